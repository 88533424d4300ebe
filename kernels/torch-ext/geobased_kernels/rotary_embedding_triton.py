"""Triton kernel of the rotary embedding: one program per tile of heads of q or k, counted over all tokens."""

import torch
import triton
import triton.language as tl

LAUNCH_CONFIG = dict(BLOCK_ROWS=64, num_warps=4)


def turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [batch, seq_len, heads, head_dim]; cos, sin [batch or 1, seq_len, head_dim] -> q and k turned."""
    q, k, cos, sin = (x.contiguous() for x in (q, k, cos, sin))
    turned_q, turned_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    heads, head_dim = q.shape[2:]
    rows = q.numel() // head_dim
    with torch.cuda.device_of(q):
        _kernel[(triton.cdiv(rows, LAUNCH_CONFIG["BLOCK_ROWS"]), 2)](
            *(q, k, cos, sin, turned_q, turned_k, rows, heads, cos.shape[0] * cos.shape[1]),
            TRANSPOSED=transposed,
            HALF=head_dim // 2,
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            **LAUNCH_CONFIG,
        )
    return turned_q, turned_k


@triton.jit
def _kernel(
    q,
    k,
    cos,
    sin,
    turned_q,
    turned_k,
    rows,
    heads,
    angle_rows,
    TRANSPOSED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    x = q
    turned = turned_q
    if tl.program_id(1) == 1:
        x = k
        turned = turned_k
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_HALF)
    visible = (row < rows)[:, None] & (dims < HALF)[None, :]
    firsts = row.to(tl.int64)[:, None] * (2 * HALF) + dims[None, :]
    # one row of angles for all heads of a token, and for all sequences where cos has a batch of 1
    angles = (row // heads % angle_rows).to(tl.int64)[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(x + firsts, visible, other=0.0).to(tl.float32)
    second = tl.load(x + firsts + HALF, visible, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + angles, visible, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angles + HALF, visible, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angles, visible, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angles + HALF, visible, other=0.0).to(tl.float32)
    if TRANSPOSED:
        y_first = first * cos_first + second * sin_second
        y_second = second * cos_second - first * sin_first
    else:
        y_first = first * cos_first - second * sin_first
        y_second = second * cos_second + first * sin_second
    tl.store(turned + firsts, y_first.to(turned.dtype.element_ty), visible)
    tl.store(turned + firsts + HALF, y_second.to(turned.dtype.element_ty), visible)
