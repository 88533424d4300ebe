"""An image tower as CUDA graphs: many threads decode images, and each of hundreds of launches from Python would wait for them."""

import contextlib
import warnings
from collections.abc import Callable, Sequence

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

Embed = Callable[[torch.Tensor], torch.Tensor]


class FeatureGraphs:
    """`embed` for one shape of pixel_values, launched at once; other shapes, and streams not named, call it as it is.

    Args:
        embed: pixel_values -> features; its weights stay where they are.
        example: pixel_values of the shape, dtype and device that graphs are for.
        streams: those that calls will come from. Each has its own graph and buffers, so that they do not wait for each other.

    What cannot be captured (weights that hooks move about, say) is called as it is, with one warning.
    """

    def __init__(self, embed: Embed, example: torch.Tensor, streams: Sequence[torch.cuda.Stream]) -> None:
        self._embed = embed
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        try:
            with torch.no_grad():
                # whatever is compiled or allocated once must not be part of a graph
                embed(example)
                self._graphs = {stream.cuda_stream: self._captured(example, stream) for stream in streams}
        except Exception as error:
            torch.cuda.synchronize(example.device)
            _end_failed_capture()
            logger.warning_once(f"the image tower runs without a CUDA graph, more slowly: {type(error).__name__}: {error}")

    def _captured(
        self, example: torch.Tensor, stream: torch.cuda.Stream
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        inputs = example.clone()
        torch.cuda.synchronize(example.device)
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            features = self._embed(inputs)
        return graph, inputs, features

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found = self._graphs.get(torch.cuda.current_stream(pixel_values.device).cuda_stream)
        if found is None or found[1].shape != pixel_values.shape or found[1].dtype != pixel_values.dtype:
            return self._embed(pixel_values)
        graph, inputs, features = found
        inputs.copy_(pixel_values)
        graph.replay()
        return features.clone()


def _end_failed_capture() -> None:
    """torch's random generator goes on as if a capture that failed still ran; one that succeeds ends it."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        pass


__all__ = ["FeatureGraphs"]
