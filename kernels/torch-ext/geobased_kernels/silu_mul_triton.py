"""Triton kernels of silu(gate) * up: one program per piece of a row; dense tensors count as one long row."""

import torch
import triton
import triton.language as tl

LAUNCH_CONFIGS = {"forward": dict(BLOCK=2048, num_warps=8), "backward": dict(BLOCK=1024, num_warps=4)}


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [..., n] of one dtype -> silu(gate) * up."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate_rows, up_rows = _rows(gate, up)
    config = LAUNCH_CONFIGS["forward"]
    with torch.cuda.device_of(gate):
        _forward_kernel[_grid(gate_rows, config)](
            *(gate_rows, up_rows, y, gate_rows.shape[1], gate_rows.stride(0), up_rows.stride(0)), **config
        )
    return y


def backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dgate, dup."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    dy_rows, gate_rows, up_rows = _rows(dy, gate, up)
    config = LAUNCH_CONFIGS["backward"]
    strides = [rows.stride(0) for rows in (dy_rows, gate_rows, up_rows)]
    with torch.cuda.device_of(gate):
        _backward_kernel[_grid(gate_rows, config)](
            *(dy_rows, gate_rows, up_rows, dgate, dup, gate_rows.shape[1], *strides), **config
        )
    return dgate, dup


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as [rows, n], or as one row where all are dense."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    dense = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)
    return [tensor.reshape(-1, tensor.shape[-1]) for tensor in dense]


def _grid(rows: torch.Tensor, config: dict) -> tuple[int]:
    return (rows.shape[0] * triton.cdiv(rows.shape[1], config["BLOCK"]),)


@triton.jit
def _locate(n, BLOCK: tl.constexpr):
    """-> this program's row and columns (int64)."""
    tiles = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), (program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward_kernel(gate, up, y, n, stride_gate, stride_up, BLOCK: tl.constexpr):
    row, columns = _locate(n, BLOCK)
    visible = columns < n
    gates = tl.load(gate + row * stride_gate + columns, visible, other=0.0).to(tl.float32)
    ups = tl.load(up + row * stride_up + columns, visible, other=0.0).to(tl.float32)
    tl.store(y + row * n + columns, (gates * tl.sigmoid(gates) * ups).to(y.dtype.element_ty), visible)


@triton.jit
def _backward_kernel(dy, gate, up, dgate, dup, n, stride_dy, stride_gate, stride_up, BLOCK: tl.constexpr):
    row, columns = _locate(n, BLOCK)
    visible = columns < n
    dys = tl.load(dy + row * stride_dy + columns, visible, other=0.0).to(tl.float32)
    gates = tl.load(gate + row * stride_gate + columns, visible, other=0.0).to(tl.float32)
    ups = tl.load(up + row * stride_up + columns, visible, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gates)
    silu = gates * sigmoid
    dgates = dys * ups * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dgate + row * n + columns, dgates.to(dgate.dtype.element_ty), visible)
    tl.store(dup + row * n + columns, (dys * silu).to(dup.dtype.element_ty), visible)
