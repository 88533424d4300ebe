"""A model that answers to images, as auditors see it: a geolocator, a CLIP with labels, or a classifier.

Images are RGB, float, between 0 and 1, of the size that the model looks at; the model's normalisation happens behind the gate.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from .access import Capability
from .held_model import HeldModel, needs_of_forward
from .model_server import Answer, Call, Tensors, verb

# float images that went through other types
TOLERANCE = 1e-4
LEVELS_OF_A_FILE = 255


class ImageModel(HeldModel):
    """What image models share; `features` and `log_probabilities` are a subclass's."""

    kind = "image"

    def __init__(self, module: nn.Module, image_processor: Any, identity: dict[str, Any]) -> None:
        super().__init__(module, identity)
        self.processor = image_processor
        self.size = _model_size(image_processor)
        mean, deviation = image_processor.image_mean, image_processor.image_std
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self._deviation = torch.tensor(deviation, device=self.device).view(1, 3, 1, 1)

    def info(self) -> dict[str, Any]:
        return {"kind": self.kind, "model_type": getattr(self.module, "config").model_type, "image_size": list(self.size)}  # noqa: B009

    @abstractmethod
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, width] of normalised images."""

    @abstractmethod
    def log_probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """[images, candidates]."""

    @abstractmethod
    def best(self, images: torch.Tensor, k: int) -> list[list[dict[str, Any]]]:
        """The `k` best answers to each image, best first, each with a score."""

    @abstractmethod
    def candidate_facts(self) -> Answer:
        """What the columns of the logits stand for."""

    @verb(Capability.QUERY)
    def prepare(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Pictures uint8 [height, width, 3] of any sizes -> images [pictures, 3, height, width] as the model would see them."""
        pictures = [Image.fromarray(tensors[name].numpy()) for name in sorted(tensors)]
        pixels = self.processor(pictures, do_normalize=False, return_tensors="pt")["pixel_values"]
        return None, {"images": pixels.float().clamp(0, 1)}

    @verb(Capability.QUERY)
    def answer(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """The best answer to each image, without a score. Images are rounded to the 8 bits of a file, as users' images are."""
        images = self._as_from_file(call, tensors)
        told = ("score", "error_radius_km")
        return [{key: value for key, value in found[0].items() if key not in told} for found in self.best(images, 1)], {}

    @verb(Capability.TOPK)
    def ranked(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """The `k` best answers to each image with their scores; images are rounded as for `answer`."""
        return self.best(self._as_from_file(call, tensors), int(arguments["k"])), {}

    @verb(Capability.TOPK)
    def candidates(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """What the columns of the logits stand for: labels, or the tensor coordinates [candidates, 2] (degrees)."""
        return self.candidate_facts()

    @verb(needs_of_forward())
    def forward(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """See `HeldModel.forward`. The input is images; logits are log probabilities of the candidates."""
        return super().forward(call, arguments, tensors)

    def read_inputs(self, tensors: Tensors) -> Tensors:
        images = tensors.get("images")
        if images is None or images.ndim != 4 or images.shape[1:] != (3, *self.size) or not len(images):
            shape = None if images is None else list(images.shape)
            raise ValueError(f"images must be [images, 3, {self.size[0]}, {self.size[1]}], not {shape}; prepare() makes them")
        if not images.is_floating_point() or not -TOLERANCE <= float(images.min()) <= float(images.max()) <= 1 + TOLERANCE:
            raise ValueError("images must be floats between 0 and 1: RGB before the model's normalisation")
        return {"images": images.to(self.device)}

    def compute(self, inputs: Tensors, read: Sequence[str], last: int | None) -> Tensors:
        pixels = (inputs["images"] - self._mean) / self._deviation
        features = self.features(pixels.to(getattr(self.module, "dtype")))  # noqa: B009
        return {"logits": self.log_probabilities(features), "embeddings": features}

    def example_loss(self, arguments: dict[str, Any], tensors: Tensors, chosen: Sequence[int]) -> torch.Tensor:
        inputs = self.read_inputs({"images": tensors["images"][list(chosen)]})
        logits = self.compute(inputs, (), None)["logits"]
        return cross_entropy(logits.float(), tensors["targets"][list(chosen)].to(logits.device))

    def _as_from_file(self, call: Call, tensors: Tensors) -> torch.Tensor:
        images = self.read_inputs(tensors)["images"]
        call.spend(forward=len(images))
        return (images.clamp(0, 1) * LEVELS_OF_A_FILE).round() / LEVELS_OF_A_FILE


class LabelledImages(ImageModel):
    """Answers are labels: a classifier's, or texts that a CLIP compares images with."""

    def __init__(
        self,
        module: nn.Module,
        image_processor: Any,
        identity: dict[str, Any],
        labels: Sequence[str],
        functions: tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        super().__init__(module, image_processor, identity)
        self.labels = list(labels)
        self._features, self._log_probabilities = functions

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._features(pixel_values)

    def log_probabilities(self, features: torch.Tensor) -> torch.Tensor:
        return self._log_probabilities(features)

    def best(self, images: torch.Tensor, k: int) -> list[list[dict[str, Any]]]:
        with torch.no_grad():
            logs = self.compute({"images": images}, (), None)["logits"].float().topk(min(k, len(self.labels)), dim=1)
        return [
            [{"label": self.labels[column], "score": score} for score, column in zip(*row, strict=True)]
            for row in zip(logs.values.exp().tolist(), logs.indices.tolist(), strict=True)
        ]

    def candidate_facts(self) -> Answer:
        return {"labels": self.labels}, {}


class GeolocatedImages(ImageModel):
    """Answers are places, of a `pipeline("image-geolocalization")`."""

    def __init__(self, pipe: Any, identity: dict[str, Any]) -> None:
        super().__init__(pipe.model, pipe.image_processor, identity)
        self.pipe = pipe

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.pipe.locator.embed(pixel_values)

    def log_probabilities(self, features: torch.Tensor) -> torch.Tensor:
        return self.pipe.locator.log_probabilities(features)

    def best(self, images: torch.Tensor, k: int) -> list[list[dict[str, Any]]]:
        levels = (images * LEVELS_OF_A_FILE).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return self.pipe([Image.fromarray(picture) for picture in levels], top_k=k, batch_size=len(levels))

    def candidate_facts(self) -> Answer:
        codes, places = self._candidate_places
        return {"country_codes": codes}, {"coordinates": places}

    @functools.cached_property
    def _candidate_places(self) -> tuple[list[str], torch.Tensor]:
        from geobased.geography.gazetteer import Gazetteer

        places = self.pipe.candidate_places()
        cities, _ = Gazetteer().nearest(*places.T)
        return [city.country_code for city in cities], torch.tensor(places)


def labels_of_clip(model: Any, tokenizer: Any, labels: Sequence[str], template: str) -> tuple[Any, Any]:
    """Functions from pixels to features and from features to log probabilities, of a CLIP that compares images with labels."""
    if not labels:
        raise ValueError("a CLIP answers with labels: give labels=, such as names of countries")
    texts = tokenizer([template.format(label=label) for label in labels], padding=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        embedded = normalize(_tensor(model.get_text_features(**texts)), dim=-1)

    def features(pixel_values: torch.Tensor) -> torch.Tensor:
        return _tensor(model.get_image_features(pixel_values=pixel_values))

    def log_probabilities(found: torch.Tensor) -> torch.Tensor:
        return (model.logit_scale.exp() * normalize(found, dim=-1) @ embedded.T).log_softmax(-1)

    return features, log_probabilities


def labels_of_classifier(model: Any) -> tuple[Any, Any]:
    """The same for a model whose output are logits; its features are the logits themselves."""

    def features(pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=pixel_values).logits

    return features, lambda found: found.log_softmax(-1)


def _tensor(output: Any) -> torch.Tensor:
    """transformers 4 gave the features themselves."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _model_size(processor: Any) -> tuple[int, int]:
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or processor.size
    if size.get("height") is None or size.get("width") is None:
        raise ValueError(f"the image processor gives images of no fixed size ({dict(size)}), which audits need")
    return int(size["height"]), int(size["width"])


__all__ = ["GeolocatedImages", "ImageModel", "LabelledImages", "labels_of_classifier", "labels_of_clip"]
