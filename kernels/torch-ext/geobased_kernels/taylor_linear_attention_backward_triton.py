"""Triton kernels of Taylor linear attention, backward: gradients of q, of k and v, and of the initial state.

With u_t = dy_t / den_t and delta_t = -u_t.y_t the value and normaliser columns are one matrix, [v_j | 1] meets [u_t | delta_t]:

    dA_tj = u_t.v_j + delta_t              ds_tj = dA_tj (1 + s_tj)
    dq_t = scale sum_j ds_tj k_j           dk_j = scale sum_t ds_tj q_t          dv_j = sum_t A_tj u_t

within a chunk. Across chunks dphi(q_t) = S u_t + z delta_t and dphi(k_j) = R v_j + r, dv_j += R^T phi(k_j), where S, z are the
forward states, recomputed, and R, r = sum phi(q_t) [u_t | delta_t] runs from the end, seeded with the gradient of the final
state; its total is the gradient of the initial state.
"""

import torch
import triton
import triton.language as tl

from .taylor_linear_attention_forward_triton import load_factors, load_keys, load_state
from .taylor_linear_attention_launch import CHUNK, launch_options
from .taylor_linear_attention_states_triton import (
    ALL_PADDING,
    NO_PADDING,
    SOME_PADDING,
    block_options,
    feature_tables,
    find_padding,
    flatten_tokens,
    load_rows,
    make_chunks,
    running_states,
    store_rows,
)


@triton.jit
def delta_kernel(
    y_ptr,
    dy_ptr,
    den_ptr,
    u_ptr,  # out [tokens, heads, DV]: dy / den
    delta_ptr,  # out [heads, tokens]: -u.y
    n_tokens,
    heads,
    dy_stride,
    dy_head_stride,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)  # the heads of a token lie together in memory
    tokens = (tl.program_id(0) // heads).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, DV_PAD)
    y = load_rows(y_ptr + head * DV, tokens, heads * DV, n_tokens, columns, DV, DV_PAD, True).to(tl.float32)
    dy = load_rows(dy_ptr + head * dy_head_stride, tokens, dy_stride, n_tokens, columns, DV, DV_PAD, True).to(tl.float32)
    den = tl.load(den_ptr + head * n_tokens + tokens, mask=tokens < n_tokens, other=1.0)
    u = (dy / den[:, None]).to(u_ptr.dtype.element_ty)
    store_rows(u_ptr + head * DV, tokens, heads * DV, n_tokens, columns, u, DV, DV_PAD)
    u = u.to(tl.float32)  # rounded: u.v_j + delta cancels, and its two terms must hold the same u
    tl.store(delta_ptr + head * n_tokens + tokens, -tl.sum(u * y, axis=1), mask=tokens < n_tokens)


@triton.jit
def add_feature_gradient(dx, dphi, x_i, x_j, select_i, select_j, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """dx [tokens, D_PAD] += the chain rule through phi_p = x_i x_j; dphi [tokens, BLOCK_P] carries the weight."""
    # the scatter is a product with the one-hot rows; the constant 1 has an empty row
    dx = tl.dot((dphi * x_j).to(DOT), select_i, dx, input_precision=PRECISION)
    return tl.dot((dphi * x_i).to(DOT), select_j, dx, input_precision=PRECISION)


@triton.jit
def add_keys_to_dq(
    dq,
    q,
    u,
    delta,
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
    """dq / scale plus what a tile of keys adds; MASKED, DIAGONAL as in the forward pass. A key that is zero adds nothing."""
    k, v, _ = load_keys(k_ptr, v_ptr, real_ptr, keys, length, k_stride, v_stride, MASKED, DIAGONAL, D, D_PAD, DV, DV_PAD, DOT)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    da = tl.dot(u, tl.trans(v), input_precision=PRECISION) + delta[:, None]
    ds = da * (1.0 + scale * x)
    if DIAGONAL:
        ds = tl.where(keys[None, :] <= tokens[:, None], ds, 0.0)
    return tl.dot(ds.to(DOT), k, dq, input_precision=PRECISION)


@triton.jit
def add_state_to_dq(
    dq,
    q_ptr,
    q,
    u,
    delta,
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
    state, norm = load_state(states_ptr, norms_ptr, state_base, rows, DV, DV_PAD, P_PAD, BLOCK_P)
    state = state.to(DOT)
    x_i, x_j, select_i, select_j = load_factors(
        q_ptr, q, offsets, rows, first_ptr, second_ptr, select_ptr,
        CONSTANTS, D, D_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
    )  # fmt: skip
    dphi = tl.dot(u, tl.trans(state), input_precision=PRECISION) + delta[:, None] * norm[None, :]
    return add_feature_gradient(dq, dphi, x_i, x_j, select_i, select_j, DOT, PRECISION)


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    real_ptr,  # bool [tokens], or None where there is no padding
    padding_ptr,  # int32 [chunks], the kind of each
    u_ptr,
    delta_ptr,
    states_ptr,  # [chunks, heads, P_PAD, DV]: the state before each chunk, or None
    norms_ptr,
    dq_ptr,  # out [tokens, heads, D]
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
    base = start.to(tl.int64)
    q_ptr += base * q_stride + head.to(tl.int64) * q_head_stride
    k_ptr += base * k_stride + head.to(tl.int64) * k_head_stride
    v_ptr += base * v_stride + head.to(tl.int64) * v_head_stride
    u_ptr += (base * heads + head) * DV
    delta_ptr += head.to(tl.int64) * n_tokens + base
    dq_ptr += (base * heads + head) * D
    tokens = tile + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, tokens, q_stride, length, tl.arange(0, D_PAD), D, D_PAD, True).to(DOT)
    u = load_rows(u_ptr, tokens, heads * DV, length, tl.arange(0, DV_PAD), DV, DV_PAD, True).to(DOT)
    delta = tl.load(delta_ptr + tokens, mask=tokens < length, other=0.0)
    dq = tl.zeros([BLOCK_M, D_PAD], dtype=tl.float32)
    full_end, diagonal_end = tile, tile + BLOCK_M
    if real_ptr is not None:
        real_ptr += base
        padding = tl.load(padding_ptr + chunk)
        full_end = tl.where(padding == NO_PADDING, tile, 0)
        diagonal_end = tl.where(padding == NO_PADDING, tile + BLOCK_M, tile)
        masked_end = tl.where(padding == SOME_PADDING, tile + BLOCK_M, 0)  # no `if`: see state_kernel
        for key_tile in tl.range(0, masked_end, BLOCK_N, num_stages=1):
            dq = add_keys_to_dq(
                dq, q, u, delta, k_ptr, v_ptr, real_ptr, tokens, key_tile + tl.arange(0, BLOCK_N), length,
                k_stride, v_stride, scale, True, True, D, D_PAD, DV, DV_PAD, DOT, PRECISION,
            )  # fmt: skip
    for key_tile in tl.range(0, full_end, BLOCK_N, num_stages=NUM_STAGES):
        dq = add_keys_to_dq(
            dq, q, u, delta, k_ptr, v_ptr, real_ptr, tokens, key_tile + tl.arange(0, BLOCK_N), length,
            k_stride, v_stride, scale, False, False, D, D_PAD, DV, DV_PAD, DOT, PRECISION,
        )  # fmt: skip
    for key_tile in tl.range(tile, diagonal_end, BLOCK_N, num_stages=NUM_STAGES):
        dq = add_keys_to_dq(
            dq, q, u, delta, k_ptr, v_ptr, real_ptr, tokens, key_tile + tl.arange(0, BLOCK_N), length,
            k_stride, v_stride, scale, False, True, D, D_PAD, DV, DV_PAD, DOT, PRECISION,
        )  # fmt: skip
    dq *= scale
    if states_ptr is not None:
        if SEEDED:
            has_state = True
        else:
            has_state = tl.load(chunks_ptr + chunk * 4 + 2) > 0
        if has_state:
            state_base = (chunk.to(tl.int64) * heads + head) * P_PAD
            offsets = tl.minimum(tokens, length - 1) * q_stride
            WITH_CONSTANTS: tl.constexpr = (D + BLOCK_P) // BLOCK_P * BLOCK_P
            for row in tl.static_range(0, WITH_CONSTANTS, BLOCK_P):
                dq = add_state_to_dq(
                    dq, q_ptr, q, u, delta, offsets, states_ptr, norms_ptr, state_base, row + tl.arange(0, BLOCK_P),
                    first_ptr, second_ptr, select_ptr,
                    True, D, D_PAD, DV, DV_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
                )  # fmt: skip
            for row in tl.range(WITH_CONSTANTS, P_PAD, BLOCK_P, num_stages=NUM_STAGES):
                dq = add_state_to_dq(
                    dq, q_ptr, q, u, delta, offsets, states_ptr, norms_ptr, state_base, row + tl.arange(0, BLOCK_P),
                    first_ptr, second_ptr, select_ptr,
                    False, D, D_PAD, DV, DV_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
                )  # fmt: skip
    store_rows(dq_ptr, tokens, heads * D, length, tl.arange(0, D_PAD), dq, D, D_PAD)


@triton.jit
def add_queries_to_dkv(
    dk,
    dv,
    k,
    v,
    q_ptr,
    u_ptr,
    delta_ptr,
    keys,
    tokens,
    length,
    heads,
    q_stride,
    scale,
    DIAGONAL: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk / scale and dv plus what a tile of queries adds; a query that does not exist has u = delta = 0."""
    q = load_rows(q_ptr, tokens, q_stride, length, tl.arange(0, D_PAD), D, D_PAD, True).to(DOT)
    u = load_rows(u_ptr, tokens, heads * DV, length, tl.arange(0, DV_PAD), DV, DV_PAD, True).to(DOT)
    delta = tl.load(delta_ptr + tokens, mask=tokens < length, other=0.0)
    x = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [keys, tokens]
    a = 1.0 + x * (scale + 0.5 * scale * scale * x)
    if DIAGONAL:
        a = tl.where(keys[:, None] <= tokens[None, :], a, 0.0)
    dv = tl.dot(a.to(DOT), u, dv, input_precision=PRECISION)
    da = tl.dot(v, tl.trans(u), input_precision=PRECISION) + delta[None, :]
    ds = da * (1.0 + scale * x)
    if DIAGONAL:
        ds = tl.where(keys[:, None] <= tokens[None, :], ds, 0.0)
    dk = tl.dot(ds.to(DOT), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def add_state_to_dkv(
    dk,
    dv,
    k_ptr,
    k,
    v,
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
    state, norm = load_state(states_ptr, norms_ptr, state_base, rows, DV, DV_PAD, P_PAD, BLOCK_P)
    state = state.to(DOT)
    x_i, x_j, select_i, select_j = load_factors(
        k_ptr, k, offsets, rows, first_ptr, second_ptr, select_ptr,
        CONSTANTS, D, D_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
    )  # fmt: skip
    dv = tl.dot((x_i * x_j).to(DOT), state, dv, input_precision=PRECISION)
    dphi = tl.dot(v, tl.trans(state), input_precision=PRECISION) + norm[None, :]
    return add_feature_gradient(dk, dphi, x_i, x_j, select_i, select_j, DOT, PRECISION), dv


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    real_ptr,  # bool [tokens], or None where there is no padding
    padding_ptr,  # int32 [chunks], the kind of each
    u_ptr,
    delta_ptr,
    states_ptr,  # [chunks, heads, P_PAD, DV]: R after each chunk, or None
    norms_ptr,
    dk_ptr,  # out [tokens, heads, D]
    dv_ptr,  # out [tokens, heads, DV]
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
    base = start.to(tl.int64)
    q_ptr += base * q_stride + head.to(tl.int64) * q_head_stride
    k_ptr += base * k_stride + head.to(tl.int64) * k_head_stride
    v_ptr += base * v_stride + head.to(tl.int64) * v_head_stride
    u_ptr += (base * heads + head) * DV
    delta_ptr += head.to(tl.int64) * n_tokens + base
    dk_ptr += (base * heads + head) * D
    dv_ptr += (base * heads + head) * DV
    keys = tile + tl.arange(0, BLOCK_M)
    all_padding = False
    if real_ptr is not None:
        all_padding = tl.load(padding_ptr + chunk) == ALL_PADDING
    if all_padding:
        zero_dk, zero_dv = tl.zeros([BLOCK_M, D_PAD], tl.float32), tl.zeros([BLOCK_M, DV_PAD], tl.float32)
        store_rows(dk_ptr, keys, heads * D, length, tl.arange(0, D_PAD), zero_dk, D, D_PAD)
        store_rows(dv_ptr, keys, heads * DV, length, tl.arange(0, DV_PAD), zero_dv, DV, DV_PAD)
        return
    k = load_rows(k_ptr, keys, k_stride, length, tl.arange(0, D_PAD), D, D_PAD, True).to(DOT)
    v = load_rows(v_ptr, keys, v_stride, length, tl.arange(0, DV_PAD), DV, DV_PAD, True).to(DOT)
    dk = tl.zeros([BLOCK_M, D_PAD], dtype=tl.float32)
    dv = tl.zeros([BLOCK_M, DV_PAD], dtype=tl.float32)
    for query_tile in tl.range(tile, tile + BLOCK_M, BLOCK_N, num_stages=NUM_STAGES):
        dk, dv = add_queries_to_dkv(
            dk, dv, k, v, q_ptr, u_ptr, delta_ptr, keys, query_tile + tl.arange(0, BLOCK_N), length, heads,
            q_stride, scale, True, D, D_PAD, DV, DV_PAD, DOT, PRECISION,
        )  # fmt: skip
    for query_tile in tl.range(tile + BLOCK_M, length, BLOCK_N, num_stages=NUM_STAGES):
        dk, dv = add_queries_to_dkv(
            dk, dv, k, v, q_ptr, u_ptr, delta_ptr, keys, query_tile + tl.arange(0, BLOCK_N), length, heads,
            q_stride, scale, False, D, D_PAD, DV, DV_PAD, DOT, PRECISION,
        )  # fmt: skip
    dk *= scale
    if states_ptr is not None:
        if SEEDED:
            has_state = True
        else:
            has_state = tl.load(chunks_ptr + chunk * 4 + 3) > 0
        if has_state:
            state_base = (chunk.to(tl.int64) * heads + head) * P_PAD
            offsets = tl.minimum(keys, length - 1) * k_stride
            WITH_CONSTANTS: tl.constexpr = (D + BLOCK_P) // BLOCK_P * BLOCK_P
            for row in tl.static_range(0, WITH_CONSTANTS, BLOCK_P):
                dk, dv = add_state_to_dkv(
                    dk, dv, k_ptr, k, v, offsets, states_ptr, norms_ptr, state_base, row + tl.arange(0, BLOCK_P),
                    first_ptr, second_ptr, select_ptr,
                    True, D, D_PAD, DV, DV_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
                )  # fmt: skip
            for row in tl.range(WITH_CONSTANTS, P_PAD, BLOCK_P, num_stages=NUM_STAGES):
                dk, dv = add_state_to_dkv(
                    dk, dv, k_ptr, k, v, offsets, states_ptr, norms_ptr, state_base, row + tl.arange(0, BLOCK_P),
                    first_ptr, second_ptr, select_ptr,
                    False, D, D_PAD, DV, DV_PAD, P_PAD, BLOCK_P, DOT, PRECISION, SELECT,
                )  # fmt: skip
    if real_ptr is not None:  # a padding key is out of every sum; until here it has stayed in its own row
        real = tl.load(real_ptr + base + keys, mask=keys < length, other=0) != 0
        dk = tl.where(real[:, None], dk, 0.0)
        dv = tl.where(real[:, None], dv, 0.0)
    store_rows(dk_ptr, keys, heads * D, length, tl.arange(0, D_PAD), dk, D, D_PAD)
    store_rows(dv_ptr, keys, heads * DV, length, tl.arange(0, DV_PAD), dv, DV, DV_PAD)


def backward(
    dy: torch.Tensor,
    dfinal_state: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    y: torch.Tensor,
    den: torch.Tensor,
    scale: float,
    need_dinitial_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk, dv and, if `need_dinitial_state`, the gradient of the initial state [sequences, heads, P, head_dim + 1]."""
    batch, seq_len, heads, feature_dim = q.shape
    head_dim = v.shape[-1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    with torch.cuda.device_of(q):
        chunks = make_chunks(batch, seq_len, cu_seqlens, CHUNK, q.device)
        tables = feature_tables(feature_dim, scale, q.device, q.dtype)
        padding = find_padding(attention_mask, chunks)
        q, k, v, dy = (flatten_tokens(x) for x in (q, k, v, dy))
        n_tokens = batch * seq_len
        options = block_options(feature_dim, head_dim, q.dtype)
        # dy / den of a long sequence can be below the smallest float16
        u = torch.empty(
            q.shape[0], heads, head_dim, device=q.device, dtype=torch.float32 if q.dtype == torch.float16 else q.dtype
        )
        delta = torch.empty_like(den)
        launch = launch_options("delta", q.dtype, feature_dim, head_dim)
        delta_kernel[(triton.cdiv(n_tokens, launch["BLOCK_M"]) * heads,)](
            y, dy, den, u, delta, n_tokens, heads, dy.stride(0), dy.stride(1), DV=head_dim, DV_PAD=options["DV_PAD"], **launch
        )

        arguments = (
            *(chunks.table, tables.first, tables.second, tables.select),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), n_tokens, scale),
        )
        states = norms = None
        if chunks.several or initial_state is not None:
            states, norms, _ = running_states(k, v, chunks, tables, padding=padding, seed=initial_state, input_dtype=q.dtype)
        launch = launch_options("dq", q.dtype, feature_dim, head_dim)
        dq_kernel[(chunks.count * (chunks.size // launch["BLOCK_M"]), heads)](
            q, k, v, *padding, u, delta, states, norms, dq, *arguments,
            CHUNK=chunks.size, SEEDED=initial_state is not None, **options, **launch,
        )  # fmt: skip

        states = norms = dinitial_state = None
        if chunks.several or dfinal_state is not None or need_dinitial_state:
            states, norms, dinitial_state = running_states(
                q, u, chunks, tables,
                extra=delta.flatten(1).T, seed=dfinal_state, need_total=need_dinitial_state, reverse=True, input_dtype=q.dtype,
            )  # fmt: skip
        if not (chunks.several or dfinal_state is not None):
            states = norms = None
        launch = launch_options("dkv", q.dtype, feature_dim, head_dim)
        dkv_kernel[(chunks.count * (chunks.size // launch["BLOCK_M"]), heads)](
            q, k, v, *padding, u, delta, states, norms, dk, dv, *arguments,
            CHUNK=chunks.size, SEEDED=dfinal_state is not None, **options, **launch,
        )  # fmt: skip
    return dq, dk, dv, dinitial_state
