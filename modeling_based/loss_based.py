# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""The loss of language modelling, without a float32 copy of the logits."""

import torch
import torch.nn.functional as F

try:
    from geobased.kernels.cross_entropy import cross_entropy
except ImportError:
    from .cross_entropy_reference import cross_entropy_reference as cross_entropy  # type: ignore[assignment]


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """What transformers' `ForCausalLMLoss` computes from the same arguments: the loss of a token given those before it.

    logits [batch, seq_len, vocab_size]; labels [batch, seq_len], or shift_labels that are shifted already. The mean over all
    labels but ignore_index, or the sum divided by num_items_in_batch (gradient accumulation). transformers' form takes four
    more passes over the logits and keeps two float32 copies of them, the largest tensors of a training step by far.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(logits.device, torch.int64).reshape(-1)
    total = cross_entropy(logits.view(-1, vocab_size), shift_labels, ignore_index=ignore_index).sum()
    if num_items_in_batch is None:
        return total / (shift_labels != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
