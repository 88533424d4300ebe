"""Sequences packed end to end into one row: checks and tables of their bounds `cu_seqlens` [n + 1]."""

import torch


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, seq_len: int) -> None:
    """Values are checked only where that costs no wait for a GPU and no break of a traced graph."""
    if batch != 1:
        raise ValueError(f"cu_seqlens needs batch 1, not {batch}: pack the sequences end to end along seq_len")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}: make it torch.int32 or torch.int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: it must be [number of sequences + 1]")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != seq_len or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to seq_len {seq_len}")


def sequence_bounds(cu_seqlens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """int32 [2, seq_len]: where the sequence of each token starts and where it ends (exclusive). Never waits for the GPU."""
    tokens = torch.arange(seq_len, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True).clamp_(1, cu_seqlens.numel() - 1)
    return torch.stack([cu_seqlens[sequence - 1], cu_seqlens[sequence]]).to(torch.int32)
