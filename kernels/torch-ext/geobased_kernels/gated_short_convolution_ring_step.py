"""One token of the gated short convolution over a ring of its inputs, as a custom op for the Triton form.

    y = silu(sum_i weight[:, i] * input_{t - kernel + 1 + i}) * gate

The input of position t lies in slot t % kernel, so that no input ever moves: of the ring one slot is written, where
`gated_short_convolution_step` shifts all of its state. See `gated_short_convolution` for whole sequences.
"""

import torch

from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .gated_short_convolution_ring_step_reference import gated_short_convolution_ring_step_reference
from .gated_short_convolution_step import MAX_TRITON_KERNEL


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
    if x.numel() == 0 or _resolve_backend(backend, x, weight) == "torch":
        return gated_short_convolution_ring_step_reference(x, gate, weight, ring, position)
    return _step(x, gate, weight, ring, position)


def _check_inputs(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, ring: torch.Tensor, position: torch.Tensor) -> None:
    if x.dim() != 2 or x.shape != gate.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and gate {tuple(gate.shape)}: both must be [batch, channels]")
    batch, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be [channels, kernel] = [{channels}, kernel]")
    kernel = weight.shape[1]
    if ring.shape != (batch, kernel, channels):
        raise ValueError(
            f"ring has shape {tuple(ring.shape)}: it must be [batch, kernel, channels] = {(batch, kernel, channels)}"
        )
    if not ring.is_contiguous():
        raise ValueError(f"ring has strides {ring.stride()}: it must be contiguous, for it is updated in place")
    if x.dtype != gate.dtype:
        raise ValueError(f"x and gate have dtypes {x.dtype} and {gate.dtype}: cast them to one")
    for name, tensor in (("x", x), ("weight", weight), ("ring", ring)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: it must be a floating point dtype")
    if position.numel() != 1:
        raise ValueError(f"position has shape {tuple(position.shape)}: it must be one number, the same for the whole batch")
    if position.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"position has dtype {position.dtype}: make it torch.int32 or torch.int64")
    devices = [t.device for t in (x, gate, weight, ring, position)]
    if len(set(devices)) > 1:
        raise ValueError(f"x, gate, weight, ring and position are on {', '.join(map(str, devices))}: move them to one")


def _resolve_backend(backend: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    resolved = resolve_backend(backend, x)
    if resolved == "torch" or weight.shape[1] <= MAX_TRITON_KERNEL:
        return resolved
    limit = f"the Triton form takes kernels up to {MAX_TRITON_KERNEL} taps, not {weight.shape[1]}"
    return without_triton("gated_short_convolution_ring_step", backend, limit)


@torch.library.custom_op("geobased::gated_short_convolution_ring_step", mutates_args=("ring",))
def _step(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, ring: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    from . import gated_short_convolution_ring_step_triton

    return gated_short_convolution_ring_step_triton.step(x, gate, weight, ring, position)


@register_fake(_step)
def _(x, gate, weight, ring, position):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
