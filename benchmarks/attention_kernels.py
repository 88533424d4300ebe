"""Times the attention and convolution kernels beside their peers on one GPU, each result checked before it is timed.

    python benchmarks/attention_kernels.py [--quick] [--only NAME ...] [--output FOLDER]

Peers: `parallel_based` and `fused_chunk_based` of flash-linear-attention (the same computation), PyTorch's
scaled_dot_product_attention (FlashAttention) and compiled flex_attention; the plain PyTorch twins. A peer that is not
installed is reported as absent. Errors are norms of differences relative to the float64 twin: of the first sequence (two
heads of it), gradients included where the backward pass is timed. A wrong result of ours ends the run; a peer's is reported.
The floor is what moving all inputs and outputs once, or the arithmetic, must take at the ceilings measured in this run.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plots import plot_lines
from results_file import OURS, device_name, print_table, results_folder, row, write_results
from timing import (
    Ceilings,
    Peers,
    checked,
    forward_and_backward,
    gradients,
    measure_ceilings,
    milliseconds,
    random_inputs,
    relative_error,
    working_memory_bytes,
)

from geobased.kernels.gated_short_convolution import gated_short_convolution
from geobased.kernels.sliding_window_attention import sliding_window_attention
from geobased.kernels.taylor_linear_attention import taylor_linear_attention
from geobased.kernels.taylor_linear_attention_reference import packed_feature_count

TOKENS, HEADS, FEATURE_DIM = 65536, 16, 16
MAX_ERROR, MAX_GRADIENT_ERROR = 0.01, 0.02  # of ours: bfloat16 inputs and outputs, float32 sums
FLEX_SEQ_LENS = (2048,)  # each length is compiled anew
CHECKED_HEADS = 2

Rows = list[dict[str, Any]]
Attention = Callable[..., torch.Tensor]


def measure(
    op: str,
    case: dict[str, Any],
    implementation: str,
    function: Attention,
    leaves: Sequence[torch.Tensor],
    *,
    tokens: int,
    errors: tuple[float | None, float | None],
    floors: tuple[float | None, float | None],
    backward: bool = True,
) -> Rows:
    """Rows of the forward pass, and of forward and backward together; errors and floors are (forward, both)."""
    rows = []
    calls = [("forward", functools.partial(function, *leaves), errors[0], MAX_ERROR, floors[0])]
    if backward:
        call = forward_and_backward(function, leaves, torch.randn_like(function(*leaves)))
        calls.append(("backward", call, errors[1], MAX_GRADIENT_ERROR, floors[1]))
    for direction, call, error, limit, floor in calls:
        name = f"{op}_{direction}"
        rows.append(
            row(
                name,
                case,
                implementation,
                milliseconds=milliseconds(call),
                tokens=tokens,
                floor_milliseconds=floor,
                relative_error=checked(error, limit, implementation, name, case),
                peak_memory_bytes=working_memory_bytes(call),
            )
        )
    return rows


def sample(tensors: Sequence[torch.Tensor], heads_dim: int) -> list[torch.Tensor]:
    """First sequence and first heads of [batch, seq_len, heads, …] (heads_dim 2) or [batch, heads, seq_len, …] (1)."""
    return [x[:1].narrow(heads_dim, 0, CHECKED_HEADS) for x in tensors]


def compare(
    function: Attention,
    leaves: Sequence[torch.Tensor],
    truth: Attention,
    *,
    heads_dim: int = 2,
    backward: bool = True,
) -> tuple[float, float | None]:
    """Relative errors of output and of the worst gradient, of the sample, against `truth` in float64.

    `truth` takes and gives [batch, seq_len, heads, dim]; the whole batch runs through `function`.
    """
    order = (lambda x: x.transpose(1, 2)) if heads_dim == 1 else (lambda x: x)
    exact_leaves = [order(x).double() for x in sample(leaves, heads_dim)]
    with torch.no_grad():
        y = function(*leaves)
        error = relative_error(order(sample([y], heads_dim)[0]), truth(*exact_leaves))
    if not backward:
        return error, None
    grad = torch.randn_like(y)
    exact = gradients(truth, exact_leaves, order(sample([grad], heads_dim)[0]).double())
    found = sample(gradients(function, leaves, grad), heads_dim)
    return error, max(relative_error(order(a), b) for a, b in zip(found, exact, strict=True))


def attempt(label: str, absent: dict[str, str], run: Callable[[], Rows]) -> Rows:
    """A peer that fails is reported; what fails of ours is not caught here."""
    try:
        return run()
    except Exception as error:
        absent[label] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        torch.cuda.empty_cache()
        return []


def taylor_truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return taylor_linear_attention(q, k, v, backend="torch", **options)


def taylor_floors(ceilings: Ceilings, total: int, head_dim: int) -> tuple[float, float]:
    """Floors of the forward pass and of both: every tensor moved once; the arithmetic of packed features and states."""
    rows = packed_feature_count(FEATURE_DIM)
    elements = total * HEADS * (2 * FEATURE_DIM + 2 * head_dim)  # q, k, v, y; as many gradients
    flop = total * HEADS * 4 * rows * (head_dim + 1)  # state and output, 2 each per multiply-add
    forward = ceilings.floor_milliseconds(2 * elements, flop)
    # backward reads q, k, v, y and dy and writes dq, dk, dv
    both = ceilings.floor_milliseconds(2 * (3 * elements), 3 * flop)
    return forward, both


def flex_taylor(seq_len: int) -> Attention:
    """Softmax of log(1 + s + s^2 / 2) is Taylor attention: the same result, in quadratic time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seq_len, seq_len, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def score(s: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        return torch.log(1 + s + 0.5 * s * s)

    return functools.partial(compiled, score_mod=score, block_mask=mask)


def taylor_case(seq_len: int, head_dim: int, ceilings: Ceilings, peers: Peers, *, twin: bool = False, flex: bool = False) -> Rows:
    batch = max(1, TOKENS // seq_len)
    total = batch * seq_len
    case = {
        "batch_size": batch,
        "seq_len": seq_len,
        "num_heads": HEADS,
        "feature_dim": FEATURE_DIM,
        "head_dim": head_dim,
        "dtype": "bfloat16",
    }
    q, k, v = random_inputs(*[(batch, seq_len, HEADS, n) for n in (FEATURE_DIM, FEATURE_DIM, head_dim)])
    op, floors = "taylor_linear_attention", taylor_floors(ceilings, total, head_dim)
    candidates: list[tuple[str, Attention | None]] = [
        (OURS, functools.partial(taylor_linear_attention, backend="triton")),
    ]
    if head_dim == 64:  # a peer's first call of every width takes long: it tries many launch parameters
        for name in ("parallel_based", "fused_chunk_based"):
            candidates.append((f"fla {name}", peers.get(f"fla {name}", "fla.ops.based", name)))
    if twin:
        candidates.append(("torch", functools.partial(taylor_linear_attention, backend="torch")))
    rows: Rows = []
    for name, function in candidates:
        if function is None:
            continue
        backward = name != "torch"

        def run(name: str = name, function: Attention = function, backward: bool = backward) -> Rows:
            errors = compare(function, [q, k, v], taylor_truth, backward=backward)
            options: dict[str, Any] = {"tokens": total, "errors": errors, "floors": floors, "backward": backward}
            return measure(op, case, name, function, [q, k, v], **options)

        rows += run() if name == OURS else attempt(f"{name}, seq_len {seq_len}", peers.absent, run)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    if flex:

        def run_flex() -> Rows:
            compiled = flex_taylor(seq_len)
            errors = compare(compiled, heads_first, taylor_truth, heads_dim=1)
            options = {"tokens": total, "errors": errors, "floors": floors}
            return measure(op, case, "flex_attention", compiled, heads_first, **options)

        rows += attempt(f"flex_attention, seq_len {seq_len}", peers.absent, run_flex)
    if head_dim == 64:  # softmax attention, for scale: it computes something else
        wide = random_inputs(*[(batch, HEADS, seq_len, 64)] * 3, seed=2)
        attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        errors = compare(attend, wide, causal_truth, heads_dim=1) if seq_len <= 4096 else (None, None)
        rows += measure(op, case, "sdpa D=64", attend, wide, tokens=total, errors=errors, floors=(None, None))
    return rows


def causal_truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention in float64; its memory grows with seq_len^2."""
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)


def taylor_variants(ceilings: Ceilings, seq_len: int = 4096, head_dim: int = 64) -> Rows:
    """What a model passes besides q, k and v: states, padding, packed sequences."""
    batch = TOKENS // seq_len
    q, k, v = random_inputs(*[(batch, seq_len, HEADS, n) for n in (FEATURE_DIM, FEATURE_DIM, head_dim)])
    _, state = taylor_linear_attention(q, k, v, output_final_state=True, backend="triton")
    mask = torch.ones(batch, seq_len, device="cuda", dtype=torch.long)
    for i in range(batch):  # left padding, at most half of the row
        mask[i, : (batch - i) * seq_len // (2 * batch)] = 0
    lengths = [seq_len // 4, seq_len // 2, seq_len, 9 * seq_len // 4] * (batch // 4)
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    packed = [x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v)]
    first = {"initial_state": state[:1, :CHECKED_HEADS].double()}

    def with_state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return taylor_linear_attention(q, k, v, initial_state=state, output_final_state=True, backend="triton")[0]

    variants: list[tuple[str, Attention, list[torch.Tensor], Attention]] = [
        ("initial and final state", with_state, [q, k, v], functools.partial(taylor_truth, **first)),
        (
            "padding mask",
            functools.partial(taylor_linear_attention, attention_mask=mask, backend="triton"),
            [q, k, v],
            functools.partial(taylor_truth, attention_mask=mask[:1]),
        ),
        (
            "cu_seqlens",
            functools.partial(taylor_linear_attention, cu_seqlens=bounds, backend="triton"),
            packed,
            functools.partial(taylor_truth, cu_seqlens=bounds),
        ),
    ]
    rows: Rows = []
    for variant, function, leaves, truth in variants:
        case = {
            "batch_size": leaves[0].shape[0],
            "seq_len": leaves[0].shape[1],
            "num_heads": HEADS,
            "feature_dim": FEATURE_DIM,
            "head_dim": head_dim,
            "dtype": "bfloat16",
            "variant": variant,
        }
        rows += measure(
            "taylor_linear_attention",
            case,
            OURS,
            function,
            leaves,
            tokens=TOKENS,
            errors=compare(function, leaves, truth),
            floors=taylor_floors(ceilings, TOKENS, head_dim),
        )
    return rows


def window_case(head_dim: int, ceilings: Ceilings, peers: Peers, *, batch: int = 16, seq_len: int = 4096) -> Rows:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, op = 129, "sliding_window_attention"
    case = {
        "batch_size": batch,
        "seq_len": seq_len,
        "num_heads": HEADS,
        "head_dim": head_dim,
        "window": window,
        "dtype": "bfloat16",
    }
    q, k, v = random_inputs(*[(batch, seq_len, HEADS, head_dim)] * 3)
    total, flop = batch * seq_len, batch * seq_len * HEADS * 4 * head_dim * window
    # forward: q, k, v, y; backward: q, k, v, y, dy, dq, dk, dv and two and a half times the arithmetic
    floors = tuple(ceilings.floor_milliseconds(2 * n * q.numel(), c * flop) for n, c in ((4, 1), (12, 3.5)))
    truth = functools.partial(sliding_window_attention, window=window, backend="torch")
    ours = functools.partial(sliding_window_attention, window=window, backend="triton")
    options: dict[str, Any] = {"tokens": total, "floors": floors}
    rows = measure(op, case, OURS, ours, [q, k, v], errors=compare(ours, [q, k, v], truth), **options)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def run_flex() -> Rows:
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, seq_len, seq_len, device="cuda")
        flex = functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
        errors = compare(flex, heads_first, truth, heads_dim=1)
        return measure(op, case, "flex_attention", flex, heads_first, errors=errors, **options)

    def run_sdpa() -> Rows:
        i = torch.arange(seq_len, device="cuda")
        distance = i[:, None] - i
        masked = functools.partial(F.scaled_dot_product_attention, attn_mask=(distance >= 0) & (distance < window))
        errors = compare(masked, heads_first, truth, heads_dim=1)
        return measure(op, case, "sdpa with mask", masked, heads_first, errors=errors, **options)

    rows += attempt(f"flex_attention window, head_dim {head_dim}", peers.absent, run_flex)
    return rows + attempt(f"sdpa with mask, head_dim {head_dim}", peers.absent, run_sdpa)


def flash_case(ceilings: Ceilings, *, batch: int = 64, seq_len: int = 577, head_dim: int = 64) -> Rows:
    """The image tower's attention: full, not causal."""
    from geobased.kernels.flash_attention import flash_attention

    case = {"batch_size": batch, "seq_len": seq_len, "num_heads": HEADS, "head_dim": head_dim, "dtype": "bfloat16"}
    q, k, v = random_inputs(*[(batch, seq_len, HEADS, head_dim)] * 3)
    flop = 4 * batch * HEADS * seq_len**2 * head_dim
    floors = tuple(ceilings.floor_milliseconds(2 * n * q.numel(), c * flop) for n, c in ((4, 1), (12, 3.5)))

    def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = torch.einsum("bqhd,bkhd->bhqk", q, k) * head_dim**-0.5
        return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)

    ours = functools.partial(flash_attention, causal=False, backend="triton")
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    sdpa = F.scaled_dot_product_attention
    options: dict[str, Any] = {"tokens": batch * seq_len, "floors": floors}
    rows = measure("flash_attention", case, OURS, ours, [q, k, v], errors=compare(ours, [q, k, v], truth), **options)
    errors = compare(sdpa, heads_first, truth, heads_dim=1)
    return rows + measure("flash_attention", case, "sdpa", sdpa, heads_first, errors=errors, **options)


def convolution_case(ceilings: Ceilings, *, batch: int = 16, seq_len: int = 2048, channels: int = 2048) -> Rows:
    op = "gated_short_convolution"
    case = {"batch_size": batch, "seq_len": seq_len, "channels": channels, "dtype": "bfloat16"}
    x, gate = random_inputs((batch, seq_len, 2 * channels))[0].chunk(2, dim=-1)  # as the model's projection gives them
    (weight,) = random_inputs((channels, 3), seed=1)
    # forward: x, gate, y; backward: x, gate, dy, dx, dgate
    floors = tuple(ceilings.floor_milliseconds(2 * n * x.numel(), 0) for n in (3, 8))
    rows: Rows = []
    some = [x[:2], gate[:2], weight]
    exact_leaves = [leaf.double() for leaf in some]
    truth = functools.partial(gated_short_convolution, backend="torch")
    for backend, name in (("triton", OURS), ("torch", "torch")):
        function = functools.partial(gated_short_convolution, backend=backend)
        grad = torch.randn_like(x[:2])
        error = relative_error(function(*some), truth(*exact_leaves))
        pairs = zip(gradients(function, some, grad), gradients(truth, exact_leaves, grad.double()), strict=True)
        errors = (error, max(relative_error(a, b) for a, b in pairs))
        rows += measure(op, case, name, function, [x, gate, weight], tokens=batch * seq_len, errors=errors, floors=floors)
    return rows


def plots(rows: Rows, folder: Path) -> list[Path]:
    """Time over sequence length at 65,536 tokens, forward and with the backward pass."""
    paths = []
    for direction, title in (("forward", "forward"), ("backward", "forward and backward")):
        chosen = [
            r
            for r in rows
            if r["benchmark"] == f"taylor_linear_attention_{direction}"
            and r["case"]["head_dim"] == 64
            and "variant" not in r["case"]
            and r["implementation"] != "torch"
        ]
        series: dict[str, list[tuple[float, float]]] = {}
        for r in chosen:
            series.setdefault(r["implementation"], []).append((r["case"]["seq_len"], r["milliseconds"]))
        floor = [(r["case"]["seq_len"], r["floor_milliseconds"]) for r in chosen if r["implementation"] == OURS]
        if len(series.get(OURS, ())) < 2:
            continue
        path = folder / f"taylor_linear_attention_{direction}.png"
        label = "tokens in a sequence (65,536 tokens in all, 16 heads, head_dim 64)"
        text = f"Taylor linear attention, {title}, {device_name()}"
        paths.append(plot_lines(path, series, title=text, xlabel=label, ylabel="milliseconds", floor=floor))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="folder for attention_kernels.json and plots (default: benchmarks/results/<gpu>)")
    parser.add_argument("--quick", action="store_true", help="few sizes; prints, and writes only with --output")
    names = ("taylor_linear_attention", "variants", "sliding_window_attention", "flash_attention", "gated_short_convolution")
    parser.add_argument("--only", nargs="+", choices=names, help="some kernels; prints, and writes only with --output")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    wanted, quick = arguments.only or names, arguments.quick
    ceilings, peers, rows = measure_ceilings(), Peers(), []
    print(f"{device_name()}: copy {ceilings.copy_tb_per_s:.2f} TB/s, matmul {ceilings.matmul_tflop_per_s:.0f} TFLOP/s")

    partial = quick or bool(arguments.only)
    folder = Path(arguments.output) if arguments.output else None if partial else results_folder()

    def add(name: str, case: Callable[[], Rows]) -> None:
        if name in wanted:
            start = time.perf_counter()
            found = case()
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            print_table(found)
            print(f"  ({name}: {time.perf_counter() - start:.0f} s with compilation)", flush=True)
            rows.extend(found)
            if folder is not None:
                write_results("attention_kernels", rows, folder, ceilings=ceilings.as_dict(), absent=peers.absent)

    for seq_len in (2048, 65536) if quick else (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        for head_dim in (64,) if quick else (64, 112):
            options = {"twin": seq_len == 2048, "flex": not quick and head_dim == 64 and seq_len in FLEX_SEQ_LENS}
            add("taylor_linear_attention", functools.partial(taylor_case, seq_len, head_dim, ceilings, peers, **options))
    add("variants", functools.partial(taylor_variants, ceilings))
    for head_dim in (64,) if quick else (64, 112):
        add("sliding_window_attention", functools.partial(window_case, head_dim, ceilings, peers))
    add("flash_attention", functools.partial(flash_case, ceilings))
    add("gated_short_convolution", functools.partial(convolution_case, ceilings))
    peers.report()
    if folder is None:
        print("not written: a part of the cases (--output FOLDER writes it anyway)")
        return
    path = write_results("attention_kernels", rows, folder, ceilings=ceilings.as_dict(), absent=peers.absent)
    print("written to", *[path, *plots(rows, folder)])


if __name__ == "__main__":
    main()
