"""Decoding with a state that is read at each token and written once every `capacity` tokens, in plain PyTorch.

Adding one token to the state at each step reads and writes all of it. Here the last tokens wait, as they are, in a small
buffer: a step attends to them exactly, with A = 1 + s + s^2 / 2, and to everything older through the state, which it only
reads. Once the buffer is full a fold adds the waiting tokens to the state.

A state in bfloat16 is two tensors, `high` and the remainder `low` that rounding to `high` left. Steps read `high` alone, so
they move half the bytes of float32; folds read and write both, so that a sum over thousands of tokens goes on growing
(alone, a bfloat16 sum stands still once it is 256 times as large as what is added).
"""

from typing import NamedTuple

import torch

from .taylor_linear_attention_reference import taylor_feature_map
from .without_autocast import without_autocast


class DeferredTaylorState(NamedTuple):
    """Sum of packed features of past tokens, and the tokens that wait to be added. All tensors are contiguous.

    P = (feature_dim + 1)(feature_dim + 2)/2 rows in the order of `packed_feature_table`.
    """

    high: torch.Tensor  # [batch, heads, P, head_dim], bfloat16 or float32 (float64 for comparisons, in plain PyTorch)
    low: torch.Tensor | None  # like high, what rounding left; None unless high is bfloat16
    norm: torch.Tensor  # [batch, heads, P], float32 (float64 beside a float64 high): sum of the features alone
    recent_k: torch.Tensor  # [batch, heads, capacity, feature_dim] in the model's dtype
    recent_v: torch.Tensor  # [batch, heads, capacity, head_dim] in the model's dtype

    @property
    def capacity(self) -> int:
        return self.recent_k.shape[2]


def make_deferred_state(
    state: torch.Tensor,
    *,
    capacity: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    input_dtype: torch.dtype | None = None,
    out: DeferredTaylorState | None = None,
) -> DeferredTaylorState:
    """state [batch, heads, P, head_dim + 1], as `taylor_linear_attention` returns it -> the same state, no token waiting.

    Args:
        capacity: how many tokens can wait.
        dtype: of `high`; torch.bfloat16, torch.float32, or torch.float64 for a float64 state.
        input_dtype: of the q, k and v to come; `dtype` unless given.
        out: write into these tensors instead of new ones (a captured CUDA graph can then serve the next prompt); the other
            arguments are then not needed. The waiting tokens in it are forgotten once the caller resets its count to 0.

    Example:
        >>> make_deferred_state(torch.zeros(2, 4, 153, 65)).high.shape
        torch.Size([2, 4, 153, 64])
    """
    feature_dim = feature_dim_of(state)
    if out is None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: at least one token must be able to wait")
        precise = torch.float64 if state.dtype == torch.float64 else torch.float32
        if dtype not in (torch.bfloat16, precise):
            raise ValueError(f"dtype={dtype}: for a {state.dtype} state it must be torch.bfloat16 or {precise}")
        batch, heads, rows, width = state.shape
        shape, device = (batch, heads, rows, width - 1), state.device
        input_dtype = dtype if input_dtype is None else input_dtype
        out = DeferredTaylorState(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device) if dtype == torch.bfloat16 else None,
            torch.empty(shape[:3], dtype=precise, device=device),
            torch.zeros(batch, heads, capacity, feature_dim, dtype=input_dtype, device=device),
            torch.zeros(batch, heads, capacity, width - 1, dtype=input_dtype, device=device),
        )
    elif (*out.high.shape[:3], out.high.shape[3] + 1) != state.shape:
        raise ValueError(f"state has shape {tuple(state.shape)} and out.high {tuple(out.high.shape)}: make a new one without out")
    _write_sum(out, state[..., :-1], state[..., -1])
    return out


def _read_sum(high: torch.Tensor, low: torch.Tensor | None, precise: torch.dtype) -> torch.Tensor:
    return high.to(precise) if low is None else high.to(precise) + low.to(precise)


def _write_sum(state: DeferredTaylorState, total: torch.Tensor, norm: torch.Tensor) -> None:
    state.high.copy_(total)
    if state.low is not None:
        state.low.copy_(total - state.high.to(total.dtype))
    state.norm.copy_(norm)


def feature_dim_of(state: torch.Tensor) -> int:
    """The feature_dim whose packed state [..., P, head_dim + 1] has this many rows."""
    if state.dim() != 4 or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"state has shape {tuple(state.shape)} and dtype {state.dtype}: it must be float32 [batch, heads, P, head_dim + 1]"
        )
    rows = state.shape[2]
    feature_dim = int((2 * rows) ** 0.5) - 1  # rows = (d + 1)(d + 2)/2 lies between (d + 1)^2 / 2 and (d + 2)^2 / 2
    if (feature_dim + 1) * (feature_dim + 2) != 2 * rows or feature_dim < 1:
        raise ValueError(f"state has {rows} rows: (d + 1)(d + 2)/2 for no feature_dim d, so it is not a packed state")
    return feature_dim


def to_running_state(
    state: DeferredTaylorState,
    count: torch.Tensor | int,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """-> the sum with its first `count` waiting tokens, [batch, heads, P, head_dim + 1] as `taylor_linear_attention` takes it.

    `state` stays as it is. `out`: write into this tensor, float32 (float64 beside a float64 state), instead of a new one.

    Example:
        >>> to_running_state(make_deferred_state(torch.ones(2, 4, 153, 65)), 0).shape
        torch.Size([2, 4, 153, 65])
    """
    batch, heads, rows, head_dim = state.high.shape
    shape = (batch, heads, rows, head_dim + 1)
    if out is None:
        out = state.norm.new_empty(shape)
    elif out.shape != shape or out.dtype != state.norm.dtype:
        raise ValueError(f"out has shape {tuple(out.shape)} and dtype {out.dtype}: it must be {shape}, {state.norm.dtype}")
    total, norm = _folded(state, count, scale)
    out[..., :-1], out[..., -1] = total, norm
    return out


def _waiting(recent: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """-> [capacity, 1], which slots hold a waiting token."""
    return (torch.arange(recent.shape[2], device=recent.device) < count).unsqueeze(-1)


def _folded(state: DeferredTaylorState, count: torch.Tensor | int, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    precise = state.norm.dtype
    waiting = _waiting(state.recent_k, count)
    phi = taylor_feature_map(state.recent_k.to(precise), scale=scale).masked_fill(~waiting, 0.0)
    values = state.recent_v.to(precise).masked_fill(~waiting, 0.0)
    with torch.autocast(phi.device.type, enabled=False):
        total = _read_sum(state.high, state.low, precise) + phi.transpose(-1, -2) @ values
    return total, state.norm + phi.sum(-2)


@without_autocast
def taylor_linear_attention_deferred_step_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: DeferredTaylorState,
    count: torch.Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-12,
) -> torch.Tensor:
    """One token: q, k [batch, heads, feature_dim]; v [batch, heads, head_dim] -> y like v.

    k and v are written to slot `count` (integer tensor [1]: how many tokens wait already, below the capacity); `count` itself
    stays as it is.
    """
    precise = state.norm.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slot = count.long().view(1)
    state.recent_k.index_copy_(2, slot, k.unsqueeze(2).to(state.recent_k.dtype))
    state.recent_v.index_copy_(2, slot, v.unsqueeze(2).to(state.recent_v.dtype))
    waiting = _waiting(state.recent_k, count + 1)
    s = scale * (state.recent_k.to(precise) @ q.to(precise).unsqueeze(-1))  # [batch, heads, capacity, 1]
    weights = (1 + s + 0.5 * s * s).masked_fill(~waiting, 0.0)
    values = state.recent_v.to(precise).masked_fill(~waiting, 0.0)
    phi = taylor_feature_map(q.to(precise), scale=scale).unsqueeze(-2)  # [batch, heads, 1, P]
    numerator = phi @ state.high.to(precise) + weights.transpose(-1, -2) @ values
    denominator = phi @ state.norm.unsqueeze(-1) + weights.sum(-2, keepdim=True)
    return (numerator / (denominator + eps)).squeeze(-2).to(v.dtype)


@torch.no_grad()
def taylor_linear_attention_fold_reference(
    state: DeferredTaylorState, count: torch.Tensor | int, *, scale: float | None = None
) -> None:
    """Adds the first `count` waiting tokens to the sum; the caller then sets its count to 0."""
    _write_sum(state, *_folded(state, count, scale))
