"""Triton kernel of a linear layer for a few rows: each program reads some rows of the weight once, for all rows of x.

A product with so few rows is bound by reading the weight. All of a program's reads are under way at once (no loop over the
inputs), and what stands before and after the layer rides along instead of waiting for a kernel of its own: each program takes
the norm of the whole row itself, which is little beside its share of the weight.
"""

import torch
import triton
import triton.language as tl

from .programmatic_launch import overlap_options

# by the rounded-up number of inputs; outputs per program, halved with `swiglu`, which reads two weight rows for each
LAUNCH: dict[int, dict[str, int]] = {
    1024: dict(BLOCK_N=4, num_warps=4),
    2048: dict(BLOCK_N=4, num_warps=4),
    4096: dict(BLOCK_N=2, num_warps=8),
    8192: dict(BLOCK_N=2, num_warps=8),
}


@triton.jit
def few_rows_kernel(
    x_ptr,  # [ROWS, inputs]
    weight_ptr,  # [outputs, inputs], or [2 * outputs, inputs] with SWIGLU
    bias_ptr,  # [outputs]
    residual_ptr,  # [ROWS, inputs]
    norm_weight_ptr,  # [inputs]
    y_ptr,  # out [ROWS, outputs]
    new_residual_ptr,  # out [ROWS, inputs]
    x_stride,
    inputs,
    outputs,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside_n, inside_k = n < outputs, k < inputs
    inside = inside_n[:, None] & inside_k[None, :]
    weight = tl.load(weight_ptr + n[:, None].to(tl.int64) * inputs + k[None, :], mask=inside, other=0.0)
    if SWIGLU:
        partner = tl.load(weight_ptr + (n + outputs)[:, None].to(tl.int64) * inputs + k[None, :], mask=inside, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * x_stride + k, mask=inside_k, other=0.0).to(tl.float32)
        if NORM:
            residual = tl.load(residual_ptr + row * inputs + k, mask=inside_k, other=0.0)
            total = (residual.to(tl.float32) + x).to(residual_ptr.dtype.element_ty)
            # one program hands the sum on, in other memory: the others still read the old one
            if program == 0:
                tl.store(new_residual_ptr + row * inputs + k, total, mask=inside_k)
            total = total.to(tl.float32)
            scale = tl.rsqrt(tl.sum(total * total, axis=0) / inputs + eps)
            norm_weight = tl.load(norm_weight_ptr + k, mask=inside_k, other=0.0).to(tl.float32)
            x = (total * scale * norm_weight).to(norm_weight_ptr.dtype.element_ty).to(tl.float32)
        y = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
        if HAS_BIAS:
            y += bias
        if SWIGLU:
            # rounded as the layers alone would round
            gate = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            up = tl.sum(partner.to(tl.float32) * x[None, :], axis=1).to(y_ptr.dtype.element_ty).to(tl.float32)
            y = gate * tl.sigmoid(gate) * up
        tl.store(y_ptr + row * outputs + n, y.to(y_ptr.dtype.element_ty), mask=inside_n)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    swiglu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> y, new_residual (empty without residual)."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if swiglu else weight.shape[0]
    y = torch.empty(rows, outputs, dtype=weight.dtype, device=x.device)
    norm = residual is not None
    new_residual = torch.empty_like(residual) if residual is not None else y.new_empty(0)
    x = x if x.stride(1) == 1 else x.contiguous()
    block_k = max(1024, triton.next_power_of_2(inputs))
    launch = dict(LAUNCH[block_k])
    if swiglu:
        launch["BLOCK_N"] //= 2
    with torch.cuda.device_of(x):
        few_rows_kernel[(triton.cdiv(outputs, launch["BLOCK_N"]),)](
            x, weight, bias if bias is not None else weight, residual if norm else x, norm_weight if norm else x, y,
            new_residual if norm else y, x.stride(0), inputs, outputs, eps,
            ROWS=rows, BLOCK_K=block_k, HAS_BIAS=bias is not None, NORM=norm, SWIGLU=swiglu, **launch, **overlap_options(),
        )  # fmt: skip
    return y, new_residual
