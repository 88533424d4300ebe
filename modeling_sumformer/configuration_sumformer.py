# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Sumformer models and of the attention models they are compared with."""

import copy
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CHOICES = {
    "mixer": ("sumformer", "softmax", "linformer", "performer"),
    "input_type": ("ids", "features"),
    "phi_type": ("mlp", "fourier", "polynomial", "linear"),
    "psi_type": ("mlp", "bilinear"),
    "aggregation": ("sum", "mean", "scaled"),
    "position_embedding_type": ("none", "sinusoidal"),
    "performer_scaling": ("norm", "constant"),
    "pooling": ("mean", "sum", "last"),
}
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "latent_size",
    "phi_hidden_size",
    "phi_degree",
    "phi_variables",
    "chunk_size",
    "linformer_size",
    "max_linformer_len",
    "num_random_features",
)
NO_CAUSAL_LINFORMER = (
    'mixer="linformer" cannot be causal: its projections E and F mix the keys and values of the whole sequence, later tokens'
    " included, before any query reads them, and a mask on the scores does not undo that. Choose"
    ' mixer="sumformer", "softmax" or "performer"'
)


@strict
class SumformerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SumformerModel`] (Alberti et al. 2023, "Sumformer: Universal Approximation for Efficient
    Transformers"), or of a model that differs from it in the mixer alone.

    Args:
        mixer (`str`, defaults to `"sumformer"`):
            What lets the elements of a set (the tokens of a sequence) see each other: `"sumformer"`, `"softmax"` attention,
            `"linformer"` or `"performer"` (FAVOR+).
        input_type (`str`, *optional*):
            `"ids"` (an embedding of `vocab_size` rows) or `"features"` (vectors of `feature_size` numbers, projected linearly);
            `"features"` if `feature_size` is given. Both kinds of model also take `inputs_embeds`.
        vocab_size (`int`, defaults to 32000), feature_size (`int`, *optional*):
            See `input_type`.
        hidden_size (`int`, defaults to 256), num_hidden_layers (`int`, defaults to 2), num_attention_heads (`int`, defaults to
            4): as in BERT; a Sumformer has no heads.
        intermediate_size (`int`, *optional*):
            Width of the hidden layer of psi, or of the MLP that follows attention; `4 * hidden_size` if not given.
        latent_size (`int`, *optional*):
            d', the width of the sum; `hidden_size` if not given. With a polynomial phi it is the number of monomials.
        phi_type (`str`, defaults to `"mlp"`):
            What is summed: `"mlp"`, `"fourier"` (cosines and sines of learned frequencies), `"polynomial"` (all monomials of
            degree 1 to `phi_degree` of `phi_variables` linear functions of the element) or `"linear"` (Deep Sets layers).
        phi_hidden_size (`int`, *optional*):
            Width of the hidden layer of an MLP phi; `hidden_size` if not given.
        phi_degree (`int`, defaults to 2), phi_variables (`int`, *optional*):
            Of a polynomial phi; `phi_variables` is `min(hidden_size, 8)` if not given.
        fourier_scale (`float`, defaults to 1.0):
            Standard deviation of the initial phases for elements whose entries have variance 1.
        psi_type (`str`, defaults to `"mlp"`):
            `"mlp"`: an MLP of the element and the sum. `"bilinear"`: its first layer also reads phi(x) * sum, as linear
            attention does.
        aggregation (`str`, defaults to `"sum"`):
            `"sum"`, `"mean"` or `"scaled"` (the sum divided by the square root of the number of elements).
        causal (`bool`, *optional*):
            Whether an element sees only those before it and itself. `None`: as the model class needs it (language models are
            causal, others are not).
        chunk_size (`int`, defaults to 64):
            Prefix sums are taken chunk by chunk, so that rounding errors grow with the number of chunks, not of tokens.
        position_embedding_type (`str`, defaults to `"none"`):
            `"none"` (the model is permutation equivariant) or `"sinusoidal"`.
        linformer_size (`int`, defaults to 64), max_linformer_len (`int`, defaults to 512), linformer_share_kv (`bool`):
            Linformer's number of projected keys, the longest input, and whether keys and values share one projection.
        num_random_features (`int`, *optional*):
            Performer's m; `int(head_dim * log(head_dim))`, at least 1, if not given.
        performer_redraw_interval (`int`, defaults to 1000):
            Training forward passes after which the random features are drawn anew; 0: never.
        performer_scaling (`str`, defaults to `"norm"`):
            Length of the orthogonal rows: `"norm"` (that of a Gaussian vector each) or `"constant"` (the square root of the
            head's width).
        performer_seed (`int`, defaults to 0):
            Seed of the random features, so that all processes of a training draw the same ones.
        use_norm, use_residual (`bool`, default to `True`):
            Whether a block normalises its input and adds it to its output. One Sumformer block without both is the paper's
            S(x_1, ..., x_n).
        pooling (`str`, *optional*):
            What sequence classification reads: the `"mean"` or `"sum"` over the elements, or the `"last"` one; mean, or last if
            causal, if not given.
        hidden_act (`str`, defaults to `"gelu"`), hidden_dropout (`float`, defaults to 0.0), layer_norm_eps (`float`, defaults to
            1e-5), initializer_range (`float`, defaults to 0.02): as in BERT, but that `initializer_range` is for embeddings
            alone; linear layers start uniform within 1 / sqrt(fan-in), those that write to the residual smaller.

    Raises `ValueError` for values that cannot make a model; the message names the value.

    Example:

    ```python
    >>> from geobased import SumformerConfig, SumformerModel
    >>> model = SumformerModel(SumformerConfig(feature_size=2, hidden_size=32, latent_size=16))
    >>> model(input_features=torch.rand(1, 5, 2)).last_hidden_state.shape
    torch.Size([1, 5, 32])
    ```
    """

    model_type = "sumformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    mixer: str = "sumformer"
    input_type: str | None = None
    vocab_size: int = 32000
    feature_size: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    latent_size: int | None = None
    phi_type: str = "mlp"
    phi_hidden_size: int | None = None
    phi_degree: int = 2
    phi_variables: int | None = None
    fourier_scale: int | float = 1.0
    psi_type: str = "mlp"
    aggregation: str = "sum"
    causal: bool | None = None
    chunk_size: int = 64
    position_embedding_type: str = "none"
    linformer_size: int = 64
    max_linformer_len: int = 512
    linformer_share_kv: bool = False
    num_random_features: int | None = None
    performer_redraw_interval: int = 1000
    performer_scaling: str = "norm"
    performer_seed: int = 0
    use_norm: bool = True
    use_residual: bool = True
    pooling: str | None = None
    hidden_act: str = "gelu"
    hidden_dropout: int | float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.input_type is None:
            self.input_type = "ids" if self.feature_size is None else "features"
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.phi_hidden_size is None:
            self.phi_hidden_size = self.hidden_size
        if self.phi_variables is None:
            self.phi_variables = min(self.hidden_size, 8)
        self._check_values()
        self._set_derived_sizes()
        super().__post_init__(**kwargs)

    def _check_values(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name == "pooling"):
                raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}")
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.input_type == "features" and (self.feature_size is None or self.feature_size < 1):
            raise ValueError(f"feature_size={self.feature_size} must be at least 1 where input_type='features'")
        if self.input_type == "ids" and (self.feature_size is not None or self.vocab_size < 1):
            raise ValueError(
                f"input_type='ids' needs vocab_size={self.vocab_size} of at least 1 and no feature_size={self.feature_size}"
            )
        if self.mixer != "sumformer" and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}")
        if self.mixer == "linformer" and self.causal:
            raise ValueError(NO_CAUSAL_LINFORMER)
        if self.performer_redraw_interval < 0:
            raise ValueError(f"performer_redraw_interval={self.performer_redraw_interval} must be 0 (never) or more")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout={self.hidden_dropout} must be at least 0 and below 1")

    def _set_derived_sizes(self) -> None:
        if self.phi_type == "polynomial":
            monomials = math.comb(self.phi_variables + self.phi_degree, self.phi_degree) - 1
            if self.latent_size not in (None, monomials):
                raise ValueError(
                    f"latent_size={self.latent_size} is not the number of monomials of degree 1 to {self.phi_degree} in"
                    f" {self.phi_variables} variables, {monomials}: leave it out, or change phi_degree or phi_variables"
                )
            self.latent_size = monomials
        elif self.latent_size is None:
            self.latent_size = self.hidden_size
        if self.phi_type == "fourier" and self.latent_size % 2:
            raise ValueError(
                f"latent_size={self.latent_size} must be even where phi_type='fourier': cosines and sines come in pairs"
            )
        if self.num_random_features is None:
            head_dim = max(self.hidden_size // self.num_attention_heads, 1)
            self.num_random_features = max(1, int(head_dim * math.log(head_dim)))

    def with_mixer(self, mixer: str, num_parameters: int | None = None, **changes: Any) -> "SumformerConfig":
        """The configuration of a model that differs in the mixer and has as many parameters, as nearly as possible.

        Everything else stays as it is (or as `changes` has it) but for `intermediate_size`, whose value brings the number of
        parameters of the base model closest to `num_parameters`, by default that of this configuration's model.

        Raises `ValueError` if even the narrowest model has more parameters.

        Example:

        ```python
        >>> config = SumformerConfig(feature_size=2, hidden_size=32, latent_size=16)
        >>> performer = config.with_mixer("performer")
        ```
        """
        from .modeling_sumformer import count_parameters

        target = count_parameters(self) if num_parameters is None else num_parameters
        # latent sizes and the like that this configuration derived are derived anew where what they follow from changes
        derived: dict[str, Any] = {}
        if "phi_type" in changes or "phi_degree" in changes or "phi_variables" in changes:
            derived["latent_size"] = None
        if "num_attention_heads" in changes or "hidden_size" in changes:
            derived["num_random_features"] = None
        sizes = self.to_dict() | derived | changes | {"mixer": mixer}

        def with_width(width: int) -> "SumformerConfig":
            return type(self)(**(copy.deepcopy(sizes) | {"intermediate_size": width}))

        narrow = with_width(1)
        least = count_parameters(narrow)
        if least > target:
            raise ValueError(
                f"a model with mixer={mixer!r} has at least {least} parameters, more than the {target} wanted: reduce"
                " hidden_size, latent_size, phi_hidden_size or max_linformer_len"
            )
        per_column = count_parameters(with_width(2)) - least  # linear in the width
        return with_width(1 + round((target - least) / per_column))


__all__ = ["SumformerConfig"]
