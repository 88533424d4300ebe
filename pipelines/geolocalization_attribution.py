"""Which parts of an image an answer rests on, with captum: occlusion, or integrated gradients (Sundararajan et al. 2017)."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from geobased.modeling_streetclip.image_decoding import decode_image

from .geolocalization_inputs import image_source

if TYPE_CHECKING:
    from .image_geolocalization import ImageGeolocalizationPipeline

Method = Literal["occlusion", "integrated_gradients"]
METHODS: tuple[Method, ...] = ("occlusion", "integrated_gradients")
# of the image's edge: the covered square, and the steps that it moves by
COVERED_PART, STEPS_PER_EDGE = 4, 8
GRADIENT_STEPS = 64
IMAGES_AT_ONCE = 16
# squares along an edge that a picture of the heat resolves: single pixels are noise
DRAWN_SQUARES = 16
SUPPORTING, OPPOSING = (209, 36, 47), (9, 105, 218)
STRONGEST_OPACITY = 0.75


@dataclass(frozen=True)
class Attribution:
    """What an answer to an image rests on.

    Attributes:
        heat: float32 [height, width], over the part of the image that the model saw. Occlusion: how much the log probability
            falls when a grey square covers the pixel, on average over the squares that do. Integrated gradients: the pixel's
            share of `difference`, of which all pixels make up the sum.
        method: "occlusion" or "integrated_gradients".
        place: the best place, as the pipeline gives it.
        probability: of the place's geocell (PIGEON, before refinement) or name (zero-shot search).
        difference: its log probability, less that for a grey image.
        box: left, top, right, bottom of the part that the model saw, in pixels of the upright image.
    """

    heat: np.ndarray
    method: Method
    place: dict[str, Any]
    probability: float
    difference: float
    box: tuple[float, float, float, float]


def captum_is_installed() -> bool:
    """Whether attributions can be computed."""
    from importlib.util import find_spec

    return find_spec("captum") is not None


def attribute(pipe: "ImageGeolocalizationPipeline", image: Any, method: Method = "occlusion") -> Attribution:
    """Attributes the log probability of an image's best place to its pixels. Works on the image tower; needs captum.

    It tells what the answer rests on, not whether it is right, nor how a change that was not tried would alter it.

    Args:
        pipe: with a model of any kind that it serves.
        image: one that the pipeline takes.
        method: "occlusion" covers squares of a quarter of the edge; "integrated_gradients" follows gradients from a grey image.

    Raises:
        ValueError: an unknown method, and images that cannot be read.
        ModuleNotFoundError: captum is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}")
    from captum.attr import IntegratedGradients, Occlusion

    decoded = decode_image(image_source(image))
    place = pipe.run_single(Image.fromarray(decoded.permute(1, 2, 0).numpy()), {}, {"top_k": 1}, {})[0]
    pixels = pipe.preprocessor([decoded], device=pipe.device, dtype=pipe.model.dtype)

    def log_probabilities(values: torch.Tensor) -> torch.Tensor:
        return pipe.locator.log_probabilities(pipe.locator.embed(values))

    # what the model's normalisation makes zero: the mean colour
    grey = torch.zeros_like(pixels)
    with torch.no_grad():
        before, whole = log_probabilities(torch.cat([grey, pixels])).unbind(0)
    target = int(whole.argmax()) if place["geocell"] is None else place["geocell"]
    height, width = pixels.shape[2:]
    if method == "occlusion":
        sizes = [max(1, edge // COVERED_PART) for edge in (height, width)]
        strides = [max(1, edge // STEPS_PER_EDGE) for edge in (height, width)]
        raw = Occlusion(log_probabilities).attribute(
            pixels,
            sliding_window_shapes=(pixels.shape[1], *sizes),
            strides=(pixels.shape[1], *strides),
            baselines=grey,
            target=target,
            perturbations_per_eval=IMAGES_AT_ONCE,
        )
        # all channels are covered at once and have the same values
        heat = raw[0, 0]
    else:
        with torch.enable_grad():
            raw = IntegratedGradients(log_probabilities).attribute(
                pixels, baselines=grey, target=target, n_steps=GRADIENT_STEPS, internal_batch_size=IMAGES_AT_ONCE
            )
        heat = raw[0].sum(0)
    return Attribution(
        heat=heat.detach().float().cpu().numpy(),
        method=method,
        place=place,
        probability=float(whole[target].exp()),
        difference=float(whole[target] - before[target]),
        box=_seen_box(pipe, decoded.shape[1], decoded.shape[2]),
    )


def _seen_box(pipe: "ImageGeolocalizationPipeline", height: int, width: int) -> tuple[float, float, float, float]:
    """The middle of an image, which preprocessing crops, in the image's own pixels."""
    scale = min(height, width) / pipe.preprocessor.shortest_edge
    across, down = scale * pipe.preprocessor.crop_width, scale * pipe.preprocessor.crop_height
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def draw_attribution(
    picture: Image.Image | str | os.PathLike[str], attribution: Attribution, edge: int = 384
) -> tuple[Image.Image, Image.Image]:
    """The part of the image that the model saw, plain and with the heat on it, both RGB, `edge` pixels wide.

    Red supports the answer, blue speaks against it; the strongest square of the image has the full colour.
    """
    from geobased.modeling_streetclip.image_decoding import decode_picture

    whole = picture if isinstance(picture, Image.Image) else decode_picture(picture)
    high = round(edge * attribution.heat.shape[0] / attribution.heat.shape[1])
    plain = whole.convert("RGB").resize((edge, high), Image.Resampling.BICUBIC, box=attribution.box)
    heat = Image.fromarray(attribution.heat.astype(np.float32))
    squares = min(DRAWN_SQUARES, *heat.size)
    smooth = heat.resize((squares, squares), Image.Resampling.BOX).resize((edge, high), Image.Resampling.BICUBIC)
    values = np.asarray(smooth) / max(float(np.abs(np.asarray(smooth)).max()), 1e-12)
    opacity = STRONGEST_OPACITY * np.abs(values)[..., None]
    colour = np.where(values[..., None] > 0, SUPPORTING, OPPOSING)
    mixed = (1 - opacity) * np.asarray(plain) + opacity * colour
    return plain, Image.fromarray(mixed.round().astype(np.uint8))


__all__ = ["METHODS", "Attribution", "Method", "attribute", "captum_is_installed", "draw_attribution"]
