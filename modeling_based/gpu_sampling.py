# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Choice of the next token without a word from the host: what transformers' logits processors do, in a form a CUDA graph holds.

A list of transformers' processors is turned into a `SamplingPlan`, or refused with a reason. A `TokenSampler` holds a plan's
numbers on the device, so that another temperature, another penalty or other end tokens need no new graph; only the *kinds* of
steps, k and the number of ids shape the graph (`SamplingPlan.signature`).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.generation import logits_process

try:
    from geobased.kernels.row_argmax import row_argmax
except ImportError:  # then `fast_generation.py` serves no call

    def row_argmax(scores: torch.Tensor) -> torch.Tensor:
        raise NotServed("geobased's kernels are not installed")


# bfloat16 logits tie often, and transformers' top-k keeps all that tie with the k-th: so many more are looked at
TOP_K_TIES = 64


class NotServed(Exception):
    """Why a call of `generate` takes transformers' ordinary loop."""


@dataclass(frozen=True)
class SamplingStep:
    """One processor: `kind`, a number that may change from call to call, ids it speaks of, and k for top-k."""

    kind: str
    number: float = 0.0
    tokens: tuple[int, ...] = ()
    size: int = 0

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.kind, len(self.tokens), self.size


@dataclass(frozen=True)
class SamplingPlan:
    """`steps` in the order of transformers' list; only the first `width` ids of the vocabulary can be picked."""

    do_sample: bool
    width: int
    steps: tuple[SamplingStep, ...] = ()
    # the repetition penalty's processor, which knows how much of the prompt it leaves out
    penalty: Any = field(default=None, compare=False)

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.do_sample, self.width, tuple(step.signature for step in self.steps)


def plan_sampling(processors: list, *, do_sample: bool, vocab_size: int, prompt_length: int) -> SamplingPlan:
    """The plan of a list of processors. Raises `NotServed` for one that is not known exactly, or in an order not served.

    `prompt_length`: columns of the input_ids that the processors will be called with first.
    """
    width, penalty = vocab_size, None
    steps: list[SamplingStep] = []
    for processor in processors:
        step = _plan_step(processor, vocab_size, prompt_length)
        if step.kind == "suppress" and step.tokens and step.tokens == tuple(range(step.tokens[0], vocab_size)):
            width = min(width, step.tokens[0])  # the vocabulary's padding: never looked at
            continue
        if any(earlier.kind in ("top_k", "top_p") for earlier in steps) and step.kind in ("suppress", "minimum", "penalty"):
            raise NotServed(f"{type(processor).__name__} after top-k or top-p")
        if step.kind == "penalty":
            if penalty is not None:
                raise NotServed("two repetition penalties")
            penalty = processor
        steps.append(step)
    if width < 1:
        raise NotServed("every id is suppressed")
    # ids outside the width cannot be picked anyhow
    steps = [replace(step, tokens=tuple(i for i in step.tokens if i < width), size=min(step.size, width)) for step in steps]
    steps = [step for step in steps if step.tokens or step.kind not in ("suppress", "minimum")]
    return SamplingPlan(do_sample, width, tuple(steps), penalty)


def _plan_step(processor: Any, vocab_size: int, prompt_length: int) -> SamplingStep:
    kind, p = type(processor), processor
    if getattr(p, "filter_value", -torch.inf) != -torch.inf:
        raise NotServed(f"{kind.__name__} with filter_value={p.filter_value}")
    if kind is logits_process.TemperatureLogitsWarper:
        return SamplingStep("temperature", p.temperature)
    if kind is logits_process.TopKLogitsWarper:
        return SamplingStep("top_k", size=min(p.top_k, vocab_size))
    if kind in (logits_process.TopPLogitsWarper, logits_process.MinPLogitsWarper):
        if p.min_tokens_to_keep != 1:
            raise NotServed(f"{kind.__name__} with min_tokens_to_keep={p.min_tokens_to_keep}")
        if kind is logits_process.TopPLogitsWarper:
            return SamplingStep("top_p", 1 - p.top_p)
        return SamplingStep("min_p", p.min_p)
    if kind is logits_process.RepetitionPenaltyLogitsProcessor:
        ignored = p.prompt_ignore_length
        if isinstance(ignored, int) and ignored > prompt_length:
            raise NotServed(f"a repetition penalty that leaves out {ignored} tokens, more than the prompt has")
        if getattr(p, "logits_indices", None) is not None:
            raise NotServed("a repetition penalty for packed sequences")
        return SamplingStep("penalty", p.penalty)
    if kind is logits_process.MinLengthLogitsProcessor:
        return SamplingStep("minimum", p.min_length - prompt_length, _known_ids(p.eos_token_id, vocab_size))
    if kind is logits_process.MinNewTokensLengthLogitsProcessor:
        minimum = p.min_new_tokens + p.prompt_length_to_skip - prompt_length
        return SamplingStep("minimum", minimum, _known_ids(p.eos_token_id, vocab_size))
    if kind is logits_process.SuppressTokensLogitsProcessor:
        return SamplingStep("suppress", tokens=_known_ids(p.suppress_tokens, vocab_size))
    if kind is logits_process.InfNanRemoveLogitsProcessor:
        return SamplingStep("finite")
    raise NotServed(f"the logits processor {kind.__name__}")


def _known_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    listed = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else [ids] if isinstance(ids, int) else list(ids)
    return tuple(sorted({i for i in listed if 0 <= i < vocab_size}))


class TokenSampler:
    """Picks tokens by a plan. `load` puts another plan of the same signature in place without changing an address."""

    def __init__(self, plan: SamplingPlan, batch: int, vocab_size: int, device: torch.device):
        self.plan, self.device = plan, device
        self.numbers = torch.zeros(max(len(plan.steps), 1), dtype=torch.float32, device=device)
        self.tokens = [torch.zeros(len(step.tokens), dtype=torch.long, device=device) for step in plan.steps]
        has_penalty = any(step.kind == "penalty" for step in plan.steps)
        # one column more takes in what does not count
        self.seen = torch.zeros(batch, vocab_size + 1, dtype=torch.bool, device=device) if has_penalty else None

    def load(self, plan: SamplingPlan, input_ids: torch.Tensor) -> None:
        """Takes over the numbers and ids of `plan`, and what its repetition penalty has seen of input_ids [batch, length]."""
        assert plan.signature == self.plan.signature
        self.plan = plan
        if plan.steps:
            self.numbers.copy_(torch.tensor([step.number for step in plan.steps], dtype=torch.float32))
        for step, tokens in zip(plan.steps, self.tokens, strict=True):
            if step.tokens:
                tokens.copy_(torch.tensor(step.tokens))
        if self.seen is not None:
            self.seen.zero_()
            ids, ignored = input_ids, plan.penalty.prompt_ignore_length
            if isinstance(ignored, int):
                ids = ids[:, ignored:]
            elif ignored is not None:
                counted = torch.arange(ids.shape[1], device=ids.device) >= ignored.to(ids.device)[:, None]
                ids = ids.masked_fill(~counted, self.seen.shape[1] - 1)
            self.seen.scatter_(1, ids, True)

    def sample(self, logits: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        """logits [batch, vocab_size] (may be overwritten) -> ids [batch]. `generated` [1]: number of tokens picked before."""
        scores, candidates = logits[:, : self.plan.width], None
        if self.plan.steps or self.plan.do_sample:
            scores = scores.float()  # as transformers does
        for i, step in enumerate(self.plan.steps):
            number = self.numbers[i]
            if step.kind == "temperature":
                scores = scores / number
            elif step.kind == "penalty":
                assert self.seen is not None
                penalised = torch.where(scores < 0, scores * number, scores / number)
                scores = torch.where(self.seen[:, : self.plan.width], penalised, scores)
            elif step.kind == "suppress":
                scores = scores.index_fill(1, self.tokens[i], -torch.inf)
            elif step.kind == "minimum":
                ends = self.tokens[i]
                allowed = torch.where(generated < number, -torch.inf, scores.index_select(1, ends))
                scores = scores.index_copy(1, ends, allowed)
            elif step.kind == "finite":
                scores = torch.nan_to_num(scores, nan=0.0)
            elif step.kind == "top_k":
                scores, candidates = self._top_k(scores, candidates, step.size)
            elif step.kind == "top_p":
                scores, candidates = self._top_p(scores, candidates, number)
            else:
                probabilities = scores.softmax(-1)
                least = number * probabilities.amax(-1, keepdim=True)
                scores = scores.masked_fill(probabilities < least, -torch.inf)
        if self.plan.do_sample:
            # the race that torch.multinomial runs too, without its checks on the host: the first of exponential clocks
            # with rates p to ring is i with probability p_i
            probabilities = scores.softmax(-1)
            scores = probabilities / torch.empty_like(probabilities).exponential_()
        picked = row_argmax(scores)
        return picked if candidates is None else candidates.gather(1, picked[:, None]).squeeze(1)

    @staticmethod
    def _top_k(scores: torch.Tensor, candidates: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = scores.shape[-1]
        top, indices = scores.topk(min(k + TOP_K_TIES, size), dim=-1)
        kth = top[:, min(k, size) - 1 : min(k, size)]
        top = top.masked_fill(top < kth, -torch.inf)
        return top, indices if candidates is None else candidates.gather(1, indices)

    @staticmethod
    def _top_p(scores: torch.Tensor, candidates: torch.Tensor | None, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drops the least likely ids whose probabilities add up to at most `tail`, never the first."""
        if candidates is None:
            scores, candidates = scores.sort(dim=-1, descending=True)
        # candidates are sorted, the likeliest first: sums from the end, as transformers takes them
        from_the_end = scores.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        dropped = from_the_end <= tail
        dropped[:, 0] = False
        return scores.masked_fill(dropped, -torch.inf), candidates


__all__ = ["NotServed", "SamplingPlan", "SamplingStep", "TokenSampler", "plan_sampling"]
