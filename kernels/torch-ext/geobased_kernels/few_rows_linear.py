"""A linear layer for a batch of a few rows, with the norm before it and the gate after it, as a custom op for the Triton form.

Decoding one sequence is a chain of such layers, each bound by reading its weight; what a norm or a gate costs there is not its
work but one more kernel. There is no gradient in the Triton form.
"""

import torch

from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .few_rows_linear_reference import few_rows_linear_reference

MAX_TRITON_ROWS = 4
MAX_TRITON_INPUTS = 8192


def few_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    swiglu: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [rows, n_in]; weight [n_out, n_in] -> y [rows, n_out] in weight's dtype, new_residual.

    Args:
        bias: [n_out]; not together with `swiglu`.
        residual, norm_weight: [rows, n_in] and [n_in]: the layer reads the RMSNorm of residual + x, and new_residual is that sum
            in residual's dtype. Without them the layer reads x, and new_residual is None.
        eps: of the norm.
        swiglu: the weight's first half is a gate: y [rows, n_out / 2] is silu(gate) * (second half's output).
        backend: "auto", "triton" (1 to 4 rows, up to 8192 inputs) or "torch".

    Raises ValueError for shapes, dtypes or devices that do not fit.

    Example:
        >>> x, residual = torch.randn(1, 64), torch.randn(1, 64)
        >>> y, residual = few_rows_linear(x, torch.randn(256, 64), residual=residual, norm_weight=torch.ones(64), swiglu=True)
        >>> y.shape
        torch.Size([1, 128])
    """
    _check_inputs(x, weight, bias, residual, norm_weight, swiglu)
    if x.numel() == 0 or weight.numel() == 0 or _resolve_backend(backend, x) == "torch":
        return few_rows_linear_reference(x, weight, bias, residual=residual, norm_weight=norm_weight, eps=eps, swiglu=swiglu)
    y, new_residual = _few_rows_linear(x, weight, bias, residual, norm_weight, eps, swiglu)
    return y, None if residual is None else new_residual


def _resolve_backend(backend: str, x: torch.Tensor) -> str:
    resolved = resolve_backend(backend, x)
    if resolved == "torch" or (x.shape[0] <= MAX_TRITON_ROWS and x.shape[1] <= MAX_TRITON_INPUTS):
        return resolved
    limit = f"the Triton form takes up to {MAX_TRITON_ROWS} rows and {MAX_TRITON_INPUTS} inputs, not {tuple(x.shape)}"
    return without_triton("few_rows_linear", backend, limit)


def _check_inputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    swiglu: bool,
) -> None:
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1] or not weight.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}: give [rows, n_in] and a contiguous [n_out, n_in]"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or swiglu):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: it must be [{weight.shape[0]}], and swiglu takes none")
    if swiglu and weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows: swiglu needs an even number")
    if (residual is None) != (norm_weight is None):
        raise ValueError("residual and norm_weight go together: give both or none")
    fits = residual is None or (residual.shape == x.shape and residual.is_contiguous())
    if not fits or (norm_weight is not None and norm_weight.shape != x.shape[1:]):
        shapes = [None if t is None else tuple(t.shape) for t in (residual, norm_weight)]
        raise ValueError(
            f"residual has shape {shapes[0]} and norm_weight {shapes[1]}: they must be contiguous"
            f" {tuple(x.shape)} and {tuple(x.shape[1:])}"
        )
    tensors = [t for t in (x, weight, bias, residual, norm_weight) if t is not None]
    if any(not t.is_floating_point() for t in tensors) or len({t.device for t in tensors}) > 1:
        kinds = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise ValueError(f"the tensors are {kinds}: they must be of floating point dtypes on one device")


@torch.library.custom_op("geobased::few_rows_linear", mutates_args=())
def _few_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    swiglu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import few_rows_linear_triton

    return few_rows_linear_triton.forward(x, weight, bias, residual, norm_weight, eps, swiglu)


@register_fake(_few_rows_linear)
def _(x, weight, bias, residual, norm_weight, eps, swiglu):
    y = torch.empty(x.shape[0], weight.shape[0] // (2 if swiglu else 1), dtype=weight.dtype, device=x.device)
    return y, y.new_empty(0) if residual is None else torch.empty_like(residual)
