"""Triton kernel of the RMSNorm that adds the parts of a linear layer to a residual: one program per row."""

import torch
import triton
import triton.language as tl

NUM_WARPS = 16  # a row is short and rows are few: latency is what counts


@triton.jit
def add_parts_rms_norm_kernel(
    parts_ptr,  # [PARTS, rows, hidden]
    bias_ptr,  # [hidden]
    residual_ptr,  # in and out [rows, hidden]
    weight_ptr,  # [hidden]
    normed_ptr,  # out [rows, hidden]
    rows,
    hidden,
    eps,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.load(residual_ptr + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    added = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        added += tl.load(parts_ptr + (part * rows + row) * hidden + column, mask=inside, other=0.0)
    if HAS_BIAS:
        added += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = (total + added).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + row * hidden + column, total, mask=inside)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / hidden + eps)
    tl.store(normed_ptr + row * hidden + column, (total * scale * weight).to(normed_ptr.dtype.element_ty), mask=inside)


def add_parts_rms_norm(
    parts: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    count, rows, hidden = parts.shape
    normed = torch.empty(rows, hidden, dtype=weight.dtype, device=parts.device)
    with torch.cuda.device_of(parts):
        add_parts_rms_norm_kernel[(rows,)](
            parts, weight if bias is None else bias, residual, weight, normed, rows, hidden, eps,
            PARTS=count, HAS_BIAS=bias is not None, BLOCK=triton.next_power_of_2(hidden), num_warps=NUM_WARPS,
        )  # fmt: skip
    return normed
