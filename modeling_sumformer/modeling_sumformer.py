# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Sumformer (Alberti et al. 2023), and Transformers with softmax, Linformer or Performer attention in its place.

- one model, four mixers: `config.mixer` is all that differs, and `config.with_mixer` makes the numbers of parameters equal
- without positions (the default) the bidirectional model is permutation equivariant, but for Linformer
- `attention_mask` says which elements are in the set; padding changes nothing, on either side
- causal Sumformers and Performers keep a state of constant size (`SumformerCache`)
"""

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_sumformer import SumformerCache
from .configuration_sumformer import NO_CAUSAL_LINFORMER, SumformerConfig
from .mixers_sumformer import MIXER_CLASSES, LinformerMixer, PerformerMixer, residual_output
from .prefix_sums import aggregate, precise_dtype


class SumformerMLP(nn.Module):
    """What follows attention; a Sumformer's psi is its own."""

    def __init__(self, config: SumformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = residual_output(nn.Linear(config.intermediate_size, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act_fn(self.fc1(x)))


def make_norm(config: SumformerConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_norm else nn.Identity()


class SumformerBlock(GradientCheckpointingLayer):
    """x + S(norm(x)), or x + attention(norm(x)) and then x + mlp(norm(x))."""

    def __init__(self, config: SumformerConfig, layer_idx: int):
        super().__init__()
        self.use_residual, self.dropout = config.use_residual, config.hidden_dropout
        self.input_layernorm = make_norm(config)
        self.mixer = MIXER_CLASSES[config.mixer](config, layer_idx)
        self.post_mixer_layernorm, self.mlp = None, None
        if config.mixer != "sumformer":
            self.post_mixer_layernorm, self.mlp = make_norm(config), SumformerMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = self._add(hidden_states, self.mixer(self.input_layernorm(hidden_states), **kwargs))
        if self.mlp is not None:
            hidden_states = self._add(hidden_states, self.mlp(self.post_mixer_layernorm(hidden_states)))
        return hidden_states

    def _add(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        branch = F.dropout(branch, self.dropout, self.training)
        return hidden_states + branch if self.use_residual else branch


AUTO_MAP = {
    "AutoConfig": "configuration_sumformer.SumformerConfig",
    "AutoModel": "modeling_sumformer.SumformerModel",
    "AutoModelForCausalLM": "modeling_sumformer.SumformerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_sumformer.SumformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_sumformer.SumformerForTokenClassification",
}


class SumformerPreTrainedModel(PreTrainedModel):
    """What the models share: configuration, initialisation and Performer's random features."""

    config: SumformerConfig
    config_class = SumformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SumformerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": SumformerBlock}

    def __init__(self, config: SumformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.main_input_name = "input_ids" if config.input_type == "ids" else "input_features"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # biases are drawn, too: without them the first norm takes away the length of feature vectors, and phi starts odd
            bound = getattr(module, "initial_scale", 1.0) * module.in_features**-0.5
            if getattr(module, "writes_to_residual", False) and self.config.use_residual:
                bound /= math.sqrt(2 * self.config.num_hidden_layers)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, LinformerMixer | PerformerMixer):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers. The folder also holds the code, for `trust_remote_code=True` where geobased is not installed."""
        if self._auto_class is not None:  # transformers itself enters only the class that is saved
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    def performer_mixers(self) -> Iterator[PerformerMixer]:
        return (module for module in self.modules() if isinstance(module, PerformerMixer))

    def redraw_projections(self) -> None:
        """Draws Performer's random features anew, in all layers. Training does so by itself (`performer_redraw_interval`), but
        for models under `torch.compile`, where the training loop has to."""
        for mixer in self.performer_mixers():
            mixer.redraw()


class SumformerModel(SumformerPreTrainedModel):
    """The blocks, without a head.

    Example:

    ```python
    >>> from geobased import SumformerConfig, SumformerModel
    >>> model = SumformerModel(SumformerConfig(vocab_size=100, hidden_size=32, mixer="performer"))
    >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    ```
    """

    def __init__(self, config: SumformerConfig):
        super().__init__(config)
        if config.input_type == "ids":
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        else:
            self.feature_projection = nn.Linear(config.feature_size, config.hidden_size)
        self.layers = nn.ModuleList([SumformerBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self._training_passes = 0
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return getattr(self, "embed_tokens", None)

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.config.input_type != "ids":
            raise ValueError("this model reads feature vectors (input_type='features') and has no embedding to set")
        self.embed_tokens = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: SumformerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """input_ids [batch, n], inputs_embeds [batch, n, hidden_size] or input_features [batch, n, feature_size], one of them, ->
        last_hidden_state [batch, n, hidden_size].

        attention_mask [batch, past + n] is 0 at elements that are not in the set: nothing depends on them, and their own outputs
        mean nothing. n may be 0, and so may be the number of elements that the mask leaves. position_ids [batch, n] are read
        where `position_embedding_type="sinusoidal"`; by default they count the elements that the mask leaves.

        Raises `ValueError` for inputs that contradict each other or the configuration, and for a mask or cache that does not fit.
        """
        hidden_states = self._embed(input_ids, inputs_embeds, input_features)
        batch, seq_len, _ = hidden_states.shape
        if past_key_values is not None:
            self._check_cache(past_key_values, batch)
        elif use_cache and self.config.causal:
            past_key_values = SumformerCache(self.config)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        key_mask = token_mask = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, past_length + seq_len):
                raise ValueError(
                    f"attention_mask of shape {tuple(attention_mask.shape)} must be [batch, cached and new elements] ="
                    f" {(batch, past_length + seq_len)}"
                )
            key_mask = attention_mask != 0
            token_mask = key_mask[:, past_length:]
        if self.config.position_embedding_type == "sinusoidal":
            hidden_states = hidden_states + self._positions(hidden_states, position_ids, key_mask, past_length)
        if self.training and torch.is_grad_enabled() and not is_torchdynamo_compiling():
            self._redraw_in_time()
        masks = {"token_mask": token_mask} | ({} if self.config.mixer == "sumformer" else {"key_mask": key_mask})
        for layer in self.layers:
            hidden_states = layer(hidden_states, past_key_values=past_key_values, **masks)
        if past_key_values is not None:
            past_key_values.count_tokens(seq_len)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, input_features: torch.Tensor | None
    ) -> torch.Tensor:
        if sum(given is not None for given in (input_ids, inputs_embeds, input_features)) != 1:
            raise ValueError("give exactly one of input_ids, inputs_embeds and input_features")
        if inputs_embeds is not None:
            width, given, name = self.config.hidden_size, inputs_embeds, "inputs_embeds"
        elif input_features is not None:
            if self.config.input_type != "features":
                raise ValueError("this model reads ids (input_type='ids'): give input_ids or inputs_embeds, or set feature_size")
            width, given, name = self.config.feature_size, input_features, "input_features"
        else:
            if self.config.input_type != "ids":
                raise ValueError("this model reads feature vectors (input_type='features'): give input_features or inputs_embeds")
            if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"input_ids must be integers [batch, n], not {input_ids.dtype} {tuple(input_ids.shape)}")
            return self.embed_tokens(input_ids)
        if given.dim() != 3 or given.shape[-1] != width:
            raise ValueError(f"{name} of shape {tuple(given.shape)} must be [batch, n, {width}]")
        return given if input_features is None else self.feature_projection(given)

    def _check_cache(self, cache: SumformerCache, batch: int) -> None:
        if not self.config.causal:
            raise ValueError("a cache needs a causal model: set causal=True, or leave past_key_values out")
        if not isinstance(cache, SumformerCache) or len(cache.layers) != self.config.num_hidden_layers:
            raise ValueError(f"{type(cache).__name__} is no cache of this model: make it with SumformerCache(model.config)")
        held = next(iter(cache.tensors()), None)
        if held is not None and held.shape[0] != batch:
            raise ValueError(
                f"the cache holds a batch of {held.shape[0]} sequences but the input has {batch}: pass a cache made for this"
                " batch, or none"
            )

    def _positions(
        self, x: torch.Tensor, position_ids: torch.Tensor | None, key_mask: torch.Tensor | None, past_length: int
    ) -> torch.Tensor:
        """Sinusoidal embeddings [batch or 1, n, hidden_size], as large as the embedding's rows are at the start."""
        if position_ids is None and key_mask is not None:
            position_ids = (key_mask.cumsum(1) - 1).clamp(min=0)[:, past_length:]
        elif position_ids is None:
            position_ids = torch.arange(past_length, past_length + x.shape[1], device=x.device).unsqueeze(0)
        width = x.shape[-1]
        pairs = torch.arange((width + 1) // 2, device=x.device, dtype=precise_dtype(x))
        angles = position_ids.unsqueeze(-1) * 10000.0 ** (-2 * pairs / width)
        scale = self.config.initializer_range if self.config.input_type == "ids" else 1.0
        return scale * torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width].to(x.dtype)

    def _redraw_in_time(self) -> None:
        interval = self.config.performer_redraw_interval
        if self.config.mixer == "performer" and interval:
            if self._training_passes and self._training_passes % interval == 0:
                self.redraw_projections()
            self._training_passes += 1


class SumformerForCausalLM(SumformerPreTrainedModel, GenerationMixin):
    """A causal model with a (tied) language modelling head.

    Raises `ValueError` for a configuration that cannot be causal: `causal=False`, `mixer="linformer"`, feature vectors.

    Example:

    ```python
    >>> from geobased import SumformerConfig, SumformerForCausalLM
    >>> model = SumformerForCausalLM(SumformerConfig(vocab_size=100, hidden_size=32, aggregation="mean"))
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape
    torch.Size([1, 7])
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SumformerConfig):
        if config.mixer == "linformer":
            raise ValueError(NO_CAUSAL_LINFORMER)
        if config.causal is False:
            raise ValueError("a language model is causal, but config.causal=False: set it to True, or leave it out")
        if config.input_type != "ids":
            raise ValueError(f"a language model reads ids, but config.input_type={config.input_type!r}: leave feature_size out")
        if config.causal is None:
            config = copy.deepcopy(config)
            config.causal = True
        super().__init__(config)
        self.model = SumformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: SumformerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As [`SumformerModel`], plus logits [batch, kept, vocab_size] and, with labels [batch, seq_len] (-100 is ignored), the
        loss of the next token.

        `logits_to_keep`: only the last so many positions get logits (0: all), or a tensor of positions.
        """
        if labels is not None and self.training and use_cache is None and past_key_values is None:
            use_cache = False  # nobody goes on from a training step
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs):
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not fit: a causal model keeps a"
                " SumformerCache, which generate makes by itself"
            )
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = SumformerCache(self.config)


class SumformerForSequenceClassification(SumformerPreTrainedModel):
    """A linear head on the pooled elements (`config.pooling`): classifiers of sets and sequences, or regressors (`num_labels=1`).

    An empty set pools to 0, so its logits are the head's bias.
    """

    def __init__(self, config: SumformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SumformerModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: SumformerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Inputs as [`SumformerModel`] -> logits [batch, num_labels] and, with labels [batch] or [batch, num_labels], the loss.

        Which elements are padding is told by attention_mask, or without one by config.pad_token_id.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            input_features=input_features,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if attention_mask is not None:
            real = attention_mask[:, attention_mask.shape[1] - hidden.shape[1] :] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        else:
            real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        logits = self.score(self._pool(hidden, real))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _pool(self, hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """hidden [batch, n, hidden_size], real [batch, n] -> [batch, hidden_size]."""
        pooling = self.config.pooling or ("last" if self.config.causal else "mean")
        if pooling == "last":
            # of no element the last is nowhere, and the sum below empty
            real = real & (real.cumsum(1) == real.sum(1, keepdim=True))
        kept = hidden.to(precise_dtype(hidden)).masked_fill(~real.unsqueeze(-1), 0.0)
        counts = real.sum(1, keepdim=True).to(kept.dtype)
        return aggregate(kept.sum(1), counts, "mean" if pooling == "mean" else "sum").to(hidden.dtype)


class SumformerForTokenClassification(SumformerPreTrainedModel):
    """A linear head on every element: equivariant functions of sets, and tags of tokens.

    With `config.problem_type="regression"` the labels are numbers and the loss is their mean squared error.
    """

    def __init__(self, config: SumformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SumformerModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Inputs as [`SumformerModel`] -> logits [batch, n, num_labels] and, with labels, the loss.

        labels [batch, n] are classes (-100 is ignored), or [batch, n] or [batch, n, num_labels] numbers in a regression. Elements
        that attention_mask leaves out do not count.
        """
        kwargs["use_cache"] = False
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            input_features=input_features,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None and self.config.problem_type == "regression":
            errors = (logits - labels.to(logits.dtype).view(logits.shape)).float().square()
            real = torch.ones_like(errors[..., 0]) if attention_mask is None else (attention_mask != 0).to(errors.dtype)
            loss = (errors.mean(-1) * real).sum() / real.sum().clamp(min=1)
        elif labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, -100)
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def count_parameters(config: SumformerConfig) -> int:
    """Parameters of a [`SumformerModel`], counted without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SumformerModel(config).parameters())


__all__ = [
    "SumformerForCausalLM",
    "SumformerForSequenceClassification",
    "SumformerForTokenClassification",
    "SumformerModel",
    "SumformerPreTrainedModel",
    "count_parameters",
]
