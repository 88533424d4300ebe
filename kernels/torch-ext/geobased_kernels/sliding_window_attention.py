"""Causal sliding window attention, differentiable; its Triton form is that of softmax attention with a window.

    y_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j,    j = i - window + 1 .. i

`window` counts the token itself (Hugging Face's `sliding_window`; flash-attn's `(window - 1, 0)`). Rotary embeddings are
applied before, to q and k.
"""

import torch

from .flash_attention import check_inputs, resolve_attention_backend, triton_attention
from .sliding_window_attention_reference import sliding_window_attention_reference


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
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: it counts the token itself")
    check_inputs(q, k, v, attention_mask, cu_seqlens)
    seq_len, kv_len = q.shape[1], k.shape[1]
    if kv_len < seq_len:
        raise ValueError(f"kv_len {kv_len} is less than seq_len {seq_len}: every query needs its own key among k")
    if q.numel() == 0:
        return torch.zeros_like(q)
    if resolve_attention_backend("sliding_window_attention", backend, q) == "torch":
        return sliding_window_attention_reference(
            q,
            k,
            v,
            window=min(window, kv_len),
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )
    return triton_attention(q, k, v, True, window, attention_mask, cu_seqlens, softmax_scale)
