"""Gated short convolution, differentiable, as one custom op for the Triton form.

    y = silu(causal_depthwise_conv(x)) * gate,    conv_t = sum_i weight[:, i] * x_{t - kernel + 1 + i}

The mixer of BASED's short-range layers, between its two projections.
"""

import torch

from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .direct_call import direct_call
from .gated_short_convolution_reference import gated_short_convolution_reference
from .packed_sequences import check_cu_seqlens, sequence_bounds

MAX_TRITON_KERNEL = 8


def gated_short_convolution(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x, gate [batch, seq_len, channels]; weight [channels, kernel] -> y like x.

    Args:
        x, gate: may be the two halves of one [batch, seq_len, 2 * channels] tensor; nothing is copied.
        state: [batch, channels, m], the last m inputs before this call, newest last; missing ones count as zero.
        attention_mask: [batch, seq_len], 0 where a token is padding: its input is taken as zero.
        cu_seqlens: [n + 1] bounds of n sequences packed end to end; batch is then 1 and `state` is not supported.
        backend: "auto", "triton" or "torch".

    weight and state may have another floating point dtype than x: sums are taken in float32.

    Example:
        >>> x, gate = torch.randn(2, 100, 2 * 64).chunk(2, dim=-1)
        >>> gated_short_convolution(x, gate, torch.randn(64, 3)).shape
        torch.Size([2, 100, 64])
    """
    _check_inputs(x, gate, weight, state, attention_mask, cu_seqlens)
    if x.numel() == 0:
        return torch.zeros_like(x)
    if _resolve_backend(backend, x, weight) == "torch":
        return gated_short_convolution_reference(
            x, gate, weight, state=state, attention_mask=attention_mask, cu_seqlens=cu_seqlens
        )
    token_mask = None if attention_mask is None else attention_mask.to(x.device).ne(0)
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens.to(x.device), x.shape[1])
    return _run(x, gate, weight, state, token_mask, bounds)


def gated_short_convolution_of_halves(
    halves: torch.Tensor,
    weight: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """halves [batch, seq_len, 2 * channels], x and gate side by side; weight [channels, kernel] -> y [batch, seq_len, channels].

    The same as `gated_short_convolution(*halves.chunk(2, dim=-1), weight, ...)`, whose arguments these are. The gradient of
    halves is written once; of two chunks autograd would put it together in another pass.

    Example:
        >>> gated_short_convolution_of_halves(torch.randn(2, 100, 2 * 64), torch.randn(64, 3)).shape
        torch.Size([2, 100, 64])
    """
    if halves.dim() != 3 or halves.shape[-1] % 2:
        raise ValueError(f"halves has shape {tuple(halves.shape)}: it must be [batch, seq_len, 2 * channels]")
    x, gate = halves.chunk(2, dim=-1)
    _check_inputs(x, gate, weight, None, attention_mask, cu_seqlens)
    if x.numel() == 0:
        return torch.zeros_like(x)
    if _resolve_backend(backend, x, weight) == "torch":
        return gated_short_convolution_reference(x, gate, weight, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
    token_mask = None if attention_mask is None else attention_mask.to(x.device).ne(0)
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens.to(x.device), x.shape[1])
    return _run_of_halves(halves, weight, token_mask, bounds)


def _resolve_backend(backend: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    resolved = resolve_backend(backend, x)
    kernel = weight.shape[1]
    if resolved == "torch" or 2 <= kernel <= MAX_TRITON_KERNEL:
        return resolved
    limit = f"the Triton form takes kernels of 2 to {MAX_TRITON_KERNEL} taps, not {kernel}"
    return without_triton("gated_short_convolution", backend, limit)


def _check_inputs(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    if x.dim() != 3 or x.shape != gate.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and gate {tuple(gate.shape)}: both must be [batch, seq_len, channels]")
    batch, seq_len, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be [channels, kernel] = [{channels}, kernel]")
    if x.dtype != gate.dtype:
        raise ValueError(f"x and gate have dtypes {x.dtype} and {gate.dtype}: cast them to one")
    tensors = {"x": x, "weight": weight} | ({} if state is None else {"state": state})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: it must be a floating point dtype")
    devices = [tensor.device for tensor in (*tensors.values(), gate)]
    if len(set(devices)) > 1:
        raise ValueError(f"x, weight, state and gate are on {', '.join(map(str, devices))}: move them to one device")
    if state is not None:
        if state.dim() != 3 or state.shape[:2] != (batch, channels):
            raise ValueError(f"state has shape {tuple(state.shape)}: it must be [batch, channels, m] = [{batch}, {channels}, m]")
        if cu_seqlens is not None:
            raise ValueError("state and cu_seqlens do not go together: a packed sequence starts without history")
    if attention_mask is not None and attention_mask.shape != (batch, seq_len):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be [batch, seq_len] = [{batch}, {seq_len}]"
        )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, seq_len)


@torch.library.custom_op("geobased::gated_short_convolution", mutates_args=())
def _convolution(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> torch.Tensor:
    from . import gated_short_convolution_triton

    return gated_short_convolution_triton.forward(x, gate, weight, state, token_mask, bounds)


@register_fake(_convolution)
def _(x, gate, weight, state, token_mask, bounds):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("geobased::gated_short_convolution_backward", mutates_args=())
def _convolution_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dx, dgate, dweight, dstate (empty without a state)."""
    from . import gated_short_convolution_triton

    return gated_short_convolution_triton.backward(dy, x, gate, weight, state, token_mask, bounds)


@register_fake(_convolution_backward)
def _(dy, x, gate, weight, state, token_mask, bounds):
    dstate = x.new_empty(0) if state is None else torch.empty(state.shape, dtype=state.dtype, device=state.device)
    return *(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate, weight)), dstate


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    state = ctx.saved_tensors[3]
    *gradients, dstate = _run_backward(dy, *ctx.saved_tensors)
    return *gradients, None if state is None else dstate, None, None


_convolution.register_autograd(_backward, setup_context=_setup_context)
_run = direct_call(_convolution, _setup_context, _backward)
_run_backward = direct_call(_convolution_backward)


@torch.library.custom_op("geobased::gated_short_convolution_of_halves", mutates_args=())
def _convolution_of_halves(
    halves: torch.Tensor, weight: torch.Tensor, token_mask: torch.Tensor | None, bounds: torch.Tensor | None
) -> torch.Tensor:
    from . import gated_short_convolution_triton

    x, gate = halves.chunk(2, dim=-1)
    return gated_short_convolution_triton.forward(x, gate, weight, None, token_mask, bounds)


@register_fake(_convolution_of_halves)
def _(halves, weight, token_mask, bounds):
    batch, seq_len, width = halves.shape
    return torch.empty(batch, seq_len, width // 2, dtype=halves.dtype, device=halves.device)


@torch.library.custom_op("geobased::gated_short_convolution_of_halves_backward", mutates_args=())
def _convolution_of_halves_backward(
    dy: torch.Tensor,
    halves: torch.Tensor,
    weight: torch.Tensor,
    token_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dhalves, dweight."""
    from . import gated_short_convolution_triton

    dhalves = torch.empty(halves.shape, dtype=halves.dtype, device=halves.device)
    x, gate = halves.chunk(2, dim=-1)
    dx, dgate = dhalves.chunk(2, dim=-1)
    dweight = gated_short_convolution_triton.backward(dy, x, gate, weight, None, token_mask, bounds, into=(dx, dgate))[2]
    return dhalves, dweight


@register_fake(_convolution_of_halves_backward)
def _(dy, halves, weight, token_mask, bounds):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (halves, weight))


def _setup_context_of_halves(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_halves(ctx, dy):
    return *_run_backward_of_halves(dy, *ctx.saved_tensors), None, None


_convolution_of_halves.register_autograd(_backward_of_halves, setup_context=_setup_context_of_halves)
_run_of_halves = direct_call(_convolution_of_halves, _setup_context_of_halves, _backward_of_halves)
_run_backward_of_halves = direct_call(_convolution_of_halves_backward)
