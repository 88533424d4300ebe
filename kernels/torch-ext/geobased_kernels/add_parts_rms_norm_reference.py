"""A linear layer whose inputs are cut into parts, and the norm that adds the parts up, in plain PyTorch."""

import torch

from .add_rms_norm_reference import add_rms_norm_reference


def linear_in_parts_reference(x: torch.Tensor, weight: torch.Tensor, parts: int) -> torch.Tensor:
    """x [rows, n_in]; weight [n_out, n_in] -> [parts, rows, n_out], in float32 or wider."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    pieces = zip(x.to(dtype).chunk(parts, 1), weight.to(dtype).chunk(parts, 1), strict=True)
    return torch.stack([piece @ part.t() for piece, part in pieces])


def add_parts_rms_norm_reference(
    parts: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """parts [any number, rows, hidden]; bias, weight [hidden] -> the norm of residual [rows, hidden], to which all is added."""
    added = parts.sum(0) if bias is None else parts.sum(0) + bias.to(parts.dtype)
    return add_rms_norm_reference(added, residual, weight, eps, inplace=True)[0]
