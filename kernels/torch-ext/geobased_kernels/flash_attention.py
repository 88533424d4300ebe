"""Softmax attention in linear memory, differentiable, as one custom op for the Triton form, with or without a window.

    y_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j

over all keys, or over those up to its own position (`causal`). `sliding_window_attention` is the form with a window.
"""

import torch

from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .direct_call import direct_call
from .flash_attention_reference import flash_attention_reference
from .packed_sequences import check_cu_seqlens, sequence_bounds

MAX_TRITON_HEAD_DIM = 128


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """q [batch, seq_len, heads, head_dim]; k, v [batch, kv_len, kv_heads, head_dim] -> y like q.

    Args:
        causal: a query sees the keys up to its own position. kv_len may exceed seq_len (keys kept from before): the last query
            is aligned with the last key.
        attention_mask: [batch, kv_len], 0 where a key is padding. A query that sees no key gives zeros.
        cu_seqlens: [n + 1] bounds of n sequences packed end to end; batch is then 1 and kv_len equals seq_len.
        softmax_scale: head_dim^-0.5 unless given.
        backend: "auto", "triton" or "torch".

    heads may be a multiple of kv_heads (grouped queries): query head h reads key head h // (heads // kv_heads).
    Raises ValueError for shapes, dtypes or devices that do not fit together, and RuntimeError if `backend` cannot run here.

    Example:
        >>> q, k, v = torch.randn(3, 2, 577, 16, 64)
        >>> flash_attention(q, k, v).shape
        torch.Size([2, 577, 16, 64])
    """
    check_inputs(q, k, v, attention_mask, cu_seqlens)
    seq_len, kv_len = q.shape[1], k.shape[1]
    if causal and kv_len < seq_len:
        raise ValueError(f"with causal=True kv_len {kv_len} is less than seq_len {seq_len}: every query needs its own key")
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q)
    if resolve_attention_backend("flash_attention", backend, q) == "torch":
        return flash_attention_reference(
            *(q, k, v), causal=causal, attention_mask=attention_mask, cu_seqlens=cu_seqlens, softmax_scale=softmax_scale
        )
    return triton_attention(q, k, v, causal, None, attention_mask, cu_seqlens, softmax_scale)


# --- with or without a window -----------------------------------------------------------------------------------------


def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    window: int | None,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    softmax_scale: float | None,
) -> torch.Tensor:
    """The Triton form; a window needs causal=True."""
    key_mask = None if attention_mask is None else attention_mask.to(q.device).ne(0)
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens.to(q.device), q.shape[1])
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _run(q, k, v, causal, window, softmax_scale, key_mask, bounds)[0]


def resolve_attention_backend(op: str, backend: str, q: torch.Tensor) -> str:
    resolved = resolve_backend(backend, q)
    head_dim = q.shape[-1]
    if resolved == "torch" or head_dim <= MAX_TRITON_HEAD_DIM:
        return resolved
    limit = f"the Triton form takes head_dim up to {MAX_TRITON_HEAD_DIM}, not {head_dim}"
    return without_triton(op, backend, limit)


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Shapes, dtypes and devices that softmax attention needs, with or without a window."""
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}: it must be [batch, seq_len, heads, head_dim]")
    batch, seq_len, heads, head_dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: they must be equal")
    if k.dim() != 4 or (k.shape[0], k.shape[3]) != (batch, head_dim):
        raise ValueError(f"k and v have shape {tuple(k.shape)}: to fit q they must be [{batch}, kv_len, kv_heads, {head_dim}]")
    kv_len, kv_heads = k.shape[1:3]
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"q has {heads} heads and k and v have {kv_heads}: the first must be a multiple of the second")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: cast them to one")
    if not q.is_floating_point():
        raise ValueError(f"q, k and v have dtype {q.dtype}: it must be a floating point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v are on {q.device}, {k.device}, {v.device}: move them to one device")
    if attention_mask is not None and attention_mask.shape != (batch, kv_len):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be [batch, kv_len] = [{batch}, {kv_len}]"
        )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, seq_len)
        if kv_len != seq_len:
            raise ValueError(f"with cu_seqlens kv_len {kv_len} must equal seq_len {seq_len}")


@torch.library.custom_op("geobased::flash_attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> y like q and the base 2 logsumexp of each query's scores, float32 [batch, heads, seq_len]."""
    from . import flash_attention_triton

    return flash_attention_triton.forward(
        *(q, k, v), causal=causal, window=window, softmax_scale=softmax_scale, key_mask=key_mask, bounds=bounds
    )


@register_fake(_attention)
def _(q, k, v, causal, window, softmax_scale, key_mask, bounds):
    batch, seq_len, heads, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(batch, heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("geobased::flash_attention_backward", mutates_args=())
def _attention_backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    logsumexp: torch.Tensor,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv."""
    from . import flash_attention_backward_triton

    return flash_attention_backward_triton.backward(
        *(dy, q, k, v, y, logsumexp),
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        key_mask=key_mask,
        bounds=bounds,
    )


@register_fake(_attention_backward)
def _(dy, q, k, v, y, logsumexp, causal, window, softmax_scale, key_mask, bounds):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.causal, ctx.window, ctx.softmax_scale, key_mask, bounds = inputs
    ctx.save_for_backward(q, k, v, *output, key_mask, bounds)


def _backward(ctx, dy, _):
    q, k, v, y, logsumexp, key_mask, bounds = ctx.saved_tensors
    gradients = _run_backward(dy, q, k, v, y, logsumexp, ctx.causal, ctx.window, ctx.softmax_scale, key_mask, bounds)
    return *gradients, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
_run = direct_call(_attention, _setup_context, _backward)
_run_backward = direct_call(_attention_backward)
