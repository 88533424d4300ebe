"""Times the kernels beside their peers on one GPU, after checking each result against float64.

    python benchmarks/bench_kernels.py [--output FOLDER] [--quick]

Peers: the plain PyTorch twins, PyTorch's scaled_dot_product_attention (full causal attention, for scale), compiled
flex_attention (the same window), and flash-linear-attention where it is installed.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton.testing
from results_file import print_table, row, write_results

from geobased.kernels.gated_short_convolution import gated_short_convolution
from geobased.kernels.sliding_window_attention import sliding_window_attention
from geobased.kernels.taylor_linear_attention import taylor_linear_attention, taylor_linear_attention_step
from geobased.kernels.taylor_linear_attention_reference import packed_feature_count

COPY_TB_PER_S = 4.27  # measured device-to-device copy on an H200, bytes read plus bytes written
MATMUL_TFLOP_PER_S = 740.0  # measured 8192^3 bf16 product on an H200


def floor_ms(num_bytes: float, flop: float) -> float:
    return max(num_bytes / (COPY_TB_PER_S * 1e9), flop / (MATMUL_TFLOP_PER_S * 1e9))


def milliseconds(function: Callable[[], Any]) -> float:
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def inputs(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]


def with_backward(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], None]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    grad = torch.randn_like(function(*leaves))

    def run() -> None:
        function(*leaves).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def taylor_case(seq_len: int, head_dim: int, tokens: int = 65536, heads: int = 16, d: int = 16) -> list[dict[str, Any]]:
    batch = max(1, tokens // seq_len)
    case = {
        "batch_size": batch,
        "seq_len": seq_len,
        "num_heads": heads,
        "feature_dim": d,
        "head_dim": head_dim,
        "dtype": "bfloat16",
    }
    q, k = inputs((batch, seq_len, heads, d), (batch, seq_len, heads, d))
    (v,) = inputs((batch, seq_len, heads, head_dim), seed=1)
    # the error is that of one sequence: float64 on all of them would take longer than everything else
    one = [x[:1].double() for x in (q, k, v)]
    truth = taylor_linear_attention(*one, backend="torch") if seq_len <= 4096 else None
    y = taylor_linear_attention(q, k, v, backend="triton")
    error = relative_error(y[:1], truth) if truth is not None else None
    total = batch * seq_len
    rows = packed_feature_count(d)
    forward_floor = floor_ms(2 * total * heads * (2 * d + 2 * head_dim), total * heads * 4 * rows * (head_dim + 1))
    result = [
        row(
            "taylor_linear_attention_forward",
            case,
            "geobased",
            milliseconds=milliseconds(lambda: taylor_linear_attention(q, k, v, backend="triton")),
            tokens=total,
            floor_milliseconds=forward_floor,
            relative_error=error,
        )
    ]
    # forward and backward together, as a training step pays for them
    ours = with_backward(functools.partial(taylor_linear_attention, backend="triton"), [q, k, v])
    result.append(
        row(
            "taylor_linear_attention_backward",
            case,
            "geobased",
            milliseconds=milliseconds(ours),
            tokens=total,
            floor_milliseconds=3 * forward_floor,
        )
    )
    if seq_len <= 4096:
        twin = taylor_linear_attention(q[:1], k[:1], v[:1], backend="torch")
        assert truth is not None
        result.append(
            row(
                "taylor_linear_attention_forward",
                case,
                "torch",
                milliseconds=milliseconds(lambda: taylor_linear_attention(q, k, v, backend="torch")),
                tokens=total,
                relative_error=relative_error(twin, truth),
            )
        )
    heads_first = [x.transpose(1, 2).contiguous() for x in inputs(*[(batch, seq_len, heads, 64)] * 3, seed=2)]
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    result += [
        row(
            "taylor_linear_attention_forward",
            case,
            "sdpa D=64",
            milliseconds=milliseconds(lambda: attend(*heads_first)),
            tokens=total,
        ),
        row(
            "taylor_linear_attention_backward",
            case,
            "sdpa D=64",
            milliseconds=milliseconds(with_backward(attend, heads_first)),
            tokens=total,
        ),
    ]
    return result


def decode_case(batch: int, head_dim: int = 112, heads: int = 16, d: int = 16) -> list[dict[str, Any]]:
    case = {"batch_size": batch, "num_heads": heads, "feature_dim": d, "head_dim": head_dim, "dtype": "bfloat16"}
    q, k = inputs((batch, heads, d), (batch, heads, d))
    (v,) = inputs((batch, heads, head_dim), seed=1)
    _, state = taylor_linear_attention(
        *(x.unsqueeze(1).expand(-1, 64, -1, -1).contiguous() for x in (q, k, v)), output_final_state=True, backend="triton"
    )
    copy = state.double()
    truth = taylor_linear_attention_step(q.double(), k.double(), v.double(), copy, backend="torch")
    fresh = state.clone()
    error = relative_error(taylor_linear_attention_step(q, k, v, fresh, backend="triton"), truth)
    result = []
    for backend, name in (("triton", "geobased"), ("torch", "torch")):
        step = functools.partial(taylor_linear_attention_step, q, k, v, fresh, backend=backend)
        result.append(
            row(
                "taylor_linear_attention_decode",
                case,
                name,
                milliseconds=milliseconds(step),
                tokens=batch,
                floor_milliseconds=floor_ms(2 * state.numel() * 4, 0),
                relative_error=error if name == "geobased" else None,
            )
        )
    return result


def window_case(seq_len: int, batch: int, head_dim: int, window: int, heads: int = 16) -> list[dict[str, Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = {
        "batch_size": batch,
        "seq_len": seq_len,
        "num_heads": heads,
        "head_dim": head_dim,
        "window": window,
        "dtype": "bfloat16",
    }
    q, k, v = inputs(*[(batch, seq_len, heads, head_dim)] * 3)
    ours = functools.partial(sliding_window_attention, window=window, backend="triton")
    truth = sliding_window_attention(*(x[:1].double() for x in (q, k, v)), window=window, backend="torch")
    total = batch * seq_len
    floor = floor_ms(2 * 4 * q.numel(), total * heads * 4 * head_dim * window)
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, seq_len, seq_len, device="cuda")
    flex = functools.partial(torch.compile(flex_attention), block_mask=mask)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    result = []
    for name, function, leaves in (("geobased", ours, [q, k, v]), ("flex_attention", flex, heads_first)):
        y = function(*leaves)
        y = y if name == "geobased" else y.transpose(1, 2)
        error = relative_error(y[:1], truth)
        for suffix, run, factor in (
            ("forward", functools.partial(function, *leaves), 1.0),
            ("backward", with_backward(function, leaves), 3.0),
        ):
            result.append(
                row(
                    f"sliding_window_attention_{suffix}",
                    case,
                    name,
                    milliseconds=milliseconds(run),
                    tokens=total,
                    floor_milliseconds=factor * floor,
                    relative_error=error,
                )
            )
    return result


def conv_case(seq_len: int, batch: int, channels: int = 2048) -> list[dict[str, Any]]:
    case = {"batch_size": batch, "seq_len": seq_len, "channels": channels, "dtype": "bfloat16"}
    (both,) = inputs((batch, seq_len, 2 * channels))
    (weight,) = inputs((channels, 3), seed=1)
    x, gate = both.chunk(2, dim=-1)
    truth = gated_short_convolution(x[:1].double(), gate[:1].double(), weight.double(), backend="torch")
    floor = floor_ms(2 * 3 * x.numel(), 0)
    result = []
    for backend, name in (("triton", "geobased"), ("torch", "torch")):
        function = functools.partial(gated_short_convolution, backend=backend)
        error = relative_error(function(x, gate, weight)[:1], truth)
        for suffix, run, factor in (
            ("forward", functools.partial(function, x, gate, weight), 1.0),
            ("backward", with_backward(function, [x.contiguous(), gate.contiguous(), weight]), 2.67),
        ):
            result.append(
                row(
                    f"gated_short_convolution_{suffix}",
                    case,
                    name,
                    milliseconds=milliseconds(run),
                    tokens=batch * seq_len,
                    floor_milliseconds=factor * floor,
                    relative_error=error,
                )
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="folder for kernels.json (default: benchmarks/results/<gpu>)")
    parser.add_argument("--quick", action="store_true", help="few sizes only")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seq_len in (2048,) if arguments.quick else (1024, 2048, 4096, 16384, 65536):
        for head_dim in (64, 112):
            rows += taylor_case(seq_len, head_dim)
    for batch in (128,) if arguments.quick else (1, 128, 1024):
        rows += decode_case(batch)
    for head_dim in (64,) if arguments.quick else (64, 112):
        rows += window_case(4096, 16, head_dim, 129)
    rows += conv_case(2048, 16)
    print_table(rows)
    print("written to", write_results("kernels", rows, arguments.output))


if __name__ == "__main__":
    main()
