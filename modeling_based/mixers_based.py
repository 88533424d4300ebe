# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""What the layers of a BASED model are made of: three token mixers, the MLP, norm and rotary embedding."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_based import RingSlidingWindowLayer
from .configuration_based import BasedConfig
from .hub_kernels_based import replaceable_function, with_replaceable

try:
    from geobased.kernels.add_rms_norm import add_rms_norm
    from geobased.kernels.gated_short_convolution import gated_short_convolution, gated_short_convolution_of_halves
    from geobased.kernels.rotary_embedding import rotary_embedding
    from geobased.kernels.silu_mul import silu_mul
    from geobased.kernels.sliding_window_attention import sliding_window_attention
    from geobased.kernels.taylor_linear_attention import taylor_linear_attention, taylor_linear_attention_step
except ImportError:
    from .add_rms_norm_reference import add_rms_norm_reference as add_rms_norm  # type: ignore[assignment]
    from .gated_short_convolution_reference import (  # type: ignore[assignment]
        gated_short_convolution_of_halves_reference as gated_short_convolution_of_halves,
    )
    from .gated_short_convolution_reference import gated_short_convolution_reference as gated_short_convolution  # type: ignore[assignment]
    from .rotary_embedding_reference import rotary_embedding_reference as rotary_embedding  # type: ignore[assignment]
    from .silu_mul_reference import silu_mul_reference as silu_mul  # type: ignore[assignment]
    from .sliding_window_attention_reference import sliding_window_attention_reference as sliding_window_attention  # type: ignore[assignment]
    from .taylor_linear_attention_reference import taylor_linear_attention_reference as taylor_linear_attention  # type: ignore[assignment]
    from .taylor_linear_attention_reference import (  # type: ignore[assignment]
        taylor_linear_attention_step_reference as taylor_linear_attention_step,
    )

    # what `use_kernels=True` swaps for the Triton forms
    taylor_linear_attention = replaceable_function("BasedTaylorLinearAttention", taylor_linear_attention)
    taylor_linear_attention_step = replaceable_function("BasedTaylorLinearAttentionStep", taylor_linear_attention_step)
    sliding_window_attention = replaceable_function("BasedSlidingWindowAttention", sliding_window_attention)
    gated_short_convolution = replaceable_function("BasedGatedShortConvolution", gated_short_convolution)
    gated_short_convolution_of_halves = replaceable_function(
        "BasedGatedShortConvolutionOfHalves", gated_short_convolution_of_halves
    )
    add_rms_norm = replaceable_function("BasedAddRMSNorm", add_rms_norm)
    rotary_embedding = replaceable_function("BasedRotaryEmbedding", rotary_embedding)
    silu_mul = replaceable_function("BasedSiluMul", silu_mul)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The only implementation that returns the attention weights; its memory grows with seq_len^2."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@with_replaceable(add_rms_norm)
class BasedRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self, hidden_states: torch.Tensor, added: torch.Tensor | None = None, return_sum: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of hidden_states + added in the weight's dtype, and with `return_sum` the sum as well."""
        if added is not None:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, added.dtype))
        normed, total = add_rms_norm(added, hidden_states, self.weight, self.eps)
        return (normed, total) if return_sum else normed

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class BasedRotaryEmbedding(nn.Module):
    inv_freq: torch.Tensor

    def __init__(self, config: BasedConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():  # `model.bfloat16()` must not round the frequencies
            if getattr(self, name).dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    @staticmethod
    def compute_default_rope_parameters(config: BasedConfig, device: torch.device | None = None, **kwargs):
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float)
        return 1.0 / (config.rope_parameters["rope_theta"] ** (exponent / config.head_dim)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [batch or 1, seq_len] -> cos, sin [batch or 1, seq_len, head_dim] in x's dtype."""
        # angles lose all meaning in half precision; float64 models are for comparison with references and get float64
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            freqs = position_ids[..., None].to(precise) * self.inv_freq.to(x.device, precise)
            angles = torch.cat((freqs, freqs), dim=-1)
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def residual_output(projection: nn.Linear) -> nn.Linear:
    """Marks a projection that writes to the residual stream: its weights start smaller."""
    projection.writes_to_residual = True  # type: ignore[assignment]
    return projection


@with_replaceable(gated_short_convolution, gated_short_convolution_of_halves)
class BasedShortConvolution(nn.Conv1d):
    """The depthwise weight, with the gated convolution as its forward: hooks that fetch an offloaded weight run on a call."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """x, gate [batch, seq_len, channels], or both side by side in x -> silu(conv(x)) * gate."""
        if gate is None:
            return gated_short_convolution_of_halves(x, self.weight.squeeze(1), **kwargs)
        return gated_short_convolution(x, gate, self.weight.squeeze(1), **kwargs)


class BasedGatedShortConvolution(nn.Module):
    """out_proj(silu(conv(x)) * gate), with x and gate the two halves of in_proj."""

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.kernel_size = layer_idx, config.conv_kernel
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.conv_dim, bias=config.conv_proj_bias)
        self.conv1d = BasedShortConvolution(
            config.conv_dim, config.conv_dim, config.conv_kernel, groups=config.conv_dim, bias=False
        )
        self.out_proj = residual_output(nn.Linear(config.conv_dim, config.hidden_size, bias=config.conv_proj_bias))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        projected = self.in_proj(hidden_states)
        if past_key_values is None:
            return self.out_proj(self.conv1d(projected, attention_mask=attention_mask, cu_seqlens=cu_seqlens)), None
        x, gate = projected.chunk(2, dim=-1)
        if attention_mask is not None:  # padding must not reach the cache
            x = x * attention_mask.unsqueeze(-1).to(x.dtype)
        inputs = past_key_values.update_conv_state(x.transpose(1, 2), self.layer_idx, conv_kernel_size=self.kernel_size)
        state = inputs[..., : inputs.shape[-1] - hidden_states.shape[1]]
        return self.out_proj(self.conv1d(x, gate, state=state)), None


@with_replaceable(taylor_linear_attention, taylor_linear_attention_step)
class BasedTaylorLinearAttention(nn.Module):
    """Causal attention with weights 1 + s + s^2/2, s = q.k / sqrt(feature_dim): a sum over the past in a state of fixed size."""

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.feature_dim, self.head_dim = layer_idx, config.feature_dim, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.feature_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.feature_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.o_proj = residual_output(nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        batch, seq_len, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(batch, seq_len, -1, self.feature_dim)
        k = self.k_proj(hidden_states).view(batch, seq_len, -1, self.feature_dim)
        v = self.v_proj(hidden_states).view(batch, seq_len, -1, self.head_dim)
        if past_key_values is None:
            y = taylor_linear_attention(q, k, v, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        else:
            layer = past_key_values.layers[self.layer_idx]
            # `has_previous_state` speaks of convolution states only; after a reset the state is zero, the right empty one
            state = layer.recurrent_states[0] if layer.is_recurrent_states_initialized[0] else None
            if state is not None and seq_len == 1 and attention_mask is None:
                y = taylor_linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state).unsqueeze(1)
            else:
                y, state = taylor_linear_attention(
                    q, k, v, attention_mask=attention_mask, initial_state=state, output_final_state=True
                )
                past_key_values.update_recurrent_state(state, self.layer_idx)
                if layer.device is None:  # transformers' layer learns it from convolution states only; offloading needs it
                    layer.dtype, layer.device = state.dtype, state.device
        return self.o_proj(y.reshape(batch, seq_len, -1)), None


@with_replaceable(rotary_embedding, sliding_window_attention)
class BasedSlidingAttention(nn.Module):
    """Softmax attention over the last `sliding_window` tokens, with rotary embedding.

    The default implementation ("sdpa") takes memory linear in the sequence length: our own windowed op, or PyTorch's
    scaled_dot_product_attention over the ring buffer for a single token. Others ("eager", "flash_attention_2", …) are
    transformers' own and follow its masks.
    """

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window
        self.is_causal = True
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = residual_output(nn.Linear(width, config.hidden_size, bias=False))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        windowed: bool = True,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`windowed`: attention_mask is a padding mask [batch, keys] for our own op; otherwise it is transformers' mask."""
        batch, seq_len, _ = hidden_states.shape
        q, k, v = (
            proj(hidden_states).view(batch, seq_len, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotary_embedding(q, k, *position_embeddings)
        weights = None
        if not windowed:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            y, weights = attend(
                self,
                q,
                k,
                v,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
        elif past_key_values is not None and seq_len == 1:
            layer, k, v = past_key_values.layers[self.layer_idx], k.transpose(1, 2), v.transpose(1, 2)
            if isinstance(layer, RingSlidingWindowLayer):
                k, v = layer.append(k, v)
            else:
                k, v = past_key_values.update(k, v, self.layer_idx)
            mask = None if attention_mask is None else attention_mask[:, None, None].bool()
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=self.scaling).transpose(1, 2)
        else:
            if past_key_values is not None:
                k, v = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            y = sliding_window_attention(
                q,
                k,
                v,
                window=self.sliding_window,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                softmax_scale=self.scaling,
            )
        return self.o_proj(y.reshape(batch, seq_len, -1)), weights


MIXER_CLASSES = {
    "conv": BasedGatedShortConvolution,
    "linear_attention": BasedTaylorLinearAttention,
    "sliding_attention": BasedSlidingAttention,
}


@with_replaceable(silu_mul)
class BasedMLP(nn.Module):
    def __init__(self, config: BasedConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = residual_output(nn.Linear(config.intermediate_size, config.hidden_size, bias=False))
        self.is_swiglu = config.hidden_act in ("silu", "swish")
        # not transformers' module of SiLU, for which `use_kernels=True` would ask the Hub
        self.act_fn = F.silu if self.is_swiglu else ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(silu_mul(gate, up) if self.is_swiglu else self.act_fn(gate) * up)
