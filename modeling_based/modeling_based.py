# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""BASED language models (Arora et al. 2024).

- three mixers, one per layer: gated short convolution, Taylor linear attention, sliding window attention
- pre-norm blocks with SwiGLU, RMSNorm, a residual stream kept in float32, a tied head, rotary embedding in sliding layers only
- a cache of constant size per sequence (`BasedCache`): a sequence can go on for ever
- left padding is exact: a padded row gives the same logits as the row alone
- with geobased installed the ops run as Triton kernels on a GPU; without it, as the plain PyTorch twins beside this file
"""

import math

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_based import BasedCache, RingSlidingWindowLayer
from .configuration_based import BasedConfig
from .fast_generation import NotServed, fast_sample, plan_generation, release_generation_buffers
from .input_checks import check_attention_mask, check_cache, check_input_ids, packed_boundaries, single_tokens_are_real
from .loss_based import causal_lm_loss
from .mixers_based import (
    MIXER_CLASSES,
    BasedMLP,
    BasedRMSNorm,
    BasedRotaryEmbedding,
    BasedShortConvolution,
    BasedSlidingAttention,
)
from .taylor_linear_attention_reference import packed_feature_count

logger = logging.get_logger(__name__)
# tokens that a prompt is read by at once: memory does not grow with its length, and the GPU is busy all the same
PREFILL_CHUNK, PREFILL_TOKENS = 16384, 65536


class BasedDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = BasedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXER_CLASSES[config.mixers[layer_idx]](config, layer_idx)
        self.post_mixer_layernorm = BasedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = BasedMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, added: torch.Tensor | None = None, in_two_parts: bool = False, **kwargs
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The layer of hidden_states + added; with `in_two_parts` the residual and what is still to be added to it."""
        normed, hidden_states = self.input_layernorm(hidden_states, added, return_sum=True)
        mixed = self.mixer(normed, **kwargs)[0]
        normed, hidden_states = self.post_mixer_layernorm(hidden_states, mixed, return_sum=True)
        output = self.mlp(normed)
        return (hidden_states, output) if in_two_parts else hidden_states + output


AUTO_MAP = {
    "AutoConfig": "configuration_based.BasedConfig",
    "AutoModel": "modeling_based.BasedModel",
    "AutoModelForCausalLM": "modeling_based.BasedForCausalLM",
    "AutoModelForSequenceClassification": "modeling_based.BasedForSequenceClassification",
}


class BasedPreTrainedModel(PreTrainedModel):
    """What BASED models share: configuration, initialisation, attention implementations and the size of the generation state."""

    config: BasedConfig
    config_class = BasedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BasedDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": BasedDecoderLayer, "attentions": BasedSlidingAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # only modules with weights of their own: for models outside its own package transformers calls this for no others
        if isinstance(module, BasedShortConvolution):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, nn.Linear) and getattr(module, "writes_to_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers. The folder also holds the code, for `trust_remote_code=True` where geobased is not installed."""
        if self._auto_class is not None:  # transformers itself enters only the class that is saved
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    def state_size_bytes(self, batch_size: int = 1) -> int:
        """Bytes of the generation state of `batch_size` sequences. It does not depend on how long they are."""
        config, element = self.config, self.dtype.itemsize
        per_mixer = {
            # running sums are float32 in a half-precision model too
            "linear_attention": config.num_attention_heads
            * packed_feature_count(config.feature_dim)
            * (config.head_dim + 1)
            * max(element, 4),
            "sliding_attention": 2 * config.num_attention_heads * config.head_dim * config.sliding_window * element,
            "conv": config.conv_dim * config.conv_kernel * element,
        }
        return batch_size * sum(per_mixer[mixer] for mixer in config.mixers)


class BasedModel(BasedPreTrainedModel):
    """The decoder without a head.

    Example:

    ```python
    >>> from geobased import BasedConfig, BasedModel
    >>> model = BasedModel(BasedConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128))
    >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 64])
    ```
    """

    def __init__(self, config: BasedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([BasedDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = BasedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = BasedRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """input_ids [batch, seq_len] (or inputs_embeds [batch, seq_len, hidden_size]) -> last_hidden_state.

        attention_mask [batch, past + seq_len] is 0 at padding, on either side. `cu_seq_lens_q` [n + 1] (as transformers'
        `DataCollatorWithFlattening` gives it) packs n sequences into a batch of one; they do not see each other. Packing that
        is only told by `position_ids` starting over at 0 is recognised too.

        Raises `ValueError` for an empty prompt, ids that are no ids, and a mask or cache that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            check_input_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        batch, seq_len, _ = inputs_embeds.shape
        if seq_len == 0:
            raise ValueError("the prompt is empty: give at least one token (the tokenizer's bos token, say)")

        cu_seqlens = cu_seq_lens_q
        if cu_seqlens is None and position_ids is not None and past_key_values is None and attention_mask is None:
            cu_seqlens = packed_boundaries(position_ids, batch, seq_len)
        if cu_seqlens is not None and past_key_values is not None:
            raise ValueError("packed sequences (cu_seq_lens_q) cannot be used with a cache: leave past_key_values out")
        # of packed sequences there is nothing to go on with, so none is made for them although use_cache defaults to True
        if use_cache and past_key_values is None and cu_seqlens is None:
            past_key_values = BasedCache(self.config)
        past_length = 0
        if past_key_values is not None:
            check_cache(past_key_values, batch, self.config.num_hidden_layers)
            past_length = past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seq_len, device=inputs_embeds.device).unsqueeze(0) + past_length  # type: ignore[assignment]

        masks, windowed = self._masks(
            inputs_embeds, attention_mask, position_ids, past_key_values, past_length, cu_seqlens is not None
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        if self.config.residual_in_fp32 and hidden_states.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.float()
        # each layer's sum is taken by the next one's norm, in one pass, unless a hook (or a layer that somebody put in a
        # layer's place) wants to see whole hidden states
        in_two_parts = all(isinstance(layer, BasedDecoderLayer) for layer in self.layers) and not any(
            module._forward_hooks or module._forward_pre_hooks for module in (*self.layers, self.norm)
        )
        added = None
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            output = layer(
                hidden_states,
                added,
                in_two_parts,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                cu_seqlens=cu_seqlens,
                windowed=windowed,
                **kwargs,
            )
            hidden_states, added = output if in_two_parts else (output, None)
        if isinstance(past_key_values, BasedCache):
            past_key_values.count_tokens(seq_len)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states, added), past_key_values=past_key_values)

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
        past_length: int,
        packed: bool,
    ) -> tuple[dict[str, torch.Tensor | None], bool]:
        """A mask for each layer type, and whether sliding layers run our windowed op (which reads a padding mask)."""
        if isinstance(attention_mask, dict):  # `generate` with a static cache has built transformers' masks already
            return attention_mask, False
        batch, seq_len, _ = inputs_embeds.shape
        if attention_mask is not None:
            check_attention_mask(attention_mask, batch, past_length, seq_len, "linear_attention" in self.config.layer_types)
        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        if padding is not None and not is_torchdynamo_compiling() and not padding.is_cuda and bool(padding.all()):
            padding = None
        new_padding = None if padding is None else padding[:, past_length:]
        if new_padding is not None and seq_len == 1 and single_tokens_are_real(new_padding):
            new_padding = None  # the common case of decoding, for which the ops have a faster form

        window_layer = None
        if past_key_values is not None and any(past_key_values.is_sliding):
            window_layer = past_key_values.layers[past_key_values.is_sliding.index(True)]
        windowed = (
            self.config._attn_implementation == "sdpa"
            and (attention_mask is None or attention_mask.dim() == 2)
            and (window_layer is None or isinstance(window_layer, RingSlidingWindowLayer | DynamicSlidingWindowLayer))
            and not (self.training and self.config.attention_dropout > 0)
        )
        if packed and not windowed:
            raise ValueError(
                'packed sequences need attn_implementation="sdpa" (the default), no 4-D mask and attention_dropout=0'
            )
        if not windowed:
            sliding = None
            if "sliding_attention" in self.config.layer_types:
                sliding = create_sliding_window_causal_mask(
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
        elif padding is None:
            sliding = None
        elif seq_len == 1 and isinstance(window_layer, RingSlidingWindowLayer):
            sliding = padding[:, window_layer.slot_positions(1, padding.device)]
            if new_padding is not None:  # a token that is padding still sees itself: a row without any key would give NaN
                sliding[:, past_length % window_layer.sliding_window] = 1
        else:
            kept = past_length and window_layer is not None and window_layer.get_mask_sizes(seq_len)[0]
            sliding = padding[:, -kept:] if kept else padding
        return {"sliding_attention": sliding, "linear_attention": new_padding}, windowed  # type: ignore[dict-item]


class BasedForCausalLM(BasedPreTrainedModel, GenerationMixin):
    """A BASED language model with its (tied) head.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> import geobased
    >>> path = geobased.checkpoint_path("based-mini")
    >>> model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    >>> output = model.generate(**tokenizer("The weather", return_tensors="pt"), max_new_tokens=20)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]

    # on CUDA `generate` runs whole steps as CUDA graphs where it can (fast_generation.py); False: transformers' loop always.
    # "eager" runs the same steps without graphs on any device, for tests.
    fast_generation: bool | str = True

    def __init__(self, config: BasedConfig):
        super().__init__(config)
        self.model = BasedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As [`BasedModel`], plus logits [batch, kept, vocab_size] and, with labels [batch, seq_len] (-100 is ignored), the loss.

        `logits_to_keep`: only the last so many positions get logits (0: all), or a tensor of positions.
        """
        if labels is not None and self.training and use_cache is None and past_key_values is None:
            use_cache = False  # nobody goes on from a training step: no states, no copies of keys
        if labels is None and isinstance(logits_to_keep, int) and logits_to_keep == 1 and inputs_embeds is None:
            input_ids, position_ids = self._read_ahead(input_ids, attention_mask, position_ids, past_key_values, kwargs)
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
            # transformers' own, as long as nobody chose another one, in a form that takes less memory
            loss_function = causal_lm_loss if self.loss_function is ForCausalLMLoss else self.loss_function
            loss = loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _read_ahead(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        kwargs: dict,
    ) -> tuple[torch.LongTensor | None, torch.LongTensor | None]:
        """Reads all but the last chunk of a long prompt into the cache -> the input_ids and position_ids that are left."""
        if input_ids is None or input_ids.dim() != 2 or torch.is_grad_enabled() or is_torchdynamo_compiling():
            return input_ids, position_ids
        (batch, seq_len), cache = input_ids.shape, past_key_values
        chunk = max(1, min(PREFILL_CHUNK, PREFILL_TOKENS // max(batch, 1)))
        records = ("output_attentions", "output_hidden_states")
        recorded = any(kwargs.get(name) or getattr(self.config, name, False) for name in records)
        plain = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)
        fits = type(cache) is BasedCache and self.config._attn_implementation == "sdpa" and kwargs.get("cu_seq_lens_q") is None
        if seq_len <= chunk or recorded or not plain or not fits:
            return input_ids, position_ids
        assert isinstance(cache, BasedCache)
        check_input_ids(input_ids, self.config.vocab_size)
        past_length = cache.get_seq_length()
        if attention_mask is not None:
            check_attention_mask(attention_mask, batch, past_length, seq_len, True)
        start = 0
        while seq_len - start > chunk:
            end = start + chunk
            self.model(
                input_ids=input_ids[:, start:end],
                attention_mask=None if attention_mask is None else attention_mask[:, : past_length + end],
                position_ids=None if position_ids is None else position_ids[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            start = end
        return input_ids[:, start:], None if position_ids is None else position_ids[:, start:]  # type: ignore[return-value]

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ):
        """Greedy decoding and sampling, as CUDA graphs where they can serve the call (see `fast_generation`)."""
        try:
            plan = plan_generation(
                self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, model_kwargs
            )
            return fast_sample(self, input_ids, generation_config, plan, streamer, model_kwargs)
        except NotServed as reason:
            logger.info(f"transformers' ordinary loop serves this call of generate: {reason}")
        return super()._sample(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def _apply(self, fn, recurse=True):
        release_generation_buffers(self)  # `.to()` and the like move the weights away from where the graphs read them
        return super()._apply(fn, recurse)

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """transformers' `generate`, with a [`BasedCache`] by default and padded vocabulary ids never picked.

        On CUDA greedy decoding and sampling run as CUDA graphs, without any flag; `model.fast_generation = False` switches
        that off. Both ways give the same tokens, up to rounding.
        """
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is not None:
            check_input_ids(prompt, self.config.vocab_size, on_any_device=True)
        return super().generate(inputs, *args, **kwargs)

    def _prepare_generation_config(self, *args, **kwargs):
        generation_config, *rest = super()._prepare_generation_config(*args, **kwargs)
        real = self.config.unpadded_vocab_size
        if real is not None and real < self.config.vocab_size:
            padding = set(range(real, self.config.vocab_size))
            generation_config.suppress_tokens = sorted(padding.union(generation_config.suppress_tokens or []))
        return generation_config, *rest

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs):
        wants_default = generation_config.use_cache is not False and generation_config.cache_implementation in (None, "dynamic")
        if wants_default and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = BasedCache(self.config)
            model_kwargs["past_key_values"].made_by_generate = True
            return
        if isinstance(model_kwargs.get("past_key_values"), BasedCache):  # the caller's, although generate may once have made it
            model_kwargs["past_key_values"].made_by_generate = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in transformers. New ids are real ones: the vocabulary's padding ends where the embedding did."""
        old_num_tokens = self.config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.unpadded_vocab_size is not None and self.config.vocab_size != old_num_tokens:
            real = self.config.vocab_size if new_num_tokens is None else min(new_num_tokens, self.config.vocab_size)
            self.config.unpadded_vocab_size = real
        return embeddings


class BasedForSequenceClassification(BasedPreTrainedModel):
    """A BASED model with a linear head on the last real token: classifiers and reward models (`num_labels=1`)."""

    def __init__(self, config: BasedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BasedModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """logits [batch, num_labels], read at the last token that is not padding (left or right padding alike).

        That token is told by attention_mask, or without one by config.pad_token_id. Raises `ValueError` for a batch of
        several rows without either.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = self._last_token(input_ids, attention_mask, hidden)
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_token(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        batch, seq_len = hidden.shape[:2]
        positions = torch.arange(seq_len, device=hidden.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -seq_len:].to(hidden.device) != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif batch == 1:
            return positions[-1:]
        else:
            raise ValueError(f"cannot tell padding in a batch of {batch}: pass attention_mask, or set model.config.pad_token_id")
        return (positions * real).argmax(-1)


__all__ = [
    "BasedForCausalLM",
    "BasedForSequenceClassification",
    "BasedModel",
    "BasedPreTrainedModel",
]
