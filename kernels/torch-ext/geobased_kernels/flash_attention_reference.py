"""Softmax attention in plain PyTorch, all scores at once: the truth that the Triton form must match."""

import torch

from .without_autocast import without_autocast


@without_autocast
def flash_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """q [batch, seq_len, heads, head_dim]; k, v [batch, kv_len, kv_heads, head_dim] -> y like q.

    heads is a multiple of kv_heads: query head h reads key head h // (heads // kv_heads). With `causal` the last query is
    aligned with the last key. attention_mask [batch, kv_len] is 0 where a key is padding; a query that sees no key gives
    zeros. With `cu_seqlens` [n + 1] the batch is 1 and holds n sequences end to end. `softmax_scale` defaults to
    head_dim^-0.5. Memory grows with seq_len * kv_len.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return torch.cat(
            [
                flash_attention_reference(
                    q[:, start:end],
                    k[:, start:end],
                    v[:, start:end],
                    causal=causal,
                    attention_mask=None if attention_mask is None else attention_mask[:, start:end],
                    softmax_scale=softmax_scale,
                )
                for start, end in zip(bounds[:-1], bounds[1:], strict=True)
            ],
            dim=1,
        )

    batch, seq_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    allowed = q.new_ones(batch, 1, 1, seq_len, kv_len, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(kv_len - seq_len)
    if attention_mask is not None:
        allowed = allowed & attention_mask.to(q.device).bool()[:, None, None, None]
    # [batch, kv_heads, heads / kv_heads, ...]
    queries = q.to(compute_dtype).view(batch, seq_len, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    keys, values = (x.to(compute_dtype).transpose(1, 2)[:, :, None] for x in (k, v))
    scores = (queries @ keys.transpose(-1, -2) * softmax_scale).masked_fill(~allowed, torch.finfo(compute_dtype).min)
    weights = scores.softmax(-1).masked_fill(~allowed, 0.0)  # the second fill serves rows without any key
    y = (weights @ values).permute(0, 3, 1, 2, 4)
    return y.reshape(q.shape).to(q.dtype)
