"""Triton kernels of residual add and RMSNorm: a program of the forward pass holds one row.

A program of the backward pass walks over many rows and keeps its share of the weight gradient in registers; PyTorch sums the
shares: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl

# rows of up to so many numbers -> warps
NUM_WARPS = {"forward": {2048: 4, 4096: 8, 16384: 16}, "backward": {1024: 2, 2048: 4, 4096: 8, 16384: 16}}
BACKWARD_PROGRAMS = 1056  # 8 on each of 132 multiprocessors; the same everywhere, so that sums do not depend on the device


def launch_config(kernel: str, hidden: int) -> dict[str, int]:
    block = triton.next_power_of_2(hidden)
    return dict(BLOCK=block, num_warps=next(warps for limit, warps in NUM_WARPS[kernel].items() if block <= limit))


def forward(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual [..., hidden]; weight [hidden] -> normed, new_residual (residual itself without x or with inplace), and
    1 / sqrt(mean(new_residual^2) + eps), float32 [rows]."""
    x = None if x is None else x.contiguous()
    residual = residual.contiguous()
    hidden = residual.shape[-1]
    rows = residual.numel() // hidden
    new_residual = residual if x is None or inplace else torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
    reciprocal = torch.empty(rows, dtype=torch.float32, device=residual.device)
    with torch.cuda.device_of(residual):
        _forward_kernel[(rows,)](
            *(x, residual, weight.contiguous(), normed, new_residual, reciprocal, eps),
            HAS_X=x is not None,
            HIDDEN=hidden,
            **launch_config("forward", hidden),
        )
    return normed, new_residual, reciprocal


def backward(
    dnormed: torch.Tensor,
    dnew_residual: torch.Tensor | None,
    new_residual: torch.Tensor,
    weight: torch.Tensor,
    reciprocal: torch.Tensor,
    x_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dresidual, the same in x_dtype (empty without one), dweight."""
    dnormed, new_residual = dnormed.contiguous(), new_residual.contiguous()
    dnew_residual = None if dnew_residual is None else dnew_residual.contiguous()
    hidden = new_residual.shape[-1]
    rows = reciprocal.shape[0]
    dresidual = torch.empty(new_residual.shape, dtype=new_residual.dtype, device=new_residual.device)
    dx = None if x_dtype is None else torch.empty(new_residual.shape, dtype=x_dtype, device=new_residual.device)
    programs = min(rows, BACKWARD_PROGRAMS)
    dweight = torch.empty(programs, hidden, dtype=torch.float32, device=new_residual.device)
    with torch.cuda.device_of(new_residual):
        _backward_kernel[(programs,)](
            *(dnormed, dnew_residual, new_residual, weight.contiguous(), reciprocal, dresidual, dx, dweight, rows),
            HAS_DRESIDUAL=dnew_residual is not None,
            HAS_X=dx is not None,
            HIDDEN=hidden,
            **launch_config("backward", hidden),
        )
    return dresidual, new_residual.new_empty(0) if dx is None else dx, dweight.sum(0).to(weight.dtype)


@triton.jit
def _forward_kernel(
    x,
    residual,
    weight,
    normed,
    new_residual,
    reciprocal,
    eps,
    HAS_X: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    visible = columns < HIDDEN
    start = row.to(tl.int64) * HIDDEN
    values = tl.load(residual + start + columns, visible, other=0.0).to(tl.float32)
    weights = tl.load(weight + columns, visible, other=0.0).to(tl.float32)
    if HAS_X:
        values += tl.load(x + start + columns, visible, other=0.0).to(tl.float32)
        rounded = values.to(new_residual.dtype.element_ty)
        tl.store(new_residual + start + columns, rounded, visible)
        values = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, 0) / HIDDEN + eps)
    tl.store(reciprocal + row, factor)
    tl.store(normed + start + columns, (values * factor * weights).to(normed.dtype.element_ty), visible)


@triton.jit
def _backward_kernel(
    dnormed,
    dnew_residual,
    new_residual,
    weight,
    reciprocal,
    dresidual,
    dx,
    dweight,
    rows,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_X: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    visible = columns < HIDDEN
    weights = tl.load(weight + columns, visible, other=0.0).to(tl.float32)
    dweights = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * HIDDEN
        values = tl.load(new_residual + start + columns, visible, other=0.0).to(tl.float32)
        dy = tl.load(dnormed + start + columns, visible, other=0.0).to(tl.float32)
        if HAS_DRESIDUAL:
            passed_on = tl.load(dnew_residual + start + columns, visible, other=0.0).to(tl.float32)
        factor = tl.load(reciprocal + row)
        values *= factor
        dweights += dy * values
        dy *= weights
        gradient = factor * (dy - values * (tl.sum(dy * values, 0) / HIDDEN))
        if HAS_DRESIDUAL:
            gradient += passed_on
        tl.store(dresidual + start + columns, gradient.to(dresidual.dtype.element_ty), visible)
        if HAS_X:
            tl.store(dx + start + columns, gradient.to(dx.dtype.element_ty), visible)
    tl.store(dweight + tl.cast(program, tl.int64) * HIDDEN + columns, dweights, visible)
