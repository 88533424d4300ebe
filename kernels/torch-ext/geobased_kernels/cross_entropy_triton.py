"""Triton kernels of the cross entropy: forward one program per token, backward one per piece of a token's logits."""

import math

import torch
import triton
import triton.language as tl

LAUNCH_CONFIGS = {"forward": dict(BLOCK=4096, num_warps=4), "backward": dict(BLOCK=2048, num_warps=4)}


def forward(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [..., vocab_size]; labels [...] -> losses and logsumexp, float32 [...]."""
    logits, labels = logits.contiguous(), labels.contiguous()
    losses, logsumexp = (torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    vocab_size, config = logits.shape[-1], launch_config("forward", logits.shape[-1])
    with torch.cuda.device_of(logits):
        _forward_kernel[(labels.numel(),)](
            *(logits, labels, losses, logsumexp, vocab_size // config["ALIGNMENT"], ignore_index), **config
        )
    return losses, logsumexp


def backward(
    dlosses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, logsumexp: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """-> dlogits, like logits."""
    dlosses, logits, labels = dlosses.contiguous(), logits.contiguous(), labels.contiguous()
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    vocab_size, config = logits.shape[-1], launch_config("backward", logits.shape[-1])
    with torch.cuda.device_of(logits):
        _backward_kernel[(labels.numel() * triton.cdiv(vocab_size, config["BLOCK"]),)](
            *(dlosses, logits, labels, logsumexp, dlogits, vocab_size // config["ALIGNMENT"], ignore_index), **config
        )
    return dlogits


def launch_config(kernel: str, vocab_size: int) -> dict[str, int]:
    config = LAUNCH_CONFIGS[kernel]
    # Triton only sees whether a number is divisible by 16; vocabularies are padded to 8, enough for the widest loads
    return config | dict(ALIGNMENT=math.gcd(vocab_size, 16), BLOCK=min(config["BLOCK"], triton.next_power_of_2(vocab_size)))


@triton.jit
def _forward_kernel(logits, labels, losses, logsumexp, aligned_size, ignore_index, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    vocab_size = aligned_size * ALIGNMENT
    logits += row.to(tl.int64) * vocab_size
    largest = float("-inf")
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, columns < vocab_size, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(values, 0))
        # a row may begin with a whole block of -inf, of logits that are forbidden
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift), 0)
        largest = new_largest
    tl.store(logsumexp + row, tl.where(largest == float("-inf"), largest, largest + tl.log(total)))
    label = tl.load(labels + row)
    chosen = tl.load(logits + label, (label >= 0) & (label < vocab_size), other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(label == ignore_index, 0.0, (largest - chosen) + tl.log(total)))


@triton.jit
def _backward_kernel(
    dlosses, logits, labels, logsumexp, dlogits, aligned_size, ignore_index, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr
):
    vocab_size = aligned_size * ALIGNMENT
    tiles = tl.cdiv(vocab_size, BLOCK)
    row = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * vocab_size
    visible = columns < vocab_size
    label = tl.load(labels + row)
    values = tl.load(logits + start + columns, visible, other=0.0).to(tl.float32)
    gradient = tl.exp(values - tl.load(logsumexp + row)) - (columns == label).to(tl.float32)
    gradient = tl.where(label == ignore_index, 0.0, gradient * tl.load(dlosses + row))
    tl.store(dlogits + start + columns, gradient.to(dlogits.dtype.element_ty), visible)
