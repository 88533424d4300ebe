"""Techniques for images that need nothing but the model's answers: corruptions, signs, crops."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from .access import Capability
from .image_tries import ImageTries, as_levels
from .questions import AuditQuestion, Item
from .technique import Progress, Technique, derived_seed

SEVERITIES = (1, 2, 3, 4, 5)
GREY = (0.299, 0.587, 0.114)


def corrupted(image: torch.Tensor, name: str, severity: int, seed: int = 0) -> torch.Tensor:
    """An image [3, height, width], between 0 and 1, as a worse camera, file or weather would have it.

    Severities 1 to 5 follow the scales of Hendrycks and Dietterich 2019 (ImageNet-C); lengths are shares of the image's edge, as
    models look at images of different sizes.

    Raises:
        ValueError: an unknown corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is unknown; there are: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity={severity} is none of {', '.join(map(str, SEVERITIES))}")
    return CORRUPTIONS[name](image, severity - 1, torch.Generator().manual_seed(seed)).clamp(0, 1)


def _gaussian_noise(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    return image + (0.08, 0.12, 0.18, 0.26, 0.38)[level] * torch.randn(image.shape, generator=generator)


def _shot_noise(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    photons = (60, 25, 12, 5, 3)[level]
    return torch.poisson(image * photons, generator=generator) / photons


def _impulse_noise(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    share, drawn = (0.03, 0.06, 0.09, 0.17, 0.27)[level], torch.rand(image.shape, generator=generator)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, image))


def _blur(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    deviation = (1, 2, 3, 4, 6)[level] / 224 * min(image.shape[1:])
    reach = max(1, round(3 * deviation))
    weights = torch.exp(-((torch.arange(-reach, reach + 1) / deviation) ** 2) / 2)
    weights /= weights.sum()
    padded = F.pad(image[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[:, 0]


def _pixelate(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    height, width = (max(1, round(share * edge)) for edge in image.shape[1:])
    small = F.adaptive_avg_pool2d(image, (height, width))
    return F.interpolate(small[None], size=image.shape[1:], mode="nearest")[0]


def _jpeg(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray(as_levels(image)).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    with Image.open(file) as opened:
        return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1) / 255


def _brightness(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    return image + (0.1, 0.2, 0.3, 0.4, 0.5)[level]


def _darkness(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    return image * (0.75, 0.6, 0.45, 0.3, 0.2)[level]


def _contrast(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    mean = image.mean((1, 2), keepdim=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[level] * (image - mean)


def _desaturation(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    grey = (image * torch.tensor(GREY).view(3, 1, 1)).sum(0, keepdim=True)
    return grey + (0.8, 0.6, 0.4, 0.2, 0.0)[level] * (image - grey)


def _fog(image: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    """Soft noise of several sizes that brightens."""
    height, width = image.shape[1:]
    clouds = torch.zeros(1, 1, height, width)
    for octave in range(1, 5):
        drawn = torch.rand(1, 1, 2**octave, 2**octave, generator=generator)
        clouds += F.interpolate(drawn, size=(height, width), mode="bilinear", align_corners=False) / 2**octave
    share = (0.2, 0.35, 0.5, 0.6, 0.7)[level]
    return (1 - share) * image + share * (0.5 + 0.5 * clouds[0] / clouds.max())


CORRUPTIONS: dict[str, Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "blur": _blur,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
    "brightness": _brightness,
    "darkness": _darkness,
    "contrast": _contrast,
    "desaturation": _desaturation,
    "fog": _fog,
}


@dataclass(frozen=True)
class Corruptions(Technique):
    """Degrades the image as cameras, files and weather do, each way at growing severity.

    The perturbation is the severity, 1 to 5.
    """

    name: ClassVar[str] = "corruptions"
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.QUERY
    perturbation_unit: ClassVar[str] = "severity of 5"
    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    severities: tuple[int, ...] = SEVERITIES

    def __post_init__(self) -> None:
        if unknown := [name for name in self.corruptions if name not in CORRUPTIONS]:
            raise ValueError(f"corruption {unknown[0]!r} is unknown; there are: {', '.join(CORRUPTIONS)}")
        if not self.corruptions or not set(self.severities) <= set(SEVERITIES):
            raise ValueError("corruptions needs corruptions, and severities from 1 to 5")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        with ImageTries(target, question, item, progress) as tries:
            for severity in sorted(self.severities):
                for name in self.corruptions:
                    changed = corrupted(tries.image[0], name, severity, derived_seed(seed, name))[None]
                    made = {"corruption": name, "severity": severity}
                    tries.tried(changed, [severity], f"{name}, severity {severity}", candidates=[made])


def with_sign(picture: Image.Image, text: str, height: float, *, place: tuple[float, float] = (0.5, 0.85)) -> tuple[Any, float]:
    """A picture with a white sign that bears a text, and the share of the picture that it covers.

    Args:
        height: of the letters, as a share of the picture's height; the sign is made smaller where it would not fit.
        place: of the sign's middle, as shares of width and height; the sign is moved to lie within the picture.
    """
    size = max(6.0, height * picture.height)
    while True:
        font = ImageFont.load_default(size=size)
        left, top, right, bottom = font.getbbox(text)
        margin = size / 4
        wide, high = right - left + 2 * margin, bottom - top + 2 * margin
        if (wide <= picture.width and high <= picture.height) or size <= 6:
            break
        size = max(6.0, size * 0.9)
    x = min(max(place[0] * picture.width - wide / 2, 0), max(picture.width - wide, 0))
    y = min(max(place[1] * picture.height - high / 2, 0), max(picture.height - high, 0))
    signed = picture.copy()
    draw = ImageDraw.Draw(signed)
    draw.rectangle((x, y, x + wide, y + high), fill="white", outline="black")
    draw.text((x + margin - left, y + margin - top), text, fill="black", font=font)
    covered = min(wide, picture.width) * min(high, picture.height) / (picture.width * picture.height)
    return signed, float(covered)


@dataclass(frozen=True)
class Signs(Technique):
    """Puts a sign that names a place into the picture (a typographic attack, Goh et al. 2021).

    The perturbation is the share of the picture that the sign covers. An item's field "sign" says what is written, else `texts`.
    """

    name: ClassVar[str] = "signs"
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.QUERY
    perturbation_unit: ClassVar[str] = "share of the image"
    texts: tuple[str, ...] = ("Sydney", "Paris", "Tokyo", "New York", "Nairobi", "Rio de Janeiro")
    heights: tuple[float, ...] = (0.06, 0.1, 0.16, 0.24)

    def __post_init__(self) -> None:
        if not self.texts or not self.heights or not all(0 < height < 1 for height in self.heights):
            raise ValueError("signs needs texts, and heights of letters between 0 and 1, as shares of the picture")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        picture = question.picture(item)
        texts = (str(item["sign"]),) if "sign" in item.values else self.texts
        with ImageTries(target, question, item, progress) as tries:
            for height in sorted(self.heights):
                for text in texts:
                    signed, share = with_sign(picture, text, height)
                    made = {"text": text, "height": height}
                    tries.tried(target.prepare([signed]), [share], f"sign {text!r}", candidates=[made])


@dataclass(frozen=True)
class Crops(Technique):
    """Cuts edges off: parts of the picture, from the middle and from its corners.

    The perturbation is the share of the picture that is cut away.
    """

    name: ClassVar[str] = "crops"
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.QUERY
    perturbation_unit: ClassVar[str] = "share of the image"
    edges: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)

    def __post_init__(self) -> None:
        if not self.edges or not all(0 < edge < 1 for edge in self.edges):
            raise ValueError("crops needs edges, shares of the picture's between 0 and 1")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        picture = question.picture(item)
        with ImageTries(target, question, item, progress) as tries:
            for edge in sorted(self.edges, reverse=True):
                for where, box in crop_boxes(picture.size, edge):
                    made = {"part": where, "edge": edge}
                    images = target.prepare([picture.crop(box)])
                    tries.tried(images, [1 - edge * edge], f"{where}, {edge:g} of the edge", candidates=[made])


def crop_boxes(size: tuple[int, int], edge: float) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Boxes (left, top, right, bottom) with a share of the edges: the middle and the four corners."""
    wide, high = (max(1, round(edge * length)) for length in size)
    across, down = size[0] - wide, size[1] - high
    named = {
        "middle": (across // 2, down // 2),
        "top left": (0, 0),
        "top right": (across, 0),
        "bottom left": (0, down),
        "bottom right": (across, down),
    }
    for where, (left, top) in named.items():
        yield where, (left, top, left + wide, top + high)


__all__ = ["CORRUPTIONS", "Corruptions", "Crops", "Signs", "corrupted", "crop_boxes", "with_sign"]
