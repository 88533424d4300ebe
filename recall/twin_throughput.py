"""How fast models of equal size generate, in tokens per second of a whole batch.

Each kind of model is timed in the ways that suit it, and the fastest counts. Full attention runs in the same CUDA graphs as
BASED, so that neither waits for Python: over a ring of keys as long as the sequence, by geobased's kernel for windows, which is
made for short ones, or by PyTorch's attention.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from geobased.kernels.rotary_embedding import rotary_embedding
from geobased.modeling_based import decode_graph, fast_generation
from geobased.modeling_based.configuration_based import BasedConfig
from geobased.modeling_based.modeling_based import BasedForCausalLM

GRAPHS, GRAPHS_SDPA, LOOP = "CUDA graphs", "CUDA graphs, PyTorch's attention", "transformers' loop"
LLAMA_DYNAMIC, LLAMA_STATIC = "transformers Llama, dynamic cache", "transformers Llama, static cache, compiled"
# beyond, PyTorch's attention is the faster one by far, and the kernel takes long to compile
KERNEL_WINDOW = 1024


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
    return LlamaConfig(  # type: ignore[call-arg]
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
    model: Any = LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else BasedForCausalLM(config)
    model = model.to(device, dtype).eval()
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

    generate: Any = model.generate

    def run(length: int, **arguments: Any) -> None:
        output = generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, **arguments)
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


def ways_to_generate(config: BasedConfig | LlamaConfig, length: int, device: torch.device, *, compiled: bool) -> list[str]:
    """Names of the ways in which a model's generation up to `length` tokens is timed.

    `compiled` adds Llama with a static cache, which transformers compiles on a GPU.
    """
    if isinstance(config, LlamaConfig):
        return [LLAMA_DYNAMIC, LLAMA_STATIC] if compiled else [LLAMA_DYNAMIC]
    if device.type != "cuda":
        return [LOOP]
    if not _has_full_attention(config, length):
        return [GRAPHS]
    return [GRAPHS, GRAPHS_SDPA] if length <= KERNEL_WINDOW else [GRAPHS_SDPA]


def _has_full_attention(config: BasedConfig, length: int) -> bool:
    return "sliding_attention" in (config.mixers or ()) and config.sliding_window >= length


def timed_generation(
    config: BasedConfig | LlamaConfig,
    way: str,
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> GenerationSpeed:
    """The speed of a model with random weights in one of `ways_to_generate`.

    With `GRAPHS_SDPA` the ring holds as many keys as the prompt, so that all slots are always filled and PyTorch needs no mask:
    full attention reads those and up to `new_tokens` more, and is flattered by that much.

    Raises:
        RuntimeError: out of memory, or `generate` did not run as CUDA graphs where it should.
    """
    if way == GRAPHS_SDPA:
        config = copy.deepcopy(config)
        config.sliding_window = prompt_length
    model: Any = random_model(config, device, dtype)
    sizes = (batch_size, prompt_length, new_tokens)
    if isinstance(config, LlamaConfig):
        return generation_speed(model, *sizes, static_cache=way == LLAMA_STATIC)
    model.fast_generation = way != LOOP
    with _attention_over_full_rings() if way == GRAPHS_SDPA else contextlib.nullcontext():
        speed = generation_speed(model, *sizes)
    if way != LOOP and model not in fast_generation._steps:
        raise RuntimeError("generate did not run as CUDA graphs; transformers' log at level INFO has the reason")
    fast_generation.release_generation_buffers(model)
    return speed


@contextlib.contextmanager
def _attention_over_full_rings() -> Iterator[None]:
    """Within this context steps that are captured attend with PyTorch's attention, to all slots of their rings."""
    kernel = decode_graph.sliding_window_attention_step
    decode_graph.sliding_window_attention_step = full_ring_attention_step  # type: ignore[assignment]
    try:
        yield
    finally:
        decode_graph.sliding_window_attention_step = kernel


def full_ring_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    position: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first_valid: torch.Tensor | None = None,
    softmax_scale: float,
) -> torch.Tensor:
    """What `sliding_window_attention_step` computes once no slot of the rings is empty, for sequences without padding."""
    q, k = (x.squeeze(1) for x in rotary_embedding(q.unsqueeze(1), k.unsqueeze(1), cos.unsqueeze(1), sin.unsqueeze(1)))
    slot = position.long() % ring_k.shape[2]
    ring_k.index_copy_(2, slot, k.unsqueeze(2))
    ring_v.index_copy_(2, slot, v.unsqueeze(2))
    return F.scaled_dot_product_attention(q.unsqueeze(2), ring_k, ring_v, scale=softmax_scale).squeeze(2)


__all__ = [
    "GRAPHS",
    "GRAPHS_SDPA",
    "LLAMA_DYNAMIC",
    "LLAMA_STATIC",
    "LOOP",
    "GenerationSpeed",
    "equal_llama",
    "full_ring_attention_step",
    "generation_speed",
    "random_model",
    "timed_generation",
    "ways_to_generate",
]
