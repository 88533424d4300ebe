"""One token of the gated short convolution, in plain PyTorch."""

import torch
import torch.nn.functional as F

from .without_autocast import without_autocast


@without_autocast
def gated_short_convolution_step_reference(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """x, gate [batch, channels]; weight [channels, kernel]; state [batch, channels, kernel] -> y like x.

    `state` holds the last `kernel` inputs, newest last; x is appended to it in place.
    """
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    older = state[..., 1:].clone()
    inputs = torch.cat([older.to(compute_dtype), x.to(compute_dtype).unsqueeze(-1)], dim=-1)
    state[..., :-1] = older
    state[..., -1] = x
    conv = (inputs * weight.to(compute_dtype)).sum(-1)
    return (F.silu(conv) * gate.to(compute_dtype)).to(x.dtype)
