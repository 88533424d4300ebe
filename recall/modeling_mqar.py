"""Small language models for multi-query associative recall: two or three layers of any mixers, at equal width.

Each layer normalises, mixes, and adds to the residual, without an MLP, as in the figure of Arora et al. 2024 (its code,
zoology, keeps an identity in the MLP's place, whose second norm also adds to the residual). There are no positions: the
convolution, or a mixer's own one, tells neighbours apart. The embedding is the head.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from geobased.kernels.cross_entropy import cross_entropy

from .mixers_mqar import MIXERS, BaseConvolution, GatedDeltaNet, Mamba2, Performer, ShortConvolution, fused


@strict
class MQARConfig(PreTrainedConfig):
    r"""
    Configuration of an [`MQARForCausalLM`].

    Args:
        vocab_size (`int`, defaults to 8192):
            Half of it are keys, half values.
        hidden_size (`int`, defaults to 64):
            Width of all layers.
        mixers (`list[str]`):
            What each layer computes: `"conv"`, `"attention"`, `"sliding_attention"`, `"linear_attention"` (Taylor), `"mamba2"`,
            `"gated_deltanet"`, `"performer"` or `"sumformer"`.
        num_heads (`int`, defaults to 1):
            Heads of attention, sliding and linear attention, and Performer.
        feature_dim (`int`, defaults to 16):
            Width of a head's queries and keys in linear attention, number of Performer's random features, width of the
            Sumformer's sum.
        sliding_window (`int`, defaults to 64):
            Keys that a query of a sliding layer sees, itself included.
        conv_kernel (`int`, defaults to 3):
            Taps of the `"conv"` layers.
        state_size (`int`, defaults to 16):
            Numbers of state per channel of Mamba-2, and width of a head's keys in Gated DeltaNet.
        expand (`int`, defaults to 2):
            Inner channels of Mamba-2 and values of Gated DeltaNet, per channel of the layer.
        head_dim (`int`, defaults to 64):
            Channels of a head of Mamba-2 and Gated DeltaNet.
        embedding_dropout (`float`, defaults to 0.1):
            Of the embedding's output, in training.
        layer_norm_eps (`float`, defaults to 1e-5), initializer_range (`float`, defaults to 0.02):
            As in GPT-2. Projections that write to the residual start smaller, by `1 / sqrt(2 * layers)`.

    Raises `ValueError` for values that cannot make a model.
    """

    model_type = "mqar"

    vocab_size: int = 8192
    hidden_size: int = 64
    mixers: list[str] | tuple[str, ...] = ("conv", "linear_attention")
    num_heads: int = 1
    feature_dim: int = 16
    sliding_window: int = 64
    conv_kernel: int = 3
    state_size: int = 16
    expand: int = 2
    head_dim: int = 64
    embedding_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.mixers = list(self.mixers)
        unknown = [mixer for mixer in self.mixers if mixer not in MIXERS]
        if unknown or not self.mixers:
            raise ValueError(f"mixers={self.mixers}: choose one or more of {', '.join(MIXERS)}")
        sizes = ("vocab_size", "hidden_size", "num_heads", "feature_dim", "sliding_window", "conv_kernel", "state_size", "expand")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        inner = self.expand * self.hidden_size
        if inner % self.head_dim and {"mamba2", "gated_deltanet"} & set(self.mixers):
            raise ValueError(f"expand * hidden_size={inner} is not divisible by head_dim={self.head_dim}")
        self.num_hidden_layers = len(self.mixers)
        super().__post_init__(**kwargs)


@dataclass
class MQAROutput(ModelOutput):
    """`loss`: mean over the queries, where labels were given; `logits`: (batch, seq_len or queries, vocab_size)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def add_norms(
    residual: torch.Tensor,
    branch: torch.Tensor,
    identity_weight: torch.Tensor,
    identity_bias: torch.Tensor,
    next_weight: torch.Tensor,
    next_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of a layer: the new residual, to which zoology's identity MLP adds its norm, and what is read next."""
    residual = residual + branch
    residual = residual + F.layer_norm(residual, identity_weight.shape, identity_weight, identity_bias, eps)
    return residual, F.layer_norm(residual, next_weight.shape, next_weight, next_bias, eps)


class MQARLayer(nn.Module):
    """A mixer, the norm before it, and the norm that stands for zoology's identity MLP."""

    def __init__(self, config: MQARConfig, layer_idx: int):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MIXERS[config.mixers[layer_idx]](config)
        self.identity_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class MQARPreTrainedModel(PreTrainedModel):
    config_class = MQARConfig
    base_model_prefix = "model"
    _no_split_modules = ["MQARLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            small = getattr(module, "writes_to_residual", False)
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers) if small else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (ShortConvolution, BaseConvolution, Mamba2, GatedDeltaNet, Performer)):
            module.reset_parameters()
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)


class MQARForCausalLM(MQARPreTrainedModel):
    """A language model that is asked at some positions only.

    Example:
        >>> model = MQARForCausalLM(MQARConfig(vocab_size=64, hidden_size=32, mixers=["conv", "linear_attention"]))
        >>> model(torch.randint(0, 64, (2, 16))).logits.shape
        torch.Size([2, 16, 64])
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: MQARConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # of the dropout; models that are trained side by side need one each to be reproducible
        self.dropout_generator: torch.Generator | None = None
        self.layers = nn.ModuleList(MQARLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def _dropout(self, embedded: torch.Tensor) -> torch.Tensor:
        if not self.training or self.config.embedding_dropout == 0:
            return embedded
        kept = torch.empty_like(embedded, dtype=torch.bool)
        kept.bernoulli_(1 - self.config.embedding_dropout, generator=self.dropout_generator)
        return embedded * kept / (1 - self.config.embedding_dropout)

    def hidden_states(self, input_ids: torch.Tensor, query_positions: torch.Tensor | None = None) -> torch.Tensor:
        """What the head reads: (batch, seq_len or queries, hidden_size)."""
        residual = self._dropout(self.embed_tokens(input_ids))
        layers = [cast(MQARLayer, layer) for layer in self.layers]
        first = layers[0].mixer_norm
        hidden_states = fused(F.layer_norm, residual)(residual, first.weight.shape, first.weight, first.bias, first.eps)
        next_norms = [layer.mixer_norm for layer in layers[1:]] + [self.norm]
        for layer, next_norm in zip(layers, next_norms, strict=True):
            branch = layer.mixer(hidden_states)
            if next_norm is self.norm and query_positions is not None:
                # nothing after the last mixer looks at other positions
                index = query_positions.unsqueeze(-1).expand(-1, -1, residual.shape[-1])
                residual, branch = residual.gather(1, index), branch.gather(1, index)
            norms = (*layer.identity_norm.parameters(), *next_norm.parameters(), next_norm.eps)
            residual, hidden_states = fused(add_norms, residual)(residual, branch, *norms)
        return hidden_states

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> MQAROutput | tuple:
        """Logits of every position, or of the queries alone.

        Args:
            input_ids: (batch, seq_len).
            labels: like the logits but for the last axis: the token that the model shall name *at* that position; unlike other
                causal models' labels they are not shifted. -100 where nothing is asked.
            query_positions: (batch, queries): logits are computed there alone, which saves most of the head's work.
        """
        logits = self.lm_head(self.hidden_states(input_ids, query_positions))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, labels).sum() / labels.ne(-100).sum()
        output = MQAROutput(loss=loss, logits=logits)
        return output if return_dict is None or return_dict else output.to_tuple()


AutoConfig.register("mqar", MQARConfig, exist_ok=True)
AutoModelForCausalLM.register(MQARConfig, MQARForCausalLM, exist_ok=True)

__all__ = ["MQARConfig", "MQARForCausalLM", "MQAROutput", "MQARPreTrainedModel"]
