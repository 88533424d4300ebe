"""Gated short convolution in plain PyTorch: the truth that the Triton form must match.

y = silu(causal_depthwise_conv(x)) * gate,    conv_t = sum_i weight[:, i] * x_{t - kernel + 1 + i}
"""

import torch
import torch.nn.functional as F

from .without_autocast import without_autocast


@without_autocast
def gated_short_convolution_reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """x, gate [batch, seq_len, channels]; weight [channels, kernel] -> y like x.

    `state` [batch, channels, m] holds the last m inputs before this call (newest last, any m; missing ones count as zero).
    attention_mask [batch, seq_len] is 0 where a token is padding: its input is taken as zero. With `cu_seqlens` [n + 1] the
    batch is 1 and holds n sequences end to end (`state` is then not supported).
    """
    channels, kernel = weight.shape
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = x.to(compute_dtype)
    if attention_mask is not None:
        inputs = inputs * attention_mask.to(compute_dtype).unsqueeze(-1)
    inputs = inputs.transpose(1, 2)
    if state is not None:
        kept = min(state.shape[-1], kernel - 1)
        history = state[..., state.shape[-1] - kept :].to(compute_dtype)
        inputs = torch.cat([history, inputs], dim=-1)
        left = kernel - 1 - kept
    else:
        left = kernel - 1
    if cu_seqlens is None:
        conv = F.conv1d(F.pad(inputs, (left, 0)), weight.to(compute_dtype).unsqueeze(1), groups=channels)
    else:
        positions = torch.arange(x.shape[1], device=x.device)
        starts = cu_seqlens.to(positions.device)[torch.searchsorted(cu_seqlens.to(positions.device), positions, right=True) - 1]
        conv = torch.zeros_like(inputs)
        for i in range(kernel):
            back = kernel - 1 - i
            shifted = F.pad(inputs, (back, 0))[..., : x.shape[1]]
            conv = conv + weight[:, i, None].to(compute_dtype) * shifted * (positions - back >= starts)
    return (F.silu(conv.transpose(1, 2)) * gate.to(compute_dtype)).to(x.dtype)


def gated_short_convolution_of_halves_reference(
    halves: torch.Tensor,
    weight: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """halves [batch, seq_len, 2 * channels], x and gate side by side; the rest as of `gated_short_convolution_reference`."""
    x, gate = halves.chunk(2, dim=-1)
    return gated_short_convolution_reference(x, gate, weight, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
