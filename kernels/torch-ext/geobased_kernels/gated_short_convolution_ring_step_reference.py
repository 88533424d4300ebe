"""One token of the gated short convolution over a ring of its inputs, in plain PyTorch.

The input of position t lies in slot t % kernel of the ring, so that storing one overwrites the input that has just left the
convolution, and no input ever moves.
"""

import torch
import torch.nn.functional as F

from .without_autocast import without_autocast


@without_autocast
def gated_short_convolution_ring_step_reference(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, ring: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """x, gate [batch, channels]; weight [channels, kernel]; ring [batch, kernel, channels] -> y like x.

    `position` (integer tensor [1]) is this token's: the number of tokens before it. x is written to slot position % kernel, whose
    old content is not read; slots of positions before 0 must hold zeros.
    """
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel = weight.shape[1]
    position = position.long().view(1)
    slots = (position + torch.arange(1, kernel, device=x.device)) % kernel  # oldest first, without x's own
    older = ring.index_select(1, slots).to(compute_dtype)
    ring.index_copy_(1, position % kernel, x.unsqueeze(1).to(ring.dtype))
    inputs = torch.cat([older, x.to(compute_dtype).unsqueeze(1)], dim=1)
    conv = (inputs * weight.t().to(compute_dtype)).sum(1)
    return (F.silu(conv) * gate.to(compute_dtype)).to(x.dtype)
