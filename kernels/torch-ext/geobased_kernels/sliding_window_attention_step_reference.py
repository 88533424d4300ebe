"""One token of causal sliding window attention over a ring buffer, in plain PyTorch.

The token at position p lies in slot p % window of the ring, so that storing one overwrites the token that has just left the
window, and no key ever moves. Keys are stored with their rotary embedding; attention does not care about the order of slots.
"""

import torch

from .without_autocast import without_autocast


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, head_dim]; cos, sin [batch or 1, head_dim] -> x with its rotary embedding, rounded once."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(compute_dtype)
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos.to(compute_dtype).unsqueeze(1), sin.to(compute_dtype).unsqueeze(1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


@without_autocast
def sliding_window_attention_step_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    position: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    first_valid: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """q, k, v [batch, heads, head_dim]; ring_k, ring_v [batch, heads, window, head_dim], updated in place -> y like q.

    `position` (integer tensor [1]) is this token's: the number of tokens stored before it. With cos and sin, [batch or 1,
    head_dim], q and k get their rotary embedding here. Tokens at positions below first_valid [batch] are padding; a query
    that sees no key at all gives zeros.
    """
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    window, head_dim = ring_k.shape[2:]
    position = position.long().view(1)
    slot = position % window
    ring_k.index_copy_(2, slot, k.unsqueeze(2).to(ring_k.dtype))
    ring_v.index_copy_(2, slot, v.unsqueeze(2).to(ring_v.dtype))
    slots = torch.arange(window, device=q.device)
    positions = position - (position - slots) % window  # of the token in each slot; negative where none has come yet
    visible = positions >= 0
    if first_valid is not None:
        visible = visible & (positions >= first_valid.view(-1, 1))
    visible = visible.view(-1, 1, window, 1)
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = ring_k.to(compute_dtype) @ q.to(compute_dtype).unsqueeze(-1)  # [batch, heads, window, 1]
    scores = scores * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    scores = scores.masked_fill(~visible, torch.finfo(compute_dtype).min)
    weights = scores.softmax(-2).masked_fill(~visible, 0.0)  # the second fill serves rows without any key
    values = ring_v.to(compute_dtype).masked_fill(~visible, 0.0)
    return (weights.transpose(-1, -2) @ values).squeeze(-2).to(q.dtype)
