"""The supervised loss of SuperHF with its KL prior, in TRL's chunked kernels or from full logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.models.utils import _ForwardRedirection

IGNORED = -100


@dataclass(frozen=True)
class SelectedTexts:
    """A minibatch of kept texts: ids, mask and labels, each [rows, tokens]. A label is its own position's id, or -100."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at every position: logits [rows, tokens, vocabulary], or hidden states with the head."""

    hidden_or_logits: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def at(self, mask: torch.Tensor) -> torch.Tensor:
        return self.hidden_or_logits[mask.to(self.hidden_or_logits.device)]


@dataclass(frozen=True)
class LossTerms:
    """The loss, and what is logged of it: sums over a minibatch, detached."""

    loss: torch.Tensor
    nll_sum: torch.Tensor
    entropy_sum: torch.Tensor
    num_tokens: torch.Tensor
    kl_sum: torch.Tensor
    """Sum of the divergence over its positions."""
    num_kl_tokens: torch.Tensor


def selected_texts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_lengths: torch.Tensor, reproduce_defects: bool = False
) -> SelectedTexts:
    """Labels of rows that are padded at the right, cut to the longest; prompt and padding are never labels.

    Args:
        input_ids: [rows, tokens]; `attention_mask` too.
        prompt_lengths: [rows]; at least a row's length where nothing of it is to be trained on.
        reproduce_defects: move the padding to the left and count the prompt from there, padding included, and leave padding
            in the labels, as the published code does: rows shorter than the longest train on their prompts.
    """
    lengths = attention_mask.sum(1)
    width = int(lengths.max())
    input_ids, attention_mask = input_ids[:, :width], attention_mask[:, :width]
    positions = torch.arange(width, device=input_ids.device)
    if reproduce_defects:
        source = (positions - (width - lengths)[:, None]) % width
        input_ids, attention_mask = input_ids.gather(1, source), attention_mask.gather(1, source)
        trained = positions >= prompt_lengths[:, None]
    else:
        trained = (positions >= prompt_lengths[:, None]) & attention_mask.bool()
    return SelectedTexts(input_ids, attention_mask, input_ids.masked_fill(~trained, IGNORED))


def superhf_loss(
    policy: Predictions,
    reference: Predictions | None,
    labels: torch.Tensor,
    *,
    beta: float,
    kl_direction: str = "forward",
    kl_reduction: str = "mean",
    kl_one_late: bool = False,
    inverse_loss_penalty: float = 0.0,
    token_weight: float | torch.Tensor | None = None,
) -> LossTerms:
    """Cross entropy of the labels plus `beta` times the KL divergence between policy and reference.

    Args:
        labels: [rows, tokens], of their own positions: the prediction before each is scored.
        reference: None only with `beta` 0. Nothing flows back into it.
        kl_reduction: "mean" adds both up over the tokens and multiplies by `token_weight` (by default one over the number of
            labels: the mean). "sum" takes the mean cross entropy, and adds the mean divergences of the rows up, each at least 0.
        kl_one_late: measure the divergence at the labels' own positions, as the published code does.
        inverse_loss_penalty: weight of one over the minibatch's mean cross entropy.

    Raises:
        ValueError: a `beta` above 0 without a reference.
    """
    if beta > 0 and reference is None:
        raise ValueError(f"beta={beta} needs a reference: pass one, or set beta=0")
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    predicts = targets != IGNORED
    nll, entropy = _token_nll(policy, predicts, targets[predicts])
    measured = (labels != IGNORED) if kl_one_late else predicts
    kl = nll.new_zeros(0) if reference is None else _token_kl(policy, reference, measured, kl_direction)
    # an empty minibatch keeps its place in the graph, so that all processes exchange gradients
    mean_nll = nll.sum() / max(nll.numel(), 1)
    if kl_reduction == "sum":
        loss = mean_nll
        if reference is not None:
            rows = measured.nonzero()[:, 0].to(kl.device)
            per_row = kl.new_zeros(labels.shape[0]).index_add(0, rows, kl)
            loss = loss + beta * (per_row / measured.sum(1).clamp(min=1).to(kl.device)).clamp(min=0).sum()
    else:
        weight = 1 / max(nll.numel(), 1) if token_weight is None else token_weight
        loss = (nll.sum() + beta * kl.sum()) * weight
    if inverse_loss_penalty and nll.numel():
        loss = loss + inverse_loss_penalty / mean_nll
    return LossTerms(
        loss=loss,
        nll_sum=nll.detach().sum(),
        entropy_sum=entropy.detach().sum(),
        num_tokens=predicts.sum(),
        kl_sum=kl.detach().sum(),
        num_kl_tokens=measured.sum(),
    )


def _token_nll(policy: Predictions, mask: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> negative log-likelihood and entropy, both [labels] and in nats."""
    values = policy.at(mask)
    targets = targets.to(values.device)
    if policy.weight is None:
        log_probs = values.float().log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
        return -log_probs.gather(-1, targets[:, None])[:, 0], entropy
    log_prob, entropy, *_ = ChunkedLogProbFunction.apply(
        values, policy.weight, policy.bias, targets, 1.0, VOCAB_CHUNK_SIZE, policy.softcap, policy.logit_scale, ("entropy",)
    )
    return -log_prob, entropy


def _token_kl(policy: Predictions, reference: Predictions, mask: torch.Tensor, direction: str) -> torch.Tensor:
    """Divergence of the next-token distributions at the masked positions, [positions], in nats, full vocabulary."""
    ours, theirs = policy.at(mask), reference.at(mask).detach()
    theirs = theirs.to(ours.device)
    if policy.weight is None or reference.weight is None:
        log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        # kl_div(input, target) = KL(target || input)
        pair = (log_p, log_q) if direction == "forward" else (log_q, log_p)
        return functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    divergence, _ = ChunkedDivergenceFunction.apply(
        ours,
        policy.weight,
        policy.bias,
        theirs,
        reference.weight.detach(),
        None if reference.bias is None else reference.bias.detach(),
        0.0 if direction == "forward" else 1.0,
        1.0,
        policy.logit_scale,
        policy.softcap,
        reference.logit_scale,
        reference.softcap,
    )
    return divergence


def predict(model: nn.Module, texts: SelectedTexts, chunked: bool) -> Predictions:
    """Predictions of an unwrapped causal language model or PEFT model at every position of `texts`."""
    inputs = {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask, "use_cache": False}
    if not chunked:
        return Predictions(model(**inputs).logits)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(**inputs).last_hidden_state
    head = base.get_output_embeddings()
    weight, bias = _whole(head.weight, hidden.dtype), _whole(head.bias, hidden.dtype)
    config = base.config.get_text_config()
    return Predictions(hidden.to(weight.device), weight, bias, *_logit_transform(config))


def _whole(parameter: Any, dtype: torch.dtype) -> Any:
    """A parameter that FSDP2 has split, put together."""
    return parameter.full_tensor().to(dtype) if isinstance(parameter, DTensor) else parameter


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """-> factor and soft cap of a model's logits, under the names that transformers' models use."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale, softcap
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    return (scaling if config.model_type == "hyperclovax" else 1 / scaling), softcap


def call_inside(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function` within the forward pass of `wrapper`, where DDP, FSDP and DeepSpeed have their hooks."""
    if wrapper is module:
        return function(*arguments)
    had_own_forward = "forward" in vars(module)
    try:
        return _ForwardRedirection()(wrapper, module, function, *arguments)
    finally:
        if not had_own_forward:
            vars(module).pop("forward", None)


__all__ = [
    "LossTerms",
    "Predictions",
    "SelectedTexts",
    "call_inside",
    "predict",
    "selected_texts",
    "superhf_loss",
]
