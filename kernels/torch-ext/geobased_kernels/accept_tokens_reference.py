"""The end of a generation step in plain PyTorch."""

import torch


def accept_tokens_reference(
    picked: torch.Tensor,
    tokens: torch.Tensor,
    period_tokens: torch.Tensor,
    finished: torch.Tensor,
    ends: torch.Tensor,
    pad: torch.Tensor,
    counters: torch.Tensor,
    slot: torch.Tensor,
    running: torch.Tensor,
) -> None:
    """Arguments as `accept_tokens`. Waits for no device."""
    if ends.numel():
        picked = torch.where(finished, pad, picked)
        finished.logical_or_((picked[:, None] == ends).any(1))
    tokens.copy_(picked)
    period_tokens.index_copy_(0, slot, picked[None])
    if ends.numel():
        counters.add_(running)
        slot.add_(running)
        running.copy_(finished.all().logical_not())
    else:
        counters.add_(1)
        slot.add_(1)
