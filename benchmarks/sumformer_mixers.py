"""Times what lets tokens see each other: the Sumformer's sum, softmax attention, Linformer and Performer, at 1k to 64k tokens.

    python benchmarks/sumformer_mixers.py [--smoke] [--output FOLDER]

Forward and backward passes together. A core is what mixes by itself: of a Sumformer the sum over the set, or over all prefixes;
of attention what it makes of queries, keys and values. A layer is a whole block with norms and an MLP, or psi; all have equally
many parameters but for Linformer's projections along the sequence. The floor is what moving inputs, outputs and their gradients
once, or the arithmetic, must take at the ceilings measured in this run; a core may keep nothing between forward and backward for
that. Outputs are compared with the same computation in float64 before they are timed, for sequences of at most 4,096 tokens.
`--smoke` runs tiny cases, on a CPU too.
"""

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plots import plot_lines
from results_file import device_name, print_table, results_folder, row, write_results
from timing import (
    DEVICE,
    Ceilings,
    WrongResult,
    forward_and_backward,
    measure_ceilings,
    milliseconds,
    random_inputs,
    relative_error,
    working_memory_bytes,
)
from torch import nn

from geobased.modeling_sumformer import SumformerConfig
from geobased.modeling_sumformer.linformer import linformer_attention
from geobased.modeling_sumformer.mixers_sumformer import LinformerMixer, PerformerMixer, SumformerMixer
from geobased.modeling_sumformer.modeling_sumformer import SumformerBlock
from geobased.modeling_sumformer.performer import favor_attention, orthogonal_random_features

MAX_ERROR = 0.02  # bfloat16 inputs and outputs, float32 sums
LONGEST_CHECKED = 4096
COMPILED_SEQ_LENS = (1024, 8192, 65536)  # each length is compiled anew
SOFTMAX, SUMFORMER, COMPILED = "softmax (SDPA)", "Sumformer", "Sumformer, compiled"

Rows = list[dict[str, Any]]
Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of all cases: tokens in a batch, lengths, widths."""

    tokens: int = 65536
    seq_lens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    hidden_size: int = 1024
    num_heads: int = 16
    latent_size: int = 256
    keys: int = 64
    """Of Linformer."""
    features: tuple[int, ...] = (64, 256)
    """Of Performers; causal ones, which hold all pairs within chunks, have the first number alone."""


SMOKE = Sizes(tokens=256, seq_lens=(64, 128), hidden_size=32, num_heads=2, latent_size=8, keys=8, features=(8,))


@dataclass(frozen=True)
class Candidate:
    """A function to time, its inputs, what it must move (numbers of two bytes) and multiply-add (two operations each)."""

    name: str
    function: Function
    leaves: Sequence[torch.Tensor]
    elements: float
    flop: float
    truth: Function
    """The same, for inputs in float64."""


class _Sums(nn.Module):
    """In psi's place: what it would read."""

    def forward(self, x: torch.Tensor, features: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        return sums


def sum_core(hidden_size: int, causal: bool) -> nn.Module:
    """A Sumformer's mixer that sums its input as it is and gives the sums."""
    config = SumformerConfig(feature_size=1, hidden_size=hidden_size, aggregation="mean", causal=causal)
    mixer = SumformerMixer(config, layer_idx=0)
    mixer.phi, mixer.psi = nn.Identity(), _Sums()
    return mixer


def cores(seq_len: int, sizes: Sizes, causal: bool) -> list[Candidate]:
    """What mixes by itself, at one length."""
    batch, head_dim = max(1, sizes.tokens // seq_len), sizes.hidden_size // sizes.num_heads
    numbers = batch * seq_len * sizes.hidden_size
    (x,) = random_inputs((batch, seq_len, sizes.hidden_size))
    q, k, v = random_inputs(*[(batch, sizes.num_heads, seq_len, head_dim)] * 3, seed=1)
    core = sum_core(sizes.hidden_size, causal)
    # a sum over the set is one row, sums over prefixes are as many numbers as there are summands
    moved = (4 if causal else 2) * numbers
    found = [Candidate(SUMFORMER, core, [x], moved, 0, core)]
    if DEVICE == "cuda" and seq_len in COMPILED_SEQ_LENS:
        found.append(replace(found[0], name=COMPILED, function=torch.compile(core, dynamic=False)))
    softmax = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
    # q, k, v, y forwards, and backwards those, dy, dq, dk and dv, with two and a half times the arithmetic
    pairs = seq_len * (0.5 if causal else 1.0)
    found.append(Candidate(SOFTMAX, softmax, [q, k, v], 12 * numbers, 3.5 * 4 * pairs * numbers, softmax))
    for features in sizes.features[: 1 if causal else None]:
        projection = orthogonal_random_features(features, head_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        favor = functools.partial(favor_attention, projection=projection, causal=causal)
        # features of q and k, what the keys' collect and what the queries' read: 2 each
        found.append(Candidate(_performer(features), favor, [q, k, v], 12 * numbers, 3 * 8 * features * numbers, favor))
    if not causal:
        e, f = random_inputs(*[(seq_len, sizes.keys)] * 2, seed=2)

        def linformer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return linformer_attention(q, k, v, (e / seq_len**0.5).to(q), (f / seq_len**0.5).to(q))

        name = f"Linformer, {sizes.keys} keys"
        found.append(Candidate(name, linformer, [q, k, v], 12 * numbers, 3 * 8 * sizes.keys * numbers, linformer))
    return found


def _performer(features: int) -> str:
    return f"Performer, {features} features"


def layers(seq_len: int, sizes: Sizes, causal: bool) -> list[Candidate]:
    """Whole blocks at one length; the cores' arithmetic comes on top of that of the projections."""
    batch = max(1, sizes.tokens // seq_len)
    tokens = batch * seq_len
    numbers = tokens * sizes.hidden_size
    (x,) = random_inputs((batch, seq_len, sizes.hidden_size))
    sumformer = SumformerConfig(
        feature_size=1,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=sizes.num_heads,
        latent_size=sizes.latent_size,
        aggregation="mean",
        causal=causal,
    )
    softmax = sumformer.with_mixer("softmax")
    configs = {SUMFORMER: sumformer, SOFTMAX: softmax}
    extra = {SUMFORMER: 0.0, SOFTMAX: 3.5 * 4 * seq_len * (0.5 if causal else 1.0) * numbers}
    for features in sizes.features[: 1 if causal else None]:
        name = _performer(features)
        configs[name] = sumformer.with_mixer("performer", num_random_features=features)
        extra[name] = 3 * 8 * features * numbers
    if not causal:
        config = copy.deepcopy(softmax)
        config.mixer, config.linformer_size, config.max_linformer_len = "linformer", sizes.keys, seq_len
        name = f"Linformer, {sizes.keys} keys"
        configs[name], extra[name] = config, 3 * 8 * sizes.keys * numbers
    found = []
    for name, config in configs.items():
        torch.manual_seed(0)
        block = SumformerBlock(config, layer_idx=0)
        if isinstance(block.mixer, LinformerMixer | PerformerMixer):
            block.mixer.reset_parameters()
        block = block.to(DEVICE, torch.bfloat16)
        along_sequence = (".e", ".f")
        matrices = sum(p.numel() for n, p in block.named_parameters() if p.dim() == 2 and not n.endswith(along_sequence))
        elements = 4 * numbers + 3 * sum(p.numel() for p in block.parameters())
        own = Candidate(name, block, [x], elements, 6 * matrices * tokens + extra[name], copy.deepcopy(block).double())
        found.append(own)
        if name == SUMFORMER and DEVICE == "cuda" and seq_len in COMPILED_SEQ_LENS:
            found.append(replace(own, name=COMPILED, function=torch.compile(block, dynamic=False)))
    return found


def error_of(candidate: Candidate) -> float | None:
    """Relative error of the first sequence; None where it is too long for float64.

    Raises WrongResult where it is large: the times would mean nothing.
    """
    if candidate.leaves[0].shape[-2] > LONGEST_CHECKED:
        return None
    with torch.no_grad():
        first = [leaf[:1] for leaf in candidate.leaves]
        # the compiled function knows the whole batch alone
        y = candidate.function(*candidate.leaves)[:1]
        error = relative_error(y, candidate.truth(*(leaf.double() for leaf in first)))
    if not error <= MAX_ERROR:
        raise WrongResult(f"{candidate.name}: relative error {error:.2e} exceeds {MAX_ERROR}")
    return error


def measure(benchmark: str, candidate: Candidate, sizes: Sizes, ceilings: Ceilings) -> dict[str, Any]:
    """A row of one function's forward and backward pass."""
    error = error_of(candidate)
    leaves, function = list(candidate.leaves), candidate.function
    weights = list(function.parameters()) if isinstance(function, nn.Module) else []
    call = forward_and_backward(function, leaves, torch.randn_like(function(*leaves)), weights)
    seq_len = leaves[0].shape[-2]
    case = {"batch_size": leaves[0].shape[0], "seq_len": seq_len, "hidden_size": sizes.hidden_size, "dtype": "bfloat16"}
    return row(
        benchmark,
        case,
        candidate.name,
        milliseconds=milliseconds(call),
        tokens=leaves[0].shape[0] * seq_len,
        floor_milliseconds=ceilings.floor_milliseconds(2 * candidate.elements, candidate.flop),
        relative_error=error,
        peak_memory_bytes=working_memory_bytes(call),
    )


BENCHMARKS: dict[str, tuple[Callable[[int, Sizes, bool], list[Candidate]], bool]] = {
    "sumformer_cores": (cores, False),
    "sumformer_cores_causal": (cores, True),
    "sumformer_layers": (layers, False),
    "sumformer_layers_causal": (layers, True),
}


def plots(rows: Rows, folder: Path, sizes: Sizes) -> list[Path]:
    """Time over length, a figure for each benchmark."""
    paths = []
    for benchmark in BENCHMARKS:
        series: dict[str, list[tuple[float, float]]] = {}
        for r in rows:
            if r["benchmark"] == benchmark:
                series.setdefault(r["implementation"], []).append((r["case"]["seq_len"], r["milliseconds"]))
        if series:
            title = f"{benchmark.replace('_', ' ')}, forward and backward, {device_name()}"
            label = f"tokens in a sequence ({sizes.tokens:,} tokens in all, width {sizes.hidden_size:,})"
            path = folder / f"{benchmark}.png"
            paths.append(plot_lines(path, series, title=title, xlabel=label, ylabel="milliseconds"))
    return paths


def run(sizes: Sizes, folder: Path | None) -> Rows:
    """All cases; written to `folder`/results.json after each, if there is a folder."""
    ceilings, rows = measure_ceilings(), []
    absent: dict[str, str] = {}
    print(f"{device_name()}: copy {ceilings.copy_tb_per_s:.2f} TB/s, matmul {ceilings.matmul_tflop_per_s:.1f} TFLOP/s")
    for seq_len in sizes.seq_lens:
        for benchmark, (candidates, causal) in BENCHMARKS.items():
            start = time.perf_counter()
            found = []
            for candidate in candidates(seq_len, sizes, causal):
                try:
                    found.append(measure(benchmark, candidate, sizes, ceilings))
                except WrongResult:
                    raise
                except Exception as error:
                    if candidate.name != COMPILED and not isinstance(error, torch.OutOfMemoryError):
                        raise
                    absent[f"{candidate.name}, {benchmark}, {seq_len} tokens"] = type(error).__name__
                    torch.cuda.empty_cache()
            torch._dynamo.reset()
            print_table(found)
            print(f"  ({benchmark}, {seq_len}: {time.perf_counter() - start:.0f} s)", flush=True)
            rows += found
            if folder is not None:
                write_results("results", rows, folder, ceilings=ceilings.as_dict(), absent=absent)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="folder for results.json and plots (default: benchmarks/results/<gpu>/sumformer_mixers)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; prints, and writes only with --output")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.smoke:
        sys.exit("this benchmark needs a CUDA GPU; --smoke runs tiny cases on a CPU")
    default = None if arguments.smoke else results_folder() / "sumformer_mixers"
    folder = Path(arguments.output) if arguments.output else default
    sizes = SMOKE if arguments.smoke else Sizes()
    rows = run(sizes, folder)
    if folder is None:
        print("not written: tiny cases (--output FOLDER writes them anyway)")
        return
    print("written to", *[folder / "results.json", *plots(rows, folder, sizes)])


if __name__ == "__main__":
    main()
