# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Pillow's antialiased bicubic resampling of 8-bit images, in torch: the same grey levels, on any device.

Pillow resizes columns first and rows second, rounds to whole grey levels in between, and multiplies by weights that it has
rounded to 22 fractional bits. torch's own `interpolate(antialias=True)` works in floating point and does not round in between, so
it misses by a grey level or two. Here the weights are split into two whole numbers of 12 bits, whose products with 8-bit pixels
float32 sums exactly (TF32 too), so that neither the device nor the order of a sum changes a result.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PRECISION_BITS = 22  # of Pillow's weights
LOW_BITS = 12
BLOCK = 16  # outputs that share a window of inputs: few enough to waste little, enough for a matrix product
MAX_ELEMENTS = 1 << 25  # of the windows that are in memory at once
CUBIC = -0.5  # Pillow's cubic; OpenCV's is -0.75


@dataclass(frozen=True)
class _Weights:
    index: torch.Tensor  # int64 [blocks, window]: the inputs that a block of outputs is made of
    weight: torch.Tensor  # float32 [blocks, window, 2 * BLOCK]: high parts of the weights, then low parts
    outputs: int


def resize_crop(
    images: torch.Tensor | Sequence[torch.Tensor],
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
    device: torch.device | None = None,
) -> torch.Tensor:
    """n uint8 images [channels, height, width] of one size -> uint8 [n, channels, bottom - top, right - left] on `device`.

    Each image is resized to size (height, width), of which crop (top, left, bottom, right) is kept; nothing outside the crop is
    moved to the device or computed. Equal to Pillow's `resize(BICUBIC)` and `crop` where images shrink to no less than an eighth;
    below, a sum may exceed what float32 holds exactly, and pixels differ by one grey level.

    Raises `ValueError` if the images are not uint8 or the crop lies outside the resized image.
    """
    if images[0].dtype != torch.uint8:
        raise ValueError(f"images must be uint8 grey levels 0 to 255, not {images[0].dtype}")
    top, left, bottom, right = crop
    if not (0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]):
        raise ValueError(f"crop (top, left, bottom, right) = {crop} lies outside of the resized image of {size[0]} x {size[1]}")
    height, width = images[0].shape[-2:]
    rows, columns = slice(*_input_range(height, size[0], top, bottom)), slice(*_input_range(width, size[1], left, right))
    used = _stacked([image[:, rows, columns] for image in images], device)
    narrow = _resample_last(used, width, size[1], left, right)
    return _resample_last(narrow.transpose(-1, -2), height, size[0], top, bottom).transpose(-1, -2)


def _stacked(images: Sequence[torch.Tensor], device: torch.device | None) -> torch.Tensor:
    """uint8 images [channels, height, width] -> [n, channels, height, width] on the device, whatever their layout in memory.

    Decoders give pixel after pixel. They are copied in that order, row by row, to memory that a GPU reads on its own, and what
    channels are is only sorted out there: a processor takes many times as long for either.
    """
    pixels = [image.permute(1, 2, 0) for image in images]
    if device is not None and device.type == "cuda" and images[0].device.type == "cpu":
        together = torch.empty(len(pixels), *pixels[0].shape, dtype=torch.uint8, pin_memory=True)
        moved = torch.stack(pixels, out=together).to(device, non_blocking=True)
    else:
        moved = torch.stack(pixels).to(device)
    return moved.permute(0, 3, 1, 2)


def _input_range(in_size: int, out_size: int, start: int, stop: int) -> tuple[int, int]:
    """First input and one past the last that outputs start to stop of a resize from in_size to out_size are made of."""
    scale = in_size / out_size
    reach = 2 * max(scale, 1.0)
    return max(int((start + 0.5) * scale - reach + 0.5), 0), min(int((stop - 0.5) * scale + reach + 0.5), in_size)


def _resample_last(pixels: torch.Tensor, in_size: int, out_size: int, start: int, stop: int) -> torch.Tensor:
    """pixels uint8 [..., the input range of start to stop] -> uint8 [..., stop - start]."""
    if in_size == out_size:
        first = _input_range(in_size, out_size, start, stop)[0]
        return pixels[..., start - first : stop - first]
    weights = _weights(in_size, out_size, start, stop, pixels.device)
    if pixels.is_cuda:  # the memory of weights that are dropped meanwhile is not given to the stream that made them
        for tensor in (weights.index, weights.weight):
            tensor.record_stream(torch.cuda.current_stream(pixels.device))
    rows = pixels.reshape(-1, pixels.shape[-1])
    per_chunk = max(MAX_ELEMENTS // weights.index.numel(), 1)
    parts = [_weighted_sums(part, weights) for part in rows.split(per_chunk)]
    return torch.cat(parts).reshape(*pixels.shape[:-1], weights.outputs)


def _weighted_sums(rows: torch.Tensor, weights: _Weights) -> torch.Tensor:
    """rows uint8 [n, inputs] -> uint8 [n, outputs]."""
    windows = rows[:, weights.index].transpose(0, 1).float()  # [blocks, n, window]
    with torch.autocast(rows.device.type, enabled=False):
        sums = torch.bmm(windows, weights.weight)
    high, low = sums.transpose(0, 1).unflatten(-1, (2, BLOCK)).unbind(-2)  # [n, blocks, BLOCK] each
    # floor((high * 2^12 + low + 2^21) / 2^22), without leaving the whole numbers that float32 has
    half = 1 << (PRECISION_BITS - LOW_BITS - 1)
    levels = (high + half + (low / (1 << LOW_BITS)).floor()) / (1 << (PRECISION_BITS - LOW_BITS))
    return levels.floor().clamp(0, 255).to(torch.uint8).flatten(1)[:, : weights.outputs]


@functools.lru_cache(maxsize=64)
def _weights(in_size: int, out_size: int, start: int, stop: int, device: torch.device) -> _Weights:
    first, last = _input_range(in_size, out_size, start, stop)
    scale = in_size / out_size
    shrink = max(scale, 1.0)
    center = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale
    low = (center - 2 * shrink + 0.5).long().clamp(min=0)
    high = (center + 2 * shrink + 0.5).long().clamp(max=in_size)

    blocks = -(-(stop - start) // BLOCK)
    block_low = low[::BLOCK]
    block_high = torch.stack([part[-1] for part in high.split(BLOCK)])
    window = int((block_high - block_low).max())
    inputs = block_low[:, None] + torch.arange(window)  # [blocks, window]

    of_output = inputs.repeat_interleave(BLOCK, dim=0)[: stop - start]  # [outputs, window]
    weight = _cubic((of_output - center[:, None] + 0.5) * (1.0 / shrink))
    weight = torch.where((of_output >= low[:, None]) & (of_output < high[:, None]), weight, 0.0)
    weight = weight / weight.sum(dim=1, keepdim=True) * (1 << PRECISION_BITS)
    whole = (weight + weight.sign() * 0.5).trunc()  # as Pillow rounds: halves away from zero

    whole = torch.nn.functional.pad(whole, (0, 0, 0, blocks * BLOCK - whole.shape[0])).view(blocks, BLOCK, window)
    high_part = (whole / (1 << LOW_BITS)).round()
    parts = torch.cat([high_part, whole - high_part * (1 << LOW_BITS)], dim=1).transpose(1, 2)
    return _Weights(
        index=(inputs.clamp(max=last - 1) - first).to(device),
        # laid out before it is moved: a copy from a processor's memory is waited for, so other streams find it finished
        weight=parts.float().contiguous().to(device),
        outputs=stop - start,
    )


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """The cubic convolution kernel (Keys 1981), of support 2."""
    x = x.abs()
    inner = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * CUBIC
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))
