# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""What lets the elements of a set see each other: the Sumformer's sum, and softmax, Linformer and Performer attention."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .cache_sumformer import SumformerCache
from .configuration_sumformer import SumformerConfig
from .features_sumformer import PHI_CLASSES
from .linformer import linformer_attention
from .performer import favor_attention, orthogonal_random_features
from .prefix_sums import aggregate, precise_dtype, prefix_sums


def residual_output(projection: nn.Linear) -> nn.Linear:
    """Marks a projection that writes to the residual stream: its weights start smaller."""
    projection.writes_to_residual = True  # type: ignore[assignment]
    return projection


class SumformerPsi(nn.Module):
    """psi(x_i, sum): an MLP whose first layer is split, so that the sum is projected once and not beside every element."""

    def __init__(self, config: SumformerConfig):
        super().__init__()
        self.token_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.sum_proj = nn.Linear(config.latent_size, config.intermediate_size, bias=False)
        self.product_proj = None
        if config.psi_type == "bilinear":
            self.product_proj = nn.Linear(config.latent_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.out_proj = residual_output(nn.Linear(config.intermediate_size, config.hidden_size))

    def forward(self, x: torch.Tensor, features: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """x [batch, n, hidden_size], features phi(x) [batch, n, latent_size], sums [batch, 1 or n, latent_size] -> like x."""
        hidden = self.token_proj(x) + self.sum_proj(sums)
        if self.product_proj is not None:
            hidden = hidden + self.product_proj(features * sums)
        return self.out_proj(self.act_fn(hidden))


class SumformerMixer(nn.Module):
    """S(x_1, ..., x_n)_i = psi(x_i, sum_k phi(x_k)), or the sum over k <= i in a causal model."""

    def __init__(self, config: SumformerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.causal = layer_idx, bool(config.causal)
        self.aggregation, self.chunk_size, self.hidden_act = config.aggregation, config.chunk_size, config.hidden_act
        self.phi = PHI_CLASSES[config.phi_type](config)
        self.psi = SumformerPsi(config)

    def forward(
        self,
        x: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        past_key_values: SumformerCache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """x [batch, n, hidden_size], token_mask [batch, n] (False: not in the set) -> like x."""
        features = self.phi(x)
        dtype = precise_dtype(features)
        # a column of ones counts the elements
        summands = F.pad(features.to(dtype), (0, 1), value=1.0)
        if token_mask is not None:
            summands = summands.masked_fill(~token_mask.unsqueeze(-1), 0.0)
        if self.causal:
            layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            sums = prefix_sums(summands, None if layer is None else layer.state, self.chunk_size)
            if layer is not None and x.shape[1]:
                layer.set_state(sums[:, -1].clone())  # a view would keep all prefixes
        else:
            sums = summands.sum(1, keepdim=True)
        pooled = aggregate(sums[..., :-1], sums[..., -1:], self.aggregation).to(features.dtype)
        return self.psi(x, features, pooled)


class AttentionMixer(nn.Module):
    """Projections to queries, keys and values, and back; what attends is the subclasses' part."""

    def __init__(self, config: SumformerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.causal = layer_idx, bool(config.causal)
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = residual_output(nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        """x [batch, n, hidden_size] and masks as [`SumformerMixer`] -> like x."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attend(q, k, v, **kwargs).transpose(1, 2).flatten(2))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        past_key_values: SumformerCache | None = None,
    ) -> torch.Tensor:
        """q, k, v [batch, heads, n, head_dim] -> like v."""
        raise NotImplementedError


class SoftmaxMixer(AttentionMixer):
    """Softmax attention, quadratic: what the others are compared with."""

    def attend(self, q, k, v, token_mask=None, key_mask=None, past_key_values=None):
        seq_len = q.shape[2]
        if seq_len == 0:
            return v
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if not self.causal:
            if token_mask is None:
                return F.scaled_dot_product_attention(q, k, v)
            # a set without any element must not become NaN, which a later sum could not hide
            empty = ~token_mask.any(1, keepdim=True)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=(token_mask | empty)[:, None, None])
            return y.masked_fill(empty[..., None, None], 0.0)
        if key_mask is None and k.shape[2] == seq_len:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        key = torch.arange(k.shape[2], device=q.device)
        query = key[k.shape[2] - seq_len :, None]
        mask = (key <= query)[None]
        if key_mask is not None:  # padding sees itself, and nothing else sees it
            mask = mask & (key_mask.unsqueeze(1) | (key == query))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))


class LinformerMixer(AttentionMixer):
    """Attention over `linformer_size` projected keys and values. Its output depends on the elements' order."""

    def __init__(self, config: SumformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.e = nn.Parameter(torch.empty(config.max_linformer_len, config.linformer_size))
        self.f = None
        if not config.linformer_share_kv:
            self.f = nn.Parameter(torch.empty(config.max_linformer_len, config.linformer_size))

    def reset_parameters(self) -> None:
        bound = self.e.shape[1] ** -0.5
        for projection in (self.e, self.f):
            if projection is not None:
                init.uniform_(projection, -bound, bound)

    def attend(self, q, k, v, token_mask=None, key_mask=None, past_key_values=None):
        f = self.e if self.f is None else self.f
        return linformer_attention(q, k, v, self.e, f, attention_mask=token_mask)


class PerformerMixer(AttentionMixer):
    """FAVOR+ attention; its random projection is saved with the weights."""

    projection: torch.Tensor
    num_draws: torch.Tensor

    def __init__(self, config: SumformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_features, self.scaling, self.seed = config.num_random_features, config.performer_scaling, config.performer_seed
        self.register_buffer("projection", torch.empty(self.num_features, self.head_dim))
        # drawings so far: the next one differs, also after saving and loading
        self.register_buffer("num_draws", torch.zeros((), dtype=torch.long))

    def draw(self, number: int) -> torch.Tensor:
        """The `number`-th projection of this layer, the same in every process."""
        seed = (self.seed * 1_000_003 + self.layer_idx) * 1_000_003 + number
        generator = torch.Generator().manual_seed(seed % 2**63)
        return orthogonal_random_features(self.num_features, self.head_dim, scaling=self.scaling, generator=generator)

    def reset_parameters(self) -> None:
        init.copy_(self.projection, self.draw(0))
        init.zeros_(self.num_draws)

    @torch.no_grad()
    def redraw(self) -> None:
        """Other random features. Keys in a cache were summed under the old ones: start a new one."""
        self.num_draws = self.num_draws + 1
        self.projection = self.draw(int(self.num_draws)).to(self.projection)

    def attend(self, q, k, v, token_mask=None, key_mask=None, past_key_values=None):
        if past_key_values is None:
            return favor_attention(q, k, v, self.projection, causal=self.causal, attention_mask=token_mask)
        layer = past_key_values.layers[self.layer_idx]
        y, state = favor_attention(
            q,
            k,
            v,
            self.projection,
            causal=True,
            attention_mask=token_mask,
            initial_state=layer.state,
            output_final_state=True,
        )
        layer.set_state(state)
        return y


MIXER_CLASSES: dict[str, type[nn.Module]] = {
    "sumformer": SumformerMixer,
    "softmax": SoftmaxMixer,
    "linformer": LinformerMixer,
    "performer": PerformerMixer,
}
