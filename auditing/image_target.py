"""What auditors may do with a model that answers to images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .access import Capability
from .held_target import READING, Forward, HeldTarget, Intervention


class ImageTarget(HeldTarget):
    """A geolocator, a CLIP with labels, an image classifier, or a server of one.

    Images are float tensors [images, 3, height, width], RGB between 0 and 1, of `info["image_size"]`: what the model looks at,
    before its normalisation. `prepare` makes them. Answers are dictionaries: places (latitude, longitude in degrees, country_code
    and so on) or labels.

    Costs in forward-equivalents: an image that is looked at 1, a backward 2 per image, a step of fine-tuning 3 per image.
    """

    __slots__ = ()
    needs = {
        **HeldTarget.needs,
        "prepare": Capability.QUERY,
        "answer": Capability.QUERY,
        "ranked": Capability.TOPK,
        "candidates": Capability.TOPK,
        "forward": READING,
    }

    def prepare(self, pictures: Sequence[Any]) -> torch.Tensor:
        """Images [pictures, 3, height, width] from paths or PIL images. Pixels alone go along, no EXIF. QUERY, costs nothing."""
        tensors = {f"{number:06d}": torch.from_numpy(_pixels(picture)) for number, picture in enumerate(pictures)}
        return self._request("prepare", {}, tensors)[1]["images"]

    def answer(self, images: torch.Tensor) -> list[dict[str, Any]]:
        """The best answer to each image, without a score; images are rounded to 8 bits first, as users' files are. QUERY."""
        return self._request("answer", {}, {"images": images})[0]

    def ranked(self, images: torch.Tensor, k: int = 5) -> list[list[dict[str, Any]]]:
        """The `k` best answers to each image, best first, with scores; images are rounded to 8 bits first. TOPK."""
        return self._request("ranked", {"k": k}, {"images": images})[0]

    def candidates(self) -> dict[str, Any]:
        """What the columns of the logits stand for: {"labels"}, or {"coordinates" [candidates, 2], "country_codes"}. TOPK."""
        facts, tensors = self._request("candidates", {})
        return {**facts, **tensors}

    def forward(
        self,
        images: torch.Tensor,
        *,
        read: Sequence[str] = ("logits",),
        interventions: Sequence[Intervention] = (),
        parameters: Sequence[str] = (),
    ) -> Forward:
        """Values of the model for images, which are not rounded and may require gradients (INPUT_GRAD).

        Args:
            read: "logits" [images, candidates], log probabilities (LOGITS); "embeddings" [images, width] (EMBED_READ); names of
                inner modules (ACT_READ).
            interventions: changes of inner modules (ACT_WRITE), whose values may require gradients (INPUT_GRAD).
            parameters: patterns of names whose gradients `parameter_gradients` shall give (PARAM_GRAD).
        """
        return self._forward({"images": images}, read, interventions, parameters)

    def fine_tune(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        *,
        steps: int,
        learning_rate: float = 1e-4,
        batch_size: int = 8,
        parameters: Sequence[str] = (),
        seed: int = 0,
    ) -> list[float]:
        """Trains on images and numbers of candidates [images] until `restore` or the end of the scope; losses. FINETUNE."""
        arguments = {
            "steps": steps,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "parameters": list(parameters),
            "seed": seed,
        }
        return self._fine_tune(len(images), arguments, {"images": images, "targets": targets})


def _pixels(picture: Any) -> np.ndarray:
    """uint8 [height, width, 3], upright."""
    if isinstance(picture, Image.Image):
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    with Image.open(picture) as opened:
        return np.array(ImageOps.exif_transpose(opened).convert("RGB"))


__all__ = ["ImageTarget"]
