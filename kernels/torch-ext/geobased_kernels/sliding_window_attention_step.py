"""One token of causal sliding window attention over a ring buffer, with rotary embedding, as a custom op for the Triton form.

The token at position p lies in slot p % window. Keys are stored with their rotary embedding. See `sliding_window_attention`
for whole sequences.
"""

import torch

from .backend import resolve_backend, without_triton
from .compile_support import register_fake
from .sliding_window_attention_step_reference import sliding_window_attention_step_reference

MAX_TRITON_HEAD_DIM = 256
MAX_TRITON_WINDOW = 4096  # the kernel has one unrolled turn for each 16 to 128 slots


def sliding_window_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    position: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    first_valid: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """q, k, v [batch, heads, head_dim]; ring_k, ring_v [batch, heads, window, head_dim], updated in place -> y like q.

    y attends to this token and the window - 1 before it. There is no gradient in the Triton form.

    Args:
        q, k, v: may be strided views of one projection; nothing is copied.
        ring_k, ring_v: this token is written to slot position % window. Slots that no token has filled are not read.
        position: int32 or int64 tensor [1] on the device, how many tokens came before this one. It is not changed.
        cos, sin: [batch or 1, head_dim], rotary embedding of this position, applied to q and k as `rotary_embedding` does: in
            float32, rounded once. Without them q and k are taken as they are.
        first_valid: int32 or int64 [batch]; tokens at positions below it are padding and are not seen.
        softmax_scale: head_dim^-0.5 unless given.
        backend: "auto", "triton" or "torch".

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 64)
        >>> ring_k, ring_v = torch.zeros(2, 2, 4, 129, 64)
        >>> sliding_window_attention_step(q, k, v, ring_k, ring_v, torch.zeros(1, dtype=torch.int32)).shape
        torch.Size([2, 4, 64])
    """
    _check_inputs(q, k, v, ring_k, ring_v, position, cos, sin, first_valid)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if q.numel() == 0 or _resolve_backend(backend, q, ring_k, cos) == "torch":
        return sliding_window_attention_step_reference(
            q, k, v, ring_k, ring_v, position, cos=cos, sin=sin, first_valid=first_valid, softmax_scale=softmax_scale
        )
    return _step(q, k, v, ring_k, ring_v, position, cos, sin, first_valid, softmax_scale)


def _check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    first_valid: torch.Tensor | None,
) -> None:
    if q.dim() != 3 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: all must be [batch, heads, head_dim]"
        )
    batch, heads, head_dim = q.shape
    for name, ring in (("ring_k", ring_k), ("ring_v", ring_v)):
        if ring.dim() != 4 or (*ring.shape[:2], ring.shape[3]) != q.shape or ring.shape[2] < 1 or ring.shape != ring_k.shape:
            raise ValueError(
                f"{name} has shape {tuple(ring.shape)}: both rings must be [batch, heads, window, head_dim] ="
                f" [{batch}, {heads}, window, {head_dim}]"
            )
        if not ring.is_contiguous():
            raise ValueError(f"{name} has strides {ring.stride()}: it must be contiguous, for it is updated in place")
    if not q.dtype == k.dtype == v.dtype == ring_k.dtype == ring_v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k, v, ring_k and ring_v have dtypes {q.dtype}, {k.dtype}, {v.dtype}, {ring_k.dtype}, {ring_v.dtype}:"
            " cast them to one floating point dtype"
        )
    check_position(position)
    if first_valid is not None and first_valid.shape != (batch,):
        raise ValueError(f"first_valid has shape {tuple(first_valid.shape)}: it must be [batch] = [{batch}]")
    if first_valid is not None:
        _check_integers("first_valid", first_valid)
    if (cos is None) != (sin is None):
        raise ValueError(f"{'cos' if cos is None else 'sin'} is missing: the rotary embedding needs both cos and sin, or neither")
    if cos is not None and sin is not None:
        if cos.shape not in ((batch, head_dim), (1, head_dim)) or sin.shape != cos.shape:
            raise ValueError(
                f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}: both must be [{batch}, {head_dim}] or"
                f" [1, {head_dim}]"
            )
        if head_dim % 2 or cos.dtype != sin.dtype:
            raise ValueError(
                f"head_dim is {head_dim} and cos and sin have dtypes {cos.dtype} and {sin.dtype}: the rotary embedding needs an"
                " even head_dim and one dtype"
            )
    tensors = [t for t in (q, k, v, ring_k, ring_v, position, cos, sin, first_valid) if t is not None]
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"the inputs are on {', '.join(sorted({str(t.device) for t in tensors}))}: move them to one device")


def check_position(position: torch.Tensor) -> None:
    """Raises ValueError unless `position` is what a step over a ring takes: one integer."""
    if position.numel() != 1:
        raise ValueError(f"position has shape {tuple(position.shape)}: it must be one number, the same for the whole batch")
    _check_integers("position", position)


def _check_integers(name: str, index: torch.Tensor) -> None:
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {index.dtype}: make it torch.int32 or torch.int64")


def _resolve_backend(backend: str, q: torch.Tensor, ring: torch.Tensor, cos: torch.Tensor | None) -> str:
    resolved = resolve_backend(backend, q)
    window, head_dim = ring.shape[2:]
    if resolved == "torch":
        return resolved
    if head_dim > MAX_TRITON_HEAD_DIM:
        limit = f"the Triton form takes head_dim up to {MAX_TRITON_HEAD_DIM}, not {head_dim}"
    elif window > MAX_TRITON_WINDOW:
        limit = f"the Triton form takes windows up to {MAX_TRITON_WINDOW}, not {window}"
    elif cos is not None and cos.dtype == torch.float64:
        limit = "the Triton form takes no float64 cos and sin"
    else:
        return resolved
    return without_triton("sliding_window_attention_step", backend, limit)


@torch.library.custom_op("geobased::sliding_window_attention_step", mutates_args=("ring_k", "ring_v"))
def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    first_valid: torch.Tensor | None,
    softmax_scale: float,
) -> torch.Tensor:
    from . import sliding_window_attention_step_triton

    return sliding_window_attention_step_triton.step(q, k, v, ring_k, ring_v, position, cos, sin, first_valid, softmax_scale)


@register_fake(_step)
def _(q, k, v, ring_k, ring_v, position, cos, sin, first_valid, softmax_scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
