# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Linformer's attention (Wang et al. 2020): keys and values projected along the sequence to a fixed number of each."""

import torch


def linformer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    e: torch.Tensor,
    f: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q (e^T k)^T / sqrt(head_dim)) (f^T v), linear in the sequence length.

    It is not causal, and cannot be made so by a mask on the scores: e^T k holds later keys. It is permutation equivariant only
    where all rows of e, and all rows of f, are alike.

    Args:
        q, k: [batch, heads, seq_len, head_dim].
        v: [batch, heads, seq_len, width].
        e, f: [longest length, projected length]; a shorter input uses the first rows.
        attention_mask: [batch, seq_len], 0 where an element is padding. The others use the rows that they would use if the
            padding were not there, so that padding changes nothing, on whichever side it is.

    Returns:
        Like v.

    Raises:
        ValueError: an input longer than e and f have rows, or shapes that do not fit.
    """
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [batch, heads, seq_len, head_dim],"
            " v of any width"
        )
    batch, _, seq_len, head_dim = k.shape
    if e.dim() != 2 or e.shape != f.shape:
        raise ValueError(f"e {tuple(e.shape)} and f {tuple(f.shape)} must be [longest length, projected length], both alike")
    if seq_len > e.shape[0]:
        raise ValueError(
            f"the input has {seq_len} elements but e and f have {e.shape[0]} rows: raise max_linformer_len, or shorten it"
        )
    if attention_mask is None:
        keys, values = e[:seq_len].T @ k, f[:seq_len].T @ v
    else:
        if attention_mask.shape != (batch, seq_len):
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must be [batch, seq_len] = {(batch, seq_len)}")
        real = attention_mask != 0
        row = (real.cumsum(1) - 1).clamp(min=0)
        padding = ~real[:, None, :, None]
        keys = e[row].transpose(1, 2).unsqueeze(1) @ k.masked_fill(padding, 0.0)
        values = f[row].transpose(1, 2).unsqueeze(1) @ v.masked_fill(padding, 0.0)
    return (q @ keys.transpose(-1, -2) * head_dim**-0.5).softmax(-1) @ values


__all__ = ["linformer_attention"]
