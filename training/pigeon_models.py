"""A PIGEON model to train, from a PIGEON or a CLIP checkpoint."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from geobased.modeling_pigeon import PigeonForImageGeolocalization
from geobased.modeling_streetclip import StreetCLIPModel


def load_pigeon(model: str, **config: Any) -> PigeonForImageGeolocalization:
    """The model of a checkpoint in float32: PIGEON's own as it is, or new heads on the tower of a CLIP or StreetCLIP.

    Args:
        model: a folder or Hub id.
        config: of `PigeonConfig`, for new heads. Of a PIGEON checkpoint only `embedding` is looked at.

    Raises:
        ValueError: a checkpoint of another kind, or a PIGEON with another embedding.
    """
    kind = PreTrainedConfig.get_config_dict(model)[0].get("model_type")
    if kind == "pigeon":
        loaded = PigeonForImageGeolocalization.from_pretrained(model, dtype=torch.float32)
        if "embedding" in config and config["embedding"] != loaded.config.embedding:
            raise ValueError(f"{model} reads the embedding {loaded.config.embedding!r}, not {config['embedding']!r}")
        return loaded
    if kind == "clip_vision_model":
        return PigeonForImageGeolocalization.from_clip(model, **config).float()
    # reads both model types, and says so of others
    return PigeonForImageGeolocalization.from_clip(StreetCLIPModel.from_pretrained(model, dtype=torch.float32), **config)


__all__ = ["load_pigeon"]
