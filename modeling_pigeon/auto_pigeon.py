# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""An auto class for image geolocalization, which transformers has none for, and PIGEON's entries in the registries."""

from collections import OrderedDict

from transformers import AutoConfig, AutoModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .configuration_pigeon import PigeonConfig
from .modeling_pigeon import PigeonForImageGeolocalization


class AutoModelForImageGeolocalization(_BaseAutoModelClass):
    """Loads any registered model that tells where an image was taken, as transformers' auto classes do for their tasks.

    Other models join with `AutoModelForImageGeolocalization.register(ConfigClass, ModelClass)`. A folder whose code is not
    installed loads with `trust_remote_code=True`, if its `auto_map` names this class.

    Example:

    ```python
    >>> from geobased.modeling_pigeon import AutoModelForImageGeolocalization
    >>> model = AutoModelForImageGeolocalization.from_pretrained("folder/of/a/pigeon")
    ```
    """

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())  # type: ignore[assignment]


def register_pigeon() -> None:
    """Makes `AutoConfig`, `AutoModel` and [`AutoModelForImageGeolocalization`] know PIGEON; may be called again."""
    AutoConfig.register("pigeon", PigeonConfig, exist_ok=True)
    AutoModel.register(PigeonConfig, PigeonForImageGeolocalization, exist_ok=True)
    AutoModelForImageGeolocalization.register(PigeonConfig, PigeonForImageGeolocalization, exist_ok=True)
    # saved models carry their code, so that they load without this package too
    PigeonConfig.register_for_auto_class()
    PigeonForImageGeolocalization.register_for_auto_class("AutoModel")


__all__ = ["AutoModelForImageGeolocalization", "register_pigeon"]
