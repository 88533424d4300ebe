"""PIGEON: configuration, model, prototypes, and an auto class for image geolocalization."""

from .answers_pigeon import PigeonAnswer
from .auto_pigeon import AutoModelForImageGeolocalization, register_pigeon
from .configuration_pigeon import PIGEON_HEADS, PigeonConfig
from .modeling_pigeon import PigeonForImageGeolocalization, PigeonOutput, PigeonPreTrainedModel
from .prototypes_pigeon import PigeonPrototypes, build_prototypes

__all__ = [
    "PIGEON_HEADS",
    "AutoModelForImageGeolocalization",
    "PigeonAnswer",
    "PigeonConfig",
    "PigeonForImageGeolocalization",
    "PigeonOutput",
    "PigeonPreTrainedModel",
    "PigeonPrototypes",
    "build_prototypes",
    "register_pigeon",
]
