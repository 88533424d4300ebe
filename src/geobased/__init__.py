"""BASED language models and image geolocalization inside the Hugging Face ecosystem.

Importing this package registers its models (BASED, StreetCLIP, PIGEON) with transformers' auto classes, its pipelines, and
`attn_implementation="geobased"` for all models. Geocells, training, recall and the command line load on first use.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from . import checkpoints
from ._version import __version__
from .attention_interface import register_attention
from .modeling_based import (
    BasedCache,
    BasedConfig,
    BasedForCausalLM,
    BasedForSequenceClassification,
    BasedModel,
    BasedPreTrainedModel,
)
from .modeling_based.official_format import explain_official_checkpoints
from .modeling_pigeon import (
    AutoModelForImageGeolocalization,
    PigeonConfig,
    PigeonForImageGeolocalization,
    register_pigeon,
)
from .modeling_streetclip import StreetCLIPConfig, StreetCLIPModel, register_streetclip
from .pipelines import ContextQuestionAnsweringPipeline, ImageGeolocalizationPipeline

_CHECKPOINTS = Path(checkpoints.__file__).parent

AutoConfig.register("based", BasedConfig, exist_ok=True)
BasedConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, BasedModel),
    (AutoModelForCausalLM, BasedForCausalLM),
    (AutoModelForSequenceClassification, BasedForSequenceClassification),
):
    auto_class.register(BasedConfig, model_class, exist_ok=True)
    # saved models carry their code, so that they load without this package too
    model_class.register_for_auto_class(auto_class.__name__)
explain_official_checkpoints()
register_streetclip()
register_pigeon()
register_attention()
PIPELINE_REGISTRY.register_pipeline(
    "context-question-answering",
    pipeline_class=ContextQuestionAnsweringPipeline,
    pt_model=AutoModelForCausalLM,
    type="text",
)
PIPELINE_REGISTRY.register_pipeline(
    "image-geolocalization",
    pipeline_class=ImageGeolocalizationPipeline,
    pt_model=AutoModel,
    type="image",
)


def shipped_checkpoints() -> list[str]:
    """Names of the trained models that ship with this package."""
    return sorted(path.parent.name for path in _CHECKPOINTS.glob("*/config.json"))


def checkpoint_path(name: str = "based-mini") -> str:
    """Folder of a trained model that ships with this package; `from_pretrained` loads it without a network.

    Raises `ValueError` if there is no such model; the message lists those there are.
    """
    names = shipped_checkpoints()
    if name not in names:
        raise ValueError(f"no checkpoint named {name!r} ships with geobased; there are: {', '.join(names) or 'none'}")
    return str(_CHECKPOINTS / name)


__all__ = [
    "AutoModelForImageGeolocalization",
    "BasedCache",
    "BasedConfig",
    "BasedForCausalLM",
    "BasedForSequenceClassification",
    "BasedModel",
    "BasedPreTrainedModel",
    "ContextQuestionAnsweringPipeline",
    "ImageGeolocalizationPipeline",
    "PigeonConfig",
    "PigeonForImageGeolocalization",
    "StreetCLIPConfig",
    "StreetCLIPModel",
    "__version__",
    "checkpoint_path",
    "shipped_checkpoints",
]
