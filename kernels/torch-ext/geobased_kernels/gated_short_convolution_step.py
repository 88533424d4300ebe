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
    check_step_inputs(x, gate, weight, "state", state, ("batch", "channels", "kernel"))
    if not x.device == gate.device == weight.device == state.device:
        raise ValueError(
            f"x, gate, weight and state are on {x.device}, {gate.device}, {weight.device}, {state.device}: move them to one"
        )
    if x.numel() == 0 or resolve_step_backend("gated_short_convolution_step", backend, x, weight) == "torch":
        return gated_short_convolution_step_reference(x, gate, weight, state)
    return _step(x, gate, weight, state)


def check_step_inputs(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, name: str, inputs: torch.Tensor, axes: tuple[str, str, str]
) -> None:
    """Shapes and dtypes of a step that keeps its last inputs, called `name`, in the order of `axes`."""
    if x.dim() != 2 or x.shape != gate.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and gate {tuple(gate.shape)}: both must be [batch, channels]")
    batch, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be [channels, kernel] = [{channels}, kernel]")
    sizes = {"batch": batch, "channels": channels, "kernel": weight.shape[1]}
    expected = tuple(sizes[axis] for axis in axes)
    if inputs.shape != expected:
        raise ValueError(f"{name} has shape {tuple(inputs.shape)}: it must be [{', '.join(axes)}] = {expected}")
    if not inputs.is_contiguous():
        raise ValueError(f"{name} has strides {inputs.stride()}: it must be contiguous, for it is updated in place")
    if x.dtype != gate.dtype:
        raise ValueError(f"x and gate have dtypes {x.dtype} and {gate.dtype}: cast them to one")
    for label, tensor in (("x", x), ("weight", weight), (name, inputs)):
        if not tensor.is_floating_point():
            raise ValueError(f"{label} has dtype {tensor.dtype}: it must be a floating point dtype")


def resolve_step_backend(op: str, backend: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    resolved = resolve_backend(backend, x)
    if resolved == "torch" or weight.shape[1] <= MAX_TRITON_KERNEL:
        return resolved
    limit = f"the Triton form takes kernels up to {MAX_TRITON_KERNEL} taps, not {weight.shape[1]}"
    return without_triton(op, backend, limit)


@torch.library.custom_op("geobased::gated_short_convolution_step", mutates_args=("state",))
def _step(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    from . import gated_short_convolution_step_triton

    return gated_short_convolution_step_triton.step(x, gate, weight, state)


@register_fake(_step)
def _(x, gate, weight, state):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
