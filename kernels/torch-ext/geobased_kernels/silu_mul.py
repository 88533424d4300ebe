"""silu(gate) * up in one pass over memory, differentiable, as one custom op for the Triton form.

The middle of a SwiGLU MLP. Only gate and up are saved for the backward pass, which is one pass too.
"""

import torch

from .backend import resolve_backend
from .compile_support import register_fake
from .direct_call import direct_call
from .silu_mul_reference import silu_mul_reference


def silu_mul(gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """gate, up [..., n] -> silu(gate) * up, computed in float32 (float64 for float64) and rounded once.

    gate and up may be the two halves of one [..., 2 * n] tensor; nothing is copied. `backend` is "auto", "triton" or "torch".

    Raises ValueError for shapes, dtypes or devices that do not fit.

    Example:
        >>> gate, up = torch.randn(2, 5, 2 * 64).chunk(2, dim=-1)
        >>> silu_mul(gate, up).shape
        torch.Size([2, 5, 64])
    """
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}: both must be [..., n]")
    for name, tensor in (("gate", gate), ("up", up)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: it must be a floating point dtype")
    if gate.device != up.device:
        raise ValueError(f"gate is on {gate.device} and up on {up.device}: move them to one device")
    if gate.dtype != up.dtype:
        dtype = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(dtype), up.to(dtype)
    if gate.numel() == 0 or resolve_backend(backend, gate) == "torch":
        return silu_mul_reference(gate, up)
    return _run(gate, up)


@torch.library.custom_op("geobased::silu_mul", mutates_args=())
def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from . import silu_mul_triton

    return silu_mul_triton.forward(gate, up)


@register_fake(_silu_mul)
def _(gate, up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("geobased::silu_mul_backward", mutates_args=())
def _silu_mul_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dgate, dup."""
    from . import silu_mul_triton

    return silu_mul_triton.backward(dy, gate, up)


@register_fake(_silu_mul_backward)
def _(dy, gate, up):
    return tuple(torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _run_backward(dy, *ctx.saved_tensors)


_silu_mul.register_autograd(_backward, setup_context=_setup_context)
_run = direct_call(_silu_mul, _setup_context, _backward)
_run_backward = direct_call(_silu_mul_backward)
