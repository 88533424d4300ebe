"""Residual add and RMSNorm in one pass over memory, differentiable, as custom ops for the Triton form.

    new_residual = residual + x,    normed = new_residual / sqrt(mean(new_residual^2) + eps) * weight

What stands between two blocks of a pre-norm decoder: the output of one is added to the residual stream, the next one reads
the stream's norm. The backward pass takes the gradients of both results in one pass too and saves only new_residual and one
number per row.
"""

import torch

from .add_rms_norm_reference import add_rms_norm_reference
from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .direct_call import direct_call

MAX_TRITON_HIDDEN = 16384


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., hidden]; weight [hidden] -> normed in weight's dtype, new_residual in residual's dtype.

    Args:
        x: what is added to the residual, or None: then only residual's norm is taken, and new_residual is residual.
        residual: may be wider than x and weight (float32 in a bfloat16 model). Sums of squares are taken in float32 (in
            float64 for a float64 residual), of new_residual as it was rounded.
        inplace: write new_residual to residual's memory (inference only).
        backend: "auto", "triton" or "torch".

    Raises ValueError for shapes, dtypes or devices that do not fit, and for `inplace` where gradients are asked for.

    Example:
        >>> x, residual = torch.randn(2, 5, 64, dtype=torch.bfloat16), torch.randn(2, 5, 64)
        >>> normed, residual = add_rms_norm(x, residual, torch.ones(64, dtype=torch.bfloat16), 1e-5)
        >>> normed.dtype, residual.dtype
        (torch.bfloat16, torch.float32)
    """
    _check_inputs(x, residual, weight, inplace)
    if residual.numel() == 0 or _resolve_backend(backend, residual, weight) == "torch":
        return add_rms_norm_reference(x, residual, weight, eps, inplace=inplace)
    if x is None:
        if torch.is_grad_enabled() and residual.requires_grad and not torch.compiler.is_compiling():
            return _RMSNormBesideResidual.apply(residual, weight, eps)[:2]
        return _run_norm(residual, weight, eps)[0], residual
    if inplace:
        return _add_rms_norm_(x, residual, weight, eps), residual
    normed, new_residual, _ = _run_add(x, residual, weight, eps)
    return normed, new_residual


def _resolve_backend(backend: str, residual: torch.Tensor, weight: torch.Tensor) -> str:
    resolved = resolve_backend(backend, residual)
    if resolved == "torch" or residual.shape[-1] <= MAX_TRITON_HIDDEN:
        return resolved
    limit = f"the Triton form takes rows of up to {MAX_TRITON_HIDDEN} numbers, not {residual.shape[-1]}"
    return without_triton("add_rms_norm", backend, limit)


def _check_inputs(x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, inplace: bool) -> None:
    if residual.dim() == 0 or weight.shape != residual.shape[-1:]:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} and weight {tuple(weight.shape)}: give [..., hidden] and [hidden]"
        )
    if x is not None and x.shape != residual.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and residual {tuple(residual.shape)}: both must be [..., hidden]")
    tensors = {"residual": residual, "weight": weight} | ({} if x is None else {"x": x})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: it must be a floating point dtype")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{devices}: move them to one device")
    if inplace:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            raise ValueError("inplace=True overwrites what the backward pass needs: use torch.no_grad() or inplace=False")
        if not residual.is_contiguous():
            raise ValueError("inplace=True needs a contiguous residual: call residual.contiguous() first or use inplace=False")


@torch.library.custom_op("geobased::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> normed, new_residual, and the reciprocal root mean square of each row, float32 [rows]."""
    from . import add_rms_norm_triton

    return add_rms_norm_triton.forward(x, residual, weight, eps)


@register_fake(_add_rms_norm)
def _(x, residual, weight, eps):
    rows = residual.numel() // residual.shape[-1]
    new_residual = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    return (*_normed_and_rms(residual, weight, rows, new_residual),)


@torch.library.custom_op("geobased::rms_norm", mutates_args=())
def _rms_norm(residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> normed, and the reciprocal root mean square of each row, float32 [rows]."""
    from . import add_rms_norm_triton

    normed, _, reciprocal = add_rms_norm_triton.forward(None, residual, weight, eps)
    return normed, reciprocal


@register_fake(_rms_norm)
def _(residual, weight, eps):
    rows = residual.numel() // residual.shape[-1]
    return _normed_and_rms(residual, weight, rows)


def _normed_and_rms(residual, weight, rows, *between):
    normed = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
    return normed, *between, torch.empty(rows, dtype=torch.float32, device=residual.device)


@torch.library.custom_op("geobased::add_rms_norm_", mutates_args={"residual"})
def _add_rms_norm_(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x -> normed."""
    from . import add_rms_norm_triton

    return add_rms_norm_triton.forward(x, residual, weight, eps, inplace=True)[0]


@register_fake(_add_rms_norm_)
def _(x, residual, weight, eps):
    return torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)


@torch.library.custom_op("geobased::add_rms_norm_backward", mutates_args=())
def _add_rms_norm_backward(
    dnormed: torch.Tensor,
    dnew_residual: torch.Tensor | None,
    new_residual: torch.Tensor,
    weight: torch.Tensor,
    reciprocal: torch.Tensor,
    x_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dresidual, the same in x_dtype (empty without one), dweight."""
    from . import add_rms_norm_triton

    return add_rms_norm_triton.backward(dnormed, dnew_residual, new_residual, weight, reciprocal, x_dtype)


@register_fake(_add_rms_norm_backward)
def _(dnormed, dnew_residual, new_residual, weight, reciprocal, x_dtype):
    dresidual, dweight = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (new_residual, weight))
    dx = new_residual.new_empty(0) if x_dtype is None else torch.empty_like(dresidual, dtype=x_dtype)
    return dresidual, dx, dweight


def _gradients(dnormed, dnew_residual, saved, x_dtype=None):
    """-> dx, dresidual, dweight; None where neither result is used. Without x_dtype dx is dresidual."""
    new_residual, weight, reciprocal = saved
    x_dtype = x_dtype or new_residual.dtype
    if dnormed is None:
        return None if dnew_residual is None else dnew_residual.to(x_dtype), dnew_residual, None
    cast_to = None if x_dtype == new_residual.dtype else x_dtype
    dresidual, dx, dweight = _run_backward(dnormed, dnew_residual, new_residual, weight, reciprocal, cast_to)
    return dresidual if cast_to is None else dx, dresidual, dweight


def _setup_add_context(ctx, inputs, output) -> None:
    x, _, weight, _ = inputs
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)  # a result that nobody uses costs no pass over a tensor of zeros
    ctx.save_for_backward(output[1], weight, output[2])


def _add_backward(ctx, dnormed, dnew_residual, _):
    return *_gradients(dnormed, dnew_residual, ctx.saved_tensors, ctx.x_dtype), None


def _setup_norm_context(ctx, inputs, output) -> None:
    residual, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, weight, output[1])


def _norm_backward(ctx, dnormed, _):
    return *_gradients(dnormed, None, ctx.saved_tensors)[1:], None


_add_rms_norm.register_autograd(_add_backward, setup_context=_setup_add_context)
_rms_norm.register_autograd(_norm_backward, setup_context=_setup_norm_context)
_run_add = direct_call(_add_rms_norm, _setup_add_context, _add_backward)
_run_norm = direct_call(_rms_norm, _setup_norm_context, _norm_backward)
_run_backward = direct_call(_add_rms_norm_backward)


class _RMSNormBesideResidual(torch.autograd.Function):
    """Hands residual on beside its norm, so that the backward kernel adds the two gradients: a custom op may not return its
    input, and autograd's own sum would be one more pass over the residual."""

    @staticmethod
    def forward(residual, weight, eps):
        normed, reciprocal = _run_norm(residual, weight, eps)
        return normed, residual.view_as(residual), reciprocal  # a view: an input returned as it is cannot be saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(output[1], inputs[1], output[2])

    @staticmethod
    def backward(ctx, dnormed, dresidual, _):
        return *_gradients(dnormed, dresidual, ctx.saved_tensors)[1:], None
