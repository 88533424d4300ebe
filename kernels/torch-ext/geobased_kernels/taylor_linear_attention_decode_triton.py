"""Triton kernels of decoding with a deferred fold: a step reads the state once, a fold reads and writes it once.

Both see the state as [batch * heads, P, head_dim]. The packed features are never stored, and neither are tables of their
indices: a program computes which two entries of [x, 1] make its rows, so nothing has to be copied to the device while a CUDA
graph is captured.
"""

import torch
import triton
import triton.language as tl

from .programmatic_launch import overlap_options
from .taylor_linear_attention_reference import packed_feature_count

# One line for each kind of state and number of (sequence, head) pairs, the first that fits is taken: bytes per entry, most
# pairs, {BLOCK_P: rows per turn, BLOCK_C: columns per program, UNROLLED: whether turns are unrolled, num_warps}. Few pairs: many
# small programs, and of each all loads at once. Many pairs: small programs that load one turn ahead. Where BLOCK_P is below the
# number of threads, Triton computes each feature in all threads that use it.
STEP_LAUNCHES: tuple[tuple[int, int, dict[str, int | bool]], ...] = (
    (2, 32, dict(BLOCK_P=256, BLOCK_C=16, UNROLLED=True, num_warps=8)),
    (2, 256, dict(BLOCK_P=256, BLOCK_C=32, UNROLLED=True, num_warps=8)),
    (2, 1024, dict(BLOCK_P=128, BLOCK_C=128, UNROLLED=True, num_warps=4)),
    (2, 2**62, dict(BLOCK_P=32, BLOCK_C=128, UNROLLED=False, num_warps=2)),
    (4, 32, dict(BLOCK_P=256, BLOCK_C=16, UNROLLED=True, num_warps=8)),
    (4, 256, dict(BLOCK_P=256, BLOCK_C=32, UNROLLED=True, num_warps=8)),
    (4, 2**62, dict(BLOCK_P=64, BLOCK_C=128, UNROLLED=True, num_warps=4)),
)
FOLD_LAUNCH: dict[str, int] = dict(BLOCK_P=16, TURNS=10, NUM_STAGES=3, num_warps=4)


def step_launch(pairs: int, entry_bytes: int, feature_dim: int, head_dim: int) -> dict[str, int | bool]:
    """Launch parameters of `step_kernel`."""
    launch = next(launch for size, most, launch in STEP_LAUNCHES if size == entry_bytes and pairs <= most)
    columns = min(launch["BLOCK_C"], max(16, triton.next_power_of_2(head_dim)))
    threads_per_row = max(1, columns * entry_bytes // 16)  # of 16 bytes each
    rows_at_once = 32 * launch["num_warps"] // threads_per_row
    rows = min(launch["BLOCK_P"], triton.next_power_of_2(packed_feature_count(feature_dim)))
    return launch | dict(BLOCK_P=rows, BLOCK_C=columns, BLOCK_R=min(rows, rows_at_once))


@triton.jit
def _packed_pair(rows, D: tl.constexpr):
    """Rows of the packed features -> indices i, j into [x, 1] and the weight of their product."""
    pair = rows - (D + 1)  # counts the pairs i <= j, row by row; row i starts at i * D - i * (i - 1) / 2
    # i solves a quadratic equation; its discriminant is 1 modulo 8, so that taking 0.5 off keeps the root on the right
    # side of every integer whatever the last bit of the square root is
    discriminant = ((2 * D + 1) * (2 * D + 1) - 8 * pair).to(tl.float32) - 0.5
    i = ((2 * D + 1 - tl.sqrt(tl.maximum(discriminant, 0.0))) * 0.5).to(tl.int32)
    j = pair - i * D + ((i * (i - 1)) >> 1) + i
    weight = tl.where((rows > D) & (i == j), 0.7071067811865476, 1.0)
    linear = rows <= D
    i = tl.where(linear, tl.where(rows == 0, D, rows - 1), i)
    j = tl.where(linear, D, j)
    return i, j, weight


@triton.jit
def _load_scaled(x_ptr, offsets, index, root_scale, mask, D: tl.constexpr):
    """Entries `index` of [x * sqrt(scale), 1]."""
    x = tl.load(x_ptr + offsets + index, mask=mask & (index < D), other=0.0).to(tl.float32) * root_scale
    return tl.where(index < D, x, 1.0)


@triton.jit
def _load_rows(ptr, start, limit, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows start .. start + ROWS - 1 of ptr [limit, WIDTH] as [BLOCK_R, ROWS / BLOCK_R, columns], zero outside.

    BLOCK_R neighbouring rows are what all threads of a program load at once. Triton gives a first axis of this length to the
    threads, so that a sum over the second stays within each of them.
    """
    rows = start + tl.arange(0, BLOCK_R)[:, None] + tl.arange(0, ROWS // BLOCK_R)[None, :] * BLOCK_R
    offsets = rows[:, :, None] * WIDTH + columns[None, None, :]
    return tl.load(ptr + offsets, mask=(rows < limit)[:, :, None] & (columns < WIDTH)[None, None, :], other=0.0)


@triton.jit
def _weighted_sum(weights, rows):
    """weights [ROWS], rows as `_load_rows` gives them -> weighted sums of every BLOCK_R-th row, [BLOCK_R, columns]."""
    weights = tl.trans(tl.reshape(weights, [rows.shape[1], rows.shape[0]]))
    return tl.sum(weights[:, :, None] * rows.to(tl.float32), axis=1)


@triton.jit
def _add_rows(acc, den, state, start, norm_ptr, q_ptr, root_scale, P: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr):
    """Adds phi(q) times the rows of `state`, which begin at `start`, to the numerator and the denominator."""
    rows = start + tl.arange(0, BLOCK_P)
    exists = rows < P
    norm = tl.load(norm_ptr + rows, mask=exists, other=0.0)
    i, j, weight = _packed_pair(rows, D)
    phi = _load_scaled(q_ptr, 0, i, root_scale, exists, D) * _load_scaled(q_ptr, 0, j, root_scale, exists, D) * weight
    return acc + _weighted_sum(phi, state), den + phi * norm


@triton.jit
def step_kernel(
    q_ptr,  # [batch, heads, D]
    k_ptr,
    v_ptr,  # [batch, heads, DV]
    high_ptr,  # [batch * heads, P, DV]
    norm_ptr,  # [batch * heads, P]
    recent_k_ptr,  # in and out [batch * heads, CAPACITY, D]
    recent_v_ptr,  # in and out [batch * heads, CAPACITY, DV]
    count_ptr,
    y_ptr,  # out [batch * heads, DV]
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    heads,
    scale,
    root_scale,
    eps,
    P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLLED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0)
    sequence = (pair // heads).to(tl.int64)
    head = pair % heads
    pair = pair.to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dims = tl.arange(0, D_PAD)
    count = tl.load(count_ptr)
    q_ptr += sequence * q_stride + head * q_head_stride
    k_ptr += sequence * k_stride + head * k_head_stride
    v_ptr += sequence * v_stride + head * v_head_stride
    high_ptr += pair * (P * DV)
    norm_ptr += pair * P
    recent_k_ptr += pair * (CAPACITY * D)
    recent_v_ptr += pair * (CAPACITY * DV)

    # The first rows before anything else: no load moves across the barriers of the sums below.
    state = _load_rows(high_ptr, 0, P, columns, DV, BLOCK_P, BLOCK_R)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    q = tl.load(q_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    den = tl.zeros([BLOCK_P], dtype=tl.float32)
    weight_sum = 0.0
    for start in tl.static_range(0, CAPACITY, BLOCK_W):
        slots = start + tl.arange(0, BLOCK_W)
        waiting = (slots < count) & (slots < CAPACITY)
        keys = tl.load(recent_k_ptr + slots[:, None] * D + dims[None, :], mask=waiting[:, None] & (dims < D)[None, :], other=0.0)
        values = _load_rows(recent_v_ptr, start, tl.minimum(count, CAPACITY), columns, DV, BLOCK_W, BLOCK_R)
        s = tl.sum(keys.to(tl.float32) * q[None, :], axis=1) * scale
        a = tl.where(waiting, 1.0 + s + 0.5 * s * s, 0.0)
        weight_sum += tl.sum(a, axis=0)
        acc += _weighted_sum(a, values)
    if UNROLLED:
        for start in tl.static_range(0, P, BLOCK_P):
            next_state = state
            if start + BLOCK_P < P:
                next_state = _load_rows(high_ptr, start + BLOCK_P, P, columns, DV, BLOCK_P, BLOCK_R)
            acc, den = _add_rows(acc, den, state, start, norm_ptr, q_ptr, root_scale, P, D, BLOCK_P)
            state = next_state
    else:
        for start in range(0, P, BLOCK_P):
            next_state = _load_rows(high_ptr, start + BLOCK_P, P, columns, DV, BLOCK_P, BLOCK_R)  # none beyond P
            acc, den = _add_rows(acc, den, state, start, norm_ptr, q_ptr, root_scale, P, D, BLOCK_P)
            state = next_state

    k = tl.load(k_ptr + dims, mask=dims < D, other=0.0)
    v = tl.load(v_ptr + columns, mask=columns < DV, other=0.0)
    s = tl.sum(k.to(tl.float32) * q, axis=0) * scale
    a = 1.0 + s + 0.5 * s * s
    numerator = tl.sum(acc, axis=0) + a * v.to(tl.float32)
    y = numerator / (tl.sum(den, axis=0) + weight_sum + a + eps)
    tl.store(y_ptr + pair * DV + columns, y.to(y_ptr.dtype.element_ty), mask=columns < DV)
    # slots from `count` on were not read, so no program can see what another one stores here
    if count < CAPACITY:
        tl.store(recent_v_ptr + count * DV + columns, v.to(recent_v_ptr.dtype.element_ty), mask=columns < DV)
        if tl.program_id(1) == 0:
            tl.store(recent_k_ptr + count * D + dims, k.to(recent_k_ptr.dtype.element_ty), mask=dims < D)


@triton.jit
def fold_kernel(
    recent_k_ptr,  # [batch * heads, CAPACITY, D]
    recent_v_ptr,  # [batch * heads, CAPACITY, DV]
    count_ptr,
    high_ptr,  # in and out [batch * heads, P, DV]
    low_ptr,  # the same, or None
    norm_ptr,  # in and out [batch * heads, P]
    root_scale,
    P: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_LOW: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TURNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    groups: tl.constexpr = (P + BLOCK_P * TURNS - 1) // (BLOCK_P * TURNS)
    pair = (tl.program_id(0) // groups).to(tl.int64)
    columns = tl.arange(0, DV_PAD)
    slots = tl.arange(0, BLOCK_W)
    count = tl.load(count_ptr)
    waiting = (slots < count) & (slots < CAPACITY)
    recent_k_ptr += pair * (CAPACITY * D)
    high_ptr += pair * (P * DV)
    if HAS_LOW:
        low_ptr += pair * (P * DV)
    norm_ptr += pair * P
    values = tl.load(
        recent_v_ptr + pair * (CAPACITY * DV) + slots[:, None] * DV + columns[None, :],
        mask=waiting[:, None] & (columns < DV)[None, :],
        other=0.0,
    )
    if PARTS == 0:
        values = values.to(tl.float32)
    for turn in tl.range(TURNS, num_stages=NUM_STAGES):
        rows = (tl.program_id(0) % groups * TURNS + turn) * BLOCK_P + tl.arange(0, BLOCK_P)
        exists = rows < P
        offsets = rows[:, None] * DV + columns[None, :]
        mask = exists[:, None] & (columns < DV)[None, :]
        state = tl.load(high_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_LOW:
            state += tl.load(low_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + rows, mask=exists, other=0.0)
        i, j, weight = _packed_pair(rows, D)
        inside = exists[:, None] & waiting[None, :]
        x_i = _load_scaled(recent_k_ptr, slots[None, :] * D, i[:, None], root_scale, inside, D)
        x_j = _load_scaled(recent_k_ptr, slots[None, :] * D, j[:, None], root_scale, inside, D)
        phi = tl.where(inside, x_i * x_j * weight[:, None], 0.0)
        norm += tl.sum(phi, axis=1)
        if PARTS == 0:
            state += tl.dot(phi, values, input_precision="tf32x3")
        else:  # bfloat16 values are exact as they are; 8 bits of phi go with each product
            for _ in tl.static_range(PARTS):
                part = phi.to(tl.bfloat16)
                phi -= part.to(tl.float32)
                state = tl.dot(part, values, acc=state)
        high = state.to(high_ptr.dtype.element_ty)
        tl.store(high_ptr + offsets, high, mask=mask)
        if HAS_LOW:
            tl.store(low_ptr + offsets, (state - high.to(tl.float32)).to(low_ptr.dtype.element_ty), mask=mask)
        tl.store(norm_ptr + rows, norm, mask=exists)


def step(
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
    """-> y [batch, heads, head_dim]; the token is written to slot `count` of recent_k and recent_v."""
    batch, heads, feature_dim = q.shape
    head_dim = v.shape[-1]
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    capacity = recent_k.shape[2]
    launch = step_launch(batch * heads, high.element_size(), feature_dim, head_dim)
    block_w = max(launch["BLOCK_R"], min(32, triton.next_power_of_2(capacity)))
    with torch.cuda.device_of(q):
        step_kernel[(batch * heads, triton.cdiv(head_dim, launch["BLOCK_C"]))](
            q, k, v, high, norm, recent_k, recent_v, count, y,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads, scale, scale**0.5, eps,
            P=high.shape[2], D=feature_dim, D_PAD=triton.next_power_of_2(feature_dim), DV=head_dim,
            CAPACITY=capacity, BLOCK_W=block_w, **launch, **overlap_options(),
        )  # fmt: skip
    return y


def fold(
    high: torch.Tensor,
    low: torch.Tensor | None,
    norm: torch.Tensor,
    recent_k: torch.Tensor,
    recent_v: torch.Tensor,
    count: torch.Tensor,
    scale: float,
) -> None:
    """Adds the first `count` waiting tokens to high, low and norm, in place."""
    batch, heads, rows, head_dim = high.shape
    capacity, feature_dim = recent_k.shape[2:]
    parts = 0
    if recent_v.dtype == torch.bfloat16 and recent_v.is_cuda:  # the interpreter's products misread bfloat16
        parts = 3 if low is None else 2  # float32 holds 24 bits, high and low 16
    groups = triton.cdiv(rows, FOLD_LAUNCH["BLOCK_P"] * FOLD_LAUNCH["TURNS"])
    with torch.cuda.device_of(high):
        fold_kernel[(batch * heads * groups,)](
            recent_k, recent_v, count, high, low, norm, scale**0.5,
            P=rows, D=feature_dim, DV=head_dim, DV_PAD=max(16, triton.next_power_of_2(head_dim)), CAPACITY=capacity,
            BLOCK_W=max(16, triton.next_power_of_2(capacity)), HAS_LOW=low is not None, PARTS=parts, **FOLD_LAUNCH,
        )  # fmt: skip
