# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Configuration of BASED language models."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

MIXERS = ("conv", "linear_attention", "sliding_attention")
MAX_FEATURE_DIM = 64


@strict
class BasedConfig(PreTrainedConfig):
    r"""
    Configuration of a [`BasedModel`] (Arora et al. 2024, "Simple linear attention language models balance the
    recall-throughput tradeoff"). The defaults give the published 360M model.

    Args:
        vocab_size (`int`, defaults to 50264):
            Rows of the embedding and of the head.
        unpadded_vocab_size (`int`, *optional*):
            Number of ids the tokenizer knows. Ids from here to `vocab_size` only pad the matrices to a round size; `generate`
            never picks them. `None`: no id is padding.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (`int`):
            As in Llama.
        head_dim (`int`, *optional*):
            Width of a head's values (and of its queries and keys in sliding attention); `hidden_size // num_attention_heads`
            if not given.
        feature_dim (`int`, defaults to 16):
            Width of a head's queries and keys in linear attention. A sequence's state holds
            `(feature_dim + 1) * (feature_dim + 2) / 2 * (head_dim + 1)` numbers per head and layer.
        mixers (`list[str]`, *optional*):
            What each layer computes: `"conv"` (gated short convolution), `"linear_attention"` (Taylor linear attention) or
            `"sliding_attention"`. By default every fifth layer, from the second on, is linear attention, followed by a sliding
            one; all others are convolutions.
        sliding_window (`int`, defaults to 129):
            Number of keys a query of a sliding layer sees, itself included.
        conv_kernel (`int`, defaults to 3):
            Taps of the short convolution.
        conv_dim (`int`, *optional*):
            Channels of the short convolution; `2 * hidden_size` if not given.
        conv_proj_bias (`bool`, defaults to `True`):
            Whether the convolution layer's two projections have a bias.
        hidden_act (`str`, defaults to `"silu"`):
            Activation of the MLP's gate.
        rope_parameters (`dict`, *optional*):
            Rotary embedding of the sliding layers (linear attention has no positions); base 10000 if not given.
        max_position_embeddings (`int`, defaults to 2048):
            Length the model was trained on. Nothing is truncated at this length.
        rms_norm_eps (`float`, defaults to 1e-5), initializer_range (`float`, defaults to 0.02):
            As in Llama. Projections that write to the residual start smaller, by `1 / sqrt(2 * num_hidden_layers)`.
        residual_in_fp32 (`bool`, defaults to `True`):
            Whether the residual stream is kept in float32 in half-precision models.
        attention_dropout (`float`, defaults to 0.0):
            Dropout of the sliding layers' attention weights.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the head shares the embedding's weight.

    `layer_types` is derived from `mixers` and says what a layer's cache holds (`"linear_attention"`, a state, or
    `"sliding_attention"`, a window of keys), as transformers' caches expect.

    Raises `ValueError` for values that cannot make a model; the message names the value.

    Example:

    ```python
    >>> from geobased import BasedConfig, BasedForCausalLM
    >>> config = BasedConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
    >>> config.mixers
    ['conv', 'linear_attention', 'sliding_attention']
    >>> model = BasedForCausalLM(config)
    ```
    """

    model_type = "based"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50264
    unpadded_vocab_size: int | None = None
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    head_dim: int | None = None
    feature_dim: int = 16
    mixers: list[str] | tuple[str, ...] | None = None
    layer_types: list[str] | None = None
    sliding_window: int = 129
    conv_kernel: int = 3
    conv_dim: int | None = None
    conv_proj_bias: bool = True
    hidden_act: str = "silu"
    rope_parameters: RopeParameters | dict | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    residual_in_fp32: bool = True
    attention_dropout: int | float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if "alt_mixer" in kwargs or "alt_mixer_layers" in kwargs:
            raise ValueError(
                "this is a configuration in the official BASED format (it has `alt_mixer`): convert the checkpoint first with"
                " `geobased convert SRC DST`"
            )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}:"
                    " change one of them or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.conv_dim is None:
            self.conv_dim = 2 * self.hidden_size
        if self.mixers is None:
            self.mixers = self.default_mixers(self.num_hidden_layers)
        self.mixers = list(self.mixers)
        self._check_values()
        self.layer_types = ["sliding_attention" if m == "sliding_attention" else "linear_attention" for m in self.mixers]
        super().__post_init__(**kwargs)

    @staticmethod
    def default_mixers(num_hidden_layers: int) -> list[str]:
        """Every fifth layer, from the second on, is linear attention, followed by sliding attention; the rest are conv."""
        pattern = ("conv", "linear_attention", "sliding_attention", "conv", "conv")
        mixers = [pattern[i % 5] for i in range(num_hidden_layers)]
        if num_hidden_layers > 5 and mixers[-1] == "linear_attention":
            mixers[-1] = "conv"  # as published: a linear attention layer is never the last
        return mixers

    def _check_values(self) -> None:
        unknown = [m for m in self.mixers if m not in MIXERS]
        if unknown:
            raise ValueError(f"mixers has unknown layer type {unknown[0]!r}; choose from {', '.join(MIXERS)}")
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"mixers names {len(self.mixers)} layers but num_hidden_layers={self.num_hidden_layers}")
        if not 1 <= self.feature_dim <= MAX_FEATURE_DIM:
            raise ValueError(f"feature_dim={self.feature_dim} is out of range: choose 1 to {MAX_FEATURE_DIM} (published: 16)")
        if self.head_dim < 1 or (self.head_dim % 2 and "sliding_attention" in self.mixers):
            raise ValueError(f"head_dim={self.head_dim} must be even and positive: rotary embedding turns pairs")
        for name in ("sliding_window", "conv_kernel", "conv_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.unpadded_vocab_size is not None and not 1 <= self.unpadded_vocab_size <= self.vocab_size:
            raise ValueError(
                f"unpadded_vocab_size={self.unpadded_vocab_size} must lie between 1 and vocab_size={self.vocab_size}"
            )

    @classmethod
    def based_360m(cls, **kwargs) -> "BasedConfig":
        """The published 360M model: 362,620,928 parameters."""
        defaults = {"unpadded_vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256}
        return cls(**(defaults | kwargs))

    @classmethod
    def based_1b(cls, **kwargs) -> "BasedConfig":
        """The published 1.3B model: 1,349,453,056 parameters."""
        linear, sliding = (1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34)
        defaults = {
            "hidden_size": 1792,
            "intermediate_size": 3584,
            "num_hidden_layers": 36,
            "mixers": ["linear_attention" if i in linear else "sliding_attention" if i in sliding else "conv" for i in range(36)],
        }
        return cls.based_360m(**(defaults | kwargs))


__all__ = ["BasedConfig"]
