"""Times the ops of one decoding step beside their peers on one GPU, each result checked before it is timed.

    python benchmarks/decode.py [--quick] [--only NAME ...] [--output FOLDER]

Every op runs in a CUDA graph over the buffers of several layers, so that the L2 cache does not hold what is read; the time is
that of one call. Linear attention: a step with 16 of 32 tokens waiting, and a 32nd of the fold. Peers: the same kernel family
with a float32 state that is rewritten at every token, PyTorch's scaled_dot_product_attention over the ring (with the rotary
embedding and the update of the ring that it needs), and the plain PyTorch twins, which run without a graph (some take tables from
the host). Errors are relative to float64, of the first two sequences, over more tokens than can wait and more than a window
holds. The floor is what reading and writing every input and output once takes at the copy rate measured in this run.
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
from timing import Ceilings, checked, measure_ceilings, random_inputs, relative_error

from geobased.kernels.gated_short_convolution_ring_step import gated_short_convolution_ring_step
from geobased.kernels.gated_short_convolution_step import gated_short_convolution_step
from geobased.kernels.sliding_window_attention_step import sliding_window_attention_step
from geobased.kernels.sliding_window_attention_step_reference import rotate
from geobased.kernels.taylor_linear_attention import taylor_linear_attention_step
from geobased.kernels.taylor_linear_attention_decode import (
    DeferredTaylorState,
    make_deferred_state,
    taylor_linear_attention_deferred_step,
    taylor_linear_attention_fold,
)
from geobased.kernels.taylor_linear_attention_reference import packed_feature_count, taylor_linear_attention_reference

REWRITTEN = "geobased, state rewritten each token"
HEADS, FEATURE_DIM, CAPACITY, WINDOW, CHANNELS, KERNEL = 16, 16, 32, 129, 3584, 3  # BASED 1.3B
BATCHES, HEAD_DIMS = (1, 32, 128, 512, 1024), (112, 64)
CHECKED = 2  # sequences
MAX_ERROR = 0.01  # of ours: bfloat16 inputs and outputs
MIN_BYTES = 300e6  # of distinct buffers in one graph: several times the L2 cache

Rows = list[dict[str, Any]]
Calls = Sequence[Callable[[], Any]]


def graph_milliseconds(calls: Calls, replays: int = 15) -> float:
    """Median time of one of `calls`, all captured in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_milliseconds(graph.replay, replays, warm_up=3) / len(calls)


def eager_milliseconds(calls: Calls, repeats: int = 5) -> float:
    """Median time of one of `calls`, launched one by one from Python."""

    def run() -> None:
        for call in calls:
            call()

    return median_milliseconds(run, repeats, warm_up=1) / len(calls)


def median_milliseconds(run: Callable[[], Any], repeats: int, warm_up: int) -> float:
    times = []
    for repeat in range(warm_up + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= warm_up:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def layers_for(num_bytes: float) -> int:
    return max(3, min(128, int(MIN_BYTES / num_bytes)))


IMPLEMENTATIONS = ((OURS, "triton", graph_milliseconds), ("torch", "torch", eager_milliseconds))


def number(value: int) -> torch.Tensor:
    return torch.full([1], value, dtype=torch.int32, device="cuda")


def linear_attention_inputs(batch: int, head_dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k [batch, heads, feature_dim] and v [batch, heads, head_dim], views of one projection as in the model."""
    widths = [HEADS * FEATURE_DIM, HEADS * FEATURE_DIM, HEADS * head_dim]
    (projected,) = random_inputs((batch, sum(widths)), seed=seed)
    q, k, v = (x.view(batch, HEADS, -1) for x in projected.split(widths, dim=-1))
    return q, k, v


def linear_attention_error(
    state: DeferredTaylorState, running: torch.Tensor, head_dim: int, backend: str, tokens: int = 2 * CAPACITY + 3
) -> float:
    """Worst relative error over some tokens, folds included; `running` is the float64 state of the first sequences."""
    count, running, worst, batch = number(0), running.clone(), 0.0, state.high.shape[0]
    for token in range(tokens):
        q, k, v = linear_attention_inputs(batch, head_dim, seed=token)
        truth = taylor_linear_attention_step(*(x[:CHECKED].double() for x in (q, k, v)), running, backend="torch")
        y = taylor_linear_attention_deferred_step(q, k, v, state, count, backend=backend)
        worst = max(worst, relative_error(y[:CHECKED], truth))
        count += 1
        if (token + 1) % CAPACITY == 0:
            taylor_linear_attention_fold(state, count, backend=backend)
            count.zero_()
    return worst


def linear_attention_case(ceilings: Ceilings, batch: int, head_dim: int, state_dtype: torch.dtype) -> Rows:
    benchmark = "taylor_linear_attention_decode"
    case = {
        "batch_size": batch,
        "num_heads": HEADS,
        "feature_dim": FEATURE_DIM,
        "head_dim": head_dim,
        "dtype": "bfloat16",
        "state_dtype": str(state_dtype).removeprefix("torch."),
    }
    rows, entry_bytes = packed_feature_count(FEATURE_DIM), torch.finfo(state_dtype).bits // 8
    k, v = random_inputs((CHECKED, 64, HEADS, FEATURE_DIM), (CHECKED, 64, HEADS, head_dim))
    _, running = taylor_linear_attention_reference(k.double(), k.double(), v.double(), output_final_state=True)
    running = running[:batch]
    start = running.float().repeat(-(-batch // CHECKED), 1, 1, 1)[:batch]
    pairs = batch * HEADS
    state_bytes = pairs * rows * head_dim * entry_bytes
    token_bytes = 2 * (FEATURE_DIM + head_dim)  # one key and one value
    step_bytes = state_bytes + pairs * (rows * 4 + 18 * token_bytes + 2 * (FEATURE_DIM + 2 * head_dim))
    fold_bytes = pairs * (16 * rows * head_dim // 2 + 8 * rows + CAPACITY * token_bytes)  # either state: 4 bytes in, 4 out
    floor = ceilings.floor_milliseconds(step_bytes + fold_bytes / CAPACITY, 0)

    layers = layers_for(state_bytes)
    make = functools.partial(make_deferred_state, start, capacity=CAPACITY, dtype=state_dtype, input_dtype=torch.bfloat16)
    states, inputs = [make() for _ in range(layers)], [linear_attention_inputs(batch, head_dim, seed=n) for n in range(layers)]
    waiting, full = number(CAPACITY // 2), number(CAPACITY)
    for state in states:
        state.recent_k.normal_()
        state.recent_v.normal_()
    result = []
    for implementation, backend, timed in IMPLEMENTATIONS:
        error = linear_attention_error(make(), running, head_dim, backend)
        checked(error, MAX_ERROR, implementation, benchmark, case)
        step = functools.partial(taylor_linear_attention_deferred_step, backend=backend)
        fold = functools.partial(taylor_linear_attention_fold, backend=backend)
        some = layers if backend == "triton" else min(layers, 8)
        steps = timed([functools.partial(step, *x, s, waiting) for x, s in zip(inputs[:some], states, strict=False)])
        folds = timed([functools.partial(fold, s, full) for s in states[:some]])
        result.append(
            row(
                benchmark,
                case,
                implementation,
                milliseconds=steps + folds / CAPACITY,
                tokens=batch,
                floor_milliseconds=floor,
                relative_error=error,
                step_milliseconds=steps,
                fold_milliseconds=folds,
            )
        )
    del states, make
    q, k, v = linear_attention_inputs(batch, head_dim)
    exact = running.clone()
    truth = taylor_linear_attention_step(*(x[:CHECKED].double() for x in (q, k, v)), exact, backend="torch")
    error = relative_error(taylor_linear_attention_step(q, k, v, start.clone(), backend="triton")[:CHECKED], truth)
    rewritten = [start.clone() for _ in range(min(layers, layers_for(start.nbytes)))]
    step = functools.partial(taylor_linear_attention_step, backend="triton")
    milliseconds = graph_milliseconds([functools.partial(step, *x, s) for x, s in zip(inputs, rewritten, strict=False)])
    result.append(row(benchmark, case, REWRITTEN, milliseconds=milliseconds, tokens=batch, relative_error=error))
    return result


def torch_window_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    _: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """What plain PyTorch does for one token of a full ring."""
    ring_k.index_copy_(2, slots, rotate(k, cos, sin).unsqueeze(2))
    ring_v.index_copy_(2, slots, v.unsqueeze(2))
    return F.scaled_dot_product_attention(rotate(q, cos, sin).unsqueeze(2), ring_k, ring_v).squeeze(2)


def window_inputs(batch: int, head_dim: int, seed: int = 0) -> list[torch.Tensor]:
    (projected,) = random_inputs((batch, 3 * HEADS * head_dim), seed=seed)
    return [x.view(batch, HEADS, head_dim) for x in projected.chunk(3, dim=-1)]


def window_attention_case(ceilings: Ceilings, batch: int, head_dim: int) -> Rows:
    benchmark = "sliding_window_attention_decode"
    case = {"batch_size": batch, "num_heads": HEADS, "head_dim": head_dim, "window": WINDOW, "dtype": "bfloat16"}
    angles = torch.rand(1, head_dim // 2, device="cuda").mul(6).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    ring_bytes = 2 * 2 * batch * HEADS * WINDOW * head_dim
    floor = ceilings.floor_milliseconds(ring_bytes + 2 * 4 * batch * HEADS * head_dim, 0)
    layers = layers_for(ring_bytes)
    rings = [random_inputs(*[(batch, HEADS, WINDOW, head_dim)] * 2, seed=n) for n in range(layers)]
    inputs = [window_inputs(batch, head_dim, seed=n) for n in range(layers)]
    position = number(10 * WINDOW + 5)
    triton, twin = (functools.partial(sliding_window_attention_step, backend=b, cos=cos, sin=sin) for b in ("triton", "torch"))
    sdpa = functools.partial(torch_window_step, cos=cos, sin=sin, slots=(position % WINDOW).long())
    result = []
    steps = ((OURS, triton, graph_milliseconds), ("sdpa", sdpa, graph_milliseconds), ("torch", twin, eager_milliseconds))
    for implementation, step, timed in steps:
        ring_k, ring_v = (x.clone() for x in rings[0])
        exact = [x[:CHECKED].double() for x in (ring_k, ring_v)]
        worst = 0.0
        for token in range(3 if implementation == "sdpa" else WINDOW + 3):
            now = position if implementation == "sdpa" else number(token)
            q, k, v = window_inputs(batch, head_dim, seed=token)
            # keys are rounded when they are stored: so are the truth's, or its ring would hold other keys
            turned = [rotate(x[:CHECKED], cos, sin).double() for x in (q, k)]
            truth = sliding_window_attention_step(*turned, v[:CHECKED].double(), *exact, now, backend="torch")
            worst = max(worst, relative_error(step(q, k, v, ring_k, ring_v, now)[:CHECKED], truth))
        checked(worst, MAX_ERROR, implementation, benchmark, case)
        some = min(layers, 8) if implementation == "torch" else layers
        calls = [functools.partial(step, *x, *r, position) for x, r in zip(inputs[:some], rings, strict=False)]
        result.append(
            row(
                benchmark,
                case,
                implementation,
                milliseconds=timed(calls),
                tokens=batch,
                floor_milliseconds=floor,
                relative_error=worst,
            )
        )
    return result


def convolution_case(ceilings: Ceilings, batch: int) -> Rows:
    benchmark = "gated_short_convolution_decode"
    case = {"batch_size": batch, "channels": CHANNELS, "kernel": KERNEL, "dtype": "bfloat16"}
    # read: x, gate and all older inputs; written: y and the new input
    floor = ceilings.floor_milliseconds(2 * CHANNELS * (batch * (3 + KERNEL) + KERNEL), 0)
    layers = layers_for(2 * batch * CHANNELS * (3 + KERNEL))
    weight, *rings = random_inputs((CHANNELS, KERNEL), *[(batch, KERNEL, CHANNELS)] * layers)
    halves = [x.chunk(2, dim=-1) for x in random_inputs(*[(batch, 2 * CHANNELS)] * layers, seed=1)]
    position = number(10 * KERNEL + 1)
    result = []
    for implementation, backend, timed in IMPLEMENTATIONS:
        step = functools.partial(gated_short_convolution_ring_step, backend=backend)
        ring, worst = torch.zeros_like(rings[0]), 0.0
        exact = torch.zeros(min(batch, CHECKED), CHANNELS, KERNEL, dtype=torch.float64, device="cuda")
        for token in range(KERNEL + 2):
            x, gate = halves[token % layers]
            inputs = [x[:CHECKED].double(), gate[:CHECKED].double(), weight.double(), exact]
            truth = gated_short_convolution_step(*inputs, backend="torch")
            worst = max(worst, relative_error(step(x, gate, weight, ring, number(token))[:CHECKED], truth))
        checked(worst, MAX_ERROR, implementation, benchmark, case)
        calls = [functools.partial(step, *x, weight, ring, position) for x, ring in zip(halves, rings, strict=True)]
        result.append(
            row(
                benchmark,
                case,
                implementation,
                milliseconds=timed(calls),
                tokens=batch,
                floor_milliseconds=floor,
                relative_error=worst,
            )
        )
    return result


def cases(ceilings: Ceilings, quick: bool) -> dict[str, list[Callable[[], Rows]]]:
    batches, head_dims = ((1, 128), (112,)) if quick else (BATCHES, HEAD_DIMS)
    shapes = [(batch, head_dim) for head_dim in head_dims for batch in (batches if head_dim == head_dims[0] else (128,))]
    dtypes = (torch.bfloat16, torch.float32)
    linear = functools.partial(linear_attention_case, ceilings)
    window = functools.partial(window_attention_case, ceilings)
    return {
        "taylor_linear_attention": [functools.partial(linear, *shape, dtype) for dtype in dtypes for shape in shapes],
        "sliding_window_attention": [functools.partial(window, *shape) for shape in shapes],
        "gated_short_convolution": [functools.partial(convolution_case, ceilings, batch) for batch in batches],
    }


def print_shares(rows: Rows) -> None:
    """How near to the floor ours comes."""
    for r in rows:
        if r["implementation"] == OURS:
            share = r["floor_milliseconds"] / r["milliseconds"]
            parts = [
                f"{name} {r[f'{name}_milliseconds'] * 1e3:.1f} us" for name in ("step", "fold") if f"{name}_milliseconds" in r
            ]
            values = " ".join(f"{key}={value}" for key, value in r["case"].items())
            line = f"{r['benchmark']} {values}: {r['milliseconds'] * 1e3:.1f} us"
            print(f"{line}, floor {r['floor_milliseconds'] * 1e3:.1f} us, share {share:.0%} {' '.join(parts)}")


def plot(rows: Rows, folder: Path) -> Path:
    """Linear attention at the largest head_dim: milliseconds over the batch size."""
    width = max(HEAD_DIMS)
    lines: dict[str, list[tuple[float, float]]] = {}
    floor = []
    for r in rows:
        case = r["case"]
        if r["benchmark"] != "taylor_linear_attention_decode" or case["head_dim"] != width:
            continue
        point = (case["batch_size"], r["milliseconds"])
        if r["implementation"] == OURS:
            lines.setdefault(OURS if case["state_dtype"] == "bfloat16" else f"{OURS}, float32 state", []).append(point)
        elif case["state_dtype"] == "bfloat16":
            lines.setdefault("state rewritten" if r["implementation"] == REWRITTEN else r["implementation"], []).append(point)
        if r["implementation"] == OURS and case["state_dtype"] == "bfloat16":
            floor.append((case["batch_size"], r["floor_milliseconds"]))
    title = f"One token of Taylor linear attention ({device_name()})"
    path = folder / "decode.png"
    plot_lines(path, lines, title=title, xlabel="sequences", ylabel="milliseconds per layer", floor=floor)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batches 1 and 128, head_dim 112; no plot")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="taylor_linear_attention, sliding_window_attention, …")
    parser.add_argument("--output", type=Path, help="folder for decode.json and decode.png (default: results/<gpu>)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode.py times kernels on a CUDA device, and there is none here", file=sys.stderr)
        return 1
    started = time.perf_counter()
    ceilings = measure_ceilings()
    rows: Rows = []
    folder = arguments.output or results_folder()
    with torch.inference_mode():
        for name, group in cases(ceilings, arguments.quick).items():
            if arguments.only is None or name in arguments.only:
                for case in group:
                    found = case()
                    print_table(found)
                    rows += found
                    write_results("decode", rows, folder, ceilings=ceilings.as_dict())
                    torch.cuda.empty_cache()
    print_shares(rows)
    print(write_results("decode", rows, folder, ceilings=ceilings.as_dict()))
    if not arguments.quick and arguments.only is None:
        print(plot(rows, folder))
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
