"""Triton kernels of Taylor linear attention, backward: gradients of q, of k and v, and of the initial state.

With delta_t = -dy_t.y_t the value and normaliser columns are one matrix: [v_j | 1] meets [dy_t | delta_t] / den_t, so

    dA_tj = (dy_t.v_j + delta_t) / den_t            ds_tj = dA_tj (1 + s_tj)
    dq_t = scale sum_j ds_tj k_j                    dk_j = scale sum_t ds_tj q_t          dv_j = sum_t A_tj dy_t / den_t

within a chunk. Across chunks dphi(q_t) = (S dy_t + z delta_t) / den_t and dphi(k_j) = R v_j + r, dv_j += R^T phi(k_j), where
S, z are the forward states, recomputed, and R, r = sum phi(q_t) [dy_t | delta_t] / den_t runs from the end, seeded with the
gradient of the final state; its total is the gradient of the initial state.
"""

import torch
import triton
import triton.language as tl

from .taylor_linear_attention_forward_triton import (
    CHUNK,
    block_options,
    feature_tables,
    flatten_mask,
    flatten_tokens,
    load_columns,
    load_features,
    load_keep,
    load_rows,
    make_chunks,
    scanned_states,
    store_columns,
)

LAUNCH = {
    ("delta", torch.bfloat16): {"num_warps": 4},
    ("delta", torch.float16): {"num_warps": 4},
    ("delta", torch.float32): {"num_warps": 4},
    ("dq", torch.bfloat16): {"num_warps": 8, "num_stages": 2},
    ("dq", torch.float16): {"num_warps": 8, "num_stages": 1},
    ("dq", torch.float32): {"num_warps": 8, "num_stages": 1},
    ("dkv", torch.bfloat16): {"num_warps": 8, "num_stages": 1},
    ("dkv", torch.float16): {"num_warps": 8, "num_stages": 1},
    ("dkv", torch.float32): {"num_warps": 8, "num_stages": 1},
}


@triton.jit
def delta_kernel(
    y_ptr,
    dy_ptr,
    delta_ptr,
    n_tokens,
    dy_stride,
    dy_head_stride,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    tokens = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, DV_PAD)
    exists = tokens < n_tokens
    y = load_rows(y_ptr, tokens * heads + head, DV, exists, columns, DV)
    dy = load_rows(dy_ptr + head.to(tl.int64) * dy_head_stride, tokens, dy_stride, exists, columns, DV)
    delta = -tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
    tl.store(delta_ptr + tokens * heads + head, delta, mask=exists)


@triton.jit
def add_feature_gradient(
    dx, dphi, x_i, x_j, rows, first_ptr, second_ptr, D_PAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """dx [D_PAD, tokens] += the chain rule through phi_p = weight_p x_i x_j; dphi [rows, tokens] carries the weight."""
    features = tl.arange(0, D_PAD)
    # the scatter is a product with one-hot rows; index D, the constant 1, falls on a feature that is never stored
    is_first = (tl.load(first_ptr + rows)[None, :] == features[:, None]).to(DOT)
    is_second = (tl.load(second_ptr + rows)[None, :] == features[:, None]).to(DOT)
    dx = tl.dot(is_first, (dphi * x_j).to(DOT), dx, input_precision=PRECISION)
    return tl.dot(is_second, (dphi * x_i).to(DOT), dx, input_precision=PRECISION)


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keep_ptr,
    dy_ptr,
    den_ptr,
    delta_ptr,
    states_ptr,  # [chunks, heads, P_PAD, DV]: the state before each chunk, or None
    norms_ptr,
    dq_ptr,  # out [tokens, heads, D]
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
    dy_stride,
    dy_head_stride,
    scale,
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
    dy_ptr += head.to(tl.int64) * dy_head_stride
    delta = tl.load(delta_ptr + tokens * heads + head, mask=exists, other=0.0)
    dy = load_columns(dy_ptr, tokens, dy_stride, exists, columns, DV).to(DOT)
    dq = tl.zeros([D_PAD, TILE], dtype=tl.float32)
    if states_ptr is not None:
        n_rows = P_PAD
        if not SEEDED:
            n_rows = tl.where(tl.load(chunks_ptr + chunk * 4 + 2) > 0, P_PAD, 0)
        base = (chunk.to(tl.int64) * heads + head) * P_PAD
        for row in range(0, n_rows, BLOCK_P):
            rows = row + tl.arange(0, BLOCK_P)
            x_i, x_j, weight = load_features(q_ptr, tokens * q_stride, exists, rows, first_ptr, second_ptr, weight_ptr, D)
            state = load_rows(states_ptr, base + rows, DV, rows >= 0, columns, DV).to(DOT)
            dphi = tl.dot(state, dy, input_precision=PRECISION)
            dphi += tl.load(norms_ptr + base + rows)[:, None] * delta[None, :]
            dq = add_feature_gradient(dq, dphi * weight[:, None], x_i, x_j, rows, first_ptr, second_ptr, D_PAD, DOT, PRECISION)
    q = load_columns(q_ptr, tokens, q_stride, exists, features, D).to(DOT)
    for key_tile in range(start, tile + TILE, TILE):
        keys = (key_tile + tl.arange(0, TILE)).to(tl.int64)
        keep = load_keep(keep_ptr, keys, end)
        k = load_rows(k_ptr, keys, k_stride, keep, features, D).to(DOT)
        v = load_rows(v_ptr, keys, v_stride, keep, columns, DV).to(DOT)
        s = tl.dot(k, q, input_precision=PRECISION) * scale  # [keys, tokens]
        da = tl.dot(v, dy, input_precision=PRECISION) + delta[None, :]
        ds = tl.where((keys[:, None] <= tokens[None, :]) & keep[:, None], da * (1.0 + s) * scale, 0.0)
        dq = tl.dot(tl.trans(k), ds.to(DOT), dq, input_precision=PRECISION)
    dq = dq / tl.load(den_ptr + tokens * heads + head, mask=exists, other=1.0)[None, :]
    store_columns(dq_ptr, tokens * heads + head, D, exists, features, dq, D)


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keep_ptr,
    dy_ptr,
    den_ptr,
    delta_ptr,
    states_ptr,  # [chunks, heads, P_PAD, DV]: R after each chunk, or None
    norms_ptr,
    dk_ptr,  # out [tokens, heads, D]
    dv_ptr,  # out [tokens, heads, DV]
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
    dy_stride,
    dy_head_stride,
    scale,
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
    keys = (tile + tl.arange(0, TILE)).to(tl.int64)
    exists = keys < end
    keep = load_keep(keep_ptr, keys, end)
    columns = tl.arange(0, DV_PAD)
    features = tl.arange(0, D_PAD)
    q_ptr += head.to(tl.int64) * q_head_stride
    k_ptr += head.to(tl.int64) * k_head_stride
    v_ptr += head.to(tl.int64) * v_head_stride
    dy_ptr += head.to(tl.int64) * dy_head_stride
    v = load_columns(v_ptr, keys, v_stride, keep, columns, DV).to(DOT)
    dk = tl.zeros([D_PAD, TILE], dtype=tl.float32)
    dv = tl.zeros([DV_PAD, TILE], dtype=tl.float32)
    if states_ptr is not None:
        n_rows = P_PAD
        if not SEEDED:
            n_rows = tl.where(tl.load(chunks_ptr + chunk * 4 + 3) > 0, P_PAD, 0)
        base = (chunk.to(tl.int64) * heads + head) * P_PAD
        for row in range(0, n_rows, BLOCK_P):
            rows = row + tl.arange(0, BLOCK_P)
            x_i, x_j, weight = load_features(k_ptr, keys * k_stride, keep, rows, first_ptr, second_ptr, weight_ptr, D)
            state = load_rows(states_ptr, base + rows, DV, rows >= 0, columns, DV).to(DOT)
            phi = weight[:, None] * x_i * x_j
            dv = tl.dot(tl.trans(state), phi.to(DOT), dv, input_precision=PRECISION)
            dphi = tl.dot(state, v, input_precision=PRECISION) + tl.load(norms_ptr + base + rows)[:, None]
            dk = add_feature_gradient(dk, dphi * weight[:, None], x_i, x_j, rows, first_ptr, second_ptr, D_PAD, DOT, PRECISION)
    k = load_columns(k_ptr, keys, k_stride, keep, features, D).to(DOT)
    for query_tile in range(tile, end, TILE):
        tokens = (query_tile + tl.arange(0, TILE)).to(tl.int64)
        real = tokens < end
        q = load_rows(q_ptr, tokens, q_stride, real, features, D).to(DOT)
        dy = load_rows(dy_ptr, tokens, dy_stride, real, columns, DV).to(DOT)
        inverse_den = 1.0 / tl.load(den_ptr + tokens * heads + head, mask=real, other=1.0)
        delta = tl.load(delta_ptr + tokens * heads + head, mask=real, other=0.0)
        visible = (keys[None, :] <= tokens[:, None]) & real[:, None] & keep[None, :]
        s = tl.dot(q, k, input_precision=PRECISION) * scale  # [tokens, keys]
        a = tl.where(visible, (1.0 + s + 0.5 * s * s) * inverse_den[:, None], 0.0)
        dv = tl.dot(tl.trans(dy), a.to(DOT), dv, input_precision=PRECISION)
        da = (tl.dot(dy, v, input_precision=PRECISION) + delta[:, None]) * inverse_den[:, None]
        ds = tl.where(visible, da * (1.0 + s) * scale, 0.0)
        dk = tl.dot(tl.trans(q), ds.to(DOT), dk, input_precision=PRECISION)
    # a padding key is out of every sum, the state's included
    store_columns(dk_ptr, keys * heads + head, D, exists, features, tl.where(keep[None, :], dk, 0.0), D)
    store_columns(dv_ptr, keys * heads + head, DV, exists, columns, tl.where(keep[None, :], dv, 0.0), DV)


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
        chunks = make_chunks(batch, seq_len, cu_seqlens, q.device)
        tables = feature_tables(feature_dim, scale, q.device)
        keep = flatten_mask(attention_mask)
        q, k, v, dy = (flatten_tokens(x) for x in (q, k, v, dy))
        n_tokens = batch * seq_len
        options = block_options(feature_dim, head_dim, q.dtype)
        delta = torch.empty_like(den)
        delta_kernel[(triton.cdiv(n_tokens, options["TILE"]), heads)](
            y, dy, delta, n_tokens, dy.stride(0), dy.stride(1),
            DV=head_dim, DV_PAD=options["DV_PAD"], TILE=options["TILE"], **LAUNCH["delta", q.dtype],
        )  # fmt: skip

        tiles = CHUNK // options["TILE"]
        grid = (chunks.count * tiles, heads)
        arguments = (
            *(chunks.table, *tables),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
            *(v.stride(0), v.stride(1), dy.stride(0), dy.stride(1), scale),
        )
        states = norms = None
        if chunks.several or initial_state is not None:
            states, norms, _ = scanned_states(k, v, chunks, tables, keep=keep, seed=initial_state)
        dq_kernel[grid](
            q, k, v, keep, dy, den, delta, states, norms, dq, *arguments,
            TILES=tiles, SEEDED=initial_state is not None, **options, **LAUNCH["dq", q.dtype],
        )  # fmt: skip

        states = norms = dinitial_state = None
        if chunks.several or dfinal_state is not None or need_dinitial_state:
            states, norms, dinitial_state = scanned_states(
                q, dy, chunks, tables,
                den=den, extra=delta, seed=dfinal_state, need_total=need_dinitial_state, reverse=True,
            )  # fmt: skip
        if not (chunks.several or dfinal_state is not None):
            states = norms = None
        dkv_kernel[grid](
            q, k, v, keep, dy, den, delta, states, norms, dk, dv, *arguments,
            TILES=tiles, SEEDED=dfinal_state is not None, **options, **LAUNCH["dkv", q.dtype],
        )  # fmt: skip
    return dq, dk, dv, dinitial_state
