# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""The loop of `generate` that runs at the speed of the GPU: whole steps as CUDA graphs, and a host that looks only now and then.

`fast_sample` stands in for transformers' `_sample`. It serves greedy decoding and sampling with the usual processors; for
everything else `plan_generation` names a reason and transformers' ordinary loop runs, with the same results.
`model.fast_generation = False` switches it off for a model.
"""

import contextlib
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, stopping_criteria
from transformers.utils import is_torchdynamo_compiling, logging

from .cache_based import BasedCache
from .decode_graph import CAPACITY, KERNELS_ARE_THERE, DecodeStep
from .gpu_sampling import NotServed, SamplingPlan, plan_sampling

logger = logging.get_logger(__name__)

# the host looks for finished rows every so many steps, and at first earlier
CHECK_EVERY = 8
FIRST_CHECKS = (1, 1, 2, 4)
# rotary embeddings whose frequencies do not change with the length of the sequence
STEADY_ROPE = ("default", "linear", "yarn", "llama3")
# steps of one model that are kept for the next call; older ones go sooner where their states take much memory
KEPT_STEPS = 4
KEPT_MEMORY = 0.25  # share of the device's memory

_steps: "weakref.WeakKeyDictionary[PreTrainedModel, OrderedDict[tuple, DecodeStep]]" = weakref.WeakKeyDictionary()
_steps_lock = threading.RLock()


@dataclass
class GenerationPlan:
    """What one call of `generate` asks for, in the form that the step takes."""

    sampling: SamplingPlan
    max_new_tokens: int
    ends: list[int]
    pad: int
    deadline: float | None
    first_valid: torch.Tensor | None  # [batch] number of padding tokens; None: no padding anywhere
    keeps_cache: bool  # the cache outlives the call
    captured: bool


# what is served


def plan_generation(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    processors: list,
    criteria: list,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> GenerationPlan:
    """The plan of a call. Raises `NotServed`, with the reason, for a call that needs transformers' ordinary loop."""
    mode: Any = model.fast_generation
    if mode is False:
        raise NotServed("fast_generation is off")
    if not KERNELS_ARE_THERE:
        raise NotServed("geobased's kernels are not installed")
    captured = mode != "eager"
    _check_model(model, captured)
    _check_call(model, input_ids, generation_config, synced_gpus, model_kwargs)
    cache = model_kwargs["past_key_values"]
    first_valid, positions = _padding(model_kwargs.get("attention_mask"), input_ids.shape[0]), model_kwargs.get("position_ids")
    if first_valid is None and positions is not None and not bool((positions[:, -1] == positions[0, -1]).all()):
        raise NotServed("position_ids that differ between rows without padding")
    max_length, ends, deadline = _stops(criteria)
    if ends and generation_config._pad_token_tensor is None:
        raise NotServed("no pad token for finished rows")
    sampling = plan_sampling(
        list(processors),
        do_sample=bool(generation_config.do_sample),
        vocab_size=model.config.vocab_size,
        prompt_length=input_ids.shape[1],
    )
    return GenerationPlan(
        sampling=sampling,
        max_new_tokens=max(max_length - input_ids.shape[1], 1),
        ends=ends,
        pad=0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor),
        deadline=deadline,
        first_valid=first_valid,
        keeps_cache=bool(generation_config.return_dict_in_generate) or not getattr(cache, "made_by_generate", False),
        captured=captured,
    )


def _check_model(model: PreTrainedModel, captured: bool) -> None:
    config, weight = model.config, model.lm_head.weight
    if captured and weight.device.type != "cuda":
        raise NotServed(f"the model is on {weight.device}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NotServed(f"the model is in {weight.dtype}")
    if config._attn_implementation != "sdpa":
        raise NotServed(f"attn_implementation={config._attn_implementation!r}")
    if model.training and (config.attention_dropout > 0 or model.is_gradient_checkpointing):
        raise NotServed("the model is in training mode, with dropout or gradient checkpointing")
    if config.rope_parameters["rope_type"] not in STEADY_ROPE and "sliding_attention" in config.mixers:
        raise NotServed(f"rope_type={config.rope_parameters['rope_type']!r}")
    if torch.is_autocast_enabled(weight.device.type):
        raise NotServed("autocast is on")
    if is_torchdynamo_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise NotServed("the call is being compiled or captured")
    own = {type(model): "BasedForCausalLM", type(model.model): "BasedModel", type(model.lm_head): "Linear"}
    if any(kind.__name__ != name for kind, name in own.items()) or type(model.lm_head) is not nn.Linear:
        raise NotServed("the model's classes are changed")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") or "forward" in module.__dict__:
            raise NotServed(f"{name or 'the model'} has a hook or another forward")
        plain = type(module) is nn.Linear or type(module) is nn.Embedding
        if not plain and (isinstance(module, nn.Linear | nn.Embedding) or hasattr(module, "base_layer")):
            raise NotServed(f"{name} is a {type(module).__name__}")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype != weight.dtype or parameter.device != weight.device:
            kind = type(parameter).__name__
            raise NotServed(f"{name} is a {kind} in {parameter.dtype} on {parameter.device}")
    for i, layer in enumerate(model.model.layers):
        names = ("in_proj", "out_proj") if config.mixers[i] == "conv" else ("q_proj", "k_proj", "v_proj", "o_proj")
        linear = [getattr(layer.mixer, name, None) for name in names]
        linear += [getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if any(type(module) is not nn.Linear for module in linear):
            raise NotServed(f"layer {i} has other projections than torch.nn.Linear")


def _check_call(
    model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> None:
    cache = model_kwargs.get("past_key_values")
    if type(cache) is not BasedCache or not model_kwargs.get("use_cache", True):
        raise NotServed(f"the cache is a {type(cache).__name__}")
    if synced_gpus:
        raise NotServed("synced_gpus")
    if config.num_beams not in (None, 1):
        raise NotServed("beams")
    if getattr(config, "is_assistant", False):
        raise NotServed("assisted decoding")
    if config.return_dict_in_generate:
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name):
                raise NotServed(name)
    if input_ids.shape[1] == 0:
        raise NotServed("no prompt ids")
    known = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    other = sorted(name for name, value in model_kwargs.items() if name not in known and value is not None)
    if other:
        raise NotServed(f"the model argument {other[0]}")
    if model_kwargs.get("logits_to_keep", 1) != 1:
        raise NotServed("logits_to_keep")
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise NotServed("position_ids of another shape")


def _stops(criteria: list) -> tuple[int, list[int], float | None]:
    """-> maximum length, ids that end a row, the time to stop at."""
    max_length, ends, deadline = None, [], None
    for criterion in criteria:
        if type(criterion) is stopping_criteria.MaxLengthCriteria:
            max_length = min(criterion.max_length, max_length or criterion.max_length)
        elif type(criterion) is stopping_criteria.EosTokenCriteria:
            ends += criterion.eos_token_id.flatten().tolist()
        elif type(criterion) is stopping_criteria.MaxTimeCriteria:
            end = criterion.initial_timestamp + criterion.max_time
            deadline = end if deadline is None else min(deadline, end)
        else:
            raise NotServed(f"the stopping criterion {type(criterion).__name__}")
    if max_length is None:
        raise NotServed("no maximum length")
    return max_length, sorted(set(ends)), deadline


def _padding(mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """Number of padding tokens of each row, int32 [batch], or None where there is none."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise NotServed("an attention mask of another shape")
    real = mask != 0
    padding = (~real).sum(1, dtype=torch.int32)
    at_the_left = real == (torch.arange(mask.shape[1], device=mask.device) >= padding[:, None])
    if not bool(at_the_left.all() & real[:, -1].all()):
        raise NotServed("padding that is not at the left")
    return padding if bool(padding.any()) else None


# steps that are kept from call to call


def release_generation_buffers(model: PreTrainedModel) -> None:
    """Frees the CUDA graphs and state buffers that earlier calls of `generate` have left with `model` for the next one."""
    with _steps_lock:
        _steps.pop(model, None)


def _decode_step(model: PreTrainedModel, plan: GenerationPlan, batch: int) -> DecodeStep:
    """The step that serves the plan: a kept one, or a new one, for which others make room."""
    key = (
        batch,
        plan.sampling.signature,
        len(plan.ends),
        plan.first_valid is not None,
        plan.captured,
    )
    with _steps_lock:
        kept = _steps.setdefault(model, OrderedDict())
        address = _addresses(model)
        step = kept.get(key)
        if step is not None and step.addresses == address:
            kept.move_to_end(key)
            return step
        for stale in [name for name, old in kept.items() if old.addresses != address or name == key]:
            del kept[stale]
        weight = model.lm_head.weight
        room = KEPT_MEMORY * torch.cuda.get_device_properties(weight.device).total_memory if weight.is_cuda else torch.inf
        while kept and (len(kept) >= KEPT_STEPS or sum(old.state_bytes() for old in kept.values()) > room):
            kept.popitem(last=False)
        step = DecodeStep(
            model,
            batch,
            plan.sampling,
            num_ends=len(plan.ends),
            padded=plan.first_valid is not None,
            captured=plan.captured,
        )
        step.addresses = _addresses(model)  # building the step may have moved weights together
        kept[key] = step
        return step


def _addresses(model: PreTrainedModel) -> tuple[int, ...]:
    """Where the weights lie. A graph reads from there, whatever has become of the parameters."""
    return *(parameter.data_ptr() for parameter in model.parameters()), model.model.rotary_emb.inv_freq.data_ptr()


# the loop


def fast_sample(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    plan: GenerationPlan,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """What transformers' `_sample` returns. Raises `NotServed` before it has done anything if the step cannot be captured."""
    device = model.lm_head.weight.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            step = _decode_step(model, plan, input_ids.shape[0])
        except RuntimeError as error:
            release_generation_buffers(model)
            if plan.captured:
                logger.warning_once(f"fast generation is off: the step could not be captured ({str(error).splitlines()[0]})")
                raise NotServed("the step could not be captured") from error
            raise
        with step.lock:
            cache, logits = _prefill(model, input_ids, generation_config, model_kwargs)
            prompt = input_ids.to(device)
            step.load(
                cache,
                plan.sampling,
                input_ids=prompt,
                first_valid=plan.first_valid,
                row_positions=_next_positions(model_kwargs.get("position_ids"), cache, plan, prompt.shape[0]).to(device),
                ends=plan.ends,
                pad=plan.pad,
                release=getattr(cache, "made_by_generate", False),
            )
            first = step.pick_first(logits)
            new_tokens = _run(step, first, plan, streamer)
            if plan.keeps_cache:
                step.store(cache)
    sequences = torch.cat([input_ids, new_tokens.to(input_ids.device)], dim=1)
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences), past_key_values=cache)
    return sequences


def _prefill(
    model: PreTrainedModel, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> tuple[BasedCache, torch.Tensor]:
    """Reads the prompt -> its cache, and the logits [batch, vocab_size] of its last token."""
    outputs = cast(Any, model)._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    return outputs.past_key_values, outputs.logits[:, -1].clone()


def _next_positions(position_ids: torch.Tensor | None, cache: BasedCache, plan: GenerationPlan, batch: int) -> torch.Tensor:
    """Rotary position of the first new token: [batch] with padding, otherwise [1]."""
    if position_ids is not None:
        following = position_ids[:, -1] + 1
        return following.expand(batch) if plan.first_valid is not None else following[:1]
    length = torch.tensor([cache.get_seq_length()])
    return length if plan.first_valid is None else length.to(plan.first_valid.device) - plan.first_valid


@dataclass
class _Look:
    """What the host will see of the step once the device has come so far."""

    generated: torch.Tensor
    running: torch.Tensor
    tokens: torch.Tensor | None
    event: Any

    @classmethod
    def at(cls, step: DecodeStep, first_row: int, num_rows: int, with_tokens: bool) -> "_Look":
        rows = step.period_tokens[first_row : first_row + num_rows] if with_tokens else None
        if not step.counters.is_cuda:
            return cls(step.generated.clone(), step.running.clone(), None if rows is None else rows.clone(), None)
        generated, running = _to_host(step.generated), _to_host(step.running)
        tokens = None if rows is None else _to_host(rows)
        event = torch.cuda.Event()
        event.record()
        return cls(generated, running, tokens, event)

    def wait(self) -> tuple[int, bool]:
        """-> how many tokens there are that count, and whether there will be more."""
        if self.event is not None:
            self.event.synchronize()
        return int(self.generated), bool(self.running)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _run(step: DecodeStep, first: torch.Tensor, plan: GenerationPlan, streamer: Any) -> torch.Tensor:
    """Replays the step until every row has ended or is full -> the new tokens [batch, n]."""
    total = plan.max_new_tokens
    tokens = first.new_empty(total, first.shape[0])
    tokens[0] = first
    streamed = 0

    def stream(rows: torch.Tensor, generated: int) -> None:
        nonlocal streamed
        for row in rows[: max(generated - streamed, 0)]:
            streamer.put(row)
            streamed += 1

    if streamer is not None:
        stream(first.cpu().unsqueeze(0), 1)
    looks_on = bool(plan.ends) or streamer is not None or plan.deadline is not None
    looks: deque[_Look] = deque()
    generated, there, running = 1, 1, True

    def look(look: _Look) -> None:
        nonlocal generated, running
        generated, running = look.wait()
        if look.tokens is not None:
            stream(look.tokens, generated)
        if plan.deadline is not None and time.time() > plan.deadline:
            running = False

    for size in _spans(total - 1):
        row = (there - 1) % CAPACITY
        for _ in range(size):
            step.replay()
        tokens[there : there + size] = step.period_tokens[row : row + size]
        there += size
        if looks_on:
            looks.append(_Look.at(step, row, size, streamer is not None))
        if row + size == CAPACITY and there < total:
            step.replay_fold()
        if len(looks) > 1:  # one span runs while the one before is looked at
            look(looks.popleft())
            if not running:
                break
    while looks:
        look(looks.popleft())
    return tokens[: generated if looks_on else there].T.contiguous()


def _spans(total: int) -> Iterator[int]:
    """Numbers of steps between two looks, which add up to `total`; none crosses the end of a period."""
    done, first = 0, iter(FIRST_CHECKS)
    while done < total:
        size = min(next(first, CHECK_EVERY), total - done, CAPACITY - done % CAPACITY)
        yield size
        done += size


__all__ = ["GenerationPlan", "NotServed", "fast_sample", "plan_generation", "release_generation_buffers"]
