"""What the package `kernels` puts in place of a BASED model's plain PyTorch functions (`use_kernels=True`).

A model without geobased marks its functions with these names (`kernels.use_kernel_forward_from_hub`), which makes modules
of them; `kernelize` replaces their `forward` by the one here. So a layer has no state and no constructor, and takes the
arguments of the function of the same name, in whatever form the model passes them. The backend stays "auto": Triton for
tensors on a GPU, the plain twin for all others and for shapes that Triton does not take.
"""

import torch
from torch import nn

from .add_rms_norm import add_rms_norm
from .gated_short_convolution import gated_short_convolution, gated_short_convolution_of_halves
from .rotary_embedding import rotary_embedding
from .silu_mul import silu_mul
from .sliding_window_attention import sliding_window_attention
from .taylor_linear_attention import taylor_linear_attention, taylor_linear_attention_step


class BasedTaylorLinearAttention(nn.Module):
    """q, k [batch, seq_len, heads, feature_dim]; v [batch, seq_len, heads, head_dim] -> y like v [, final state]."""

    can_torch_compile = True
    has_backward = True

    def forward(self, *args, **kwargs) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return taylor_linear_attention(*args, **kwargs)


class BasedTaylorLinearAttentionStep(nn.Module):
    """One token: q, k [batch, heads, feature_dim]; v [batch, heads, head_dim] -> y like v; the state is updated in place."""

    can_torch_compile = True
    has_backward = False  # a model that is trained keeps its own function

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return taylor_linear_attention_step(*args, **kwargs)


class BasedSlidingWindowAttention(nn.Module):
    """q [batch, seq_len, heads, head_dim]; k, v [batch, kv_len, heads, head_dim] -> y like q."""

    can_torch_compile = True
    has_backward = True

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return sliding_window_attention(*args, **kwargs)


class BasedGatedShortConvolution(nn.Module):
    """x, gate [batch, seq_len, channels]; weight [channels, kernel] -> y like x."""

    can_torch_compile = True
    has_backward = True

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return gated_short_convolution(*args, **kwargs)


class BasedGatedShortConvolutionOfHalves(nn.Module):
    """halves [batch, seq_len, 2 * channels], x and gate side by side; weight [channels, kernel] -> y."""

    can_torch_compile = True
    has_backward = True

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return gated_short_convolution_of_halves(*args, **kwargs)


class BasedAddRMSNorm(nn.Module):
    """x (or None), residual [..., hidden]; weight [hidden]; eps -> the norm of their sum in weight's dtype, the sum."""

    can_torch_compile = True
    has_backward = True

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(*args, **kwargs)


class BasedRotaryEmbedding(nn.Module):
    """q, k [batch, seq_len, heads, head_dim]; cos, sin [batch or 1, seq_len, head_dim] -> q and k, rotated."""

    can_torch_compile = True
    has_backward = True

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_embedding(*args, **kwargs)


class BasedSiluMul(nn.Module):
    """gate, up [..., n] -> silu(gate) * up."""

    can_torch_compile = True
    has_backward = True

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return silu_mul(*args, **kwargs)


__all__ = [
    "BasedAddRMSNorm",
    "BasedGatedShortConvolution",
    "BasedGatedShortConvolutionOfHalves",
    "BasedRotaryEmbedding",
    "BasedSiluMul",
    "BasedSlidingWindowAttention",
    "BasedTaylorLinearAttention",
    "BasedTaylorLinearAttentionStep",
]
