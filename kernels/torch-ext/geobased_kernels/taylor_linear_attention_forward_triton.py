"""Triton kernels of Taylor linear attention: chunk states, a scan over them, outputs.

- Tokens are flattened to [batch * seq_len] and cut into chunks of `CHUNK`; a table gives the bounds of every chunk, so dense
  batches and sequences packed end to end (cu_seqlens) run the same kernels.
- S_c = sum_j phi(k_j) v_j^T and z_c = sum_j phi(k_j) per chunk; an exclusive scan makes them the state before each chunk;
  a tile of outputs adds what that state holds and the quadratic form inside its own chunk.
- phi is packed (see packed_feature_table), built on chip as [features, tokens] tiles, never stored. Accumulators are
  transposed, [head_dim, tokens]: with features along the last axis the output kernel is three times slower.
- The chunk state and scan kernels also serve the backward pass, which sums phi(q_t) [dy_t | -dy_t.y_t] / den_t in reverse.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .backend import triton_interpreter_is_on
from .taylor_linear_attention_reference import packed_feature_count, packed_feature_table

CHUNK = 256  # tokens whose keys share one stored state
# tokens of one matrix product; without tensor cores (float32) 64 would not fit in the registers
TILE = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
BLOCK_P = 32  # packed features of one matrix product; states are padded to a multiple of it
SCAN_BLOCK_P = 8  # small, so that one long sequence still fills the GPU

# (kernel, input dtype) -> launch options. float32 multiplies without tensor cores, which needs more threads and no prefetch.
LAUNCH = {
    ("chunk_state", torch.bfloat16): {"num_warps": 4, "num_stages": 3},
    ("chunk_state", torch.float16): {"num_warps": 4, "num_stages": 2},
    ("chunk_state", torch.float32): {"num_warps": 8, "num_stages": 1},
    ("chunk_state_reverse", torch.bfloat16): {"num_warps": 8, "num_stages": 2},
    ("chunk_state_reverse", torch.float16): {"num_warps": 8, "num_stages": 2},
    ("chunk_state_reverse", torch.float32): {"num_warps": 8, "num_stages": 1},
    ("scan", torch.bfloat16): {"num_warps": 4, "num_stages": 4},
    ("scan", torch.float16): {"num_warps": 4, "num_stages": 4},
    ("scan", torch.float32): {"num_warps": 4, "num_stages": 4},
    ("output", torch.bfloat16): {"num_warps": 4, "num_stages": 3},
    ("output", torch.float16): {"num_warps": 4, "num_stages": 2},
    ("output", torch.float32): {"num_warps": 8, "num_stages": 1},
}

# input dtype -> dtype of matrix operands, of stored chunk states, and precision of float32 products. Sums over a chunk can
# overflow float16, hence float32 operands there; TF32 keeps every bit of a float16.
PRECISION = {
    torch.bfloat16: (tl.bfloat16, torch.bfloat16, "tf32"),
    torch.float16: (tl.float32, torch.float32, "tf32"),
    torch.float32: (tl.float32, torch.float32, "ieee"),
}


class Chunks(NamedTuple):
    """How the flattened tokens are cut. Rows of `table` [count, 4]: start, end, chunks before and after in the sequence."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    sequences: int
    table: torch.Tensor
    first: torch.Tensor  # [sequences + 1]: the first chunk of each sequence
    several: bool  # whether some sequence may hold more than one chunk


def make_chunks(batch: int, seq_len: int, cu_seqlens: torch.Tensor | None, device: torch.device) -> Chunks:
    if cu_seqlens is None:
        return _dense_chunks(batch, seq_len, device)
    return _varlen_chunks(cu_seqlens, seq_len)


@functools.lru_cache(maxsize=256)
def _dense_chunks(batch: int, seq_len: int, device: torch.device) -> Chunks:
    chunks = _varlen_chunks(torch.arange(batch + 1) * seq_len, batch * seq_len)
    count = batch * triton.cdiv(seq_len, CHUNK)
    return Chunks(count, batch, chunks.table[:count].to(device), chunks.first.to(device), seq_len > CHUNK)


def _varlen_chunks(bounds: torch.Tensor, total: int) -> Chunks:
    """Everything stays on the device of `bounds`, without waiting for it: the count is an upper bound, the rest is empty."""
    sequences = bounds.numel() - 1
    bounds = bounds.long()
    lengths = bounds.diff()
    torch._assert_async(
        (lengths >= 0).all() & (bounds[0] == 0) & (bounds[-1] == total),
        f"cu_seqlens must rise from 0 to the number of tokens, {total}",
    )
    counts = (lengths + CHUNK - 1) // CHUNK
    first = F.pad(counts.cumsum(0), (1, 0))
    chunk = torch.arange(total // CHUNK + sequences, device=bounds.device)
    sequence = torch.searchsorted(first[1:], chunk, right=True)
    exists = sequence < sequences
    sequence = sequence.clamp(max=sequences - 1)
    before = chunk - first[sequence]
    start = bounds[sequence] + before * CHUNK
    end = torch.minimum(start + CHUNK, bounds[sequence + 1])
    table = torch.stack([start, end, before, counts[sequence] - 1 - before], dim=1) * exists[:, None]
    return Chunks(chunk.numel(), sequences, table.int(), first.int(), total > CHUNK)


@functools.lru_cache(maxsize=64)
def feature_tables(feature_dim: int, scale: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index tables and weights of the packed features on `device`, the scale folded into the weights, padded by weight 0."""
    first, second, weight = (torch.tensor(column) for column in packed_feature_table(feature_dim))
    degree = (first < feature_dim).int() + (second < feature_dim).int()
    weight = (weight.double() * scale ** (degree.double() / 2)).float()
    padding = (0, padded_rows(feature_dim) - weight.numel())
    tables = (
        F.pad(first, padding, value=feature_dim).int(),
        F.pad(second, padding, value=feature_dim).int(),
        F.pad(weight, padding),
    )
    return tables[0].to(device), tables[1].to(device), tables[2].to(device)


def padded_rows(feature_dim: int) -> int:
    return triton.cdiv(packed_feature_count(feature_dim), BLOCK_P) * BLOCK_P


def flatten_tokens(x: torch.Tensor) -> torch.Tensor:
    """[batch, seq_len, heads, dim] -> [batch * seq_len, heads, dim], contiguous in the last axis; a view where it can be."""
    x = x.reshape(-1, *x.shape[2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def flatten_mask(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if attention_mask is None else attention_mask.ne(0).reshape(-1).contiguous().view(torch.uint8)


def block_options(feature_dim: int, head_dim: int, dtype: torch.dtype) -> dict:
    dot, _, precision = PRECISION[dtype]
    return {
        "D": feature_dim,
        "D_PAD": max(16, triton.next_power_of_2(feature_dim)),
        "DV": head_dim,
        "DV_PAD": max(16, triton.next_power_of_2(head_dim)),
        "P_PAD": padded_rows(feature_dim),
        "BLOCK_P": BLOCK_P,
        "TILE": TILE[dtype],
        # the interpreter multiplies the bit patterns of bfloat16 operands
        "DOT": tl.float32 if triton_interpreter_is_on() else dot,
        "PRECISION": precision,
    }


@triton.jit
def load_rows(ptr, tokens, stride, keep, columns, WIDTH: tl.constexpr):
    """[tokens, columns], zero where `keep` is false and from column WIDTH on."""
    mask = keep[:, None] & (columns[None, :] < WIDTH)
    return tl.load(ptr + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(ptr, tokens, stride, keep, columns, WIDTH: tl.constexpr):
    """[columns, tokens]: load_rows transposed."""
    mask = keep[None, :] & (columns[:, None] < WIDTH)
    return tl.load(ptr + tokens[None, :] * stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def store_columns(ptr, tokens, stride, keep, columns, tile, WIDTH: tl.constexpr):
    """tile [columns, tokens] -> memory [tokens, WIDTH]."""
    mask = keep[None, :] & (columns[:, None] < WIDTH)
    tl.store(ptr + tokens[None, :] * stride + columns[:, None], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_keep(keep_ptr, keys, end):
    """Which keys exist and are no padding."""
    keep = keys < end
    if keep_ptr is not None:
        keep = keep & (tl.load(keep_ptr + keys, mask=keep, other=0) != 0)
    return keep


@triton.jit
def load_features(x_ptr, offsets, keep, rows, first_ptr, second_ptr, weight_ptr, D: tl.constexpr):
    """x1[first], x1[second] [rows, tokens] in float32 and weight [rows]; phi = weight * their product; x1 = [x, 1]."""
    i = tl.load(first_ptr + rows)
    j = tl.load(second_ptr + rows)
    weight = tl.load(weight_ptr + rows)
    x_i = tl.load(x_ptr + offsets[None, :] + i[:, None], mask=(i[:, None] < D) & keep[None, :], other=1.0).to(tl.float32)
    x_j = tl.load(x_ptr + offsets[None, :] + j[:, None], mask=(j[:, None] < D) & keep[None, :], other=1.0).to(tl.float32)
    return x_i, x_j, weight


@triton.jit
def chunk_state_kernel(
    x_ptr,  # [tokens, heads, D]: k, or q in the backward pass
    value_ptr,  # [tokens, heads, DV]: v, or dy
    keep_ptr,  # [tokens] or None
    den_ptr,  # [tokens, heads]: phi is divided by it (backward), or None
    extra_ptr,  # [tokens, heads]: the value column of the normaliser (backward), or None for ones
    states_ptr,  # out [chunks, heads, P_PAD, DV]
    norms_ptr,  # out [chunks, heads, P_PAD]
    chunks_ptr,
    first_ptr,
    second_ptr,
    weight_ptr,
    x_stride,
    x_head_stride,
    value_stride,
    value_head_stride,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILE: tl.constexpr,
    REVERSE: tl.constexpr,
    NEED_TOTAL: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    chunk = tl.program_id(0) // (P_PAD // BLOCK_P)
    rows = tl.program_id(0) % (P_PAD // BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    start = tl.load(chunks_ptr + chunk * 4)
    end = tl.load(chunks_ptr + chunk * 4 + 1)
    if not NEED_TOTAL:  # then nothing reads the sums of the chunk where the scan ends
        end = tl.where(tl.load(chunks_ptr + chunk * 4 + (2 if REVERSE else 3)) == 0, start, end)
    if start >= end:
        return
    columns = tl.arange(0, DV_PAD)
    state = tl.zeros([BLOCK_P, DV_PAD], dtype=tl.float32)
    norm = tl.zeros([BLOCK_P], dtype=tl.float32)
    x_ptr += head.to(tl.int64) * x_head_stride
    value_ptr += head.to(tl.int64) * value_head_stride
    for tile in range(start, end, TILE):
        tokens = (tile + tl.arange(0, TILE)).to(tl.int64)
        keep = load_keep(keep_ptr, tokens, end)
        token_weight = keep.to(tl.float32)
        if den_ptr is not None:
            token_weight = token_weight / tl.load(den_ptr + tokens * heads + head, mask=keep, other=1.0)
        x_i, x_j, weight = load_features(x_ptr, tokens * x_stride, keep, rows, first_ptr, second_ptr, weight_ptr, D)
        phi = weight[:, None] * x_i * x_j * token_weight[None, :]
        value = load_rows(value_ptr, tokens, value_stride, keep, columns, DV).to(DOT)
        state = tl.dot(phi.to(DOT), value, state, input_precision=PRECISION)
        if extra_ptr is not None:
            phi = phi * tl.load(extra_ptr + tokens * heads + head, mask=keep, other=0.0)[None, :]
        norm += tl.sum(phi, axis=1)
    out = (chunk.to(tl.int64) * heads + head) * P_PAD
    state_offsets = (out + rows)[:, None] * DV + columns[None, :]
    tl.store(states_ptr + state_offsets, state.to(states_ptr.dtype.element_ty), mask=columns[None, :] < DV)
    tl.store(norms_ptr + out + rows, norm)


@triton.jit
def scan_kernel(
    states_ptr,  # in: sums of each chunk; out: sums of all chunks before it (after it if REVERSE), from the seed on
    norms_ptr,
    seed_ptr,  # [sequences, heads, P, DV + 1] or None
    total_ptr,  # out [sequences, heads, P, DV + 1] or None
    first_chunk_ptr,
    P,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REVERSE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    sequence = tl.program_id(0) // (P_PAD // BLOCK_P)
    rows = tl.program_id(0) % (P_PAD // BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    columns = tl.arange(0, DV_PAD)
    in_state = columns[None, :] < DV
    outer = ((sequence.to(tl.int64) * heads + head) * P + rows) * (DV + 1)
    state = tl.zeros([BLOCK_P, DV_PAD], dtype=tl.float32)
    norm = tl.zeros([BLOCK_P], dtype=tl.float32)
    if seed_ptr is not None:
        state += tl.load(seed_ptr + outer[:, None] + columns[None, :], mask=(rows[:, None] < P) & in_state, other=0.0)
        norm += tl.load(seed_ptr + outer + DV, mask=rows < P, other=0.0)
    start = tl.load(first_chunk_ptr + sequence)
    count = tl.load(first_chunk_ptr + sequence + 1) - start
    for step in tl.range(0, count, num_stages=NUM_STAGES):
        chunk = start + (count - 1 - step if REVERSE else step)
        offsets = (chunk.to(tl.int64) * heads + head) * P_PAD + rows
        state_offsets = offsets[:, None] * DV + columns[None, :]
        n_rows = P_PAD
        if total_ptr is None:  # then the sums of the last chunk were not computed
            n_rows = tl.where(chunk == (start if REVERSE else start + count - 1), 0, P_PAD)
        computed = rows < n_rows
        chunk_state = tl.load(states_ptr + state_offsets, mask=computed[:, None] & in_state, other=0.0).to(tl.float32)
        chunk_norm = tl.load(norms_ptr + offsets, mask=computed, other=0.0)
        tl.store(states_ptr + state_offsets, state.to(states_ptr.dtype.element_ty), mask=in_state)
        tl.store(norms_ptr + offsets, norm)
        state += chunk_state
        norm += chunk_norm
    if total_ptr is not None:
        tl.store(total_ptr + outer[:, None] + columns[None, :], state, mask=(rows[:, None] < P) & in_state)
        tl.store(total_ptr + outer + DV, norm, mask=rows < P)


@triton.jit
def output_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keep_ptr,
    states_ptr,  # [chunks, heads, P_PAD, DV]: the state before each chunk, or None
    norms_ptr,
    y_ptr,  # out [tokens, heads, DV]
    den_ptr,  # out [tokens, heads]
    chunks_ptr,
    first_ptr,
    second_ptr,
    weight_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SEEDED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    chunk = tl.program_id(0) // TILES
    start = tl.load(chunks_ptr + chunk * 4)
    end = tl.load(chunks_ptr + chunk * 4 + 1)
    tile = start + tl.program_id(0) % TILES * TILE
    if tile >= end:
        return
    tokens = (tile + tl.arange(0, TILE)).to(tl.int64)
    exists = tokens < end
    columns = tl.arange(0, DV_PAD)
    features = tl.arange(0, D_PAD)
    q_ptr += head.to(tl.int64) * q_head_stride
    k_ptr += head.to(tl.int64) * k_head_stride
    v_ptr += head.to(tl.int64) * v_head_stride
    acc = tl.zeros([DV_PAD, TILE], dtype=tl.float32)
    den = tl.zeros([TILE], dtype=tl.float32)
    if states_ptr is not None:
        n_rows = P_PAD
        if not SEEDED:
            n_rows = tl.where(tl.load(chunks_ptr + chunk * 4 + 2) > 0, P_PAD, 0)
        base = (chunk.to(tl.int64) * heads + head) * P_PAD
        for row in range(0, n_rows, BLOCK_P):
            rows = row + tl.arange(0, BLOCK_P)
            x_i, x_j, weight = load_features(q_ptr, tokens * q_stride, exists, rows, first_ptr, second_ptr, weight_ptr, D)
            phi = weight[:, None] * x_i * x_j  # [BLOCK_P, TILE]
            state = load_columns(states_ptr, base + rows, DV, rows >= 0, columns, DV).to(DOT)
            acc = tl.dot(state, phi.to(DOT), acc, input_precision=PRECISION)
            den += tl.sum(tl.load(norms_ptr + base + rows)[:, None] * phi, axis=0)
    q = load_columns(q_ptr, tokens, q_stride, exists, features, D).to(DOT)
    for key_tile in range(start, tile + TILE, TILE):
        keys = (key_tile + tl.arange(0, TILE)).to(tl.int64)
        keep = load_keep(keep_ptr, keys, end)
        k = load_rows(k_ptr, keys, k_stride, keep, features, D).to(DOT)
        v = load_columns(v_ptr, keys, v_stride, keep, columns, DV).to(DOT)
        s = tl.dot(k, q, input_precision=PRECISION) * scale
        a = tl.where((keys[:, None] <= tokens[None, :]) & keep[:, None], 1.0 + s + 0.5 * s * s, 0.0)  # [keys, tokens]
        den += tl.sum(a, axis=0)
        acc = tl.dot(v, a.to(DOT), acc, input_precision=PRECISION)
    den += eps
    store_columns(y_ptr, tokens * heads + head, DV, exists, columns, acc / den[None, :], DV)
    tl.store(den_ptr + tokens * heads + head, den, mask=exists)


def scanned_states(
    x: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    keep: torch.Tensor | None = None,
    den: torch.Tensor | None = None,
    extra: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    need_total: bool = False,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The state before each chunk (after it if `reverse`) and the total over each sequence.

    x [tokens, heads, d], value [tokens, heads, dv] -> states [chunks, heads, P_PAD, dv], norms [chunks, heads, P_PAD] and,
    if `need_total`, total [sequences, heads, P, dv + 1].
    """
    heads, feature_dim, head_dim = x.shape[1], x.shape[2], value.shape[2]
    options = block_options(feature_dim, head_dim, x.dtype)
    rows, packed = options["P_PAD"], packed_feature_count(feature_dim)
    states = x.new_empty(chunks.count, heads, rows, head_dim, dtype=PRECISION[x.dtype][1])
    norms = x.new_empty(chunks.count, heads, rows, dtype=torch.float32)
    total = x.new_empty(chunks.sequences, heads, packed, head_dim + 1, dtype=torch.float32) if need_total else None
    chunk_state_kernel[(chunks.count * (rows // BLOCK_P), heads)](
        x, value, keep, den, extra, states, norms, chunks.table, *tables,
        x.stride(0), x.stride(1), value.stride(0), value.stride(1),
        REVERSE=reverse, NEED_TOTAL=need_total, **options, **LAUNCH["chunk_state_reverse" if reverse else "chunk_state", x.dtype],
    )  # fmt: skip
    launch = LAUNCH["scan", x.dtype]
    scan_kernel[(chunks.sequences * (rows // SCAN_BLOCK_P), heads)](
        states, norms, None if seed is None else seed.contiguous(), total, chunks.first, packed,
        DV=head_dim, DV_PAD=options["DV_PAD"], P_PAD=rows, BLOCK_P=SCAN_BLOCK_P, REVERSE=reverse,
        NUM_STAGES=launch["num_stages"], num_warps=launch["num_warps"],
    )  # fmt: skip
    return states, norms, total


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    eps: float,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """y like v, the final state or None, and the denominators [batch, seq_len, heads], kept for the backward pass."""
    batch, seq_len, heads, feature_dim = q.shape
    head_dim = v.shape[-1]
    y = v.new_empty(v.shape)
    den = v.new_empty(batch, seq_len, heads, dtype=torch.float32)
    with torch.cuda.device_of(q):
        chunks = make_chunks(batch, seq_len, cu_seqlens, q.device)
        tables = feature_tables(feature_dim, scale, q.device)
        keep = flatten_mask(attention_mask)
        q, k, v = (flatten_tokens(x) for x in (q, k, v))
        states = norms = final_state = None
        seeded = initial_state is not None
        if chunks.several or seeded or output_final_state:
            states, norms, final_state = scanned_states(
                k, v, chunks, tables, keep=keep, seed=initial_state, need_total=output_final_state
            )
        if not (chunks.several or seeded):
            states = norms = None
        options = block_options(feature_dim, head_dim, q.dtype)
        tiles = CHUNK // options["TILE"]
        output_kernel[(chunks.count * tiles, heads)](
            q, k, v, keep, states, norms, y, den, chunks.table, *tables,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), scale, eps,
            TILES=tiles, SEEDED=seeded, **options, **LAUNCH["output", q.dtype],
        )  # fmt: skip
    return y, final_state, den
