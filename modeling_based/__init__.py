"""BASED: configuration, cache and models, and the reader of official checkpoints."""

from .cache_based import BasedCache
from .configuration_based import BasedConfig
from .modeling_based import BasedForCausalLM, BasedForSequenceClassification, BasedModel, BasedPreTrainedModel

__all__ = [
    "BasedCache",
    "BasedConfig",
    "BasedForCausalLM",
    "BasedForSequenceClassification",
    "BasedModel",
    "BasedPreTrainedModel",
]
