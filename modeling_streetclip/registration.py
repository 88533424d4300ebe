# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""StreetCLIP among transformers' auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, CLIPProcessor

from .configuration_streetclip import StreetCLIPConfig
from .modeling_streetclip import StreetCLIPModel


def register_streetclip() -> None:
    """Makes model type "streetclip" known to `AutoConfig`, `AutoModel`, `AutoModelForZeroShotImageClassification` and
    `AutoProcessor`. May be called more than once."""
    AutoConfig.register(StreetCLIPConfig.model_type, StreetCLIPConfig, exist_ok=True)
    StreetCLIPConfig.register_for_auto_class()
    for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
        auto_class.register(StreetCLIPConfig, StreetCLIPModel, exist_ok=True)
        # saved models carry their code, so that they load without this package too
        StreetCLIPModel.register_for_auto_class(auto_class.__name__)
    AutoProcessor.register(StreetCLIPConfig, CLIPProcessor, exist_ok=True)


__all__ = ["register_streetclip"]
