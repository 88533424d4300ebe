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
    stride = max(context_length // 2, 1) if stride is None else stride
    if context_length < 2 or not 1 <= stride < context_length:
        raise ValueError(f"need 1 <= stride < context_length, got stride={stride} and context_length={context_length}")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(item.strip() for item in texts):
        raise ValueError("the text is empty")
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no beginning-of-text token to predict the first token from")
    windows: list[tuple[torch.Tensor, int]] = []
    num_tokens = 0
    for item in texts:
        encoded = tokenizer(item, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([tokenizer.bos_token_id, *encoded])
        num_tokens += len(encoded)
        windows.append((ids[:context_length], 1))
        for start in range(stride, ids.numel() - context_length + stride, stride):
            windows.append((ids[start : start + context_length], context_length - stride))
    was_training = model.training
    model.eval()
    try:
        total = sum(_window_losses(model, windows[first : first + batch_size]) for first in range(0, len(windows), batch_size))
    finally:
        model.train(was_training)
    num_words, num_bytes = sum(len(item.split()) for item in texts), sum(len(item.encode("utf-8")) for item in texts)
    return Perplexity(
        token_perplexity=_exp(total / num_tokens),
        word_perplexity=_exp(total / num_words),
        bits_per_byte=total / num_bytes / math.log(2),
        negative_log_likelihood=total,
        num_tokens=num_tokens,
        num_words=num_words,
        num_bytes=num_bytes,
    )


def _window_losses(model: PreTrainedModel, windows: list[tuple[torch.Tensor, int]]) -> float:
    """Negative log-likelihood of windows, each an (ids, index of the first token that counts)."""
    # short windows are filled up on the right, which a causal model cannot see
    rows = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in windows], batch_first=True).to(model.device)
    positions = torch.arange(1, rows.shape[1])
    counted = torch.stack([(positions >= first) & (positions < ids.numel()) for ids, first in windows])
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
    return losses.double().view(counted.shape)[counted.to(losses.device)].sum().item()


def _exp(value: float) -> float:
    """exp, infinite where a float overflows (an untrained model's word perplexity)."""
    return math.exp(value) if value < 700 else math.inf


__all__ = ["Perplexity", "evaluate_perplexity"]
