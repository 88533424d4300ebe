"""Rotary embedding of queries and keys in one launch, differentiable, as one custom op for the Triton form.

    y = x * cos + rotate_half(x) * sin,    rotate_half((a, b)) = (-b, a), a and b the two halves of a head

Nothing is saved for the backward pass but cos and sin: it is the transposed turn of the gradients.
"""

import torch

from .backend import resolve_backend
from .compile_support import register_fake
from .direct_call import direct_call
from .rotary_embedding_reference import rotary_embedding_reference


def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [batch, seq_len, heads, head_dim]; cos, sin [batch or 1, seq_len, head_dim] -> q and k turned, in their dtype.

    cos and sin may have another floating point dtype than q and k, and get no gradient. Products are taken in float32
    (float64 for float64) and rounded once. `backend` is "auto", "triton" or "torch".

    Raises ValueError for shapes, dtypes or devices that do not fit.

    Example:
        >>> q, k = torch.randn(2, 2, 10, 4, 64)
        >>> angles = torch.arange(10.0)[None, :, None] * torch.ones(64)
        >>> q, k = rotary_embedding(q, k, angles.cos(), angles.sin())
        >>> q.shape
        torch.Size([2, 10, 4, 64])
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape[-1] % 2:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}: both must be [batch, seq_len, heads, head_dim], head_dim even"
        )
    batch, seq_len, _, head_dim = q.shape
    if cos.shape != sin.shape or (cos.shape != (1, seq_len, head_dim) and cos.shape != (batch, seq_len, head_dim)):
        raise ValueError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}: to fit q they must be"
            f" [{batch} or 1, {seq_len}, {head_dim}]"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q and k have dtypes {q.dtype} and {k.dtype}: cast them to one floating point dtype")
    if len({tensor.device for tensor in (q, k, cos, sin)}) > 1:
        raise ValueError(f"q, k, cos and sin are on {q.device}, {k.device}, {cos.device}, {sin.device}: move them to one device")
    cos, sin = cos.detach(), sin.detach()
    if q.numel() == 0 or resolve_backend(backend, q) == "torch":
        return rotary_embedding_reference(q, k, cos, sin)
    return _run(q, k, cos, sin, False)


@torch.library.custom_op("geobased::rotary_embedding", mutates_args=())
def _turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned; with `transposed`, by the transposed matrices, as gradients are."""
    from . import rotary_embedding_triton

    return rotary_embedding_triton.turn(q, k, cos, sin, transposed)


@register_fake(_turn)
def _(q, k, cos, sin, transposed):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    return *_run(dq, dk, *ctx.saved_tensors, not ctx.transposed), None, None, None


_turn.register_autograd(_backward, setup_context=_setup_context)
_run = direct_call(_turn, _setup_context, _backward)
