# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Sumformer among transformers' auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_sumformer import SumformerConfig
from .modeling_sumformer import (
    SumformerForCausalLM,
    SumformerForSequenceClassification,
    SumformerForTokenClassification,
    SumformerModel,
)


def register_sumformer() -> None:
    """Makes model type "sumformer" known to `AutoConfig`, `AutoModel` and its forms for causal language models, sequence and
    token classification. May be called more than once."""
    AutoConfig.register(SumformerConfig.model_type, SumformerConfig, exist_ok=True)
    SumformerConfig.register_for_auto_class()
    for auto_class, model_class in (
        (AutoModel, SumformerModel),
        (AutoModelForCausalLM, SumformerForCausalLM),
        (AutoModelForSequenceClassification, SumformerForSequenceClassification),
        (AutoModelForTokenClassification, SumformerForTokenClassification),
    ):
        auto_class.register(SumformerConfig, model_class, exist_ok=True)
        # saved models carry their code, so that they load without this package too
        model_class.register_for_auto_class(auto_class.__name__)


__all__ = ["register_sumformer"]
