"""x * sigmoid(1.702 x) in plain PyTorch: the truth that the Triton form must match."""

import torch

from .without_autocast import without_autocast

SLOPE = 1.702


@without_autocast
def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """x [...] -> x * sigmoid(1.702 x), computed in float32 (float64 for float64) and rounded once."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (wide * torch.sigmoid(SLOPE * wide)).to(x.dtype)
