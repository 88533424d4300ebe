"""Cross entropy of each token in plain PyTorch: the truth that the Triton form must match."""

import torch
import torch.nn.functional as F

from .without_autocast import without_autocast


@without_autocast
def cross_entropy_reference(logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
    """logits [..., vocab_size], labels [...] -> logsumexp(logits) - logits[label], float32 (float64 for float64) [...].

    Zero where the label is ignore_index.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    return losses.view(labels.shape)
