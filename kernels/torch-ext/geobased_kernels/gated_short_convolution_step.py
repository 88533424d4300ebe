"""One token of the gated short convolution, with its inputs kept in place, as a custom op for the Triton form.

    y = silu(sum_i weight[:, i] * input_{t - kernel + 1 + i}) * gate

See `gated_short_convolution` for whole sequences.
"""

import torch

from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .gated_short_convolution_step_reference import gated_short_convolution_step_reference

MAX_TRITON_KERNEL = 8


def gated_short_convolution_step(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """x, gate [batch, channels]; weight [channels, kernel]; state [batch, channels, kernel] -> y like x.

    `state` holds the last `kernel` inputs, newest last, as transformers' cache does; x is appended to it in place. Sums are
    taken in float32, whatever the dtypes. There is no gradient in the Triton form.

    Args:
        x, gate: may be the two halves of one [batch, 2 * channels] tensor; nothing is copied.
        backend: "auto", "triton" or "torch".

    Example:
        >>> x, gate = torch.randn(2, 2 * 64).chunk(2, dim=-1)
        >>> gated_short_convolution_step(x, gate, torch.randn(64, 3), torch.zeros(2, 64, 3)).shape
        torch.Size([2, 64])
    """
    if x.dim() != 2 or x.shape != gate.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and gate {tuple(gate.shape)}: both must be [batch, channels]")
    batch, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be [channels, kernel] = [{channels}, kernel]")
    if state.shape != (batch, *weight.shape):
        raise ValueError(f"state has shape {tuple(state.shape)}: it must be [batch, channels, kernel] = {(batch, *weight.shape)}")
    if not state.is_contiguous():
        raise ValueError(f"state has strides {state.stride()}: it must be contiguous, for it is updated in place")
    if x.dtype != gate.dtype:
        raise ValueError(f"x and gate have dtypes {x.dtype} and {gate.dtype}: cast them to one")
    for name, tensor in (("x", x), ("weight", weight), ("state", state)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: it must be a floating point dtype")
    if not x.device == gate.device == weight.device == state.device:
        raise ValueError(
            f"x, gate, weight and state are on {x.device}, {gate.device}, {weight.device}, {state.device}: move them to one"
        )
    if x.numel() == 0 or _resolve_backend(backend, x, weight) == "torch":
        return gated_short_convolution_step_reference(x, gate, weight, state)
    return _step(x, gate, weight, state)


def _resolve_backend(backend: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    resolved = resolve_backend(backend, x)
    if resolved == "torch" or weight.shape[1] <= MAX_TRITON_KERNEL:
        return resolved
    limit = f"the Triton form takes kernels up to {MAX_TRITON_KERNEL} taps, not {weight.shape[1]}"
    return without_triton("gated_short_convolution_step", backend, limit)


@torch.library.custom_op("geobased::gated_short_convolution_step", mutates_args=("state",))
def _step(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    from . import gated_short_convolution_step_triton

    return gated_short_convolution_step_triton.step(x, gate, weight, state)


@register_fake(_step)
def _(x, gate, weight, state):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
