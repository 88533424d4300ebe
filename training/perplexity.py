"""Perplexity of a causal language model on a text, in units that can be compared between tokenizers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """Result of `evaluate_perplexity`.

    Token perplexity depends on the tokenizer. Word perplexity, exp(negative log-likelihood / whitespace words), and bits per
    UTF-8 byte do not.
    """

    token_perplexity: float
    word_perplexity: float
    bits_per_byte: float
    negative_log_likelihood: float
    """Of all the text, in nats."""
    num_tokens: int
    num_words: int
    num_bytes: int


@torch.inference_mode()
def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    context_length: int = 1024,
    stride: int | None = None,
    *,
    batch_size: int = 8,
) -> Perplexity:
    """Perplexity of a text, or of several that do not see each other, each token predicted exactly once.

    A text follows the beginning-of-text token, so that its first token is predicted too. Windows of `context_length`
    tokens advance by `stride`; a window scores the tokens that no earlier one has scored, so that with a stride below the
    context length every token but those of the first window has at least `context_length - stride` tokens before it.

    Args:
        model: in the dtype and on the device to evaluate with; its training mode is restored.
        stride: tokens; `context_length // 2` by default.
        batch_size: windows at a time.

    Raises:
        ValueError: an empty text, a tokenizer without a beginning-of-text token, or sizes out of range.

    Example:
        >>> evaluate_perplexity(model, tokenizer, "To be, or not to be", context_length=16).bits_per_byte  # doctest: +SKIP
        2.31
    """
    texts = [text] if isinstance(text, str) else list(text)
    windows = perplexity_windows(tokenizer, texts, context_length, stride)
    num_tokens = sum(ids.numel() - first for ids, first in windows)
    total = mean_loss(model, windows, batch_size) * num_tokens
    num_words, num_bytes = sum(len(item.split()) for item in texts), sum(len(item.encode("utf-8")) for item in texts)
    return Perplexity(
        token_perplexity=exp_or_infinity(total / num_tokens),
        word_perplexity=exp_or_infinity(total / num_words),
        bits_per_byte=total / num_bytes / math.log(2),
        negative_log_likelihood=total,
        num_tokens=num_tokens,
        num_words=num_words,
        num_bytes=num_bytes,
    )


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: Sequence[tuple[torch.Tensor, int]], batch_size: int = 8) -> float:
    """Mean negative log-likelihood, in nats, of the tokens that count in `perplexity_windows`; the training mode is restored."""
    was_training = model.training
    model.eval()
    try:
        batches = (list(windows[first : first + batch_size]) for first in range(0, len(windows), batch_size))
        total = sum(losses[counted].sum().item() for _, losses, counted in (window_losses(model, batch) for batch in batches))
    finally:
        model.train(was_training)
    return total / sum(ids.numel() - first for ids, first in windows)


def perplexity_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context_length: int = 1024, stride: int | None = None
) -> list[tuple[torch.Tensor, int]]:
    """Windows of texts as (ids [tokens], index of the first token that counts); each token counts in exactly one of them.

    See `evaluate_perplexity` for the arguments and errors.
    """
    stride = max(context_length // 2, 1) if stride is None else stride
    if context_length < 2 or not 1 <= stride < context_length:
        raise ValueError(f"need 1 <= stride < context_length, got stride={stride} and context_length={context_length}")
    if not texts or not all(item.strip() for item in texts):
        raise ValueError("the text is empty")
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no beginning-of-text token to predict the first token from")
    windows: list[tuple[torch.Tensor, int]] = []
    for item in texts:
        encoded = tokenizer(item, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([tokenizer.bos_token_id, *encoded])
        windows.append((ids[:context_length], 1))
        for start in range(stride, ids.numel() - context_length + stride, stride):
            windows.append((ids[start : start + context_length], context_length - stride))
    return windows


def window_losses(
    model: PreTrainedModel, windows: list[tuple[torch.Tensor, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [batch, tokens] of windows, each predicted token's negative log-likelihood [batch, tokens - 1], and which count.

    The likelihoods are in nats and float64; all three are on the CPU.
    """
    # short windows are filled up on the right, which a causal model cannot see
    rows = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in windows], batch_first=True)
    positions = torch.arange(1, rows.shape[1])
    counted = torch.stack([(positions >= first) & (positions < ids.numel()) for ids, first in windows])
    on_device = rows.to(model.device)
    logits = model(input_ids=on_device, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), on_device[:, 1:].flatten(), reduction="none")
    # MPS has no float64
    return rows, losses.view(counted.shape).cpu().double(), counted


def exp_or_infinity(value: float) -> float:
    """exp, infinite where a float overflows (an untrained model's word perplexity)."""
    return math.exp(value) if value < 700 else math.inf


__all__ = ["Perplexity", "evaluate_perplexity", "exp_or_infinity", "mean_loss", "perplexity_windows", "window_losses"]
