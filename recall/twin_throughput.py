"""How fast models of equal size generate, in tokens per second of a whole batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from geobased.kernels.sliding_window_attention_step import MAX_TRITON_WINDOW
from geobased.modeling_based import fast_generation
from geobased.modeling_based.configuration_based import BasedConfig
from geobased.modeling_based.fast_generation import release_generation_buffers
from geobased.modeling_based.modeling_based import BasedForCausalLM

FAST, LOOP = "CUDA graphs of geobased", "transformers' loop"
LLAMA_DYNAMIC, LLAMA_STATIC = "transformers Llama, dynamic cache", "transformers Llama, static cache, compiled"


@dataclass(frozen=True)
class GenerationSpeed:
    """Tokens of all sequences together: after the first one, whose time is that of reading the prompt, and with it."""

    tokens_per_second: float
    end_to_end_tokens_per_second: float
    peak_memory_bytes: int | None


def equal_llama(num_parameters: int, config: BasedConfig, length: int) -> LlamaConfig:
    """A Llama as wide and deep as `config`, whose MLPs make up for the number of parameters."""
    width, layers = config.hidden_size, config.num_hidden_layers
    attention, norms = 4 * width * config.num_attention_heads * (config.head_dim or 0), 2 * width
    left = num_parameters - config.vocab_size * width - width - layers * (attention + norms)
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=max(8, round(left / (3 * width * layers) / 8) * 8),
        num_hidden_layers=layers,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def random_model(config: BasedConfig | LlamaConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose random weights do for timing: it writes as fast as a trained one, since nothing ends its sequences."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else BasedForCausalLM(config)
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = config.pad_token_id
    return model


def generation_speed(
    model: PreTrainedModel, batch_size: int, prompt_length: int, new_tokens: int, *, static_cache: bool = False
) -> GenerationSpeed:
    """Greedy decoding of `new_tokens` tokens after random prompts, the better of two runs after one that warms up.

    Raises:
        ValueError: fewer than two new tokens.
        RuntimeError: more tokens took no longer than the first, on a busy machine.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens={new_tokens} must be at least 2: the first comes with the prompt, whose time is subtracted")
    device = model.device
    ids = torch.randint(2, model.config.vocab_size, (batch_size, prompt_length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    mask = torch.ones_like(ids)

    def run(length: int, **arguments: Any) -> None:
        output = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, **arguments)
        if output.shape != (batch_size, prompt_length + length):
            raise RuntimeError(f"generate returned {tuple(output.shape)}, not {length} new tokens")

    def whole() -> None:
        run(new_tokens, **({"cache_implementation": "static"} if static_cache else {}))

    # with a static cache each length would be compiled anew: its prompt is timed with the dynamic one
    run(1)
    whole()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    short = min(_seconds(lambda: run(1), device) for _ in range(2))
    long = min(_seconds(whole, device) for _ in range(2))
    if long <= short:
        raise RuntimeError(f"{new_tokens} tokens took {long:.3g} s, and the first alone {short:.3g} s: time more tokens")
    return GenerationSpeed(
        tokens_per_second=batch_size * (new_tokens - 1) / (long - short),
        end_to_end_tokens_per_second=batch_size * new_tokens / long,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def based_speeds(
    config: BasedConfig, batch_size: int, prompt_length: int, new_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, GenerationSpeed]:
    """Speeds of a BASED model or a twin of it, by the loop that generates.

    Windows that cover the whole sequence, as in the attention twin, are also timed in transformers' loop, where PyTorch's
    attention reads the keys there are, and the faster of the two counts.
    """
    loops = [LOOP]
    if device.type == "cuda":
        full_attention = "sliding_attention" in config.mixers and config.sliding_window >= prompt_length + new_tokens  # type: ignore[operator]
        # beyond, the step's kernel gives way to its plain form, which is slower than the other loop
        loops = [FAST] if not full_attention else [FAST, LOOP] if config.sliding_window <= MAX_TRITON_WINDOW else [LOOP]
    speeds = {}
    for loop in loops:
        model = random_model(config, device, dtype)
        model.fast_generation = loop == FAST
        speeds[loop] = generation_speed(model, batch_size, prompt_length, new_tokens)
        if loop == FAST and model not in fast_generation._steps:
            raise RuntimeError("generate did not run as CUDA graphs, and the reason is in transformers' log at level INFO")
        release_generation_buffers(model)
    return speeds


def llama_speeds(
    config: LlamaConfig,
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> dict[str, GenerationSpeed]:
    """Speeds of transformers' Llama by its cache; `compiled` adds the static cache, which transformers compiles on a GPU."""
    model = random_model(config, device, dtype)
    speeds = {LLAMA_DYNAMIC: generation_speed(model, batch_size, prompt_length, new_tokens)}
    if compiled:
        speeds[LLAMA_STATIC] = generation_speed(model, batch_size, prompt_length, new_tokens, static_cache=True)
    return speeds


__all__ = [
    "FAST",
    "LLAMA_DYNAMIC",
    "LLAMA_STATIC",
    "LOOP",
    "GenerationSpeed",
    "based_speeds",
    "equal_llama",
    "generation_speed",
    "llama_speeds",
    "random_model",
]
