"""Sumformer, and softmax, Linformer and Performer attention in its place: configuration, cache and models.

`performer` and `linformer` hold the attention functions, `theory` the constructions of the universality proofs.
"""

from .cache_sumformer import SumformerCache
from .configuration_sumformer import SumformerConfig
from .modeling_sumformer import (
    SumformerForCausalLM,
    SumformerForSequenceClassification,
    SumformerForTokenClassification,
    SumformerModel,
    SumformerPreTrainedModel,
)
from .registration import register_sumformer

__all__ = [
    "SumformerCache",
    "SumformerConfig",
    "SumformerForCausalLM",
    "SumformerForSequenceClassification",
    "SumformerForTokenClassification",
    "SumformerModel",
    "SumformerPreTrainedModel",
    "register_sumformer",
]
