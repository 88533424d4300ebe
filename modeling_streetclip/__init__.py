"""StreetCLIP: configuration and model; beside them image preprocessing, captions and hierarchical zero-shot search.

What is needed to load a model is imported here. The rest is imported from its own module: `image_decoding`,
`image_processing_gpu`, `captions`, `label_embeddings`, `zero_shot`, `candidate_ceiling`.
"""

from .configuration_streetclip import StreetCLIPConfig
from .modeling_streetclip import StreetCLIPImageEmbeddings, StreetCLIPModel
from .registration import register_streetclip

__all__ = ["StreetCLIPConfig", "StreetCLIPImageEmbeddings", "StreetCLIPModel", "register_streetclip"]
