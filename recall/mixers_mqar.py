"""The sequence mixers that the recall experiment compares, each (batch, seq_len, hidden_size) -> the same, all causal.

They are as plain as the task allows: no positions, one norm before each in the layer around them. Taylor linear attention and
sliding windows run this package's kernels, the other sums and scans chunked forms in plain PyTorch, which need no other package
and, at these sizes, no kernels.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from geobased.kernels.sliding_window_attention import sliding_window_attention
from geobased.kernels.taylor_linear_attention import taylor_linear_attention
from geobased.modeling_sumformer.configuration_sumformer import SumformerConfig
from geobased.modeling_sumformer.mixers_sumformer import SumformerMixer
from geobased.modeling_sumformer.performer import favor_attention, orthogonal_random_features

if TYPE_CHECKING:
    from .modeling_mqar import MQARConfig

SHORT_CONV_KERNEL = 4  # of Mamba-2 and Gated DeltaNet, as published
CHUNK = 32  # the shortest segments still have two: a compiled form for one chunk would be another


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def fused(function: Callable[..., Any], tensor: torch.Tensor) -> Callable[..., Any]:
    """The function, compiled where it is trained on a GPU: eagerly, every operation would read and write all activations."""
    return _compiled(function) if tensor.is_cuda and torch.is_grad_enabled() else function


def causal_depthwise_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """out_t = bias + sum_j weight[:, j] x_{t - kernel + 1 + j}; x (batch, seq_len, channels), weight (channels, kernel)."""
    kernel = weight.shape[-1]
    out = x * weight[:, -1]
    for lag in range(1, min(kernel, x.shape[1])):
        out = out + F.pad(x[:, :-lag], (0, 0, lag, 0)) * weight[:, kernel - 1 - lag]
    return out if bias is None else out + bias


def silu_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """silu of a causal depthwise convolution, like x."""
    return F.silu(causal_depthwise_convolution(x, weight, bias)).to(x.dtype)


def gated_convolution(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(conv(x) + bias) * gate + x."""
    return causal_depthwise_convolution(x, weight, bias) * gate + x


class ShortConvolution(nn.Module):
    """Weights of the convolutions inside Mamba-2 and Gated DeltaNet."""

    def __init__(self, channels: int, kernel: int = SHORT_CONV_KERNEL, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


def _output_projection(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    projection = nn.Linear(in_features, out_features, bias=bias)
    projection.writes_to_residual = True  # type: ignore[assignment]
    return projection


class BaseConvolution(nn.Module):
    """(conv(x) + b) * (W x + c) + x: zoology's gated convolution."""

    def __init__(self, config: "MQARConfig"):
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.conv_kernel))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv1d`."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused(gated_convolution, x)(x, self.projection(x), self.weight, self.bias)


class CausalAttention(nn.Module):
    """Softmax attention over all earlier tokens, without positions."""

    def __init__(self, config: "MQARConfig"):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = _output_projection(config.hidden_size, config.hidden_size, bias=True)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.out_proj(self.attend(q, k, v).flatten(2))


class SlidingAttention(CausalAttention):
    """Softmax attention over the last `sliding_window` tokens, the token itself included, without positions."""

    def __init__(self, config: "MQARConfig"):
        super().__init__(config)
        self.window = config.sliding_window

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sliding_window_attention(q, k, v, window=self.window)


class TaylorLinearAttention(nn.Module):
    """BASED's linear attention: a second-order Taylor feature map over `feature_dim` numbers a head."""

    def __init__(self, config: "MQARConfig"):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.feature_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_heads * config.feature_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = _output_projection(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = taylor_linear_attention(q, k, v)
        assert isinstance(mixed, torch.Tensor)  # without a final state
        return self.out_proj(mixed.flatten(2))


class Performer(CausalAttention):
    """FAVOR+ with `feature_dim` orthogonal random features a head (Choromanski et al. 2021), drawn once."""

    projection: torch.Tensor

    def __init__(self, config: "MQARConfig"):
        super().__init__(config)
        self.register_buffer("projection", torch.empty(config.feature_dim, config.hidden_size // config.num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Features of the global random generator, as the weights are."""
        self.projection.copy_(orthogonal_random_features(*self.projection.shape))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = favor_attention(q, k, v, self.projection, causal=True)
        assert isinstance(mixed, torch.Tensor)  # without a final state
        return mixed.transpose(1, 2)


class Sumformer(SumformerMixer):
    """psi(x_t, mean of phi(x_k) over k <= t) with a sum of width `feature_dim` (Alberti et al. 2023), and a bilinear psi."""

    def __init__(self, config: "MQARConfig"):
        super().__init__(
            SumformerConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.hidden_size,
                latent_size=config.feature_dim,
                psi_type="bilinear",
                aggregation="mean",
                causal=True,
            ),
            layer_idx=0,
        )


def _in_chunks(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(batch, seq_len, heads, ...) -> (batch, heads, chunks, CHUNK, ...), filled up with zeros."""
    missing = -x.shape[1] % CHUNK
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.to(dtype).unflatten(1, (-1, CHUNK)).movedim(3, 1)


def _from_chunks(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return y.movedim(1, 3).flatten(1, 2)[:, : like.shape[1]].to(like.dtype)


def _decay_within(total: torch.Tensor) -> torch.Tensor:
    """exp(total_i - total_j) for j <= i, 0 elsewhere; total (..., CHUNK) -> (..., CHUNK, CHUNK)."""
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()


def state_space_dual(x: torch.Tensor, log_decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Mamba-2's core (Dao and Gu 2024): h_t = exp(log_decay_t) h_{t-1} + b_t x_t^T, y_t = c_t h_t.

    Args:
        x: (batch, seq_len, heads, head_dim), multiplied by the time step.
        log_decay: (batch, seq_len, heads), at most 0.
        b, c: (batch, seq_len, state_size), shared by the heads.

    Returns:
        (batch, seq_len, heads, head_dim) like x. Decays are float32; products take their operands in the dtype of b.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = b.dtype
        values, total = _in_chunks(x, dtype), _in_chunks(log_decay).cumsum(-1)
        b, c = _in_chunks(b.unsqueeze(2), dtype), _in_chunks(c.unsqueeze(2), dtype)
        y = ((c @ b.transpose(-1, -2)) * _decay_within(total)).to(dtype) @ values
        end = total[..., -1:]
        written = (b * (end - total).exp().unsqueeze(-1)).to(dtype).transpose(-1, -2) @ values
        read = (c * total.exp().unsqueeze(-1)).to(dtype)
        # what is left of each chunk's writing at the start of each later chunk
        ends = end.squeeze(-1).cumsum(-1)
        left = (ends - end.squeeze(-1)).unsqueeze(-1) - ends.unsqueeze(-2)
        later = torch.arange(ends.shape[-1], device=x.device)
        left = left.masked_fill(later.unsqueeze(-1) <= later, -torch.inf).exp().to(dtype)
        states = (left @ written.flatten(3)).unflatten(-1, written.shape[3:])
        return _from_chunks(y.float() + read @ states, x)


class Mamba2(nn.Module):
    """Mamba-2 (Dao and Gu 2024) with one group; the parameters are those of transformers' `Mamba2Mixer`."""

    def __init__(self, config: "MQARConfig"):
        super().__init__()
        self.inner, self.state_size = config.expand * config.hidden_size, config.state_size
        self.heads = self.inner // config.head_dim
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.inner + 2 * self.state_size + self.heads, bias=False)
        self.conv = ShortConvolution(self.inner + 2 * self.state_size)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.out_proj = _output_projection(self.inner, config.hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: A from 1 to 16, time steps from 0.001 to 0.1, log-uniform."""
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        nn.init.ones_(self.D)
        self.dt_bias.copy_(_inverse_softplus_of_time_steps(self.dt_bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.conv.weight, self.conv.bias, self.dt_bias, self.A_log, self.D, self.norm.weight)
        return self.out_proj(fused(mamba2_inner, x)(self.in_proj(x), *weights, self.state_size))


def mamba2_inner(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    norm_weight: torch.Tensor,
    state_size: int,
) -> torch.Tensor:
    """All of Mamba-2 between its projections: (batch, seq_len, 2 inner + 2 state_size + heads) -> (batch, seq_len, inner)."""
    inner, heads = norm_weight.shape[0], dt_bias.shape[0]
    z, xbc, dt = projected.split([inner, inner + 2 * state_size, heads], dim=-1)
    values, b, c = silu_convolution(xbc, conv_weight, conv_bias).split([inner, state_size, state_size], dim=-1)
    values = values.float().unflatten(-1, (heads, -1))
    dt = F.softplus(dt.float() + dt_bias)
    y = state_space_dual(values * dt.unsqueeze(-1), -A_log.exp() * dt, b, c) + values * D.unsqueeze(-1)
    return F.rms_norm(y.flatten(2) * F.silu(z.float()), norm_weight.shape, norm_weight, 1e-5).to(projected.dtype)


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (Yang et al. 2024): keys of `state_size`, values of `head_dim` numbers a head, short convolutions."""

    def __init__(self, config: "MQARConfig"):
        super().__init__()
        value_dim = config.expand * config.hidden_size
        self.heads, self.key_dim = value_dim // config.head_dim, config.state_size
        key_dim = self.heads * config.state_size
        self.qkv_proj = nn.Linear(config.hidden_size, 2 * key_dim + value_dim, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, value_dim, bias=False)
        self.decay_proj = nn.Linear(config.hidden_size, 2 * self.heads, bias=False)
        self.conv = ShortConvolution(2 * key_dim + value_dim, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(self.heads)) for _ in range(2))
        self.norm = nn.RMSNorm(config.head_dim, eps=1e-5)
        self.out_proj = _output_projection(value_dim, config.hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: A from 0 to 16, time steps from 0.001 to 0.1, log-uniform."""
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(0.01, 16).log())
        self.dt_bias.copy_(_inverse_softplus_of_time_steps(self.dt_bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.conv.weight, self.dt_bias, self.A_log, self.norm.weight)
        inputs = (self.qkv_proj(x), self.decay_proj(x), self.gate_proj(x))
        return self.out_proj(gated_deltanet_inner(*inputs, *weights, self.key_dim))


def gated_deltanet_inner(
    qkv: torch.Tensor,
    decay_and_beta: torch.Tensor,
    gate: torch.Tensor,
    conv_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    norm_weight: torch.Tensor,
    key_dim: int,
) -> torch.Tensor:
    """All of Gated DeltaNet between its projections -> (batch, seq_len, heads * head_dim)."""
    weights = (conv_weight, dt_bias, A_log, key_dim, norm_weight.shape[0])
    q, k, v, log_decay, beta = fused(_delta_rule_inputs, qkv)(qkv, decay_and_beta, *weights)
    y = gated_delta_rule(q, k, v, log_decay, beta)
    return fused(_gated_norm, y)(y, gate, norm_weight)


def _delta_rule_inputs(
    qkv: torch.Tensor,
    decay_and_beta: torch.Tensor,
    conv_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    key_dim: int,
    head_dim: int,
) -> tuple[torch.Tensor, ...]:
    heads = dt_bias.shape[0]
    splits = [heads * key_dim, heads * key_dim, heads * head_dim]
    qkv = silu_convolution(qkv, conv_weight, None)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.split(splits, dim=-1))
    decay, beta = decay_and_beta.float().chunk(2, dim=-1)
    return q, k, v, -A_log.exp() * F.softplus(decay + dt_bias), beta.sigmoid()


def _gated_norm(y: torch.Tensor, gate: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
    """The norm of each head's output, times silu(gate): (batch, seq_len, heads, head_dim) -> (batch, seq_len, both)."""
    normed = F.rms_norm(y.float(), norm_weight.shape, norm_weight, 1e-5)
    return (normed * F.silu(gate.float().unflatten(-1, y.shape[2:]))).flatten(2).to(gate.dtype)


def gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Gated DeltaNet's core (Yang et al. 2024), y_t = q_t S_t / sqrt(key_dim).

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T

    Args:
        q, k: (batch, seq_len, heads, key_dim), brought to length 1 here.
        v: (batch, seq_len, heads, head_dim).
        log_decay: (batch, seq_len, heads), the logarithm of the decay a, at most 0.
        beta: (batch, seq_len, heads), how much of the old value is replaced, from 0 to 1.

    Returns:
        (batch, seq_len, heads, head_dim), computed in float32, returned like v.
    """
    with torch.autocast(v.device.type, enabled=False):
        within, read, kept, end, overlap, wanted = fused(_delta_rule_chunks, v)(q, k, v, log_decay, beta)
        # what a token writes, given what the tokens before it in its chunk wrote: a triangular system
        solved = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
        new, old = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        state, outputs = new.new_zeros(*new.shape[:2], k.shape[-1], new.shape[-1]), []
        # unbound: the gradient of a slice is as large as all of them
        for chunk in zip(*(part.unbind(2) for part in (new, old, read, within, kept, end)), strict=True):
            new_here, old_here, read_here, within_here, kept_here, end_here = chunk
            written = new_here - old_here @ state
            outputs.append(read_here @ state + within_here @ written)
            state = state * end_here + kept_here.transpose(-1, -2) @ written
        return _from_chunks(torch.stack(outputs, dim=2), v)


def _delta_rule_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What the chunks of the delta rule are made of, before they see each other; (batch, heads, chunks, CHUNK, ...)."""
    q, k = (_in_chunks(part) for part in (q, k))
    q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
    q = q * q.shape[-1] ** -0.5
    values, total, beta = _in_chunks(v), _in_chunks(log_decay).cumsum(-1), _in_chunks(beta).unsqueeze(-1)
    decay, growth, end = _decay_within(total), total.exp().unsqueeze(-1), total[..., -1:]
    overlap = ((k * beta) @ k.transpose(-1, -2) * decay).tril(-1)
    wanted = torch.cat([values * beta, k * beta * growth], dim=-1)
    within = q @ k.transpose(-1, -2) * decay
    return within, q * growth, k * (end - total).exp().unsqueeze(-1), end.exp().unsqueeze(-1), overlap, wanted


def _inverse_softplus_of_time_steps(like: torch.Tensor) -> torch.Tensor:
    dt = torch.empty_like(like).uniform_(math.log(0.001), math.log(0.1)).exp()
    return dt + torch.log(-torch.expm1(-dt))


MIXERS: dict[str, type[nn.Module]] = {
    "conv": BaseConvolution,
    "attention": CausalAttention,
    "sliding_attention": SlidingAttention,
    "linear_attention": TaylorLinearAttention,
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "performer": Performer,
    "sumformer": Sumformer,
}

__all__ = [
    "MIXERS",
    "BaseConvolution",
    "CausalAttention",
    "GatedDeltaNet",
    "Mamba2",
    "Performer",
    "ShortConvolution",
    "SlidingAttention",
    "Sumformer",
    "TaylorLinearAttention",
    "causal_depthwise_convolution",
    "fused",
    "gated_convolution",
    "gated_delta_rule",
    "silu_convolution",
    "state_space_dual",
]
