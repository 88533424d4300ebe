"""Triton kernel of the largest entry of every row: one program per row."""

import torch
import triton
import triton.language as tl

# a row of logits is long and rows are few: as many reads under way as a program can hold
LAUNCH: dict[str, int] = dict(BLOCK=8192, num_warps=32)


@triton.jit
def row_argmax_kernel(scores_ptr, index_ptr, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * stride
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    index = columns
    for start in range(0, n, BLOCK):
        x = tl.load(scores_ptr + start + columns, mask=start + columns < n, other=-float("inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        better = x > best  # not where equal: the first one stays
        best = tl.where(better, x, best)
        index = tl.where(better, start + columns, index)
    top = tl.max(best, axis=0)
    tl.store(index_ptr + row, tl.min(tl.where(best == top, index, n), axis=0).to(tl.int64))


def row_argmax(scores: torch.Tensor) -> torch.Tensor:
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    rows, n = scores.shape
    index = torch.empty(rows, dtype=torch.int64, device=scores.device)
    block = min(LAUNCH["BLOCK"], max(128, triton.next_power_of_2(n)))
    launch = LAUNCH | {"BLOCK": block, "num_warps": min(LAUNCH["num_warps"], block // 32)}
    with torch.cuda.device_of(scores):
        row_argmax_kernel[(rows,)](scores, index, scores.stride(0), n, **launch)
    return index
