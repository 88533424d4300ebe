"""Triton kernel of one token of sliding window attention: one program per (sequence, head) reads its ring once.

The slot that the new token takes held a token that has just left the window, so it is written and never read: the window - 1
others are read in its place (128 for the window of 129 that BASED uses: a full tile), and the new token comes from registers.
"""

import torch
import triton
import triton.language as tl

from .programmatic_launch import overlap_options

# The first line whose number of (sequence, head) pairs is not exceeded. Few pairs: all loads at once; many: small programs
# that load one tile ahead (PREFETCH).
LAUNCHES: tuple[tuple[int, dict[str, int | bool]], ...] = (
    (256, dict(BLOCK_W=128, PREFETCH=False, num_warps=8)),
    (2**62, dict(BLOCK_W=8, PREFETCH=True, num_warps=1)),
)


def launch_parameters(pairs: int, window: int, head_dim: int, entry_bytes: int) -> dict[str, int | bool]:
    launch = next(launch for most, launch in LAUNCHES if pairs <= most)
    width, num_warps = _padded(head_dim), launch["num_warps"]
    # a tile of keys and one of values live in registers: at most 16 loads of 16 bytes each for every thread
    most = max(1, 16 * num_warps * 32 * 16 // (width * entry_bytes))
    block = min(launch["BLOCK_W"], triton.next_power_of_2(max(1, window - 1)), most)
    rows_at_once = max(1, 32 * num_warps * 16 // (width * entry_bytes))
    return launch | dict(BLOCK_W=block, BLOCK_R=min(block, rows_at_once))


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def _load_rotated(x_ptr, cos, sin, columns, D: tl.constexpr, ROTARY: tl.constexpr):
    """x with its rotary embedding, in x's dtype."""
    x = tl.load(x_ptr + columns, mask=columns < D, other=0.0)
    if ROTARY:
        half: tl.constexpr = D // 2
        partner = tl.where(columns < half, columns + half, columns - half)
        other = tl.load(x_ptr + partner, mask=columns < D, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * cos + tl.where(columns < half, -other, other) * sin).to(x_ptr.dtype.element_ty)
    return x


@triton.jit
def _load_tile(
    ptr, start, slot, older, columns, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Tokens start + 1 .. start + BLOCK_W positions back, as [BLOCK_R, BLOCK_W / BLOCK_R, columns]; zero beyond `older`.

    BLOCK_R rows are what all threads load at once. Triton gives a first axis of this length to the threads, so that a sum
    over the second stays within each of them.
    """
    others = start + tl.arange(0, BLOCK_R)[:, None] + tl.arange(0, BLOCK_W // BLOCK_R)[None, :] * BLOCK_R
    slots = slot - 1 - others
    slots = tl.where(slots < 0, slots + WINDOW, slots)
    offsets = slots[:, :, None] * D + columns[None, None, :]
    return tl.load(ptr + offsets, mask=(others < older)[:, :, None] & (columns < D)[None, None, :], other=0.0)


@triton.jit
def step_kernel(
    q_ptr,  # [batch, heads, D]
    k_ptr,
    v_ptr,
    ring_k_ptr,  # in and out [batch * heads, WINDOW, D]
    ring_v_ptr,
    position_ptr,
    cos_ptr,  # [batch or 1, D]
    sin_ptr,
    first_valid_ptr,  # [batch]
    y_ptr,  # out [batch * heads, D]
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    cos_stride,
    sin_stride,
    heads,
    softmax_scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_FIRST_VALID: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0)
    sequence = (pair // heads).to(tl.int64)
    head = pair % heads
    columns = tl.arange(0, D_PAD)
    position = tl.load(position_ptr).to(tl.int32)
    slot = position % WINDOW
    older = tl.minimum(position, WINDOW - 1)  # how many tokens are seen beside the new one
    if HAS_FIRST_VALID:
        older = tl.minimum(older, position - tl.load(first_valid_ptr + sequence).to(tl.int32))
    ring_k_ptr += pair.to(tl.int64) * (WINDOW * D)
    ring_v_ptr += pair.to(tl.int64) * (WINDOW * D)
    # The first tiles before anything else: no load moves across the barriers of the sums below.
    keys = _load_tile(ring_k_ptr, 0, slot, older, columns, WINDOW, D, BLOCK_W, BLOCK_R)
    values = _load_tile(ring_v_ptr, 0, slot, older, columns, WINDOW, D, BLOCK_W, BLOCK_R)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    cos, sin = 0.0, 0.0
    if ROTARY:
        cos = tl.load(cos_ptr + sequence * cos_stride + columns, mask=columns < D, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + sequence * sin_stride + columns, mask=columns < D, other=0.0).to(tl.float32)
    q = _load_rotated(q_ptr + sequence * q_stride + head * q_head_stride, cos, sin, columns, D, ROTARY)
    k = _load_rotated(k_ptr + sequence * k_stride + head * k_head_stride, cos, sin, columns, D, ROTARY)
    v = tl.load(v_ptr + sequence * v_stride + head * v_head_stride + columns, mask=columns < D, other=0.0)

    q = q.to(tl.float32) * (softmax_scale * 1.4426950408889634)  # scores in base 2
    # the new token is the first of the running softmax
    seen = older >= 0  # otherwise the new token itself is padding
    top = tl.where(seen, tl.sum(q * k.to(tl.float32), axis=0), -1e30)
    total = tl.where(seen, 1.0, 0.0)
    acc = tl.zeros([BLOCK_R, D_PAD], dtype=tl.float32)  # of the new token the first row alone
    acc = tl.where(seen & (tl.arange(0, BLOCK_R) == 0)[:, None], v.to(tl.float32)[None, :], acc)
    turns: tl.constexpr = BLOCK_W // BLOCK_R
    for start in range(0, WINDOW - 1, BLOCK_W):
        if PREFETCH:  # beyond the window nothing is loaded
            next_keys = _load_tile(ring_k_ptr, start + BLOCK_W, slot, older, columns, WINDOW, D, BLOCK_W, BLOCK_R)
            next_values = _load_tile(ring_v_ptr, start + BLOCK_W, slot, older, columns, WINDOW, D, BLOCK_W, BLOCK_R)
        visible = start + tl.arange(0, BLOCK_R)[:, None] + tl.arange(0, turns)[None, :] * BLOCK_R < older
        scores = tl.where(visible, tl.sum(keys.to(tl.float32) * q[None, None, :], axis=2), -1e30)
        new_top = tl.maximum(top, tl.max(scores))
        weights = tl.where(visible, tl.exp2(scores - new_top), 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights)
        acc = acc * shrink + tl.sum(weights[:, :, None] * values.to(tl.float32), axis=1)
        top = new_top
        if PREFETCH:
            keys = next_keys
            values = next_values
        elif BLOCK_W < WINDOW - 1:
            keys = _load_tile(ring_k_ptr, start + BLOCK_W, slot, older, columns, WINDOW, D, BLOCK_W, BLOCK_R)
            values = _load_tile(ring_v_ptr, start + BLOCK_W, slot, older, columns, WINDOW, D, BLOCK_W, BLOCK_R)
    y = tl.sum(acc, axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(y_ptr + pair.to(tl.int64) * D + columns, y.to(y_ptr.dtype.element_ty), mask=columns < D)
    tl.store(ring_k_ptr + slot * D + columns, k.to(ring_k_ptr.dtype.element_ty), mask=columns < D)
    tl.store(ring_v_ptr + slot * D + columns, v.to(ring_v_ptr.dtype.element_ty), mask=columns < D)


def step(
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
    """-> y like q; the token is written to slot position % window of both rings."""
    batch, heads, head_dim = q.shape
    window = ring_k.shape[2]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos_stride = sin_stride = 0
    if cos is not None and sin is not None:
        cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
        cos_stride, sin_stride = (0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin))
    with torch.cuda.device_of(q):
        step_kernel[(batch * heads,)](
            q, k, v, ring_k, ring_v, position, cos, sin, first_valid, y,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), cos_stride, sin_stride,
            heads, softmax_scale, D=head_dim, D_PAD=_padded(head_dim), WINDOW=window, ROTARY=cos is not None,
            HAS_FIRST_VALID=first_valid is not None,
            **launch_parameters(batch * heads, window, head_dim, q.element_size()), **overlap_options(),
        )  # fmt: skip
    return y
