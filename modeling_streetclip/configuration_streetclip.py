# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Configuration of StreetCLIP: CLIP's own, under a model type of its own."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig


@strict
class StreetCLIPConfig(CLIPConfig):
    r"""
    Configuration of a [`StreetCLIPModel`] (Haas et al. 2023, "Learning generalized zero-shot learners for open-domain image
    geolocalization"). It has the fields of [`CLIPConfig`], and reads a CLIP checkpoint's `config.json` as it is.

    `from_pretrained` raises `ValueError` for a folder of any other model type.

    Example:

    ```python
    >>> from geobased.modeling_streetclip import StreetCLIPConfig, StreetCLIPModel
    >>> config = StreetCLIPConfig(vision_config={"image_size": 336, "patch_size": 14})
    >>> model = StreetCLIPModel(config)
    ```
    """

    model_type = "streetclip"

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = config.get("model_type", "clip")
        if found not in ("clip", cls.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found!r}; StreetCLIP reads 'clip' and 'streetclip'"
                " (load other models with AutoModel)"
            )
        return {**config, "model_type": cls.model_type}, kwargs


__all__ = ["StreetCLIPConfig"]
