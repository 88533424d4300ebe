"""BASED language models and image geolocalization inside the Hugging Face ecosystem.

Importing this package registers its models (BASED, StreetCLIP, PIGEON, Sumformer) with transformers' auto classes, its pipelines,
and `attn_implementation="geobased"` for all models. Geocells, training, recall and the command line load on first use.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from ._version import __version__
from .attention_interface import register_attention
from .checkpoints import checkpoint_path, shipped_checkpoints
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
from .modeling_sumformer import (
    SumformerCache,
    SumformerConfig,
    SumformerForCausalLM,
    SumformerForSequenceClassification,
    SumformerForTokenClassification,
    SumformerModel,
    SumformerPreTrainedModel,
    register_sumformer,
)
from .pipelines import ContextQuestionAnsweringPipeline, ImageGeolocalizationPipeline

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
register_sumformer()
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
    "SumformerCache",
    "SumformerConfig",
    "SumformerForCausalLM",
    "SumformerForSequenceClassification",
    "SumformerForTokenClassification",
    "SumformerModel",
    "SumformerPreTrainedModel",
    "__version__",
    "checkpoint_path",
    "shipped_checkpoints",
]
