"""One token of the gated short convolution over a ring of its inputs, as a custom op for the Triton form.

    y = silu(sum_i weight[:, i] * input_{t - kernel + 1 + i}) * gate

The input of position t lies in slot t % kernel, so that no input ever moves: of the ring one slot is written, where
`gated_short_convolution_step` shifts all of its state. See `gated_short_convolution` for whole sequences.
"""

import torch

from .compile_support import register_fake
from .gated_short_convolution_ring_step_reference import gated_short_convolution_ring_step_reference
from .gated_short_convolution_step import check_step_inputs, resolve_step_backend
from .sliding_window_attention_step import check_position


def gated_short_convolution_ring_step(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    ring: torch.Tensor,
    position: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """x, gate [batch, channels]; weight [channels, kernel]; ring [batch, kernel, channels], updated in place -> y like x.

    Sums are taken in float32, whatever the dtypes. There is no gradient in the Triton form.

    Args:
        x, gate: may be the two halves of one [batch, 2 * channels] tensor; nothing is copied.
        ring: x is written to slot position % kernel, whose old content is not read: a call repeated at one position gives the
            same result. All other slots are read, so those of positions before 0 must hold zeros, as a causal convolution
            pads: start from zeros.
        position: int32 or int64 tensor [1] on the device, how many tokens came before this one. It is not changed.
        backend: "auto", "triton" or "torch".

    Example:
        >>> x, gate = torch.randn(2, 2 * 64).chunk(2, dim=-1)
        >>> ring, position = torch.zeros(2, 3, 64), torch.zeros(1, dtype=torch.int32)
        >>> gated_short_convolution_ring_step(x, gate, torch.randn(64, 3), ring, position).shape
        torch.Size([2, 64])
    """
    _check_inputs(x, gate, weight, ring, position)
    if x.numel() == 0 or resolve_step_backend("gated_short_convolution_ring_step", backend, x, weight) == "torch":
        return gated_short_convolution_ring_step_reference(x, gate, weight, ring, position)
    return _step(x, gate, weight, ring, position)


def _check_inputs(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, ring: torch.Tensor, position: torch.Tensor) -> None:
    check_step_inputs(x, gate, weight, "ring", ring, ("batch", "kernel", "channels"))
    check_position(position)
    devices = [t.device for t in (x, gate, weight, ring, position)]
    if len(set(devices)) > 1:
        raise ValueError(f"x, gate, weight, ring and position are on {', '.join(map(str, devices))}: move them to one")


@torch.library.custom_op("geobased::gated_short_convolution_ring_step", mutates_args=("ring",))
def _step(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, ring: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    from . import gated_short_convolution_ring_step_triton

    return gated_short_convolution_ring_step_triton.step(x, gate, weight, ring, position)


@register_fake(_step)
def _(x, gate, weight, ring, position):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
