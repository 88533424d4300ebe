"""A linear layer with its neighbours, for a batch of a few rows, in plain PyTorch."""

import torch
import torch.nn.functional as F

from .add_rms_norm_reference import add_rms_norm_reference
from .silu_mul_reference import silu_mul_reference


def few_rows_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    swiglu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [rows, n_in]; weight [n_out, n_in] -> y [rows, n_out], new_residual.

    With residual [rows, n_in] and norm_weight [n_in] the layer reads the norm of residual + x, which is new_residual. With
    `swiglu` the weight's halves are a gate and its partner, and y [rows, n_out / 2] is silu(gate) * partner.
    """
    if residual is not None and norm_weight is not None:
        x, residual = add_rms_norm_reference(x, residual, norm_weight, eps)
    y = F.linear(x, weight, bias)
    if swiglu:
        gate, partner = y.chunk(2, dim=-1)
        y = silu_mul_reference(gate, partner)
    return y, residual
