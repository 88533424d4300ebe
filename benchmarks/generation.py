"""Times `generate` of BASED models beside other models of equal size on one GPU.

    python benchmarks/generation.py [--quick] [--output FOLDER]

Every model has random bfloat16 weights and decodes greedily after a prompt of 64 random tokens. A row is the time of one step:
the difference between two lengths, divided by their difference (`new_tokens`), so that reading the prompt does not count; under
torch.compile, where each length would be compiled anew, it is the time of one call divided by its tokens. Peers that need 50 ms
and more for a step are timed over fewer tokens than ours. One more row reads a prompt of a million tokens.

Before anything is timed, tokens of a small float32 model must be those of transformers' own loop, and `relative_error` is that
of the large model's logits, fed given tokens one by one, against its float32 form. The floor is reading the weights once and each
sequence's states once, at the measured speed of memory, or the products at the measured speed of matrix products.

Peers: transformers' loop around our model, transformers' Llama with its default cache and with a static cache under
torch.compile (not with `--quick`), and flash-linear-attention's Gated DeltaNet.
"""

import argparse
import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plots import plot_lines
from results_file import OURS, print_table, results_folder, row, write_results
from timing import Ceilings, Peers, measure_ceilings, relative_error
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from geobased import BasedConfig, BasedForCausalLM
from geobased.kernels.taylor_linear_attention_reference import packed_feature_count
from geobased.modeling_based import fast_generation

PROMPT, LONG_PROMPT = 64, 1_000_000
OUR_LOOP = "geobased, transformers' loop"
LLAMA, COMPILED, DELTANET = "transformers Llama", "transformers Llama, compiled", "fla Gated DeltaNet"
LLAMA_SIZES = {
    "360m": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16),
    "1.3b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16),
}
# implementation -> size -> {batch size: new tokens that are timed}
FULL = {
    OURS: {"1.3b": {1: 1024, 32: 512, 128: 1024, 512: 256, 1024: 256, 2048: 256}},
    LLAMA: {"1.3b": {1: 32, 128: 32, 512: 32}},
    COMPILED: {"1.3b": {128: 128}},
    DELTANET: {"1.3b": {1: 24, 128: 24}},
    OUR_LOOP: {"1.3b": {1: 24, 128: 24}},
}
QUICK = {
    OURS: {"1.3b": {1: 256, 128: 512, 512: 128, 1024: 64}},
    OUR_LOOP: {"1.3b": {128: 24}},
    LLAMA: {"1.3b": {1: 32, 128: 32}},
    DELTANET: {"1.3b": {128: 24}},
}


def build(implementation: str, size: str, peers: Peers) -> PreTrainedModel | None:
    """A model with random weights, or None if a peer is not there."""
    torch.manual_seed(0)
    if implementation == DELTANET:
        config_class = peers.get(DELTANET, "fla.models", "GatedDeltaNetConfig")
        model_class = peers.get(DELTANET, "fla.models", "GatedDeltaNetForCausalLM")
        if config_class is None or model_class is None:
            return None
        config = config_class(hidden_size=2048, num_hidden_layers=21, vocab_size=50264, tie_word_embeddings=True)
    elif implementation in (LLAMA, COMPILED):
        model_class = LlamaForCausalLM
        config = LlamaConfig(vocab_size=50264, tie_word_embeddings=True, attn_implementation="sdpa", **LLAMA_SIZES[size])
    else:
        model_class, config = BasedForCausalLM, BasedConfig.based_1b() if size == "1.3b" else BasedConfig.based_360m()
    with torch.device("cuda"):
        model = model_class(config)
    model = model.to(torch.bfloat16).eval()
    # an id that a BASED model never picks: its rows are looked at for their end, and never end
    model.generation_config.eos_token_id = 50263 if implementation == OURS else None
    model.generation_config.pad_token_id = 50256
    if implementation == OUR_LOOP:
        model.fast_generation = False
    return model


def seconds(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: PreTrainedModel, batch_size: int, new_tokens: int, **arguments: Any) -> dict[str, float]:
    """-> milliseconds of a step, tokens per second of the whole call with its prompt, and the highest memory allocated."""
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(1, 50000, (batch_size, PROMPT), device="cuda", generator=generator)
    arguments |= {"attention_mask": torch.ones_like(ids), "do_sample": False}

    def run(length: int) -> None:
        output = model.generate(ids, max_new_tokens=length, **arguments)
        if output.shape != (batch_size, PROMPT + length):
            raise RuntimeError(f"generate returned {tuple(output.shape)}, not {length} new tokens")

    short, long = 8, 8 + new_tokens
    if arguments.get("cache_implementation") == "static":
        short, long = 0, new_tokens
    run(short or long)  # captures, or compiles
    torch.cuda.reset_peak_memory_stats()
    times = [(seconds(lambda: run(short)) if short else 0.0, seconds(lambda: run(long))) for _ in range(2)]
    first, whole = min(t for t, _ in times), min(t for _, t in times)
    return {
        "milliseconds": (whole - first) / (long - short) * 1e3,
        "end_to_end_tokens_per_second": batch_size * long / whole,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }


def read_long_prompt(model: PreTrainedModel) -> dict[str, Any]:
    """A row: one sequence whose prompt is read in pieces, so that memory does not grow with it."""
    ids = torch.randint(1, 50000, (1, LONG_PROMPT), device="cuda")
    model.generate(
        ids[:, :50_000], attention_mask=torch.ones_like(ids[:, :50_000]), max_new_tokens=2, do_sample=False
    )  # compiles
    torch.cuda.reset_peak_memory_stats()
    took = seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False))
    return row(
        "prompt",
        {"model": "1.3b", "batch_size": 1, "prompt_len": LONG_PROMPT, "dtype": "bfloat16"},
        OURS,
        milliseconds=took * 1e3,
        tokens=LONG_PROMPT,
        peak_memory_bytes=torch.cuda.max_memory_allocated(),
    )


def floor_milliseconds(config: BasedConfig, parameters: int, batch_size: int, ceilings: Ceilings) -> float:
    """Weights read once; of each sequence the linear attention states (bfloat16 sums, float32 norms) and windows read once."""
    heads, rows = config.num_attention_heads, packed_feature_count(config.feature_dim)
    per_mixer = {
        "linear_attention": heads * rows * (2 * config.head_dim + 4),
        "sliding_attention": heads * config.sliding_window * 2 * 2 * config.head_dim,
        "conv": 2 * 2 * config.conv_kernel * config.conv_dim,  # read and written
    }
    states = sum(per_mixer[mixer] for mixer in config.mixers)
    return ceilings.floor_milliseconds(2 * parameters + batch_size * states, 2 * parameters * batch_size)


def check_tokens() -> None:
    """The captured steps of a small float32 model against transformers' loop."""
    torch.manual_seed(0)
    config = BasedConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, initializer_range=0.06
    )
    model = BasedForCausalLM(config).cuda().eval()
    ids = torch.randint(1, 512, (5, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    outputs = []
    for fast in (False, True):
        model.fast_generation = fast
        arguments = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        outputs.append(model.generate(ids, max_new_tokens=150, **arguments))
    if not torch.equal(*outputs):
        raise SystemExit("the captured steps and transformers' loop give different tokens")
    if model not in fast_generation._steps:
        raise SystemExit("the captured steps did not serve the call")


@torch.no_grad()
def error_of_logits(model: PreTrainedModel, batch_size: int) -> float:
    """Relative error of the logits of 96 steps that are fed given tokens, against the float32 form of the model."""
    ids = torch.randint(1, 50000, (batch_size, PROMPT + 96), device="cuda")
    exact_model = copy.deepcopy(model).float()
    truth = exact_model(ids, use_cache=False).logits[:, PROMPT:]
    del exact_model
    model.fast_generation = "eager"  # the same kernels, one by one
    prompt = ids[:, :PROMPT]
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, return_dict_in_generate=True)
    (step,) = fast_generation._steps[model].values()
    seen: list[torch.Tensor] = []
    sample = step.sampler.sample

    def spy(logits: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return sample(logits, generated)

    step.sampler.sample = spy
    for column in ids[:, PROMPT:].T:
        step.tokens.copy_(column)
        step.replay()
        if int(step.count) == fast_generation.CAPACITY:
            step.replay_fold()
    fast_generation.release_generation_buffers(model)
    model.fast_generation = True
    return relative_error(torch.stack(seen, 1), truth)


def free() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def run(
    cases: dict[str, dict[str, dict[int, int]]],
    ceilings: Ceilings,
    peers: Peers,
    save: Callable[[list[dict[str, Any]]], Any] = lambda rows: None,
) -> list[dict[str, Any]]:
    check_tokens()
    rows = []
    for implementation, sizes in cases.items():
        for size, lengths in sizes.items():
            try:
                model = build(implementation, size, peers)
                if model is None:
                    continue
                error = error_of_logits(model, 8) if implementation == OURS else None
                for batch_size, new_tokens in lengths.items():
                    static = {"cache_implementation": "static"} if implementation == COMPILED else {}
                    measured = measure(model, batch_size, new_tokens, **static)
                    floor = None
                    if implementation == OURS:
                        floor = floor_milliseconds(model.config, model.num_parameters(), batch_size, ceilings)
                        fast_generation.release_generation_buffers(model)
                    rows.append(
                        row(
                            "generation",
                            {
                                "model": size,
                                "batch_size": batch_size,
                                "prompt_len": PROMPT,
                                "new_tokens": new_tokens,
                                "dtype": "bfloat16",
                            },
                            implementation,
                            tokens=batch_size,
                            floor_milliseconds=floor,
                            relative_error=error,
                            parameters=model.num_parameters(),
                            **measured,
                        )
                    )
                    print_table(rows[-1:])
                    save(rows)
                    torch.cuda.empty_cache()
                if implementation == OURS:
                    rows.append(read_long_prompt(model))
                    print_table(rows[-1:])
                    save(rows)
            except Exception as problem:  # a peer that fails must not take the others with it
                if implementation == OURS:
                    raise
                peers.absent[f"{implementation}, {size}"] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
            model = None
            free()
    steps = [r for r in rows if r["benchmark"] == "generation"]
    ours = {(r["case"]["model"], r["case"]["batch_size"]): r for r in steps if r["implementation"] == OURS}
    for r in steps:
        own = ours.get((r["case"]["model"], r["case"]["batch_size"]))
        if own is not None:
            r["times_slower_than_geobased"] = r["milliseconds"] / own["milliseconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few batch sizes and tokens, nothing compiled")
    parser.add_argument("--output", help="folder of the results (default: benchmarks/results/<gpu>)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    ceilings, peers = measure_ceilings(), Peers()
    folder = Path(arguments.output) if arguments.output else results_folder()

    def save(rows: list[dict[str, Any]]) -> Path:
        return write_results("generation", rows, folder, ceilings=ceilings.as_dict(), absent=peers.absent)

    rows = run(QUICK if arguments.quick else FULL, ceilings, peers, save)
    for r in rows:
        case = f"{r['case']['model']} batch {r['case']['batch_size']:<5d}{r['implementation']:30s}"
        ratio = r.get("times_slower_than_geobased")
        print(f"{case}{r['tokens_per_second']:10,.0f} tokens/s{'' if ratio is None else f'  {ratio:6.2f}x the time of ours'}")
    peers.report()
    print(save(rows))
    large = [r for r in rows if r["case"]["model"] == "1.3b" and r["benchmark"] == "generation"]
    series: dict[str, list[tuple[float, float]]] = {}
    for r in large:
        series.setdefault(r["implementation"], []).append((r["case"]["batch_size"], r["tokens_per_second"]))
    floor = [
        (r["case"]["batch_size"], r["case"]["batch_size"] / r["floor_milliseconds"] * 1e3)
        for r in large
        if r["floor_milliseconds"]
    ]
    title = "Generation, 1.3B, bfloat16, greedy"
    print(
        plot_lines(folder / "generation.png", series, title=title, xlabel="batch size", ylabel="tokens per second", floor=floor)
    )


if __name__ == "__main__":
    main()
