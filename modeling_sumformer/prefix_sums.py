# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Sums over a set and over prefixes of a sequence, in float32 whatever the model's precision."""

import torch
import torch.nn.functional as F


def precise_dtype(x: torch.Tensor) -> torch.dtype:
    """What sums over x are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def prefix_sums(x: torch.Tensor, initial: torch.Tensor | None = None, chunk_size: int = 64) -> torch.Tensor:
    """x [batch, seq_len, width] -> y alike, y_t = initial + x_1 + ... + x_t, chunk by chunk.

    initial [batch, width] is the sum over what came before. Within a chunk the sums run, and so do the chunks' totals: the
    longest chain of additions is chunk_size + seq_len / chunk_size.
    """
    seq_len = x.shape[1]
    if seq_len <= chunk_size:
        sums = x.cumsum(1)
    else:
        within = F.pad(x, (0, 0, 0, -seq_len % chunk_size)).unflatten(1, (-1, chunk_size)).cumsum(2)
        before = F.pad(within[:, :-1, -1], (0, 0, 1, 0)).cumsum(1)
        sums = (within + before.unsqueeze(2)).flatten(1, 2)[:, :seq_len]
    return sums if initial is None else sums + initial.unsqueeze(1)


def aggregate(sums: torch.Tensor, counts: torch.Tensor, aggregation: str) -> torch.Tensor:
    """ "sum", "mean" or "scaled" (divided by the square root of the count); an empty set gives 0 in all three."""
    if aggregation == "mean":
        return sums / counts.clamp(min=1)
    if aggregation == "scaled":
        return sums / counts.clamp(min=1).sqrt()
    return sums
