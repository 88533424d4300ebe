"""Pipelines that transformers does not have; importing geobased registers them for `transformers.pipeline`."""

from .context_question_answering import ContextQuestionAnsweringPipeline
from .image_geolocalization import ImageGeolocalizationPipeline

__all__ = ["ContextQuestionAnsweringPipeline", "ImageGeolocalizationPipeline"]
