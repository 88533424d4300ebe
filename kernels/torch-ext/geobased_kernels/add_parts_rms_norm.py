"""A linear layer in parts, and the RMSNorm that adds the parts to a residual, as a custom op for the Triton form.

A layer with few outputs and a small batch has too few tiles to keep a GPU busy, and each of them is a long chain of products.
Cut along its inputs it has several times as many, shorter ones, and the norm that follows in a pre-norm decoder adds the parts
up where it would have read the sum:

    parts = linear_in_parts(x, weight, 2)
    normed = add_parts_rms_norm(parts, bias, residual, norm_weight, eps)     # residual += parts.sum(0) + bias

Parts are float32 and are added in a fixed order: the same bits every time. There is no gradient in the Triton form.
"""

import torch

from .add_parts_rms_norm_reference import add_parts_rms_norm_reference, linear_in_parts_reference
from .add_rms_norm import MAX_TRITON_HIDDEN
from .backend import resolve_backend, without_triton
from .compile_support import register_fake


def linear_in_parts(x: torch.Tensor, weight: torch.Tensor, parts: int) -> torch.Tensor:
    """x [rows, n_in]; weight [n_out, n_in] -> [parts, rows, n_out], float32 (float64 for float64): x @ weight.T over `parts`
    equal cuts of n_in. The matrix products are PyTorch's.

    Raises ValueError for shapes that do not fit and parts that do not divide n_in.

    Example:
        >>> linear_in_parts(torch.randn(2, 256), torch.randn(64, 256), 2).shape
        torch.Size([2, 2, 64])
    """
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}: give [rows, n_in] and [n_out, n_in]")
    if parts < 1 or x.shape[1] % parts:
        raise ValueError(f"parts={parts} must divide the number of inputs, {x.shape[1]}")
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return linear_in_parts_reference(x, weight, parts)
    cut_x, cut_weight = x.unflatten(1, (parts, -1)), weight.unflatten(1, (parts, -1))
    return torch.bmm(cut_x.transpose(0, 1), cut_weight.permute(1, 2, 0), out_dtype=torch.float32)


def add_parts_rms_norm(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Adds parts [any number, rows, hidden] and bias [hidden] to residual [rows, hidden], in place -> the residual's RMSNorm
    times weight [hidden], in weight's dtype.

    Raises ValueError for shapes that do not fit.

    Example:
        >>> parts, residual = torch.randn(2, 3, 64), torch.randn(3, 64)
        >>> add_parts_rms_norm(parts, None, residual, torch.ones(64), 1e-5).shape
        torch.Size([3, 64])
    """
    fits = parts.dim() == 3 and residual.shape == parts.shape[1:] and weight.shape == parts.shape[2:]
    if not fits or (bias is not None and bias.shape != weight.shape):
        shapes = [None if t is None else tuple(t.shape) for t in (parts, bias, residual, weight)]
        raise ValueError(
            f"parts, bias, residual and weight have shapes {shapes}: give [any number, rows, hidden], [hidden] or None,"
            " [rows, hidden] and [hidden]"
        )
    if not parts.is_contiguous() or not residual.is_contiguous():
        raise ValueError("parts and residual must be contiguous: residual is written in place")
    resolved = resolve_backend(backend, parts)
    if resolved == "triton" and weight.shape[0] > MAX_TRITON_HIDDEN:
        limit = f"the Triton form takes rows of up to {MAX_TRITON_HIDDEN} numbers, not {weight.shape[0]}"
        resolved = without_triton("add_parts_rms_norm", backend, limit)
    if parts.numel() == 0 or resolved == "torch":
        return add_parts_rms_norm_reference(parts, bias, residual, weight, eps)
    return _add_parts_rms_norm(parts, bias, residual, weight, eps)


@torch.library.custom_op("geobased::add_parts_rms_norm", mutates_args={"residual"})
def _add_parts_rms_norm(
    parts: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    from . import add_parts_rms_norm_triton

    return add_parts_rms_norm_triton.add_parts_rms_norm(parts, bias, residual, weight, eps)


@register_fake(_add_parts_rms_norm)
def _(parts, bias, residual, weight, eps):
    return torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
