"""Causal sliding window attention, differentiable, as one custom op for the Triton form.

    y_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j,    j = i - window + 1 .. i

`window` counts the token itself (Hugging Face's `sliding_window`; flash-attn's `(window - 1, 0)`). Rotary embeddings are
applied before, to q and k.
"""

import torch

from .backend import resolve_backend, without_triton
from .direct_call import direct_call
from .flash_attention import check_heads
from .packed_sequences import check_cu_seqlens, sequence_bounds
from .sliding_window_attention_reference import sliding_window_attention_reference

MAX_TRITON_HEAD_DIM = 128


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """q [batch, seq_len, heads, head_dim]; k, v [batch, kv_len, kv_heads, head_dim] -> y like q.

    Args:
        window: keys that a query sees, itself included; a window of kv_len or more is plain causal attention.
        attention_mask: [batch, kv_len], 0 where a key is padding. A query that sees no key gives zeros.
        cu_seqlens: [n + 1] bounds of n sequences packed end to end; batch is then 1 and kv_len equals seq_len.
        softmax_scale: head_dim^-0.5 unless given.
        backend: "auto", "triton" or "torch".

    kv_len may exceed seq_len (keys kept from before): the last query is aligned with the last key. heads may be a multiple of
    kv_heads (grouped queries): query head h reads key head h // (heads // kv_heads).

    Example:
        >>> q, k, v = torch.randn(3, 2, 100, 4, 64)
        >>> sliding_window_attention(q, k, v, window=16).shape
        torch.Size([2, 100, 4, 64])
    """
    _check_inputs(q, k, v, window, attention_mask, cu_seqlens)
    if q.numel() == 0:
        return torch.zeros_like(q)
    if _resolve_backend(backend, q) == "torch":
        return sliding_window_attention_reference(
            q,
            k,
            v,
            window=min(window, k.shape[1]),
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )
    key_mask = None if attention_mask is None else attention_mask.to(q.device).ne(0)
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens.to(q.device), q.shape[1])
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _run(q, k, v, window, softmax_scale, key_mask, bounds)[0]


def _resolve_backend(backend: str, q: torch.Tensor) -> str:
    resolved = resolve_backend(backend, q)
    head_dim = q.shape[-1]
    if resolved == "torch" or head_dim <= MAX_TRITON_HEAD_DIM:
        return resolved
    limit = f"the Triton form takes head_dim up to {MAX_TRITON_HEAD_DIM}, not {head_dim}"
    return without_triton("sliding_window_attention", backend, limit)


def _check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: it counts the token itself")
    check_heads(q, k, v, attention_mask)
    seq_len, kv_len = q.shape[1], k.shape[1]
    if kv_len < seq_len:
        raise ValueError(f"kv_len {kv_len} is less than seq_len {seq_len}: every query needs its own key among k")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[0], seq_len)
        if kv_len != seq_len:
            raise ValueError(f"with cu_seqlens kv_len {kv_len} must equal seq_len {seq_len}")


@torch.library.custom_op("geobased::sliding_window_attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> y like q and the base 2 logsumexp of each query's scores, float32 [batch, heads, seq_len]."""
    from . import sliding_window_attention_triton

    return sliding_window_attention_triton.forward(q, k, v, window, softmax_scale, key_mask, bounds)


@_attention.register_fake
def _(q, k, v, window, softmax_scale, key_mask, bounds):
    batch, seq_len, heads, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(batch, heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("geobased::sliding_window_attention_backward", mutates_args=())
def _attention_backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    logsumexp: torch.Tensor,
    window: int,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv."""
    from . import sliding_window_attention_triton

    return sliding_window_attention_triton.backward(dy, q, k, v, y, logsumexp, window, softmax_scale, key_mask, bounds)


@_attention_backward.register_fake
def _(dy, q, k, v, y, logsumexp, window, softmax_scale, key_mask, bounds):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.window, ctx.softmax_scale, key_mask, bounds = inputs
    ctx.save_for_backward(q, k, v, *output, key_mask, bounds)


def _backward(ctx, dy, _):
    q, k, v, y, logsumexp, key_mask, bounds = ctx.saved_tensors
    gradients = _run_backward(dy, q, k, v, y, logsumexp, ctx.window, ctx.softmax_scale, key_mask, bounds)
    return *gradients, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
_run = direct_call(_attention, _setup_context, _backward)
_run_backward = direct_call(_attention_backward)
