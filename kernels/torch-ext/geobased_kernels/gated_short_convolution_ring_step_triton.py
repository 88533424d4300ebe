"""Triton kernel of one token of the gated short convolution over a ring: one program per tile of sequences and channels."""

import torch
import triton
import triton.language as tl

from .programmatic_launch import overlap_options

# The first line whose batch is not exceeded. Few sequences are bound by latency: many small programs. Many share the strided
# loads of the weights. 8 channels for each thread make a load of bfloat16 16 bytes wide.
LAUNCH: tuple[tuple[int, dict[str, int]], ...] = (
    (1, dict(BLOCK_C=128, ROWS=1, num_warps=1)),
    (16, dict(BLOCK_C=256, ROWS=1, num_warps=1)),
    (2**62, dict(BLOCK_C=256, ROWS=4, num_warps=4)),
)


@triton.jit
def step_kernel(
    x_ptr,  # [batch, channels]
    gate_ptr,
    weight_ptr,  # [channels, KERNEL]
    ring_ptr,  # in and out [batch, KERNEL, channels]
    position_ptr,
    y_ptr,  # out [batch, channels]
    x_stride,
    gate_stride,
    batch,
    channels,
    KERNEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    sequences = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = channel[None, :]
    inside = (sequences < batch) & (columns < channels)
    slot = (tl.load(position_ptr) % KERNEL).to(tl.int32)
    # Every load before the first sum. Threads load other weights than they need, for those loads are strided, and exchange them
    # through shared memory: no load would move across the barriers of that.
    weights = ()
    for tap in tl.static_range(KERNEL):
        weights = weights + (tl.load(weight_ptr + channel * KERNEL + tap, mask=channel < channels, other=0.0),)
    ring_ptr += sequences * (channels * KERNEL) + columns
    older = ()
    for tap in tl.static_range(KERNEL - 1):  # oldest first; the slot that x takes is not among them
        source = slot + (tap + 1)
        source = tl.where(source < KERNEL, source, source - KERNEL)
        older = older + (tl.load(ring_ptr + source * channels, mask=inside, other=0.0),)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + sequences * x_stride + columns, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + sequences * gate_stride + columns, mask=inside, other=0.0)
    # the weights are 1D up to here: as 2D loads they would make all others take their distribution over threads
    conv = x.to(tl.float32) * weights[KERNEL - 1].to(tl.float32)[None, :]
    for tap in tl.static_range(KERNEL - 1):
        conv += older[tap].to(tl.float32) * weights[tap].to(tl.float32)[None, :]
    y = conv * tl.sigmoid(conv) * gate.to(tl.float32)
    tl.store(y_ptr + sequences * channels + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(ring_ptr + slot * channels, x.to(ring_ptr.dtype.element_ty), mask=inside)


def step(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, ring: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """-> y [batch, channels]; x is written to slot position % kernel of `ring`."""
    batch, channels = x.shape
    launch = next(launch for most, launch in LAUNCH if batch <= most)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, gate = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, gate))
    with torch.cuda.device_of(x):
        step_kernel[(triton.cdiv(batch, launch["ROWS"]), triton.cdiv(channels, launch["BLOCK_C"]))](
            x, gate, weight.contiguous(), ring, position, y, x.stride(0), gate.stride(0), batch, channels,
            KERNEL=weight.shape[1], **launch, **overlap_options(),
        )  # fmt: skip
    return y
