"""Times training steps of BASED models beside transformers' Llama of equal size on one GPU.

    python benchmarks/training.py [--quick] [--compile] [--output FOLDER]

A step is forward, loss, backward and a fused AdamW step, with weights, gradients and optimizer state in bfloat16 and random
tokens. Llama runs PyTorch's scaled_dot_product_attention. Before anything is timed, loss and gradients of a small model with
Triton kernels are compared with the plain PyTorch form. The floor is 6 FLOP per parameter and token plus the token mixers' own,
at the measured speed of matrix products. `--quick` runs the 360M models alone, `--compile` adds ours under torch.compile.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plots import plot_bars
from results_file import OURS, print_table, results_folder, row, write_results
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from geobased import BasedConfig, BasedForCausalLM
from geobased.kernels.backend import use_backend
from geobased.kernels.taylor_linear_attention_reference import packed_feature_count

MATMUL_TFLOP_PER_S = 790.0  # best 8192^3 bf16 product measured on an H200
TOKENS = 16384
LENGTHS = (2048, 16384)
LARGEST_DIFFERENCE_OF_SIZE = 0.03
LLAMA = "transformers Llama, SDPA"
LLAMA_SIZES = {
    "360m": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16),
    "1.3b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16),
}


def based_config(size: str) -> BasedConfig:
    return BasedConfig.based_360m() if size == "360m" else BasedConfig.based_1b()


def llama_config(size: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50264, tie_word_embeddings=True, attn_implementation="sdpa", max_position_embeddings=16384, **LLAMA_SIZES[size]
    )


def build(size: str, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(llama_config(size)) if implementation == LLAMA else BasedForCausalLM(based_config(size))
    model = model.to(torch.bfloat16).train()
    if implementation.endswith("torch.compile"):
        model.compile()
    return model


def mixer_flop_per_token(config: BasedConfig | LlamaConfig, seq_len: int) -> float:
    """Of a forward pass, without projections: scores and sums over values."""
    if isinstance(config, LlamaConfig):
        return config.num_hidden_layers * 2 * seq_len * config.hidden_size  # half of all pairs are causal
    width = config.num_attention_heads * config.head_dim
    visible = min(config.sliding_window, seq_len)
    flop = {
        "linear_attention": 4 * config.num_attention_heads * packed_feature_count(config.feature_dim) * (config.head_dim + 1),
        "sliding_attention": 4 * visible * width,
        "conv": 2 * config.conv_kernel * config.conv_dim,
    }
    return sum(flop[mixer] for mixer in config.mixers)


def floor_milliseconds(model: PreTrainedModel, tokens: int, seq_len: int) -> float:
    flop = 6 * model.num_parameters() + 3 * mixer_flop_per_token(model.config, seq_len)
    return flop * tokens / (MATMUL_TFLOP_PER_S * 1e9)


def training_step(model: PreTrainedModel, batch_size: int, seq_len: int) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, 50257, (batch_size, seq_len), device="cuda", generator=generator)

    def step() -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(step: Callable[[], Any], steps: int) -> tuple[float, int]:
    """-> median milliseconds of a step, and the highest memory allocated during the steps."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in zip(events, events[1:], strict=False)]
    return statistics.median(times), torch.cuda.max_memory_allocated()


def check_against_plain_form() -> float:
    """Loss and gradients of a small float32 model, Triton against plain PyTorch -> the gradients' relative difference."""
    torch.manual_seed(0)
    config = BasedConfig(vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4)
    model = BasedForCausalLM(config).cuda().train()
    ids = torch.randint(0, 1000, (2, 700), generator=torch.Generator().manual_seed(1)).cuda()
    losses, gradients = [], []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            loss = model(ids, labels=ids, use_cache=False).loss
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
            losses.append(loss.item())
    error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    if not (abs(losses[0] - losses[1]) < 1e-4 * losses[1] and error < 1e-2):
        raise SystemExit(f"Triton and plain PyTorch disagree: losses {losses}, relative error of the gradients {error:.1e}")
    return error


def run(
    sizes: tuple[str, ...],
    implementations: list[str],
    steps: int,
    save: Callable[[list[dict[str, Any]]], Any] = lambda rows: None,
) -> list[dict[str, Any]]:
    error = check_against_plain_form()
    rows = []
    for size in sizes:
        parameters = {}
        for implementation in implementations:
            for seq_len in LENGTHS:
                case = {"model": size, "batch_size": TOKENS // seq_len, "seq_len": seq_len, "dtype": "bfloat16"}
                model = build(size, implementation)
                parameters[implementation] = model.num_parameters()
                milliseconds, memory = measure(training_step(model, TOKENS // seq_len, seq_len), steps)
                rows.append(
                    row(
                        "training",
                        case,
                        implementation,
                        milliseconds=milliseconds,
                        tokens=TOKENS,
                        floor_milliseconds=floor_milliseconds(model, TOKENS, seq_len),
                        relative_error=None if implementation == LLAMA else error,
                        peak_memory_bytes=memory,
                        parameters=parameters[implementation],
                    )
                )
                print_table(rows[-1:])
                save(rows)
                del model
                torch._dynamo.reset()
                gc.collect()
                torch.cuda.empty_cache()
        ours, llama = parameters[OURS], parameters[LLAMA]
        if abs(llama / ours - 1) > LARGEST_DIFFERENCE_OF_SIZE:
            raise SystemExit(f"Llama has {llama:,} parameters and ours {ours:,}: not of equal size")
    peers = {str(r["case"]): r for r in rows if r["implementation"] == LLAMA}
    for r in rows:
        r["speed_relative_to_llama"] = peers[str(r["case"])]["milliseconds"] / r["milliseconds"]
        r["memory_relative_to_llama"] = r["peak_memory_bytes"] / peers[str(r["case"])]["peak_memory_bytes"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the 360M models alone, fewer steps")
    parser.add_argument("--compile", action="store_true", help="ours under torch.compile as well")
    parser.add_argument("--output", help="folder of the results (default: benchmarks/results/<gpu>)")
    arguments = parser.parse_args()
    implementations = [OURS, LLAMA] + (["geobased, torch.compile"] if arguments.compile else [])
    folder = Path(arguments.output) if arguments.output else results_folder()

    def save(rows: list[dict[str, Any]]) -> Path:
        return write_results("training", rows, folder)

    rows = run(("360m",) if arguments.quick else ("360m", "1.3b"), implementations, 5 if arguments.quick else 10, save)
    for r in rows:
        case = f"{r['case']['model']:5s} T={r['case']['seq_len']:<6d} {r['implementation']:26s}"
        speed, memory = r["speed_relative_to_llama"], r["memory_relative_to_llama"]
        print(f"{case} {r['tokens_per_second']:9,.0f} tokens/s  {speed:5.2f}x Llama's speed  {memory:4.0%} of its memory")
    print(save(rows))
    groups = list(dict.fromkeys((r["case"]["model"], r["case"]["seq_len"]) for r in rows))
    speeds = {(r["implementation"], r["case"]["model"], r["case"]["seq_len"]): r["tokens_per_second"] for r in rows}
    print(
        plot_bars(
            folder / "training.png",
            [f"{size}, T={seq_len:,}" for size, seq_len in groups],
            {name: [speeds.get((name, *group)) for group in groups] for name in implementations},
            title="Training, bfloat16, 16,384 tokens per step",
            ylabel="tokens per second",
        )
    )


if __name__ == "__main__":
    main()
