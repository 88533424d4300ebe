"""Causal sliding window attention in plain PyTorch: the truth that the Triton form must match.

Query i attends to keys i - window + 1 .. i: `window` counts the token itself. Queries are cut into blocks, each of which sees
only the keys its window can reach, so memory grows with seq_len * window and never with seq_len^2.
"""

import torch
import torch.nn.functional as F

from .without_autocast import without_autocast


@without_autocast
def sliding_window_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    block_size: int = 128,
) -> torch.Tensor:
    """q [batch, seq_len, heads, head_dim]; k, v [batch, kv_len, kv_heads, head_dim] -> y like q.

    heads is a multiple of kv_heads: query head h reads key head h // (heads // kv_heads). kv_len may exceed seq_len (keys kept
    from before): the last query is aligned with the last key. attention_mask [batch, kv_len] is 0 where a key is padding; a
    query that sees no key at all gives zeros. With `cu_seqlens` [n + 1] the batch is 1 and holds n sequences end to end.
    `softmax_scale` defaults to head_dim^-0.5.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return torch.cat(
            [
                sliding_window_attention_reference(
                    q[:, start:end],
                    k[:, start:end],
                    v[:, start:end],
                    window=window,
                    attention_mask=None if attention_mask is None else attention_mask[:, start:end],
                    softmax_scale=softmax_scale,
                    block_size=block_size,
                )
                for start, end in zip(bounds[:-1], bounds[1:], strict=True)
            ],
            dim=1,
        )

    batch, seq_len, heads, head_dim = q.shape
    if k.shape[2] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    if seq_len == 0:
        return torch.zeros_like(q)
    kv_len = k.shape[1]
    softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    block = min(block_size, seq_len)
    num_blocks = -(-seq_len // block)
    reach = block + window - 1  # keys that one block of queries can see

    # pad so that block n sees keys n * block .. n * block + reach - 1 of the padded axis
    tail = num_blocks * block - seq_len
    head = window - 1 - (kv_len - seq_len)
    if head < 0:  # older keys than any query can reach
        k, v = k[:, -head:], v[:, -head:]
        attention_mask = None if attention_mask is None else attention_mask[:, -head:]
        head = 0
    visible = q.new_ones(batch, k.shape[1], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    visible = F.pad(visible, (head, tail)).unfold(1, reach, block)[:, None, :, None]  # [batch, 1, blocks, 1, reach]
    # [batch, heads, blocks, ...]
    keys, values = (
        F.pad(x.to(compute_dtype), (0, 0, 0, 0, head, tail)).unfold(1, reach, block).permute(0, 2, 1, 3, 4) for x in (k, v)
    )
    queries = F.pad(q.to(compute_dtype), (0, 0, 0, 0, 0, tail)).view(batch, num_blocks, block, heads, head_dim)
    queries = queries.permute(0, 3, 1, 2, 4)
    offset = torch.arange(reach, device=q.device) - torch.arange(block, device=q.device)[:, None]
    allowed = (offset >= 0) & (offset < window) & visible
    scores = (queries @ keys * softmax_scale).masked_fill(~allowed, torch.finfo(compute_dtype).min)
    weights = scores.softmax(-1).masked_fill(~allowed, 0.0)  # the second fill serves rows without any key
    y = weights @ values.transpose(-1, -2)
    y = y.permute(0, 2, 3, 1, 4).reshape(batch, num_blocks * block, heads, head_dim)
    return y[:, :seq_len].to(q.dtype)
