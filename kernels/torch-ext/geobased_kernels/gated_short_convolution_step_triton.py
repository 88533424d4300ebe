"""Triton kernel of one token of the gated short convolution: one program per (sequence, channel tile)."""

import torch
import triton
import triton.language as tl

# small batches are bound by latency: many small programs
LAUNCH: dict[str, int] = dict(num_warps=4)


@triton.jit
def step_kernel(
    x_ptr,  # [batch, channels]
    gate_ptr,
    weight_ptr,  # [channels, KERNEL]
    state_ptr,  # in and out [batch, channels, KERNEL]
    y_ptr,  # out [batch, channels]
    x_stride,
    gate_stride,
    channels,
    KERNEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < channels
    first_tap = columns * KERNEL
    state_ptr += sequence * channels * KERNEL
    x = tl.load(x_ptr + sequence * x_stride + columns, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + sequence * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    conv = x.to(tl.float32) * tl.load(weight_ptr + first_tap + (KERNEL - 1), mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(KERNEL - 1):
        older = tl.load(state_ptr + first_tap + (tap + 1), mask=inside, other=0.0).to(tl.float32)
        conv += older * tl.load(weight_ptr + first_tap + tap, mask=inside, other=0.0).to(tl.float32)
    y = conv * tl.sigmoid(conv) * gate
    tl.store(y_ptr + sequence * channels + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    # One channel for each thread, so that a thread overwrites only what it has read itself. The second read is served by the
    # L1 cache; keeping the first one's values would put a store between every two loads above.
    for tap in tl.static_range(KERNEL - 1):
        tl.store(state_ptr + first_tap + tap, tl.load(state_ptr + first_tap + (tap + 1), mask=inside, other=0.0), mask=inside)
    tl.store(state_ptr + first_tap + (KERNEL - 1), x.to(state_ptr.dtype.element_ty), mask=inside)


def step(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """-> y [batch, channels]; x is appended to `state` in place."""
    batch, channels = x.shape
    kernel = weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, gate = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, gate))
    block = 32 * LAUNCH["num_warps"]  # one channel for each thread
    with torch.cuda.device_of(x):
        step_kernel[(batch, triton.cdiv(channels, block))](
            x, gate, weight.contiguous(), state, y, x.stride(0), gate.stride(0), channels,
            KERNEL=kernel, BLOCK_C=block, **LAUNCH,
        )  # fmt: skip
    return y
