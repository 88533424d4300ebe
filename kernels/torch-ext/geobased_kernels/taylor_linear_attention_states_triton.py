"""Triton kernels of Taylor linear attention: the state before every chunk of tokens, which forward and backward pass share.

- Tokens are flattened to [batch * seq_len] and cut into chunks; a table gives the bounds of every chunk, so dense batches and
  sequences packed end to end (cu_seqlens) run the same kernels.
- A packed feature is x1[i] x1[j] with x1 = [x, 1] (see packed_feature_table). Feature tiles are built on chip, never stored, and
  for 16-bit inputs by matrix products: x times a table of one-hot columns *selects* x_i for a whole tile of features, exactly,
  and in the register layout in which the next product takes its operand. Gathered loads are several times slower.
- The weights of the features stand in the stored states, squared: S_p = w_p^2 sum_j k_i k_j v. So the side that reads a state
  multiplies plain products q_i q_j.
- Where there are many sequences, one program walks a whole sequence and writes its running sum at every chunk; where there are
  few, all chunks are summed at once and a scan makes running sums of them.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .backend import triton_interpreter_is_on
from .taylor_linear_attention_launch import ROW_GRANULE, launch_options, scan_options, walks_sequences
from .taylor_linear_attention_reference import packed_feature_count, packed_feature_table

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
    size: int  # tokens of a full chunk
    even: bool  # whether all sequences are equally long


def make_chunks(batch: int, seq_len: int, cu_seqlens: torch.Tensor | None, size: int, device: torch.device) -> Chunks:
    if cu_seqlens is None:
        return _dense_chunks(batch, seq_len, size, device)
    return _varlen_chunks(cu_seqlens, seq_len, size)


@functools.lru_cache(maxsize=256)
def _dense_chunks(batch: int, seq_len: int, size: int, device: torch.device) -> Chunks:
    per_sequence = triton.cdiv(seq_len, size)
    before = torch.arange(per_sequence)
    start = torch.arange(batch)[:, None] * seq_len + before * size
    end = torch.minimum(start + size, (torch.arange(batch)[:, None] + 1) * seq_len)
    table = torch.stack(torch.broadcast_tensors(start, end, before, per_sequence - 1 - before), dim=-1).reshape(-1, 4)
    first = torch.arange(batch + 1) * per_sequence
    return Chunks(batch * per_sequence, batch, table.int().to(device), first.int().to(device), seq_len > size, size, True)


def _varlen_chunks(bounds: torch.Tensor, total: int, size: int) -> Chunks:
    """Made on the device of `bounds`, without waiting for it: the count is an upper bound, chunks from the last on are empty."""
    sequences = bounds.numel() - 1
    count = total // size + sequences
    table = torch.empty(count, 4, dtype=torch.int32, device=bounds.device)
    first = torch.empty(sequences + 1, dtype=torch.int32, device=bounds.device)
    valid = torch.empty(1, dtype=torch.int32, device=bounds.device)
    block = 128
    chunk_table_kernel[(triton.cdiv(count, block),)](
        bounds.contiguous(), table, first, valid, sequences, total, count,
        SIZE=size, BLOCK_C=block, BLOCK_S=min(256, max(16, triton.next_power_of_2(sequences))), num_warps=4,
    )  # fmt: skip
    torch._assert_async(valid, f"cu_seqlens must rise from 0 to the number of tokens, {total}")
    return Chunks(count, sequences, table, first, total > size, size, False)


@triton.jit
def chunk_table_kernel(
    bounds_ptr,  # [sequences + 1]
    table_ptr,  # out int32 [count, 4]
    first_ptr,  # out int32 [sequences + 1]
    valid_ptr,  # out int32 [1]: whether the bounds rise from 0 to `total`
    sequences,
    total,
    count,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Every program sums up all sequences for its BLOCK_C chunks: one launch instead of a dozen small ones."""
    program = tl.program_id(0)
    chunk = program * BLOCK_C + tl.arange(0, BLOCK_C)
    sequence = tl.zeros([BLOCK_C], dtype=tl.int32)
    first = tl.zeros([BLOCK_C], dtype=tl.int32)  # the first chunk of the sequence that a chunk belongs to
    chunks_before = tl.zeros([1], dtype=tl.int32)
    valid = tl.full([1], 1, dtype=tl.int32)
    for block in range(0, sequences, BLOCK_S):
        s = block + tl.arange(0, BLOCK_S)
        low = tl.load(bounds_ptr + s, mask=s < sequences, other=0).to(tl.int32)
        high = tl.load(bounds_ptr + s + 1, mask=s < sequences, other=0).to(tl.int32)
        valid = valid & (tl.min((high >= low).to(tl.int32), axis=0))
        counts = (tl.maximum(high - low, 0) + SIZE - 1) // SIZE
        ends = chunks_before + tl.cumsum(counts, axis=0)
        if program == 0:
            tl.store(first_ptr + s + 1, ends, mask=s < sequences)
        passed = (ends[None, :] <= chunk[:, None]) & (s < sequences)[None, :]
        sequence += tl.sum(passed.to(tl.int32), axis=1)
        first = tl.maximum(first, tl.max(tl.where(passed, ends[None, :], 0), axis=1))
        chunks_before += tl.sum(counts, axis=0)
    exists = chunk < chunks_before
    sequence = tl.minimum(sequence, sequences - 1)
    start = tl.load(bounds_ptr + sequence).to(tl.int32) + (chunk - first) * SIZE
    sequence_end = tl.load(bounds_ptr + sequence + 1).to(tl.int32)
    end = tl.minimum(start + SIZE, sequence_end)
    after = (sequence_end - end + SIZE - 1) // SIZE
    keep = chunk < count
    tl.store(table_ptr + chunk * 4, tl.where(exists, start, 0), mask=keep)
    tl.store(table_ptr + chunk * 4 + 1, tl.where(exists, end, 0), mask=keep)
    tl.store(table_ptr + chunk * 4 + 2, tl.where(exists, chunk - first, 0), mask=keep)
    tl.store(table_ptr + chunk * 4 + 3, tl.where(exists, after, 0), mask=keep)
    if program == 0:
        ends_right = (tl.load(bounds_ptr).to(tl.int32) == 0) & (tl.load(bounds_ptr + sequences).to(tl.int32) == total)
        tl.store(first_ptr, 0)
        tl.store(valid_ptr + tl.arange(0, 1), valid & ends_right.to(tl.int32))


class FeatureTables(NamedTuple):
    """The packed features on a device, rows from P on being padding: weight 0 and the constant."""

    first: torch.Tensor  # int32 [P_PAD]: feature p is weight[p] * x1[first[p]] * x1[second[p]]
    second: torch.Tensor
    weight: torch.Tensor  # float32 [P_PAD], with the scale
    select: torch.Tensor  # [2, P_PAD, D_PAD], one-hot: x @ select[0, p] is x[first[p]], or 0 where that is the constant 1


@functools.lru_cache(maxsize=64)
def feature_tables(feature_dim: int, scale: float, device: torch.device, dtype: torch.dtype = torch.float32) -> FeatureTables:
    first, second, weight = (torch.tensor(column) for column in packed_feature_table(feature_dim))
    degree = (first < feature_dim).int() + (second < feature_dim).int()
    weight = (weight.double() * scale ** (degree.double() / 2)).float()
    padding = (0, padded_rows(feature_dim) - weight.numel())
    first, second = (F.pad(index, padding, value=feature_dim) for index in (first, second))
    one_hot = torch.eye(feature_dim + 1, padded_features(feature_dim))
    one_hot[feature_dim] = 0
    select = one_hot[torch.stack([first, second])]
    return FeatureTables(
        first.int().to(device), second.int().to(device), F.pad(weight, padding).to(device), select.to(device, dtype).contiguous()
    )


def padded_rows(feature_dim: int) -> int:
    return triton.cdiv(packed_feature_count(feature_dim), ROW_GRANULE) * ROW_GRANULE


def padded_features(feature_dim: int) -> int:
    return max(16, triton.next_power_of_2(feature_dim))


def flatten_tokens(x: torch.Tensor) -> torch.Tensor:
    """[batch, seq_len, heads, dim] -> [batch * seq_len, heads, dim], contiguous in the last axis; a view where it can be."""
    x = x.reshape(-1, *x.shape[2:])
    return x if x.stride(-1) == 1 else x.contiguous()


class Padding(NamedTuple):
    """Which tokens are padding. Loads that wait for a mask cannot run ahead of their use, so only chunks with both kinds of
    tokens take them; what a padding token holds, NaN included, never reaches a sum."""

    real: torch.Tensor | None = None  # bool [batch * seq_len]
    kinds: torch.Tensor | None = None  # int32 [chunks]: NO_PADDING, SOME_PADDING or ALL_PADDING


WITHOUT_PADDING = Padding()
NO_PADDING = tl.constexpr(0)
SOME_PADDING = tl.constexpr(1)
ALL_PADDING = tl.constexpr(2)


def find_padding(attention_mask: torch.Tensor | None, chunks: Chunks) -> Padding:
    if attention_mask is None:
        return WITHOUT_PADDING
    real = attention_mask.ne(0).reshape(-1)
    kinds = torch.empty(chunks.count, dtype=torch.int32, device=real.device)
    padding_kernel[(chunks.count,)](real, chunks.table, kinds, CHUNK=chunks.size, num_warps=1)
    return Padding(real, kinds)


@triton.jit
def padding_kernel(real_ptr, chunks_ptr, kinds_ptr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    start = tl.load(chunks_ptr + chunk * 4)
    tokens = start + tl.arange(0, CHUNK)
    length = tl.load(chunks_ptr + chunk * 4 + 1) - start
    real = tl.load(real_ptr + tokens, mask=tokens < start + length, other=0)
    count = tl.sum(real.to(tl.int32), axis=0)
    kind = tl.where(count == length, NO_PADDING, tl.where(count == 0, ALL_PADDING, SOME_PADDING))
    tl.store(kinds_ptr + chunk, kind)


def block_options(feature_dim: int, head_dim: int, dtype: torch.dtype) -> dict:
    """Compile-time constants that all kernels of the op share."""
    dot, _, precision = PRECISION[dtype]
    return {
        "D": feature_dim,
        "D_PAD": padded_features(feature_dim),
        "DV": head_dim,
        "DV_PAD": max(16, triton.next_power_of_2(head_dim)),
        "P_PAD": padded_rows(feature_dim),
        # the interpreter multiplies the bit patterns of bfloat16 operands
        "DOT": tl.float32 if triton_interpreter_is_on() else dot,
        "PRECISION": precision,
        "SELECT": dtype != torch.float32,  # without tensor cores, selecting by products would cost more than gathered loads
    }


@triton.jit
def load_rows(ptr, tokens, stride, length, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr):
    """[tokens, columns], zero from column WIDTH on and, if BOUNDED, from token `length` on."""
    pointers = ptr + tokens[:, None] * stride + columns[None, :]
    if BOUNDED and WIDTH < PADDED:
        x = tl.load(pointers, mask=(tokens[:, None] < length) & (columns[None, :] < WIDTH), other=0.0)
    elif BOUNDED:
        x = tl.load(pointers, mask=tokens[:, None] < length, other=0.0)
    elif WIDTH < PADDED:
        x = tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def load_real_rows(ptr, tokens, stride, real, columns, WIDTH: tl.constexpr):
    """[tokens, columns], zero from column WIDTH on and where `real` [tokens] says that a token is padding or not there."""
    pointers = ptr + tokens[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=real[:, None] & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def store_rows(ptr, tokens, stride, length, columns, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    mask = tokens[:, None] < length
    if WIDTH < PADDED:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(ptr + tokens[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_selection(select_ptr, rows, P_PAD: tl.constexpr, D_PAD: tl.constexpr, BLOCK_P: tl.constexpr, DOT: tl.constexpr):
    """The two one-hot tables [BLOCK_P, D_PAD] of a tile of features."""
    offsets = rows[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
    if P_PAD % BLOCK_P == 0:
        first = tl.load(select_ptr + offsets)
        second = tl.load(select_ptr + P_PAD * D_PAD + offsets)
    else:
        first = tl.load(select_ptr + offsets, mask=rows[:, None] < P_PAD, other=0.0)
        second = tl.load(select_ptr + P_PAD * D_PAD + offsets, mask=rows[:, None] < P_PAD, other=0.0)
    return first.to(DOT), second.to(DOT)


@triton.jit
def load_constants(first_ptr, second_ptr, rows, D: tl.constexpr, P_PAD: tl.constexpr):
    """What selection leaves out: 1 where a feature's first or second factor is the constant."""
    first = tl.load(first_ptr + rows, mask=rows < P_PAD, other=D) == D
    second = tl.load(second_ptr + rows, mask=rows < P_PAD, other=D) == D
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def gather_factors(x_ptr, offsets, rows, first_ptr, second_ptr, D: tl.constexpr, P_PAD: tl.constexpr):
    """x1[first], x1[second] as float32 [tokens, rows] by gathered loads; offsets [tokens] must be safe to read."""
    i = tl.load(first_ptr + rows, mask=rows < P_PAD, other=D)
    j = tl.load(second_ptr + rows, mask=rows < P_PAD, other=D)
    x_i = tl.load(x_ptr + offsets[:, None] + i[None, :], mask=i[None, :] < D, other=1.0)
    x_j = tl.load(x_ptr + offsets[:, None] + j[None, :], mask=j[None, :] < D, other=1.0)
    return x_i.to(tl.float32), x_j.to(tl.float32)


@triton.jit
def add_tokens(
    state,
    norm,
    x_ptr,
    value_ptr,
    extra_ptr,
    real_ptr,
    first_ptr,
    second_ptr,
    select_i,
    select_j,
    constant_i,
    constant_j,
    has_constants,  # whether some of the features have the factor 1, which selection leaves out
    rows,
    length,
    x_stride,
    value_stride,
    extra_stride,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
    MASKED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """state [BLOCK_P, DV_PAD] and norm [BLOCK_P] plus what `length` tokens add; MASKED: some of them may be padding."""
    for tile in tl.range(0, length, BLOCK_T, num_stages=NUM_STAGES):
        tokens = tile + tl.arange(0, BLOCK_T)
        real = tokens < length
        if MASKED:
            real = tl.load(real_ptr + tokens, mask=real, other=0) != 0
            value = load_real_rows(value_ptr, tokens, value_stride, real, tl.arange(0, DV_PAD), DV).to(DOT)
        else:
            value = load_rows(value_ptr, tokens, value_stride, length, tl.arange(0, DV_PAD), DV, DV_PAD, True).to(DOT)
        if SELECT:
            if MASKED:
                x = load_real_rows(x_ptr, tokens, x_stride, real, tl.arange(0, D_PAD), D).to(DOT)
            else:
                x = load_rows(x_ptr, tokens, x_stride, length, tl.arange(0, D_PAD), D, D_PAD, True).to(DOT)
            x_i = tl.dot(select_i, tl.trans(x), input_precision=PRECISION)
            x_j = tl.dot(select_j, tl.trans(x), input_precision=PRECISION)
            if has_constants:
                x_i += constant_i[:, None]
                x_j += constant_j[:, None]
        else:
            x_i, x_j = gather_factors(x_ptr, tl.minimum(tokens, length - 1) * x_stride, rows, first_ptr, second_ptr, D, P_PAD)
            x_i, x_j = tl.trans(x_i), tl.trans(x_j)
        phi = x_i * x_j
        if MASKED:
            phi = tl.where(real[None, :], phi, 0.0)
        state = tl.dot(phi.to(DOT), value, state, input_precision=PRECISION)
        if extra_ptr is not None:
            phi *= tl.load(extra_ptr + tokens * extra_stride, mask=real, other=0.0)[None, :]
        elif has_constants and not MASKED:  # a token that is not there has zeros for factors, but its constant feature is 1
            phi = tl.where(real[None, :], phi, 0.0)
        norm += tl.sum(phi, axis=1)
    return state, norm


@triton.jit
def state_kernel(
    x_ptr,  # [tokens, heads, D]: k, or q in the backward pass
    value_ptr,  # [tokens, heads, DV]: v, or dy / den
    extra_ptr,  # the value column of the normaliser, [tokens, heads], or None for ones
    real_ptr,  # bool [tokens], or None where there is no padding
    padding_ptr,  # int32 [chunks], the kind of each
    states_ptr,  # out [chunks, heads, P_PAD, DV]: the sum of each chunk, or (WALK) of all before it (after it if REVERSE)
    norms_ptr,  # out [chunks, heads, P_PAD]
    seed_ptr,  # [sequences, heads, P, DV + 1] or None; WALK only, as `total`
    total_ptr,  # out [sequences, heads, P, DV + 1] or None
    chunks_ptr,
    first_chunk_ptr,
    first_ptr,
    second_ptr,
    weight_ptr,
    select_ptr,
    x_stride,
    x_head_stride,
    value_stride,
    value_head_stride,
    extra_stride,
    extra_head_stride,
    P,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
    NEED_TOTAL: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    P_TILES: tl.constexpr = (P_PAD + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    index = tl.program_id(0) // P_TILES  # a sequence, or a chunk
    rows = tl.program_id(0) % P_TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.arange(0, DV_PAD)
    in_rows = rows < P_PAD
    in_state = in_rows[:, None] & (columns[None, :] < DV)
    weight = tl.load(weight_ptr + rows, mask=in_rows, other=0.0)
    squared = weight * weight
    select_i, select_j = load_selection(select_ptr, rows, P_PAD, D_PAD, BLOCK_P, DOT)
    constant_i, constant_j = load_constants(first_ptr, second_ptr, rows, D, P_PAD)
    has_constants = tl.program_id(0) % P_TILES * BLOCK_P <= D or not SELECT
    state = tl.zeros([BLOCK_P, DV_PAD], dtype=tl.float32)
    norm = tl.zeros([BLOCK_P], dtype=tl.float32)
    x_ptr += head.to(tl.int64) * x_head_stride
    value_ptr += head.to(tl.int64) * value_head_stride
    if extra_ptr is not None:
        extra_ptr += head.to(tl.int64) * extra_head_stride

    first_chunk = index
    count = 1
    if WALK:
        first_chunk = tl.load(first_chunk_ptr + index)
        count = tl.load(first_chunk_ptr + index + 1) - first_chunk
        outer = ((index.to(tl.int64) * heads + head) * P + rows) * (DV + 1)
        in_outer = (rows < P)[:, None] & (columns[None, :] < DV)
        if seed_ptr is not None:
            inverse = tl.where(rows < P, 1.0 / tl.where(weight > 0, weight, 1.0), 0.0)
            state += inverse[:, None] * tl.load(seed_ptr + outer[:, None] + columns[None, :], mask=in_outer, other=0.0)
            norm += inverse * tl.load(seed_ptr + outer + DV, mask=rows < P, other=0.0)

    for step in range(count):
        chunk = first_chunk + step
        if REVERSE and WALK:
            chunk = first_chunk + count - 1 - step
        offsets = (chunk.to(tl.int64) * heads + head) * P_PAD + rows
        if WALK and (step > 0 or seed_ptr is not None):  # nobody reads the empty state before the first chunk
            tl.store(
                states_ptr + offsets[:, None] * DV + columns[None, :],
                (squared[:, None] * state).to(states_ptr.dtype.element_ty),
                mask=in_state,
            )
            tl.store(norms_ptr + offsets, squared * norm, mask=in_rows)
        start = tl.load(chunks_ptr + chunk * 4)
        length = tl.load(chunks_ptr + chunk * 4 + 1) - start
        if not NEED_TOTAL:  # then nothing reads the sum of the chunk where the sequence ends
            if WALK:
                length = tl.where(step == count - 1, 0, length)
            else:
                length = tl.where(tl.load(chunks_ptr + chunk * 4 + (2 if REVERSE else 3)) == 0, 0, length)
        base = start.to(tl.int64)
        extra_base = extra_ptr
        if extra_ptr is not None:
            extra_base = extra_ptr + base * extra_stride
        full_length = length
        if real_ptr is not None:
            padding = tl.load(padding_ptr + chunk)
            full_length = tl.where(padding == NO_PADDING, length, 0)
            # a loop of no turns, not an `if` around it: code that Triton 3.6 made of that read beyond its shared memory (float16)
            masked_length = tl.where(padding == SOME_PADDING, length, 0)
            state, norm = add_tokens(
                state, norm, x_ptr + base * x_stride, value_ptr + base * value_stride, extra_base, real_ptr + base,
                first_ptr, second_ptr, select_i, select_j, constant_i, constant_j, has_constants,
                rows, masked_length, x_stride, value_stride, extra_stride,
                D, D_PAD, DV, DV_PAD, P_PAD, BLOCK_T, DOT, PRECISION, SELECT, True, 1,
            )  # fmt: skip
        state, norm = add_tokens(
            state, norm, x_ptr + base * x_stride, value_ptr + base * value_stride, extra_base, real_ptr,
            first_ptr, second_ptr, select_i, select_j, constant_i, constant_j, has_constants,
            rows, full_length, x_stride, value_stride, extra_stride,
            D, D_PAD, DV, DV_PAD, P_PAD, BLOCK_T, DOT, PRECISION, SELECT, False, NUM_STAGES,
        )  # fmt: skip
        if not WALK and length > 0:
            tl.store(
                states_ptr + offsets[:, None] * DV + columns[None, :],
                (squared[:, None] * state).to(states_ptr.dtype.element_ty),
                mask=in_state,
            )
            tl.store(norms_ptr + offsets, squared * norm, mask=in_rows)
    if WALK and total_ptr is not None:
        tl.store(total_ptr + outer[:, None] + columns[None, :], weight[:, None] * state, mask=in_outer)
        tl.store(total_ptr + outer + DV, weight * norm, mask=rows < P)


@triton.jit
def scan_kernel(
    states_ptr,  # in: sums of each chunk; out: sums of all chunks before it (after it if REVERSE), from the seed on
    norms_ptr,
    seed_ptr,  # [sequences, heads, P, DV + 1] or None
    total_ptr,  # out [sequences, heads, P, DV + 1] or None
    first_chunk_ptr,
    weight_ptr,
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
    weight = tl.load(weight_ptr + rows)
    outer = ((sequence.to(tl.int64) * heads + head) * P + rows) * (DV + 1)
    in_outer = (rows < P)[:, None] & in_state
    state = tl.zeros([BLOCK_P, DV_PAD], dtype=tl.float32)
    norm = tl.zeros([BLOCK_P], dtype=tl.float32)
    if seed_ptr is not None:
        state += weight[:, None] * tl.load(seed_ptr + outer[:, None] + columns[None, :], mask=in_outer, other=0.0)
        norm += weight * tl.load(seed_ptr + outer + DV, mask=rows < P, other=0.0)
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
        inverse = 1.0 / tl.where(rows < P, weight, 1.0)
        tl.store(total_ptr + outer[:, None] + columns[None, :], inverse[:, None] * state, mask=in_outer)
        tl.store(total_ptr + outer + DV, inverse * norm, mask=rows < P)


def running_states(
    x: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    tables: FeatureTables,
    *,
    extra: torch.Tensor | None = None,
    padding: Padding = WITHOUT_PADDING,
    seed: torch.Tensor | None = None,
    need_total: bool = False,
    reverse: bool = False,
    input_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The weighted state before each chunk (after it if `reverse`) and the total over each sequence.

    x [tokens, heads, d], value [tokens, heads, dv], extra, what stands beside a value for the normaliser instead of 1,
    [tokens, heads] -> states [chunks, heads, P_PAD, dv], norms [chunks, heads, P_PAD] and,
    if `need_total`, total [sequences, heads, P, dv + 1] with the outer weights. Without a seed the state before the first
    chunk is left unwritten: it is zero.
    """
    heads, feature_dim, head_dim = x.shape[1], x.shape[2], value.shape[2]
    options = block_options(feature_dim, head_dim, input_dtype)
    rows, packed = options["P_PAD"], packed_feature_count(feature_dim)
    states = x.new_empty(chunks.count, heads, rows, head_dim, dtype=PRECISION[input_dtype][1])
    norms = x.new_empty(chunks.count, heads, rows, dtype=torch.float32)
    total = x.new_empty(chunks.sequences, heads, packed, head_dim + 1, dtype=torch.float32) if need_total else None
    seed = None if seed is None else seed.contiguous()
    extra_strides = (0, 0) if extra is None else extra.stride()
    launch = launch_options("states", input_dtype, feature_dim, head_dim)
    row_tiles = triton.cdiv(rows, launch["BLOCK_P"])
    walk = walks_sequences(chunks.even, chunks.sequences, chunks.count, heads, row_tiles)
    state_kernel[((chunks.sequences if walk else chunks.count) * row_tiles, heads)](
        x, value, extra, *padding, states, norms, seed if walk else None, total if walk else None, chunks.table, chunks.first,
        tables.first, tables.second, tables.weight, tables.select,
        x.stride(0), x.stride(1), value.stride(0), value.stride(1), *extra_strides, packed,
        CHUNK=chunks.size, WALK=walk, REVERSE=reverse, NEED_TOTAL=need_total, **options, **launch,
    )  # fmt: skip
    if not walk:
        scan = scan_options(chunks.sequences * heads * rows)
        scan_kernel[(chunks.sequences * (rows // scan["BLOCK_P"]), heads)](
            states, norms, seed, total, chunks.first, tables.weight, packed,
            DV=head_dim, DV_PAD=options["DV_PAD"], P_PAD=rows, REVERSE=reverse, **scan,
        )  # fmt: skip
    return states, norms, total
