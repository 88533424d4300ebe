"""What the forward and the backward kernels of softmax attention share: tiles, ranges and masks.

A query sees one run of keys: `last`, the last of them, and `count`, how many. Bidirectional, causal, windowed and packed
attention differ only in these two numbers, so that one unsigned comparison, `last - key < count`, masks them all; a key that
is padding stands at HIDDEN, which no run contains.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(2**30)


@triton.jit
def locate(heads, length, TILE: tl.constexpr, HEADS_FIRST: tl.constexpr):
    """-> batch, head (int64) and first row of this program's tile.

    HEADS_FIRST: programs side by side are heads of one tile (a window's tiles share keys with their neighbours in time),
    otherwise tiles of one head (which share all its keys), the last first: where attention is causal it has most to do.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(length, TILE)
    if HEADS_FIRST:
        head = program % heads
        tile = program // heads % tiles
        batch = program // heads // tiles
    else:
        tile = tiles - 1 - program % tiles
        head = program // tiles % heads
        batch = program // tiles // heads
    return batch.to(tl.int64), head.to(tl.int64), tile * TILE


@triton.jit
def load_rows(
    base, start, limit, stride, BOUNDED: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows start .. start + ROWS - 1 of base [limit, HEAD_DIM] as [ROWS, BLOCK_D], zero outside."""
    offsets = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + offsets[:, None] * stride + dims[None, :]
    if BOUNDED and HEAD_DIM < BLOCK_D:
        x = tl.load(pointers, (start + offsets < limit)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif BOUNDED:
        x = tl.load(pointers, (start + offsets < limit)[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(pointers, (dims < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def store_rows(base, start, limit, stride, x, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    offsets = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + offsets[:, None] * stride + dims[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), (start + offsets < limit)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def visible_runs(
    queries,
    bounds,
    seq_len,
    kv_len,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """-> last [queries] and count [queries] (unsigned) of the keys that each query sees."""
    if CAUSAL:
        last = queries + (kv_len - seq_len)
    elif PACKED:
        last = tl.load(bounds + seq_len + queries, queries < seq_len, other=0) - 1
    else:
        last = tl.zeros_like(queries) + (kv_len - 1)
    count = last + 1
    if WINDOWED:
        count = tl.minimum(count, window)
    if PACKED:
        count = tl.minimum(count, last + 1 - tl.load(bounds + queries, queries < seq_len, other=0))
    return last, count.to(tl.uint32, bitcast=True)


@triton.jit
def key_ranges(
    start,
    bounds,
    seq_len,
    kv_len,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Queries start .. start + TILE - 1 see keys lo .. hi - 1; each of them sees all of full_lo .. full_hi - 1."""
    end = tl.minimum(start + TILE, seq_len) - 1
    lo = 0
    full_lo = 0
    if CAUSAL:
        hi = end + kv_len - seq_len + 1
        full_hi = start + kv_len - seq_len + 1
    elif PACKED:
        hi = tl.load(bounds + seq_len + end)
        full_hi = tl.load(bounds + seq_len + start)
    else:
        hi = kv_len
        full_hi = kv_len
    if WINDOWED:
        lo = tl.maximum(full_hi - window, 0)
        full_lo = tl.maximum(hi - window, 0)
    if PACKED:
        lo = tl.maximum(lo, tl.load(bounds + start))
        full_lo = tl.maximum(full_lo, tl.load(bounds + end))
    return lo, hi, full_lo, full_hi


@triton.jit
def query_ranges(
    start,
    bounds,
    seq_len,
    kv_len,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Queries lo .. hi - 1 see some of the keys start .. start + TILE - 1; those of full_lo .. full_hi - 1 see them all."""
    end = tl.minimum(start + TILE, kv_len) - 1
    lo = 0
    full_lo = 0
    hi = seq_len
    full_hi = seq_len
    if CAUSAL:
        lo = tl.maximum(start + seq_len - kv_len, 0)
        full_lo = tl.maximum(end + seq_len - kv_len, 0)
    elif PACKED:
        lo = tl.load(bounds + start)
        full_lo = tl.load(bounds + end)
    if WINDOWED:
        hi = tl.minimum(end + seq_len - kv_len + window, hi)
        full_hi = tl.minimum(start + seq_len - kv_len + window, full_hi)
    if PACKED:
        hi = tl.minimum(hi, tl.load(bounds + seq_len + end))
        full_hi = tl.minimum(full_hi, tl.load(bounds + seq_len + start))
    return lo, hi, full_lo, full_hi


@triton.jit
def key_places(start, key_mask, kv_len, HAS_MASK: tl.constexpr, STEP: tl.constexpr):
    """Positions [STEP] of the keys from start on, HIDDEN where a key is padding. No run reaches beyond the last key."""
    keys = start + tl.arange(0, STEP)
    if HAS_MASK:
        kept = tl.load(key_mask + keys, keys < kv_len, other=0) != 0
        keys = tl.where(kept, keys, HIDDEN)
    return keys


@triton.jit
def sees(last, count, keys):
    """Whether queries see keys; last and count along one axis of the result, keys along the other."""
    return (last - keys).to(tl.uint32, bitcast=True) < count


@triton.jit
def hide_keys(
    tile,
    hidden,
    start,
    last,
    count,
    full_lo,
    full_hi,
    key_mask,
    kv_len,
    EDGES: tl.constexpr,
    MASK_ALL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STEP: tl.constexpr,
):
    """tile [queries, STEP] of the keys from start on, with the number `hidden` where a query does not see a key.

    EDGES: some queries do not see some keys, in every tile (MASK_ALL) or outside full_lo .. full_hi - 1.
    """
    if MASK_ALL:
        keys = key_places(start, key_mask, kv_len, HAS_MASK, STEP)
        tile = tl.where(sees(last[:, None], count[:, None], keys[None, :]), tile, hidden)
    elif EDGES:
        if (start < full_lo) | (start + STEP > full_hi):
            keys = key_places(start, key_mask, kv_len, HAS_MASK, STEP)
            tile = tl.where(sees(last[:, None], count[:, None], keys[None, :]), tile, hidden)
    elif HAS_MASK:
        kept = tl.load(key_mask + start + tl.arange(0, STEP)) != 0
        tile = tl.where(kept[None, :], tile, hidden)
    return tile
