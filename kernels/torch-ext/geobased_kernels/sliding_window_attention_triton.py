"""Triton form of causal sliding window attention: the softmax attention kernels with a window."""

import torch

from . import flash_attention_backward_triton, flash_attention_triton


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [batch, seq_len, heads, head_dim]; k, v [batch, kv_len, kv_heads, head_dim]; key_mask bool [batch, kv_len]; bounds
    int32 [2, seq_len], start and end of each token's sequence -> y like q, logsumexp float32 [batch, heads, seq_len]."""
    return flash_attention_triton.forward(
        *(q, k, v), causal=True, window=window, softmax_scale=softmax_scale, key_mask=key_mask, bounds=bounds
    )


def backward(
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
    """Arguments as of `forward`, dy like y -> dq, dk, dv."""
    return flash_attention_backward_triton.backward(
        *(dy, q, k, v, y, logsumexp),
        causal=True,
        window=window,
        softmax_scale=softmax_scale,
        key_mask=key_mask,
        bounds=bounds,
    )
