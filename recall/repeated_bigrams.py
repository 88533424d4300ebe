"""Perplexity split by what recall alone can explain: tokens that repeat a bigram of their own context, and all others.

Where a text goes on from "Walvis" as it did before, "Bay" can be copied from the context. "Zoology: Measuring and Improving
Recall in Efficient Language Models" (Arora et al. 2023) calls these tokens associative recall hits, leaves bigrams out that
are frequent in the training texts, since a model knows those by heart, and finds most of the gap in perplexity between
attention and other mixers on them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geobased.training.perplexity import exp_or_infinity, perplexity_windows, window_losses

# the paper's: bigrams seen more often in training are no recall
FREQUENT_COUNT = 1250
# a bigram as one number; no vocabulary reaches 2**31
_SHIFT = 31


@dataclass(frozen=True)
class SlicePerplexity:
    """Of one kind of tokens; NaN where there are none. The negative log-likelihood is their sum, in nats."""

    token_perplexity: float
    negative_log_likelihood: float
    num_tokens: int


@dataclass(frozen=True)
class SplitPerplexity:
    """Result of `evaluate_split_perplexity`: the tokens that complete a repeated bigram, the others, and both together."""

    repeated: SlicePerplexity
    other: SlicePerplexity
    overall: SlicePerplexity
    num_frequent_bigrams: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return asdict(self)


def repeated_bigram_mask(input_ids: torch.Tensor, frequent: torch.Tensor | None = None) -> torch.Tensor:
    """Whether the bigram of each token and the one before it stands earlier in the same row.

    Args:
        input_ids: int64 [batch, seq_len] or [seq_len].
        frequent: bigrams [n, 2] that never count, as `frequent_bigrams` returns them.

    Returns:
        bool, of the shape of `input_ids`; False at the first token, which ends no bigram.

    Raises:
        ValueError: other shapes.

    Example:
        >>> repeated_bigram_mask(torch.tensor([5, 7, 5, 7, 7])).tolist()
        [False, False, False, True, False]
    """
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"input_ids must be [batch, seq_len] or [seq_len], not of shape {tuple(input_ids.shape)}")
    codes = _codes(input_ids)
    # of equal bigrams, a stable sort leaves the earliest first
    ordered, order = codes.sort(dim=-1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    mask[..., 1:] = torch.zeros_like(again).scatter(-1, order, again)
    if frequent is not None:
        mask[..., 1:] &= ~torch.isin(codes, _codes(frequent.to(codes)).flatten())
    return mask


def _codes(ids: torch.Tensor) -> torch.Tensor:
    """Each bigram of rows as one number [..., seq_len - 1]."""
    return (ids[..., :-1].long() << _SHIFT) | ids[..., 1:].long()


def frequent_bigrams(sequences: Iterable[torch.Tensor | Sequence[int]], threshold: int = FREQUENT_COUNT) -> torch.Tensor:
    """Bigrams that occur more than `threshold` times in tokenized training texts, as int64 [n, 2], sorted.

    Args:
        sequences: token ids of the texts; no bigram reaches over their bounds. Few long ones are faster than many short ones,
            and tensors on a GPU are counted there.

    Raises:
        ValueError: a negative threshold.
    """
    if threshold < 0:
        raise ValueError(f"threshold={threshold} is a number of occurrences: choose 0 or more")
    codes, counts = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    for ids in sequences:
        new, new_counts = _codes(torch.as_tensor(ids).flatten()).unique(return_counts=True)
        codes, counts = codes.to(new.device), counts.to(new.device)
        codes, where = torch.cat([codes, new]).unique(return_inverse=True)
        counts = torch.zeros_like(codes).scatter_add(0, where, torch.cat([counts, new_counts]))
    chosen = codes[counts > threshold]
    return torch.stack([chosen >> _SHIFT, chosen & ((1 << _SHIFT) - 1)], 1)


@torch.inference_mode()
def evaluate_split_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    context_length: int = 1024,
    stride: int | None = None,
    *,
    batch_size: int = 8,
    frequent: torch.Tensor | None = None,
) -> SplitPerplexity:
    """Perplexity of a text, apart for tokens that complete a bigram of their own window and for all others.

    A bigram counts as repeated where the model can see it: in the window that the token is predicted in. Windows, arguments and
    errors are those of `evaluate_perplexity`, whose token perplexity is `overall`.

    Args:
        frequent: bigrams [n, 2] of the training texts that the model knows by heart, from `frequent_bigrams`; their tokens
            are among the others.

    Example:
        >>> split = evaluate_split_perplexity(model, tokenizer, text)  # doctest: +SKIP
        >>> split.repeated.token_perplexity, split.other.token_perplexity  # doctest: +SKIP
        (2.4, 38.1)
    """
    windows = perplexity_windows(tokenizer, [text] if isinstance(text, str) else list(text), context_length, stride)
    return split_perplexity_of_windows(model, windows, batch_size=batch_size, frequent=frequent)


@torch.inference_mode()
def split_perplexity_of_windows(
    model: PreTrainedModel,
    windows: Sequence[tuple[torch.Tensor, int]],
    *,
    batch_size: int = 8,
    frequent: torch.Tensor | None = None,
) -> SplitPerplexity:
    """`evaluate_split_perplexity` of a text that is cut already, by `perplexity_windows`."""
    totals, numbers = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(windows), batch_size):
            ids, losses, counted = window_losses(model, list(windows[first : first + batch_size]))
            kinds = repeated_bigram_mask(ids, frequent)[:, 1:][counted].long()
            totals += torch.zeros_like(totals).index_add(0, kinds, losses[counted])
            numbers += torch.bincount(kinds, minlength=2)
    finally:
        model.train(was_training)

    def perplexity(total: torch.Tensor, number: torch.Tensor) -> SlicePerplexity:
        value = exp_or_infinity((total / number).item()) if number else float("nan")
        return SlicePerplexity(value, total.item(), int(number))

    return SplitPerplexity(
        repeated=perplexity(totals[1], numbers[1]),
        other=perplexity(totals[0], numbers[0]),
        overall=perplexity(totals.sum(), numbers.sum()),
        num_frequent_bigrams=0 if frequent is None else len(frequent),
    )


__all__ = [
    "FREQUENT_COUNT",
    "SlicePerplexity",
    "SplitPerplexity",
    "evaluate_split_perplexity",
    "frequent_bigrams",
    "repeated_bigram_mask",
    "split_perplexity_of_windows",
]
