"""Decoding with Taylor linear attention and a deferred fold, as custom ops for the Triton form.

A step only reads the state; the last tokens wait in a buffer, are attended to exactly, and are added to the state together:

    state = make_deferred_state(running_state)           # what `taylor_linear_attention` returned for the prompt
    for each token, in each layer:
        y = taylor_linear_attention_deferred_step(q, k, v, state, count)
    then once for all layers: count += 1; and when it reaches the capacity, in each layer:
        taylor_linear_attention_fold(state, count)
    and count = 0

`count` is a tensor on the device, which the kernels read and never write, so that one captured CUDA graph serves every step.
"""

import torch

from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .taylor_linear_attention import check_token_shapes, checked_scale
from .taylor_linear_attention_decode_reference import (
    DeferredTaylorState,
    make_deferred_state,
    taylor_linear_attention_deferred_step_reference,
    taylor_linear_attention_fold_reference,
    to_running_state,
)
from .taylor_linear_attention_reference import packed_feature_count

__all__ = [
    "DeferredTaylorState",
    "make_deferred_state",
    "taylor_linear_attention_deferred_step",
    "taylor_linear_attention_fold",
    "to_running_state",
]

MAX_TRITON_FEATURE_DIM = 32
MAX_TRITON_HEAD_DIM = 128
MAX_TRITON_CAPACITY = 128


def taylor_linear_attention_deferred_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: DeferredTaylorState,
    count: torch.Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-12,
    backend: str = "auto",
) -> torch.Tensor:
    """One token: q, k [batch, heads, feature_dim]; v [batch, heads, head_dim] -> y like v.

    k and v are written to slot `count` of the state's waiting tokens, and y attends to the state, the waiting tokens and this
    one. There is no gradient in the Triton form.

    Args:
        q, k, v: may be strided views of one projection; nothing is copied.
        state: from `make_deferred_state`.
        count: integer tensor [1] on the device, how many tokens wait already. It must be below the capacity: a token beyond it
            is attended to but not kept. The caller adds 1 after the last layer.
        scale: feature_dim^-0.5 unless given.
        backend: "auto", "triton" or "torch".

    Example:
        >>> state = make_deferred_state(torch.zeros(2, 4, 153, 65), dtype=torch.float32)
        >>> count = torch.zeros(1, dtype=torch.int32)
        >>> q, k = torch.randn(2, 2, 4, 16)
        >>> taylor_linear_attention_deferred_step(q, k, torch.randn(2, 4, 64), state, count).shape
        torch.Size([2, 4, 64])
    """
    check_token_shapes(q, k, v)
    if not q.dtype == k.dtype == v.dtype == state.recent_k.dtype:
        raise ValueError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype} and the waiting tokens {state.recent_k.dtype}: cast them to"
            " one, or give make_deferred_state another input_dtype"
        )
    _check_state(state, count)
    batch, heads, feature_dim = q.shape
    expected = (batch, heads, packed_feature_count(feature_dim), v.shape[-1])
    if state.high.shape != expected or state.recent_k.shape[-1] != feature_dim:
        raise ValueError(
            f"state.high has shape {tuple(state.high.shape)}: for these q and v it must be [batch, heads, P, head_dim] ="
            f" {expected}"
        )
    if not q.device == k.device == v.device == state.high.device:
        raise ValueError(
            f"q, k, v and the state are on {q.device}, {k.device}, {v.device}, {state.high.device}: move them to one"
        )
    scale = checked_scale(scale, feature_dim)
    if v.numel() == 0 or _resolve_backend(backend, q, state) == "torch":
        return taylor_linear_attention_deferred_step_reference(q, k, v, state, count, scale=scale, eps=eps)
    return _step(q, k, v, state.high, state.norm, state.recent_k, state.recent_v, count, scale, eps)


def taylor_linear_attention_fold(
    state: DeferredTaylorState, count: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> None:
    """Adds the first `count` waiting tokens (integer tensor [1] on the device) to the sum, in place.

    `scale` must be that of the steps. The caller then sets count to 0.

    Example:
        >>> state = make_deferred_state(torch.zeros(2, 4, 153, 65))
        >>> taylor_linear_attention_fold(state, torch.full([1], 32, dtype=torch.int32))
    """
    _check_state(state, count)
    scale = checked_scale(scale, state.recent_k.shape[-1])
    if state.high.numel() == 0 or _resolve_backend(backend, state.high, state) == "torch":
        taylor_linear_attention_fold_reference(state, count, scale=scale)
    elif state.low is None:
        _fold(state.high, state.norm, state.recent_k, state.recent_v, count, scale)
    else:
        _fold_with_remainder(state.high, state.low, state.norm, state.recent_k, state.recent_v, count, scale)


def _check_state(state: DeferredTaylorState, count: torch.Tensor) -> None:
    for name, tensor in state._asdict().items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"state.{name} has strides {tensor.stride()}: it must be contiguous, for it is updated in place")
    if (state.low is not None) != (state.high.dtype == torch.bfloat16):
        low = "missing" if state.low is None else "there"
        raise ValueError(
            f"state.high has dtype {state.high.dtype} and state.low is {low}: a bfloat16 state has both, others have high alone"
            " (see make_deferred_state)"
        )
    if count.numel() != 1 or count.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"count has shape {tuple(count.shape)} and dtype {count.dtype}: it must be one int32 or int64 number")
    if count.device != state.high.device:
        raise ValueError(f"count is on {count.device} and the state on {state.high.device}: move it there")


def _resolve_backend(backend: str, tensor: torch.Tensor, state: DeferredTaylorState) -> str:
    resolved = resolve_backend(backend, tensor)
    feature_dim, head_dim = state.recent_k.shape[-1], state.recent_v.shape[-1]
    if resolved == "torch":
        return resolved
    if feature_dim > MAX_TRITON_FEATURE_DIM:
        limit = f"the Triton form takes feature_dim up to {MAX_TRITON_FEATURE_DIM}, not {feature_dim}"
    elif head_dim > MAX_TRITON_HEAD_DIM:
        limit = f"the Triton form takes head_dim up to {MAX_TRITON_HEAD_DIM}, not {head_dim}"
    elif state.capacity > MAX_TRITON_CAPACITY:
        limit = f"the Triton form lets up to {MAX_TRITON_CAPACITY} tokens wait, not {state.capacity}"
    elif state.high.dtype == torch.float64:
        limit = "the Triton form takes a bfloat16 or float32 state, not a float64 one"
    else:
        return resolved
    return without_triton("taylor_linear_attention_decode", backend, limit)


@torch.library.custom_op("geobased::taylor_linear_attention_deferred_step", mutates_args=("recent_k", "recent_v"))
def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    high: torch.Tensor,
    norm: torch.Tensor,
    recent_k: torch.Tensor,
    recent_v: torch.Tensor,
    count: torch.Tensor,
    scale: float,
    eps: float,
) -> torch.Tensor:
    from . import taylor_linear_attention_decode_triton

    return taylor_linear_attention_decode_triton.step(q, k, v, high, norm, recent_k, recent_v, count, scale, eps)


@register_fake(_step)
def _(q, k, v, high, norm, recent_k, recent_v, count, scale, eps):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@torch.library.custom_op("geobased::taylor_linear_attention_fold", mutates_args=("high", "norm"))
def _fold(
    high: torch.Tensor, norm: torch.Tensor, recent_k: torch.Tensor, recent_v: torch.Tensor, count: torch.Tensor, scale: float
) -> None:
    from . import taylor_linear_attention_decode_triton

    taylor_linear_attention_decode_triton.fold(high, None, norm, recent_k, recent_v, count, scale)


@register_fake(_fold)
def _(high, norm, recent_k, recent_v, count, scale):
    return None


@torch.library.custom_op("geobased::taylor_linear_attention_fold_with_remainder", mutates_args=("high", "low", "norm"))
def _fold_with_remainder(
    high: torch.Tensor,
    low: torch.Tensor,
    norm: torch.Tensor,
    recent_k: torch.Tensor,
    recent_v: torch.Tensor,
    count: torch.Tensor,
    scale: float,
) -> None:
    from . import taylor_linear_attention_decode_triton

    taylor_linear_attention_decode_triton.fold(high, low, norm, recent_k, recent_v, count, scale)


@register_fake(_fold_with_remainder)
def _(high, low, norm, recent_k, recent_v, count, scale):
    return None
