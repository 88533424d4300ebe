"""Rotary embedding of queries and keys in plain PyTorch: the truth that the Triton form must match.

y = x * cos + rotate_half(x) * sin,    rotate_half((a, b)) = (-b, a), a and b the two halves of a head
"""

import torch

from .without_autocast import without_autocast


@without_autocast
def rotary_embedding_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [batch, seq_len, heads, head_dim]; cos, sin [batch or 1, seq_len, head_dim] -> q and k turned, in their dtype.

    Computed in float32 (float64 for float64) and rounded once.
    """
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(compute_dtype).unsqueeze(2), sin.to(compute_dtype).unsqueeze(2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        wide = x.to(compute_dtype)
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    return turn(q), turn(k)
