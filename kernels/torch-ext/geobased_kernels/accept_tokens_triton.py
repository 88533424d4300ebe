"""Triton kernel of the end of a generation step: one program, since the counters wait for all rows."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def accept_tokens_kernel(
    picked_ptr,
    tokens_ptr,
    period_tokens_ptr,
    finished_ptr,
    ends_ptr,
    pad_ptr,
    counters_ptr,
    slot_ptr,
    running_ptr,
    batch,
    num_ends,
    NUM_COUNTERS: tl.constexpr,
    COUNTERS_PAD: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.load(slot_ptr)
    going_on = 1
    unfinished = tl.zeros([BLOCK], dtype=tl.int32)
    if HAS_ENDS:
        going_on = tl.load(running_ptr)
        pad = tl.load(pad_ptr)
    for start in range(0, batch, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < batch
        token = tl.load(picked_ptr + rows, mask=inside, other=0)
        if HAS_ENDS:
            finished = tl.load(finished_ptr + rows, mask=inside, other=1) != 0
            token = tl.where(finished, pad, token)
            for end in range(num_ends):
                finished = finished | (token == tl.load(ends_ptr + end))
            tl.store(finished_ptr + rows, finished, mask=inside)
            unfinished += (inside & (finished == 0)).to(tl.int32)
        tl.store(tokens_ptr + rows, token, mask=inside)
        tl.store(period_tokens_ptr + slot * batch + rows, token, mask=inside)
    counter = tl.arange(0, COUNTERS_PAD)
    counted = counter < NUM_COUNTERS
    tl.store(counters_ptr + counter, tl.load(counters_ptr + counter, mask=counted, other=0) + going_on, mask=counted)
    tl.store(slot_ptr, slot + going_on)
    if HAS_ENDS:
        tl.store(running_ptr, (tl.sum(unfinished, axis=0) > 0).to(tl.int32))


def accept_tokens(
    picked: torch.Tensor,
    tokens: torch.Tensor,
    period_tokens: torch.Tensor,
    finished: torch.Tensor,
    ends: torch.Tensor,
    pad: torch.Tensor,
    counters: torch.Tensor,
    slot: torch.Tensor,
    running: torch.Tensor,
) -> None:
    block = min(BLOCK, max(32, triton.next_power_of_2(picked.shape[0])))
    with torch.cuda.device_of(picked):
        accept_tokens_kernel[(1,)](
            picked, tokens, period_tokens, finished, ends, pad, counters, slot, running, picked.shape[0], ends.numel(),
            NUM_COUNTERS=counters.numel(), COUNTERS_PAD=triton.next_power_of_2(counters.numel()), HAS_ENDS=ends.numel() > 0,
            BLOCK=block, num_warps=min(8, block // 32),
        )  # fmt: skip
