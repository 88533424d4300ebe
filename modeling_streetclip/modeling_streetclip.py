# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""StreetCLIP (Haas et al. 2023): a CLIP whose captions were places.

Module names, weights and outputs are those of transformers' `CLIPModel`, so any CLIP checkpoint loads. What is added are names
for the image embeddings that geolocalization models are built on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPModel
from transformers.utils import ModelOutput

from .configuration_streetclip import StreetCLIPConfig

AUTO_MAP = {
    "AutoConfig": "configuration_streetclip.StreetCLIPConfig",
    "AutoModel": "modeling_streetclip.StreetCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_streetclip.StreetCLIPModel",
}


@dataclass
class StreetCLIPImageEmbeddings(ModelOutput):
    """The three vectors of an image that go by the name of "the CLIP embedding". None of them is normalised.

    Args:
        projected (`torch.FloatTensor` of shape `(batch_size, projection_dim)`):
            Class token after the last layer norm and the projection: what is compared with texts, and what
            `CLIPModel.get_image_features` calls `pooler_output`. StreetCLIP's zero-shot classification uses it.
        cls (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
            Class token of the last layer, before the layer norm. PLONK was trained on it.
        token_mean (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
            Mean over all tokens of the last layer, the class token among them, before the layer norm. PIGEON's heads take it.
    """

    projected: torch.FloatTensor | None = None
    cls: torch.FloatTensor | None = None
    token_mean: torch.FloatTensor | None = None


class StreetCLIPModel(CLIPModel):
    """CLIP for places. Loads `geolocal/StreetCLIP` or any other CLIP checkpoint, and gives what `CLIPModel` gives.

    `from_pretrained(..., attn_implementation="geobased")` runs both towers on this package's attention kernels.

    Example:

    ```python
    >>> import torch
    >>> from geobased.modeling_streetclip import StreetCLIPConfig, StreetCLIPModel
    >>> size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = StreetCLIPConfig(text_config=size, vision_config={**size, "image_size": 28, "patch_size": 14}, projection_dim=16)
    >>> embeddings = StreetCLIPModel(config).get_image_embeddings(torch.randn(1, 3, 28, 28))
    >>> {name: tuple(vector.shape) for name, vector in embeddings.items()}
    {'projected': (1, 16), 'cls': (1, 32), 'token_mean': (1, 32)}
    ```
    """

    config: StreetCLIPConfig
    config_class = StreetCLIPConfig

    def get_image_embeddings(self, pixel_values: torch.Tensor, **kwargs: Any) -> StreetCLIPImageEmbeddings:
        """pixel_values [batch, 3, height, width] -> the image's `projected`, `cls` and `token_mean` embeddings, by one forward.

        Further keywords go to `get_image_features` (`interpolate_pos_encoding=True` for images of another size).
        """
        features = self.get_image_features(pixel_values=pixel_values, **{**kwargs, "return_dict": True})
        tokens = features.last_hidden_state
        return StreetCLIPImageEmbeddings(projected=features.pooler_output, cls=tokens[:, 0], token_mean=tokens.mean(dim=1))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers. The folder also holds the code, for `trust_remote_code=True` where geobased is not installed."""
        if self._auto_class is not None:  # transformers itself enters only the class that is saved
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


__all__ = ["StreetCLIPImageEmbeddings", "StreetCLIPModel"]
