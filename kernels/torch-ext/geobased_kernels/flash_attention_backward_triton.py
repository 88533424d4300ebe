"""Triton backward kernels of softmax attention; the forward kernel's module says what the arguments are.

- The weights are recomputed from the saved logsumexp: p = exp2(scale * score - logsumexp), ds = p * (dy v^T - delta),
  delta = sum_d dy * y.
- Queries' side: one program per tile of queries walks over its keys: dq. Keys' side: one program per tile of keys walks over
  its queries: dk, dv, with transposed scores, so that p^T and ds^T stay in registers as left operands.
- The queries' side runs first and leaves delta for the keys' side.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .flash_attention_configs import launch_config
from .flash_attention_tiles_triton import hide_keys, key_ranges, load_rows, locate, query_ranges, sees, store_rows, visible_runs
from .flash_attention_triton import grid, is_misread_by_interpreter, shared_arguments, strides, with_dense_rows


def backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    logsumexp: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments as of `forward`, dy like y -> dq, dk, dv."""
    options: dict[str, Any] = dict(causal=causal, window=window, softmax_scale=softmax_scale, key_mask=key_mask, bounds=bounds)
    if is_misread_by_interpreter(q):
        dy, y, wide_q, wide_k, wide_v = (x.float() for x in (dy, y, q, k, v))
        dq, dk, dv = backward(dy, wide_q, wide_k, wide_v, y, logsumexp, **options)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    dy, q, k, v, y = (with_dense_rows(x) for x in (dy, q, k, v, y))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    shared = shared_arguments(q, k, v, **options)
    shared.update(softmax_scale=softmax_scale, **strides(d=dy))
    seq_len, kv_len = q.shape[1], k.shape[1]
    choose = functools.partial(launch_config, q=q, windowed=window is not None, kv_len=kv_len)
    delta = torch.empty_like(logsumexp)
    with torch.cuda.device_of(q):
        config = choose("dq")
        _query_gradient_kernel[grid(config["TILE"], seq_len, q)](
            *(q, k, v, y, dy, logsumexp, delta, dq), **shared, **strides(y=y), **config
        )
        config = choose("dkdv")
        _key_value_gradient_kernel[grid(config["TILE"], kv_len, k)](*(q, k, v, dy, logsumexp, delta, dk, dv), **shared, **config)
    return dq, dk, dv


@triton.jit
def _query_gradient_kernel(
    q,
    k,
    v,
    y,
    dy,
    logsumexp,
    delta,
    dq,
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
    stride_yb,
    stride_yt,
    stride_yh,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    MASK_ALL: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and delta of the queries start .. start + TILE - 1 of one head."""
    batch, head, start = locate(heads, seq_len, TILE, HEADS_FIRST)
    queries = start + tl.arange(0, TILE)
    last, count = visible_runs(queries, bounds, seq_len, kv_len, window, CAUSAL, WINDOWED, PACKED)
    lo, hi, full_lo, full_hi = key_ranges(start, bounds, seq_len, kv_len, window, CAUSAL, WINDOWED, PACKED, TILE)
    dy_tile = load_rows(dy + batch * stride_db + head * stride_dh, start, seq_len, stride_dt, True, HEAD_DIM, TILE, BLOCK_D)
    y_tile = load_rows(y + batch * stride_yb + head * stride_yh, start, seq_len, stride_yt, True, HEAD_DIM, TILE, BLOCK_D)
    row_delta = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    q_tile = load_rows(q + batch * stride_qb + head * stride_qh, start, seq_len, stride_qt, True, HEAD_DIM, TILE, BLOCK_D)
    statistics = (batch * heads + head) * seq_len + queries
    lse = tl.load(logsumexp + statistics, queries < seq_len, other=0.0)
    tl.store(delta + statistics, row_delta, queries < seq_len)
    k += batch * stride_kb + head // GROUP * stride_kh
    v += batch * stride_vb + head // GROUP * stride_vh
    if HAS_MASK:
        key_mask += batch * kv_len

    acc = tl.zeros([TILE, BLOCK_D], tl.float32)
    if WINDOWED or PACKED:
        acc = _accumulate_query_gradient(
            *(acc, q_tile, dy_tile, lse, row_delta, k, v, key_mask, last, count, lo, hi, full_lo, full_hi, kv_len),
            *(stride_kt, stride_vt, scale_log2, True, MASK_ALL or HAS_MASK, HAS_MASK),
            *(HEAD_DIM, BLOCK_D, STEP, PRECISION),
        )
    else:
        full = full_hi // STEP * STEP
        acc = _accumulate_query_gradient(
            *(acc, q_tile, dy_tile, lse, row_delta, k, v, key_mask, last, count, 0, full, 0, full, kv_len),
            *(stride_kt, stride_vt, scale_log2, False, False, HAS_MASK, HEAD_DIM, BLOCK_D, STEP, PRECISION),
        )
        acc = _accumulate_query_gradient(
            *(acc, q_tile, dy_tile, lse, row_delta, k, v, key_mask, last, count, full, hi, 0, 0, kv_len),
            *(stride_kt, stride_vt, scale_log2, True, True, HAS_MASK, HEAD_DIM, BLOCK_D, STEP, PRECISION),
        )
    row = (batch * seq_len * heads + head) * HEAD_DIM
    store_rows(dq + row, start, seq_len, heads * HEAD_DIM, acc * softmax_scale, HEAD_DIM, TILE, BLOCK_D)


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
    last,
    count,
    lo,
    hi,
    full_lo,
    full_hi,
    kv_len,
    stride_kt,
    stride_vt,
    scale_log2,
    EDGES: tl.constexpr,
    MASK_ALL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc += ds @ k over the keys lo .. hi - 1; EDGES and MASK_ALL as in `hide_keys`."""
    for start in range(lo, hi, STEP):
        k_tile = load_rows(k, start, kv_len, stride_kt, EDGES, HEAD_DIM, STEP, BLOCK_D)
        v_tile = load_rows(v, start, kv_len, stride_vt, EDGES, HEAD_DIM, STEP, BLOCK_D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - lse[:, None])
        weights = hide_keys(
            *(weights, 0.0, start, last, count, full_lo, full_hi, key_mask, kv_len, EDGES, MASK_ALL, HAS_MASK, STEP)
        )
        dweights = tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[:, None])
        acc = tl.dot(dscores.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
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
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    MASK_ALL: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of the keys start .. start + TILE - 1 of one key head, over all the query heads that share it."""
    kv_heads = heads // GROUP
    batch, head, start = locate(kv_heads, kv_len, TILE, HEADS_FIRST)
    keys = start + tl.arange(0, TILE)
    k_tile = load_rows(k + batch * stride_kb + head * stride_kh, start, kv_len, stride_kt, True, HEAD_DIM, TILE, BLOCK_D)
    v_tile = load_rows(v + batch * stride_vb + head * stride_vh, start, kv_len, stride_vt, True, HEAD_DIM, TILE, BLOCK_D)
    lo, hi, full_lo, full_hi = query_ranges(start, bounds, seq_len, kv_len, window, CAUSAL, WINDOWED, PACKED, TILE)
    dk_tile = tl.zeros([TILE, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([TILE, BLOCK_D], tl.float32)
    for member in range(GROUP):
        query_head = head * GROUP + member
        statistics = (batch * heads + query_head) * seq_len
        q_head = q + batch * stride_qb + query_head * stride_qh
        dy_head = dy + batch * stride_db + query_head * stride_dh
        if WINDOWED or PACKED:
            dk_tile, dv_tile = _accumulate_key_value_gradient(
                *(dk_tile, dv_tile, k_tile, v_tile, q_head, dy_head, logsumexp, delta, bounds, keys, lo, hi),
                *(full_lo, full_hi, statistics, seq_len, kv_len, window, stride_qt, stride_dt, scale_log2),
                *(CAUSAL, WINDOWED, PACKED, True, MASK_ALL, HEAD_DIM, BLOCK_D, STEP, PRECISION),
            )
        else:
            # causal: the diagonal first; then, and without causality everywhere, all queries see all of the keys
            full = tl.minimum(lo + tl.cdiv(full_lo - lo, STEP) * STEP, seq_len)
            if CAUSAL:
                dk_tile, dv_tile = _accumulate_key_value_gradient(
                    *(dk_tile, dv_tile, k_tile, v_tile, q_head, dy_head, logsumexp, delta, bounds, keys, lo, full),
                    *(0, 0, statistics, seq_len, kv_len, window, stride_qt, stride_dt, scale_log2),
                    *(CAUSAL, WINDOWED, PACKED, True, True, HEAD_DIM, BLOCK_D, STEP, PRECISION),
                )
            dk_tile, dv_tile = _accumulate_key_value_gradient(
                *(dk_tile, dv_tile, k_tile, v_tile, q_head, dy_head, logsumexp, delta, bounds, keys, full, hi),
                *(0, 0, statistics, seq_len, kv_len, window, stride_qt, stride_dt, scale_log2),
                *(CAUSAL, WINDOWED, PACKED, False, False, HEAD_DIM, BLOCK_D, STEP, PRECISION),
            )
    if HAS_MASK:  # what padding gathered stands in its own rows
        kept = (tl.load(key_mask + batch * kv_len + keys, keys < kv_len, other=0) != 0)[:, None]
        dk_tile = tl.where(kept, dk_tile, 0.0)
        dv_tile = tl.where(kept, dv_tile, 0.0)
    row = (batch * kv_len * kv_heads + head) * HEAD_DIM
    store_rows(dk + row, start, kv_len, kv_heads * HEAD_DIM, dk_tile * softmax_scale, HEAD_DIM, TILE, BLOCK_D)
    store_rows(dv + row, start, kv_len, kv_heads * HEAD_DIM, dv_tile, HEAD_DIM, TILE, BLOCK_D)


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
    lo,
    hi,
    full_lo,
    full_hi,
    statistics,
    seq_len,
    kv_len,
    window,
    stride_qt,
    stride_dt,
    scale_log2,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    EDGES: tl.constexpr,
    MASK_ALL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dv += p^T @ dy and dk += ds^T @ q over the queries lo .. hi - 1; queries that do not exist are rows of zeros."""
    for start in range(lo, hi, STEP):
        queries = start + tl.arange(0, STEP)
        q_tile = load_rows(q, start, seq_len, stride_qt, True, HEAD_DIM, STEP, BLOCK_D)
        dy_tile = load_rows(dy, start, seq_len, stride_dt, True, HEAD_DIM, STEP, BLOCK_D)
        lse = tl.load(logsumexp + statistics + queries, queries < seq_len, other=0.0)
        row_delta = tl.load(delta + statistics + queries, queries < seq_len, other=0.0)
        # both products of the transposed tiles before the exponential, which the second one then overlaps
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        dweights = tl.dot(v_tile, tl.trans(dy_tile), input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - lse[None, :])
        if MASK_ALL:
            last, count = visible_runs(queries, bounds, seq_len, kv_len, window, CAUSAL, WINDOWED, PACKED)
            weights = tl.where(sees(last[None, :], count[None, :], keys[:, None]), weights, 0.0)
        elif EDGES:  # noqa: SIM102 (decided when the kernel is compiled, the next one when it runs)
            if (start < full_lo) | (start + STEP > full_hi):
                last, count = visible_runs(queries, bounds, seq_len, kv_len, window, CAUSAL, WINDOWED, PACKED)
                weights = tl.where(sees(last[None, :], count[None, :], keys[:, None]), weights, 0.0)
        dscores = weights * (dweights - row_delta[None, :])
        dv_tile = tl.dot(weights.to(dy_tile.dtype), dy_tile, dv_tile, input_precision=PRECISION)
        dk_tile = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    return dk_tile, dv_tile
