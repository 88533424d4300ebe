"""CLIP's activation x * sigmoid(1.702 x) in one pass over memory, differentiable, as one custom op for the Triton form.

The sigmoid approximation of GELU of Hendrycks and Gimpel 2016 (section 2). Written as three operations of PyTorch it moves seven
tensors through memory in place of two.
"""

import torch

from .backend import resolve_backend
from .compile_support import register_fake
from .direct_call import direct_call
from .quick_gelu_reference import quick_gelu_reference


def quick_gelu(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x [...] -> x * sigmoid(1.702 x), computed in float32 (float64 for float64) and rounded once.

    `backend` is "auto", "triton" or "torch". Raises ValueError for a dtype that is not floating point.

    Example:
        >>> quick_gelu(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: it must be a floating point dtype")
    if x.numel() == 0 or resolve_backend(backend, x) == "torch":
        return quick_gelu_reference(x)
    return _run(x)


@torch.library.custom_op("geobased::quick_gelu", mutates_args=())
def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    from . import quick_gelu_triton

    return quick_gelu_triton.forward(x)


@register_fake(_quick_gelu)
def _(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("geobased::quick_gelu_backward", mutates_args=())
def _quick_gelu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """-> dx."""
    from . import quick_gelu_triton

    return quick_gelu_triton.backward(dy, x)


@register_fake(_quick_gelu_backward)
def _(dy, x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _run_backward(dy, *ctx.saved_tensors)


_quick_gelu.register_autograd(_backward, setup_context=_setup_context)
_run = direct_call(_quick_gelu, _setup_context, _backward)
_run_backward = direct_call(_quick_gelu_backward)
