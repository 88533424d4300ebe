"""Residual add and RMSNorm in plain PyTorch: the truth that the Triton form must match.

new_residual = residual + x,    normed = new_residual / sqrt(mean(new_residual^2) + eps) * weight
"""

import torch
import torch.nn.functional as F


def add_rms_norm_reference(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., hidden] or None; residual [..., hidden]; weight [hidden] -> normed in weight's dtype, new_residual in residual's.

    With `inplace` the sum is written to residual, which is returned as new_residual. Without x new_residual is residual.
    """
    if x is not None:
        # the sum is rounded once, to residual's dtype, also where x has the wider one
        residual = residual.add_(x) if inplace else (residual + x).to(residual.dtype)
    # the residual may be float32 in a bfloat16 model: normalise in its precision, hand on in the model's
    hidden = residual.float() if residual.dtype in (torch.float16, torch.bfloat16) else residual
    return F.rms_norm(hidden, weight.shape, weight.to(hidden.dtype), eps).to(weight.dtype), residual
