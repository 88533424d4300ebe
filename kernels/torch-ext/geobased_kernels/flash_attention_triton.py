"""Triton forward kernel of softmax attention, and what launches it: bidirectional, causal, windowed, packed, grouped heads.

- One program per (batch, tile of queries, head): online softmax over the key tiles that its queries see.
- Scores keep their scale until the exponential, exp2(scale * score - scale * max), one multiply-add each.
- A window's tiles all lie near its edges: they run in one pipelined loop. Without a window the tiles that every query sees
  run without a mask, then those at the edge, with a last tile as small as the keys that are left (577 = 9 * 64 + 1).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .backend import triton_interpreter_is_on
from .flash_attention_configs import launch_config
from .flash_attention_tiles_triton import hide_keys, key_ranges, load_rows, locate, store_rows, visible_runs


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [batch, seq_len, heads, head_dim]; k, v [batch, kv_len, kv_heads, head_dim]; key_mask bool [batch, kv_len]; bounds
    int32 [2, seq_len], start and end of each token's sequence; a window needs causal=True.

    -> y like q and the base 2 logsumexp of each query's scores, float32 [batch, heads, seq_len], inf where it sees no key.
    """
    options: dict[str, Any] = dict(causal=causal, window=window, key_mask=key_mask, bounds=bounds)
    if is_misread_by_interpreter(q):
        y, logsumexp = forward(q.float(), k.float(), v.float(), softmax_scale=softmax_scale, **options)
        return y.to(q.dtype), logsumexp
    if softmax_scale <= 0:  # the largest scaled score must be the largest score
        q, softmax_scale = (-q, -softmax_scale) if softmax_scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (with_dense_rows(x) for x in (q, k, v))
    batch, seq_len, heads, head_dim = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(batch, heads, seq_len, dtype=torch.float32, device=q.device)
    config = launch_config("forward", q, windowed=window is not None, kv_len=k.shape[1])
    # packed and windowed tiles may be masked at both ends: one loop
    split = window is None and bounds is None
    step = config["STEP"]
    tail = step if causal or not split else min(step, max(16, triton.next_power_of_2(k.shape[1] % step)))
    with torch.cuda.device_of(q):
        _forward_kernel[grid(config["TILE"], seq_len, q)](
            *(q, k, v, y, logsumexp),
            **shared_arguments(q, k, v, softmax_scale=softmax_scale, **options),
            SPLIT=split,
            TAIL=tail,
            **config,
        )
    return y, logsumexp


def is_misread_by_interpreter(q: torch.Tensor) -> bool:
    """Triton's interpreter keeps bfloat16 as 16-bit integers, and its dot multiplies those."""
    return q.dtype == torch.bfloat16 and triton_interpreter_is_on()


def with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    # offsets within a tile are int32: rows far apart are brought together
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()


def grid(tile: int, length: int, x: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(length, tile) * x.shape[0] * x.shape[2],)


def shared_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> dict[str, Any]:
    """Arguments that every kernel takes."""
    heads, head_dim = q.shape[2:]
    kv_len, kv_heads = k.shape[1:3]
    return dict(
        key_mask=None if key_mask is None else key_mask.contiguous().view(torch.int8),
        bounds=bounds,
        heads=heads,
        seq_len=q.shape[1],
        kv_len=kv_len,
        window=kv_len if window is None else min(window, kv_len),
        scale_log2=softmax_scale * math.log2(math.e),
        **strides(q=q, k=k, v=v),
        CAUSAL=causal,
        WINDOWED=window is not None,
        PACKED=bounds is not None,
        HAS_MASK=key_mask is not None,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
    )


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bth")}


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
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    MASK_ALL: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, start = locate(heads, seq_len, TILE, HEADS_FIRST)
    queries = start + tl.arange(0, TILE)
    last, count = visible_runs(queries, bounds, seq_len, kv_len, window, CAUSAL, WINDOWED, PACKED)
    lo, hi, full_lo, full_hi = key_ranges(start, bounds, seq_len, kv_len, window, CAUSAL, WINDOWED, PACKED, TILE)
    q += batch * stride_qb + head * stride_qh
    q_tile = load_rows(q, start, seq_len, stride_qt, True, HEAD_DIM, TILE, BLOCK_D)
    k += batch * stride_kb + head // GROUP * stride_kh
    v += batch * stride_vb + head // GROUP * stride_vh
    if HAS_MASK:
        key_mask += batch * kv_len

    # finite, so that a row whose keys are all hidden gives exp2(-inf - row_max) = 0 and no nan
    row_max = tl.full([TILE], -1e30, tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_D], tl.float32)
    if SPLIT:
        full = full_hi // STEP * STEP
        acc, row_sum, row_max = _attend(
            *(acc, row_sum, row_max, q_tile, k, v, key_mask, last, count, 0, full, 0, full, kv_len),
            *(stride_kt, stride_vt, scale_log2, False, False, HAS_MASK, HEAD_DIM, BLOCK_D, STEP, PRECISION),
        )
        acc, row_sum, row_max = _attend(
            *(acc, row_sum, row_max, q_tile, k, v, key_mask, last, count, full, hi, 0, 0, kv_len),
            *(stride_kt, stride_vt, scale_log2, True, True, HAS_MASK, HEAD_DIM, BLOCK_D, TAIL, PRECISION),
        )
    else:
        acc, row_sum, row_max = _attend(
            *(acc, row_sum, row_max, q_tile, k, v, key_mask, last, count, lo, hi, full_lo, full_hi, kv_len),
            *(stride_kt, stride_vt, scale_log2, True, MASK_ALL or HAS_MASK, HAS_MASK),
            *(HEAD_DIM, BLOCK_D, STEP, PRECISION),
        )

    sees_none = row_sum == 0.0
    row_sum = tl.where(sees_none, 1.0, row_sum)
    row = (batch * seq_len * heads + head) * HEAD_DIM
    store_rows(y + row, start, seq_len, heads * HEAD_DIM, acc * (1.0 / row_sum)[:, None], HEAD_DIM, TILE, BLOCK_D)
    lse = tl.where(sees_none, float("inf"), row_max * scale_log2 + tl.log2(row_sum))
    tl.store(logsumexp + (batch * heads + head) * seq_len + queries, lse, queries < seq_len)


@triton.jit
def _attend(
    acc,
    row_sum,
    row_max,
    q_tile,
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
    """Fold the keys lo .. hi - 1 into acc [TILE, BLOCK_D], row_sum and row_max [TILE]; EDGES and MASK_ALL as in `hide_keys`."""
    for start in range(lo, hi, STEP):
        k_tile = load_rows(k, start, kv_len, stride_kt, EDGES, HEAD_DIM, STEP, BLOCK_D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores = hide_keys(
            *(scores, float("-inf"), start, last, count, full_lo, full_hi, key_mask, kv_len, EDGES, MASK_ALL, HAS_MASK, STEP)
        )
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
        decay = tl.exp2((row_max - new_max) * scale_log2)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        v_tile = load_rows(v, start, kv_len, stride_vt, EDGES, HEAD_DIM, STEP, BLOCK_D)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max
