"""Triton kernel of one decoding step of Taylor linear attention: the state is read and written once."""

import torch
import triton
import triton.language as tl

from .taylor_linear_attention_reference import packed_feature_count
from .taylor_linear_attention_states_triton import feature_tables, padded_rows

LAUNCH = {"BLOCK_P": 32, "num_warps": 4, "num_stages": 3}


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
def step_kernel(
    q_ptr,  # [batch, heads, D]
    k_ptr,
    v_ptr,  # [batch, heads, DV]
    state_ptr,  # in and out [batch, heads, P, DV + 1]
    y_ptr,  # out [batch, heads, DV]
    first_ptr,
    second_ptr,
    weight_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    state_stride,
    state_head_stride,
    state_row_stride,
    eps,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    sequence = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, DV_PAD)
    one = tl.zeros([1], dtype=tl.int64)  # load_features takes a list of tokens; here there is one
    q_ptr += sequence * q_stride + head * q_head_stride
    k_ptr += sequence * k_stride + head * k_head_stride
    state_ptr += sequence * state_stride + head * state_head_stride
    v = tl.load(v_ptr + sequence * v_stride + head * v_head_stride + columns, mask=columns < DV, other=0.0).to(tl.float32)
    y = tl.zeros([DV_PAD], dtype=tl.float32)
    den = tl.zeros([BLOCK_P], dtype=tl.float32)
    for row in range(0, P_PAD, BLOCK_P):
        rows = row + tl.arange(0, BLOCK_P)
        q_i, q_j, weight = load_features(q_ptr, one, one == 0, rows, first_ptr, second_ptr, weight_ptr, D)
        k_i, k_j, _ = load_features(k_ptr, one, one == 0, rows, first_ptr, second_ptr, weight_ptr, D)
        phi_q = q_i * q_j * weight[:, None]  # [BLOCK_P, 1]
        phi_k = k_i * k_j * weight[:, None]
        offsets = rows.to(tl.int64) * state_row_stride
        mask = (rows[:, None] < P) & (columns[None, :] < DV)
        state = tl.load(state_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0) + phi_k * v[None, :]
        norm = tl.load(state_ptr + offsets + DV, mask=rows < P, other=0.0) + tl.sum(phi_k, axis=1)
        tl.store(state_ptr + offsets[:, None] + columns[None, :], state, mask=mask)
        tl.store(state_ptr + offsets + DV, norm, mask=rows < P)
        y += tl.sum(phi_q * state, axis=0)
        den += tl.sum(phi_q, axis=1) * norm
    y = y / (tl.sum(den, axis=0) + eps)
    tl.store(y_ptr + (sequence * heads + head) * DV + columns, y.to(y_ptr.dtype.element_ty), mask=columns < DV)


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, scale: float, eps: float) -> torch.Tensor:
    """y [batch, heads, head_dim]; `state` is updated in place."""
    batch, heads, feature_dim = q.shape
    head_dim = v.shape[-1]
    y = v.new_empty(v.shape)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with torch.cuda.device_of(q):
        step_kernel[(heads, batch)](
            q, k, v, state, y, *feature_tables(feature_dim, scale, q.device)[:3],
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            state.stride(0), state.stride(1), state.stride(2), eps, packed_feature_count(feature_dim),
            D=feature_dim, DV=head_dim, DV_PAD=triton.next_power_of_2(head_dim), P_PAD=padded_rows(feature_dim), **LAUNCH,
        )  # fmt: skip
    return y
