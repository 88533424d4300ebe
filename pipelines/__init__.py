"""Pipelines that transformers does not have; importing geobased registers them for `transformers.pipeline`."""

from .context_question_answering import ContextQuestionAnsweringPipeline

__all__ = ["ContextQuestionAnsweringPipeline"]
