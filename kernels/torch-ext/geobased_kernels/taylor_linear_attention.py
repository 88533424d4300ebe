"""Causal Taylor linear attention, differentiable, as custom ops for the Triton form.

    y_t = sum_{j <= t} A_tj v_j / (sum_{j <= t} A_tj + eps),    A = 1 + s + s^2 / 2,    s = scale * q_t . k_j

A is an inner product of features, so the past fits in a state of fixed size, [sequences, heads, P, head_dim + 1] in float32:
P = (d + 1)(d + 2)/2 packed features (see packed_feature_table), the last column the normaliser.
"""

import torch

from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .direct_call import direct_call
from .packed_sequences import check_cu_seqlens
from .taylor_linear_attention_reference import (
    packed_feature_count,
    taylor_linear_attention_reference,
    taylor_linear_attention_step_reference,
)

MIN_TRITON_FEATURE_DIM, MAX_TRITON_FEATURE_DIM = 8, 32
MAX_TRITON_HEAD_DIM = 128


def taylor_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-12,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q, k [batch, seq_len, heads, feature_dim]; v [batch, seq_len, heads, head_dim] -> y like v [, final state].

    Args:
        attention_mask: [batch, seq_len], 0 where a token is padding: its phi(k) is zero *including the constant feature*.
        initial_state: [batch, heads, P, head_dim + 1], what came before the first token.
        output_final_state: also return the state after the last token.
        cu_seqlens: [n + 1] bounds of n sequences packed end to end; batch is then 1 and states are [n, ...].
        scale: feature_dim^-0.5 unless given.
        backend: "auto", "triton" or "torch".

    Example:
        >>> q, k = torch.randn(2, 2, 100, 4, 16)
        >>> y, state = taylor_linear_attention(q, k, torch.randn(2, 100, 4, 64), output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 100, 4, 64]), torch.Size([2, 4, 153, 65]))
    """
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: q and k must be"
            " [batch, seq_len, heads, feature_dim] and v [batch, seq_len, heads, head_dim]"
        )
    scale = _check_values(q, k, v, scale)
    batch, seq_len, heads, feature_dim = q.shape
    if attention_mask is not None and attention_mask.shape != (batch, seq_len):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be [batch, seq_len] = [{batch}, {seq_len}]"
        )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, seq_len)
    if initial_state is not None:
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        _check_state("initial_state", initial_state, (sequences, heads), q, v)
    attention_mask = None if attention_mask is None else attention_mask.to(q.device).ne(0)
    if v.numel() == 0 or _resolve_backend(backend, q, v) == "torch":
        return taylor_linear_attention_reference(
            q,
            k,
            v,
            attention_mask=attention_mask,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            scale=scale,
            eps=eps,
        )
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device)
    y, final_state, _ = _run(q, k, v, attention_mask, initial_state, cu_seqlens, scale, eps, output_final_state)
    return (y, final_state) if output_final_state else y


def taylor_linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-12,
    backend: str = "auto",
) -> torch.Tensor:
    """One token: q, k [batch, heads, feature_dim]; v [batch, heads, head_dim] -> y like v; `state` is updated in place.

    state [batch, heads, P, head_dim + 1], float32, as `taylor_linear_attention` returns it; zeros before the first token.
    The Triton form has no gradient.

    Example:
        >>> state = torch.zeros(2, 4, 153, 65)
        >>> q, k = torch.randn(2, 2, 4, 16)
        >>> taylor_linear_attention_step(q, k, torch.randn(2, 4, 64), state).shape
        torch.Size([2, 4, 64])
    """
    check_token_shapes(q, k, v)
    scale = _check_values(q, k, v, scale)
    _check_state("state", state, (q.shape[0], q.shape[1]), q, v)
    if v.numel() == 0 or _resolve_backend(backend, q, v) == "torch":
        return taylor_linear_attention_step_reference(q, k, v, state, scale=scale, eps=eps)
    return _step(q, k, v, state, scale, eps)


def _check_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> float:
    """Dtypes, devices and scale -> scale."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: cast them to one")
    if not q.is_floating_point():
        raise ValueError(f"q, k and v have dtype {q.dtype}: it must be a floating point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v are on {q.device}, {k.device}, {v.device}: move them to one device")
    if q.shape[-1] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}: feature_dim must be at least 1")
    return checked_scale(scale, q.shape[-1])


def check_token_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 3 or v.dim() != 3 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: q and k must be"
            " [batch, heads, feature_dim] and v [batch, heads, head_dim]"
        )


def checked_scale(scale: float | None, feature_dim: int) -> float:
    if scale is None:
        return feature_dim**-0.5
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive: its square root scales the features")
    return scale


def _check_state(name: str, state: torch.Tensor, leading: tuple[int, int], q: torch.Tensor, v: torch.Tensor) -> None:
    expected = (*leading, packed_feature_count(q.shape[-1]), v.shape[-1] + 1)
    if state.shape != expected:
        raise ValueError(f"{name} has shape {tuple(state.shape)}: it must be [sequences, heads, P, head_dim + 1] = {expected}")
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state.dtype != dtype:
        raise ValueError(f"{name} has dtype {state.dtype}: for {v.dtype} inputs it must be {dtype}")
    if state.device != v.device:
        raise ValueError(f"{name} is on {state.device} and v on {v.device}: move them to one device")


def _resolve_backend(backend: str, q: torch.Tensor, v: torch.Tensor) -> str:
    resolved = resolve_backend(backend, q)
    feature_dim, head_dim = q.shape[-1], v.shape[-1]
    if resolved == "torch":
        return resolved
    if not MIN_TRITON_FEATURE_DIM <= feature_dim <= MAX_TRITON_FEATURE_DIM:
        limit = f"the Triton form takes feature_dim {MIN_TRITON_FEATURE_DIM} to {MAX_TRITON_FEATURE_DIM}, not {feature_dim}"
    elif head_dim > MAX_TRITON_HEAD_DIM:
        limit = f"the Triton form takes head_dim up to {MAX_TRITON_HEAD_DIM}, not {head_dim}"
    else:
        return resolved
    return without_triton("taylor_linear_attention", backend, limit)


@torch.library.custom_op("geobased::taylor_linear_attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    eps: float,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y like v, the final state (empty unless asked for), and the denominators, float32 [heads, batch, seq_len]."""
    from . import taylor_linear_attention_forward_triton

    y, final_state, den = taylor_linear_attention_forward_triton.forward(
        q, k, v, attention_mask, initial_state, cu_seqlens, scale, eps, output_final_state
    )
    return y, v.new_empty(0, dtype=torch.float32) if final_state is None else final_state, den


@register_fake(_attention)
def _(q, k, v, attention_mask, initial_state, cu_seqlens, scale, eps, output_final_state):
    batch, seq_len, heads, feature_dim = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (sequences, heads, packed_feature_count(feature_dim), v.shape[-1] + 1) if output_final_state else (0,)
    return (
        v.new_empty(v.shape),
        v.new_empty(state_shape, dtype=torch.float32),
        v.new_empty((heads, batch, seq_len), dtype=torch.float32),
    )


@torch.library.custom_op("geobased::taylor_linear_attention_backward", mutates_args=())
def _attention_backward(
    dy: torch.Tensor,
    dfinal_state: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    y: torch.Tensor,
    den: torch.Tensor,
    scale: float,
    need_dinitial_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv and the gradient of the initial state (empty unless needed)."""
    from . import taylor_linear_attention_backward_triton

    *gradients, dinitial_state = taylor_linear_attention_backward_triton.backward(
        dy, dfinal_state, q, k, v, attention_mask, initial_state, cu_seqlens, y, den, scale, need_dinitial_state
    )
    return *gradients, v.new_empty(0, dtype=torch.float32) if dinitial_state is None else dinitial_state  # type: ignore[return-value]


@register_fake(_attention_backward)
def _(dy, dfinal_state, q, k, v, attention_mask, initial_state, cu_seqlens, y, den, scale, need_dinitial_state):
    dinitial_state = v.new_empty(initial_state.shape if need_dinitial_state else (0,), dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dinitial_state


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _, ctx.output_final_state = inputs
    y, _, den = output
    ctx.save_for_backward(*tensors, y, den)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_state, _):
    y = ctx.saved_tensors[-2]
    dy = torch.zeros_like(y) if dy is None else dy
    dfinal_state = dfinal_state if ctx.output_final_state else None
    need_dinitial_state = ctx.needs_input_grad[4]
    *gradients, dinitial_state = _run_backward(dy, dfinal_state, *ctx.saved_tensors, ctx.scale, need_dinitial_state)
    return *gradients, None, dinitial_state if need_dinitial_state else None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
_run = direct_call(_attention, _setup_context, _backward)
_run_backward = direct_call(_attention_backward)


@torch.library.custom_op("geobased::taylor_linear_attention_step", mutates_args=("state",))
def _step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, scale: float, eps: float) -> torch.Tensor:
    from . import taylor_linear_attention_step_triton

    return taylor_linear_attention_step_triton.step(q, k, v, state, scale, eps)


@register_fake(_step)
def _(q, k, v, state, scale, eps):
    return v.new_empty(v.shape)
