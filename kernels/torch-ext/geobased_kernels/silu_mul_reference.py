"""silu(gate) * up in plain PyTorch: the truth that the Triton form must match."""

import torch
import torch.nn.functional as F

from .without_autocast import without_autocast


@without_autocast
def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [..., n] -> silu(gate) * up, computed in float32 (float64 for float64) and rounded once."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(compute_dtype)) * up.to(compute_dtype)).to(dtype)
