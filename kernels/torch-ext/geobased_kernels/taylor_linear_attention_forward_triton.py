"""Triton kernel of Taylor linear attention, forward: outputs from the states before each chunk and the keys inside it.

A tile of outputs adds what the state before its chunk holds, phi(q) S, and the quadratic form 1 + s + s^2 / 2 over the keys of
its own chunk. Both sums run in [tokens, ...] tiles whose left operands come out of the previous product in registers.
"""

import torch
import triton
import triton.language as tl

from .taylor_linear_attention_launch import CHUNK, launch_options
from .taylor_linear_attention_states_triton import (
    NO_PADDING,
    SOME_PADDING,
    block_options,
    feature_tables,
    find_padding,
    flatten_tokens,
    gather_factors,
    load_constants,
    load_real_rows,
    load_rows,
    load_selection,
    make_chunks,
    running_states,
    store_rows,
)


@triton.jit
def load_factors(
    x_ptr,
    x,
    offsets,
    rows,
    first_ptr,
    second_ptr,
    select_ptr,
    CONSTANTS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
):
    """x1[first], x1[second] [tokens, rows] in float32, whose product is phi, and the selection tables [rows, D_PAD].

    CONSTANTS: some of the features have the factor 1, which selection leaves out.
    """
    select_i, select_j = load_selection(select_ptr, rows, P_PAD, D_PAD, BLOCK_P, DOT)
    if SELECT:
        x_i = tl.dot(x, tl.trans(select_i), input_precision=PRECISION)
        x_j = tl.dot(x, tl.trans(select_j), input_precision=PRECISION)
        if CONSTANTS:
            constant_i, constant_j = load_constants(first_ptr, second_ptr, rows, D, P_PAD)
            x_i += constant_i[None, :]
            x_j += constant_j[None, :]
    else:
        x_i, x_j = gather_factors(x_ptr, offsets, rows, first_ptr, second_ptr, D, P_PAD)
    return x_i, x_j, select_i, select_j


@triton.jit
def load_state(
    states_ptr, norms_ptr, base, rows, DV: tl.constexpr, DV_PAD: tl.constexpr, P_PAD: tl.constexpr, BLOCK_P: tl.constexpr
):
    """[BLOCK_P, DV_PAD] of a stored state and [BLOCK_P] of its normaliser; `base` is its first row, as int64."""
    columns = tl.arange(0, DV_PAD)
    pointers = states_ptr + base * DV + rows[:, None] * DV + columns[None, :]
    if DV == DV_PAD and P_PAD % BLOCK_P == 0:
        state = tl.load(pointers)
    else:
        state = tl.load(pointers, mask=(rows[:, None] < P_PAD) & (columns[None, :] < DV), other=0.0)
    return state, tl.load(norms_ptr + base + rows, mask=rows < P_PAD, other=0.0)


@triton.jit
def add_state(
    acc,
    den,
    q_ptr,
    q,
    offsets,
    states_ptr,
    norms_ptr,
    state_base,
    rows,
    first_ptr,
    second_ptr,
    select_ptr,
    CONSTANTS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
):
    """acc [BLOCK_M, DV_PAD] and den [BLOCK_M] plus what a block of rows of the state before the chunk adds."""
    state, norm = load_state(states_ptr, norms_ptr, state_base, rows, DV, DV_PAD, P_PAD, BLOCK_P)
    x_i, x_j, _, _ = load_factors(
        q_ptr, q, offsets, rows, first_ptr, second_ptr, select_ptr,
        CONSTANTS, D, D_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
    )  # fmt: skip
    phi = x_i * x_j
    den += tl.sum(phi * norm[None, :], axis=1)
    return tl.dot(phi.to(DOT), state.to(DOT), acc, input_precision=PRECISION), den


@triton.jit
def load_keys(
    k_ptr,
    v_ptr,
    real_ptr,
    keys,
    length,
    k_stride,
    v_stride,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    DOT: tl.constexpr,
):
    """k [keys, D_PAD] and v [keys, DV_PAD], and which of the keys are there (if MASKED: and no padding; others are zero)."""
    real = keys < length
    if MASKED:
        real = tl.load(real_ptr + keys, mask=real, other=0) != 0
        k = load_real_rows(k_ptr, keys, k_stride, real, tl.arange(0, D_PAD), D)
        v = load_real_rows(v_ptr, keys, v_stride, real, tl.arange(0, DV_PAD), DV)
    else:
        k = load_rows(k_ptr, keys, k_stride, length, tl.arange(0, D_PAD), D, D_PAD, BOUNDED)
        v = load_rows(v_ptr, keys, v_stride, length, tl.arange(0, DV_PAD), DV, DV_PAD, BOUNDED)
    return k.to(DOT), v.to(DOT), real


@triton.jit
def add_keys(
    acc,
    den,
    q,
    k_ptr,
    v_ptr,
    real_ptr,
    tokens,
    keys,
    length,
    k_stride,
    v_stride,
    scale,
    MASKED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc and den plus what a tile of keys adds; DIAGONAL: the tile may hold keys later than a query, or none at all;
    MASKED: some keys may be padding."""
    k, v, real = load_keys(k_ptr, v_ptr, real_ptr, keys, length, k_stride, v_stride, MASKED, DIAGONAL, D, D_PAD, DV, DV_PAD, DOT)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    a = 1.0 + x * (scale + 0.5 * scale * scale * x)
    if DIAGONAL:  # a key that does not exist is later than every query
        a = tl.where(keys[None, :] <= tokens[:, None], a, 0.0)
    if MASKED:
        a = tl.where(real[None, :], a, 0.0)
    den += tl.sum(a, axis=1)
    return tl.dot(a.to(DOT), v, acc, input_precision=PRECISION), den


@triton.jit
def output_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    real_ptr,  # bool [tokens], or None where there is no padding
    padding_ptr,  # int32 [chunks], the kind of each
    states_ptr,  # [chunks, heads, P_PAD, DV]: the state before each chunk, or None
    norms_ptr,
    y_ptr,  # out [tokens, heads, DV]
    den_ptr,  # out [heads, n_tokens]
    chunks_ptr,
    first_ptr,
    second_ptr,
    select_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    n_tokens,
    scale,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SEEDED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    chunk = tl.program_id(0) // (CHUNK // BLOCK_M)
    start = tl.load(chunks_ptr + chunk * 4)
    length = tl.load(chunks_ptr + chunk * 4 + 1) - start
    tile = tl.program_id(0) % (CHUNK // BLOCK_M) * BLOCK_M
    if tile >= length:
        return
    # one int64 base per program; offsets inside a chunk are int32
    base = start.to(tl.int64)
    q_ptr += base * q_stride + head.to(tl.int64) * q_head_stride
    k_ptr += base * k_stride + head.to(tl.int64) * k_head_stride
    v_ptr += base * v_stride + head.to(tl.int64) * v_head_stride
    y_ptr += (base * heads + head) * DV
    den_ptr += head.to(tl.int64) * n_tokens + base
    tokens = tile + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, tokens, q_stride, length, tl.arange(0, D_PAD), D, D_PAD, True).to(DOT)
    acc = tl.zeros([BLOCK_M, DV_PAD], dtype=tl.float32)
    den = tl.zeros([BLOCK_M], dtype=tl.float32)
    if states_ptr is not None:
        if SEEDED:
            has_state = True
        else:
            has_state = tl.load(chunks_ptr + chunk * 4 + 2) > 0
        if has_state:
            state_base = (chunk.to(tl.int64) * heads + head) * P_PAD
            offsets = tl.minimum(tokens, length - 1) * q_stride
            WITH_CONSTANTS: tl.constexpr = (D + BLOCK_P) // BLOCK_P * BLOCK_P  # the first 1 + D rows have the factor 1
            for row in tl.static_range(0, WITH_CONSTANTS, BLOCK_P):
                acc, den = add_state(
                    acc, den, q_ptr, q, offsets, states_ptr, norms_ptr, state_base, row + tl.arange(0, BLOCK_P),
                    first_ptr, second_ptr, select_ptr,
                    True, D, D_PAD, DV, DV_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
                )  # fmt: skip
            for row in tl.range(WITH_CONSTANTS, P_PAD, BLOCK_P, num_stages=NUM_STAGES):
                acc, den = add_state(
                    acc, den, q_ptr, q, offsets, states_ptr, norms_ptr, state_base, row + tl.arange(0, BLOCK_P),
                    first_ptr, second_ptr, select_ptr,
                    False, D, D_PAD, DV, DV_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
                )  # fmt: skip
    full_end, diagonal_end = tile, tile + BLOCK_M
    if real_ptr is not None:
        real_ptr += base
        padding = tl.load(padding_ptr + chunk)
        full_end = tl.where(padding == NO_PADDING, tile, 0)
        diagonal_end = tl.where(padding == NO_PADDING, tile + BLOCK_M, tile)
        masked_end = tl.where(padding == SOME_PADDING, tile + BLOCK_M, 0)  # no `if`: see state_kernel
        for key_tile in tl.range(0, masked_end, BLOCK_N, num_stages=1):
            acc, den = add_keys(
                acc, den, q, k_ptr, v_ptr, real_ptr, tokens, key_tile + tl.arange(0, BLOCK_N), length,
                k_stride, v_stride, scale, True, True, D, D_PAD, DV, DV_PAD, DOT, PRECISION,
            )  # fmt: skip
    for key_tile in tl.range(0, full_end, BLOCK_N, num_stages=NUM_STAGES):
        acc, den = add_keys(
            acc, den, q, k_ptr, v_ptr, real_ptr, tokens, key_tile + tl.arange(0, BLOCK_N), length, k_stride, v_stride, scale,
            False, False, D, D_PAD, DV, DV_PAD, DOT, PRECISION,
        )  # fmt: skip
    for key_tile in tl.range(tile, diagonal_end, BLOCK_N, num_stages=NUM_STAGES):
        acc, den = add_keys(
            acc, den, q, k_ptr, v_ptr, real_ptr, tokens, key_tile + tl.arange(0, BLOCK_N), length, k_stride, v_stride, scale,
            False, True, D, D_PAD, DV, DV_PAD, DOT, PRECISION,
        )  # fmt: skip
    den += eps
    store_rows(y_ptr, tokens, heads * DV, length, tl.arange(0, DV_PAD), acc / den[:, None], DV, DV_PAD)
    tl.store(den_ptr + tokens, den, mask=tokens < length)


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
    """y like v, the final state or None, and the denominators [heads, batch, seq_len], kept for the backward pass."""
    batch, seq_len, heads, feature_dim = q.shape
    head_dim = v.shape[-1]
    y = v.new_empty(v.shape)
    den = v.new_empty(heads, batch, seq_len, dtype=torch.float32)  # tokens last: a tile of one head is read and written whole
    with torch.cuda.device_of(q):
        chunks = make_chunks(batch, seq_len, cu_seqlens, CHUNK, q.device)
        tables = feature_tables(feature_dim, scale, q.device, q.dtype)
        padding = find_padding(attention_mask, chunks)
        q, k, v = (flatten_tokens(x) for x in (q, k, v))
        states = norms = final_state = None
        seeded = initial_state is not None
        if chunks.several or seeded or output_final_state:
            states, norms, final_state = running_states(
                k, v, chunks, tables, padding=padding, seed=initial_state, need_total=output_final_state, input_dtype=q.dtype
            )
        if not (chunks.several or seeded):
            states = norms = None
        launch = launch_options("output" if attention_mask is None else "masked_output", q.dtype, feature_dim, head_dim)
        output_kernel[(chunks.count * (chunks.size // launch["BLOCK_M"]), heads)](
            q, k, v, *padding, states, norms, y, den, chunks.table, tables.first, tables.second, tables.select,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), batch * seq_len, scale, eps,
            CHUNK=chunks.size, SEEDED=seeded, **block_options(feature_dim, head_dim, q.dtype), **launch,
        )  # fmt: skip
    return y, final_state, den
