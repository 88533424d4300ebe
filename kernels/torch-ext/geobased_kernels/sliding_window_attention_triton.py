"""Triton kernels of causal sliding window attention: online softmax over the key tiles a query tile can reach.

- One program per (batch, tile, head), heads fastest, so that the tiles in flight share keys and values in the L2 cache.
- Positions count along the keys: query i stands at position i + kv_len - seq_len and sees keys
  first_key(i) .. its position, first_key = max(position - window + 1, start of its sequence).
- Tiles that every query of a tile sees in full skip the window mask (SPLIT); packed sequences mask every tile.
- The backward pass recomputes the weights from the saved base 2 logsumexp. The dq kernel runs first and leaves
  delta = sum_d dy * y for the dk, dv kernel.
"""

import math

import torch
import triton
import triton.language as tl

from .backend import triton_interpreter_is_on

# (16-bit inputs, head_dim up to) -> tiles of BLOCK_M queries and BLOCK_N keys
LAUNCH_CONFIGS = {
    "forward": {
        (True, 64): dict(BLOCK_M=64, BLOCK_N=64, SPLIT=True, num_warps=4, num_stages=3),
        (True, 128): dict(BLOCK_M=64, BLOCK_N=64, SPLIT=True, num_warps=4, num_stages=2),
        (False, 64): dict(BLOCK_M=32, BLOCK_N=32, SPLIT=False, num_warps=4, num_stages=2),
        (False, 128): dict(BLOCK_M=32, BLOCK_N=32, SPLIT=False, num_warps=8, num_stages=1),
    },
    "dq": {
        (True, 64): dict(BLOCK_M=64, BLOCK_N=64, SPLIT=True, num_warps=4, num_stages=3),
        (True, 128): dict(BLOCK_M=64, BLOCK_N=64, SPLIT=True, num_warps=4, num_stages=2),
        (False, 64): dict(BLOCK_M=32, BLOCK_N=32, SPLIT=False, num_warps=4, num_stages=2),
        (False, 128): dict(BLOCK_M=16, BLOCK_N=16, SPLIT=False, num_warps=8, num_stages=1),
    },
    "dkdv": {
        (True, 64): dict(BLOCK_M=64, BLOCK_N=64, SPLIT=True, num_warps=4, num_stages=2),
        (True, 128): dict(BLOCK_M=64, BLOCK_N=64, SPLIT=False, num_warps=8, num_stages=2),
        (False, 64): dict(BLOCK_M=16, BLOCK_N=32, SPLIT=False, num_warps=4, num_stages=2),
        (False, 128): dict(BLOCK_M=16, BLOCK_N=32, SPLIT=False, num_warps=8, num_stages=1),
    },
}


def launch_config(kernel: str, q: torch.Tensor) -> dict:
    return LAUNCH_CONFIGS[kernel][q.element_size() == 2, 64 if q.shape[-1] <= 64 else 128]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [batch, seq_len, heads, head_dim]; k, v [batch, kv_len, heads, head_dim]; key_mask bool [batch, kv_len]; bounds
    int32 [2, seq_len], start and end of each token's sequence -> y like q, logsumexp float32 [batch, heads, seq_len]."""
    if _is_misread_by_interpreter(q):
        y, logsumexp = forward(q.float(), k.float(), v.float(), window, softmax_scale, key_mask, bounds)
        return y.to(q.dtype), logsumexp
    q, k, v = (_with_dense_rows(x) for x in (q, k, v))
    batch, seq_len, heads, head_dim = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(batch, heads, seq_len, dtype=torch.float32, device=q.device)
    config = launch_config("forward", q)
    with torch.cuda.device_of(q):
        _forward_kernel[_grid(config["BLOCK_M"], seq_len, q)](
            *(q, k, v, y, logsumexp),
            **_shared_arguments(q, k, v, window, softmax_scale, key_mask, bounds),
            **config,
        )
    return y, logsumexp


def backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    logsumexp: torch.Tensor,
    window: int,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments as of `forward`, dy like y -> dq, dk, dv."""
    if _is_misread_by_interpreter(q):
        dy, y, wide_q, wide_k, wide_v = (x.float() for x in (dy, y, q, k, v))
        dq, dk, dv = backward(dy, wide_q, wide_k, wide_v, y, logsumexp, window, softmax_scale, key_mask, bounds)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    dy, q, k, v = (_with_dense_rows(x) for x in (dy, q, k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(logsumexp)
    shared = _shared_arguments(q, k, v, window, softmax_scale, key_mask, bounds)
    shared.update(softmax_scale=softmax_scale, **_strides(d=dy))
    with torch.cuda.device_of(q):
        config = launch_config("dq", q)
        _query_gradient_kernel[_grid(config["BLOCK_M"], q.shape[1], q)](
            *(q, k, v, y.contiguous(), dy, logsumexp, dq, delta), **shared, **config
        )
        config = launch_config("dkdv", q)
        _key_value_gradient_kernel[_grid(config["BLOCK_N"], k.shape[1], q)](
            *(q, k, v, dy, logsumexp, delta, dk, dv), **shared, **config
        )
    return dq, dk, dv


def _is_misread_by_interpreter(q: torch.Tensor) -> bool:
    """Triton's interpreter keeps bfloat16 as 16-bit integers, and its dot multiplies those."""
    return q.dtype == torch.bfloat16 and triton_interpreter_is_on()


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    # offsets within a tile are int32: rows far apart are brought together
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()


def _grid(block: int, length: int, q: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(length, block) * q.shape[0] * q.shape[2],)


def _shared_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> dict:
    heads, head_dim = q.shape[2:]
    return dict(
        key_mask=None if key_mask is None else key_mask.contiguous().view(torch.int8),
        bounds=bounds,
        heads=heads,
        seq_len=q.shape[1],
        kv_len=k.shape[1],
        window=min(window, k.shape[1]),
        scale_log2=softmax_scale * math.log2(math.e),
        **_strides(q=q, k=k, v=v),
        HAS_MASK=key_mask is not None,
        PACKED=bounds is not None,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
    )


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bth")}


@triton.jit
def _locate(heads, length, BLOCK: tl.constexpr):
    """-> batch, head (int64) and first row of this program's tile."""
    program = tl.program_id(0)
    tiles = tl.cdiv(length, BLOCK)
    head = program % heads
    tile = program // heads % tiles
    batch = program // heads // tiles
    return batch.to(tl.int64), head.to(tl.int64), tile * BLOCK


@triton.jit
def _load_rows(
    base, start, limit, stride, BOUNDED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows start .. start + BLOCK - 1 of base [limit, HEAD_DIM] as [BLOCK, BLOCK_D], zero outside."""
    offsets = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + offsets[:, None] * stride + dims[None, :]
    if BOUNDED:
        rows = start + offsets
        x = tl.load(pointers, ((rows >= 0) & (rows < limit))[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(pointers, (dims < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _store_rows(base, start, limit, stride, x, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + offsets[:, None] * stride + dims[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), (start + offsets < limit)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _first_keys(positions, queries, bounds, seq_len, window, PACKED: tl.constexpr):
    first = tl.maximum(positions - window + 1, 0)
    if PACKED:
        first = tl.maximum(first, tl.load(bounds + queries, queries < seq_len, other=0))
    return first


@triton.jit
def _key_ranges(
    start,
    bounds,
    seq_len,
    kv_len,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Bounds a <= b <= c <= d of the keys that queries start .. start + BLOCK_M - 1 reach: tiles from a to b and from c to d
    need the window mask, tiles from b to c do not."""
    position = start + kv_len - seq_len
    last = tl.minimum(position + BLOCK_M, kv_len)
    first = tl.maximum(position - window + 1, 0)
    if PACKED:
        first = tl.maximum(first, tl.load(bounds + start))
    full = 0
    if SPLIT and not PACKED:
        full = tl.maximum(position - tl.maximum(position + BLOCK_M - window, first), 0) // BLOCK_N
    full_start = position - full * BLOCK_N
    return full_start - tl.cdiv(tl.maximum(full_start - first, 0), BLOCK_N) * BLOCK_N, full_start, position, last


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    y,
    logsumexp,
    key_mask,
    bounds,
    heads,
    seq_len,
    kv_len,
    window,
    scale_log2,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    batch, head, start = _locate(heads, seq_len, BLOCK_M)
    queries = start + tl.arange(0, BLOCK_M)
    positions = queries + (kv_len - seq_len)
    first_keys = _first_keys(positions, queries, bounds, seq_len, window, PACKED)
    q += batch * stride_qb + head * stride_qh
    q_tile = _load_rows(q, start, seq_len, stride_qt, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    if HAS_MASK:
        key_mask += batch * kv_len

    # finite, so that a row whose keys are all masked gives exp2(-inf - row_max) = 0 and no nan
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    edge, full, diagonal, last = _key_ranges(start, bounds, seq_len, kv_len, window, BLOCK_M, BLOCK_N, SPLIT, PACKED)
    if SPLIT and not PACKED:
        acc, row_sum, row_max = _attend(
            *(acc, row_sum, row_max, q_tile, k, v, key_mask, positions, first_keys, edge, full, kv_len),
            *(stride_kt, stride_vt, scale_log2, True, HAS_MASK, HEAD_DIM, BLOCK_N, BLOCK_D),
        )
        acc, row_sum, row_max = _attend(
            *(acc, row_sum, row_max, q_tile, k, v, key_mask, positions, first_keys, full, diagonal, kv_len),
            *(stride_kt, stride_vt, scale_log2, False, HAS_MASK, HEAD_DIM, BLOCK_N, BLOCK_D),
        )
        edge = diagonal
    acc, row_sum, row_max = _attend(
        *(acc, row_sum, row_max, q_tile, k, v, key_mask, positions, first_keys, edge, last, kv_len),
        *(stride_kt, stride_vt, scale_log2, True, HAS_MASK, HEAD_DIM, BLOCK_N, BLOCK_D),
    )

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    row = (batch * seq_len * heads + head) * HEAD_DIM
    _store_rows(y + row, start, seq_len, heads * HEAD_DIM, acc / row_sum[:, None], HEAD_DIM, BLOCK_M, BLOCK_D)
    tl.store(logsumexp + (batch * heads + head) * seq_len + queries, row_max + tl.log2(row_sum), queries < seq_len)


@triton.jit
def _attend(
    acc,
    row_sum,
    row_max,
    q_tile,
    k,
    v,
    key_mask,
    positions,
    first_keys,
    lo,
    hi,
    kv_len,
    stride_kt,
    stride_vt,
    scale_log2,
    WINDOWED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold the key tiles from lo to hi into acc [BLOCK_M, BLOCK_D], row_sum and row_max [BLOCK_M]."""
    for start in range(lo, hi, BLOCK_N):
        k_tile = _load_rows(k, start, kv_len, stride_kt, WINDOWED, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
        scores = _hide(scores, start + tl.arange(0, BLOCK_N), positions, first_keys, key_mask, kv_len, WINDOWED, HAS_MASK)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        v_tile = _load_rows(v, start, kv_len, stride_vt, WINDOWED, HEAD_DIM, BLOCK_N, BLOCK_D)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _hide(scores, keys, positions, first_keys, key_mask, kv_len, WINDOWED: tl.constexpr, HAS_MASK: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N] with -inf where a query does not see a key."""
    if WINDOWED:
        visible = (keys[None, :] >= first_keys[:, None]) & (keys[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    if HAS_MASK:
        kept = tl.load(key_mask + keys, (keys >= 0) & (keys < kv_len), other=0) != 0
        scores = tl.where(kept[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _query_gradient_kernel(
    q,
    k,
    v,
    y,
    dy,
    logsumexp,
    dq,
    delta,
    key_mask,
    bounds,
    heads,
    seq_len,
    kv_len,
    window,
    softmax_scale,
    scale_log2,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_db,
    stride_dt,
    stride_dh,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    batch, head, start = _locate(heads, seq_len, BLOCK_M)
    queries = start + tl.arange(0, BLOCK_M)
    positions = queries + (kv_len - seq_len)
    first_keys = _first_keys(positions, queries, bounds, seq_len, window, PACKED)
    row = (batch * seq_len * heads + head) * HEAD_DIM
    q += batch * stride_qb + head * stride_qh
    q_tile = _load_rows(q, start, seq_len, stride_qt, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    y_tile = _load_rows(y + row, start, seq_len, heads * HEAD_DIM, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    dy += batch * stride_db + head * stride_dh
    dy_tile = _load_rows(dy, start, seq_len, stride_dt, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    statistics = (batch * heads + head) * seq_len + queries
    lse = tl.load(logsumexp + statistics, queries < seq_len, other=0.0)
    row_delta = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(delta + statistics, row_delta, queries < seq_len)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    if HAS_MASK:
        key_mask += batch * kv_len

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    edge, full, diagonal, last = _key_ranges(start, bounds, seq_len, kv_len, window, BLOCK_M, BLOCK_N, SPLIT, PACKED)
    if SPLIT and not PACKED:
        acc = _accumulate_query_gradient(
            *(acc, q_tile, dy_tile, lse, row_delta, k, v, key_mask, positions, first_keys, edge, full, kv_len),
            *(stride_kt, stride_vt, scale_log2, True, HAS_MASK, HEAD_DIM, BLOCK_N, BLOCK_D),
        )
        acc = _accumulate_query_gradient(
            *(acc, q_tile, dy_tile, lse, row_delta, k, v, key_mask, positions, first_keys, full, diagonal, kv_len),
            *(stride_kt, stride_vt, scale_log2, False, HAS_MASK, HEAD_DIM, BLOCK_N, BLOCK_D),
        )
        edge = diagonal
    acc = _accumulate_query_gradient(
        *(acc, q_tile, dy_tile, lse, row_delta, k, v, key_mask, positions, first_keys, edge, last, kv_len),
        *(stride_kt, stride_vt, scale_log2, True, HAS_MASK, HEAD_DIM, BLOCK_N, BLOCK_D),
    )
    _store_rows(dq + row, start, seq_len, heads * HEAD_DIM, acc * softmax_scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _accumulate_query_gradient(
    acc,
    q_tile,
    dy_tile,
    lse,
    row_delta,
    k,
    v,
    key_mask,
    positions,
    first_keys,
    lo,
    hi,
    kv_len,
    stride_kt,
    stride_vt,
    scale_log2,
    WINDOWED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """acc += dscores @ k over the key tiles from lo to hi, dscores = weights * (dy v^T - delta)."""
    for start in range(lo, hi, BLOCK_N):
        k_tile = _load_rows(k, start, kv_len, stride_kt, WINDOWED, HEAD_DIM, BLOCK_N, BLOCK_D)
        v_tile = _load_rows(v, start, kv_len, stride_vt, WINDOWED, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
        scores = _hide(scores, start + tl.arange(0, BLOCK_N), positions, first_keys, key_mask, kv_len, WINDOWED, HAS_MASK)
        weights = tl.exp2(scores - lse[:, None])
        dweights = tl.dot(dy_tile, tl.trans(v_tile), input_precision="ieee")
        dscores = weights * (dweights - row_delta[:, None])
        acc = tl.dot(dscores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _key_value_gradient_kernel(
    q,
    k,
    v,
    dy,
    logsumexp,
    delta,
    dk,
    dv,
    key_mask,
    bounds,
    heads,
    seq_len,
    kv_len,
    window,
    softmax_scale,
    scale_log2,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_db,
    stride_dt,
    stride_dh,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    batch, head, start = _locate(heads, kv_len, BLOCK_N)
    keys = start + tl.arange(0, BLOCK_N)
    k += batch * stride_kb + head * stride_kh
    k_tile = _load_rows(k, start, kv_len, stride_kt, True, HEAD_DIM, BLOCK_N, BLOCK_D)
    v += batch * stride_vb + head * stride_vh
    v_tile = _load_rows(v, start, kv_len, stride_vt, True, HEAD_DIM, BLOCK_N, BLOCK_D)
    q += batch * stride_qb + head * stride_qh
    dy += batch * stride_db + head * stride_dh
    logsumexp += (batch * heads + head) * seq_len
    delta += (batch * heads + head) * seq_len
    kept = keys < kv_len
    if HAS_MASK:
        kept = tl.load(key_mask + batch * kv_len + keys, kept, other=0) != 0

    # queries lo .. hi - 1 reach this tile; those from full to full_end see all of it
    query = start + seq_len - kv_len
    lo = tl.maximum(query, 0)
    hi = tl.minimum(query + BLOCK_N - 1 + window, seq_len)
    if PACKED:
        hi = tl.minimum(hi, tl.load(bounds + seq_len + tl.minimum(start + BLOCK_N, seq_len) - 1))
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if SPLIT and not PACKED:
        full = lo + tl.cdiv(tl.maximum(query + BLOCK_N - 1 - lo, 0), BLOCK_M) * BLOCK_M
        full_end = full + tl.maximum(tl.minimum(query + window, seq_len) - full, 0) // BLOCK_M * BLOCK_M
        dk_tile, dv_tile = _accumulate_key_value_gradient(
            *(dk_tile, dv_tile, k_tile, v_tile, q, dy, logsumexp, delta, bounds, keys, kept, seq_len, kv_len, window),
            *(lo, tl.minimum(full, hi), stride_qt, stride_dt, scale_log2),
            *(True, HAS_MASK, PACKED, HEAD_DIM, BLOCK_M, BLOCK_D),
        )
        dk_tile, dv_tile = _accumulate_key_value_gradient(
            *(dk_tile, dv_tile, k_tile, v_tile, q, dy, logsumexp, delta, bounds, keys, kept, seq_len, kv_len, window),
            *(full, full_end, stride_qt, stride_dt, scale_log2),
            *(False, HAS_MASK, PACKED, HEAD_DIM, BLOCK_M, BLOCK_D),
        )
        lo = full_end
    dk_tile, dv_tile = _accumulate_key_value_gradient(
        *(dk_tile, dv_tile, k_tile, v_tile, q, dy, logsumexp, delta, bounds, keys, kept, seq_len, kv_len, window),
        *(lo, hi, stride_qt, stride_dt, scale_log2),
        *(True, HAS_MASK, PACKED, HEAD_DIM, BLOCK_M, BLOCK_D),
    )
    row = (batch * kv_len * heads + head) * HEAD_DIM
    _store_rows(dk + row, start, kv_len, heads * HEAD_DIM, dk_tile * softmax_scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    _store_rows(dv + row, start, kv_len, heads * HEAD_DIM, dv_tile, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _accumulate_key_value_gradient(
    dk_tile,
    dv_tile,
    k_tile,
    v_tile,
    q,
    dy,
    logsumexp,
    delta,
    bounds,
    keys,
    kept,
    seq_len,
    kv_len,
    window,
    lo,
    hi,
    stride_qt,
    stride_dt,
    scale_log2,
    WINDOWED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dv += weights^T @ dy and dk += dscores^T @ q over the query tiles from lo to hi; scores are transposed."""
    for start in range(lo, hi, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q_tile = _load_rows(q, start, seq_len, stride_qt, WINDOWED, HEAD_DIM, BLOCK_M, BLOCK_D)
        dy_tile = _load_rows(dy, start, seq_len, stride_dt, WINDOWED, HEAD_DIM, BLOCK_M, BLOCK_D)
        lse = tl.load(logsumexp + queries, queries < seq_len, other=0.0)
        row_delta = tl.load(delta + queries, queries < seq_len, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale_log2
        if WINDOWED:
            positions = queries + (kv_len - seq_len)
            first_keys = _first_keys(positions, queries, bounds, seq_len, window, PACKED)
            visible = (keys[:, None] >= first_keys[None, :]) & (keys[:, None] <= positions[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        if HAS_MASK:
            scores = tl.where(kept[:, None], scores, float("-inf"))
        weights = tl.exp2(scores - lse[None, :])
        dv_tile = tl.dot(weights.to(dy_tile.dtype), dy_tile, dv_tile, input_precision="ieee")
        dweights = tl.dot(v_tile, tl.trans(dy_tile), input_precision="ieee")
        dscores = weights * (dweights - row_delta[None, :])
        dk_tile = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    return dk_tile, dv_tile
