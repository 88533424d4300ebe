"""Triton kernels of x * sigmoid(1.702 x): one program per piece of a dense tensor."""

import torch
import triton
import triton.language as tl

from .quick_gelu_reference import SLOPE

LAUNCH_CONFIG = dict(BLOCK=2048, num_warps=8)


def forward(x: torch.Tensor) -> torch.Tensor:
    """x [...] -> x * sigmoid(1.702 x)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(y)](x.contiguous(), y, y.numel(), SLOPE, **LAUNCH_CONFIG)
    return y


def backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """-> dx."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[_grid(dx)](dy.contiguous(), x.contiguous(), dx, dx.numel(), SLOPE, **LAUNCH_CONFIG)
    return dx


def _grid(x: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), LAUNCH_CONFIG["BLOCK"]),)


@triton.jit
def _forward_kernel(x, y, n, slope, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, at < n, other=0.0).to(tl.float32)
    tl.store(y + at, (values * tl.sigmoid(slope * values)).to(y.dtype.element_ty), at < n)


@triton.jit
def _backward_kernel(dy, x, dx, n, slope, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dys = tl.load(dy + at, at < n, other=0.0).to(tl.float32)
    values = tl.load(x + at, at < n, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(slope * values)
    slopes = sigmoid * (1.0 + slope * values * (1.0 - sigmoid))
    tl.store(dx + at, (dys * slopes).to(dx.dtype.element_ty), at < n)
