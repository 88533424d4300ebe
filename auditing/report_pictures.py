"""Pictures and heat maps of a report, as PNG files made of pixels alone, with few colours."""

import io

import numpy as np
from PIL import Image

from .technique import Picture

SUPPORTING, OPPOSING = (209, 36, 47), (9, 105, 218)
STRONGEST_OPACITY = 0.75
HEAT_EDGE = 192
COLOURS = 64


def picture_png(picture: Picture) -> bytes:
    """The bytes of the picture in 64 colours, with its heat drawn over it: red supports, blue opposes.

    Raises `ValueError` for other shapes.
    """
    pixels = picture.pixels
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    image = Image.fromarray(pixels)
    if picture.heat is not None:
        # heat has finer steps than the pixels of a small image
        scale = enlargement(image.size, HEAT_EDGE)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if picture.heat.ndim != 2 or not np.isfinite(picture.heat).all():
            raise ValueError("heat is finite numbers [height, width]")
        heat = Image.fromarray(picture.heat.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
        values = np.asarray(heat)[..., None] / max(float(np.abs(picture.heat).max()), 1e-12)
        opacity = STRONGEST_OPACITY * np.abs(values).clip(0, 1)
        mixed = (1 - opacity) * np.asarray(image) + opacity * np.where(values > 0, SUPPORTING, OPPOSING)
        image = Image.fromarray(mixed.round().astype(np.uint8))
    file = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def enlargement(size: tuple[int, int], least_edge: int) -> int:
    """By what whole number an image must be enlarged for its shorter edge to have `least_edge` pixels."""
    return max(1, -(-least_edge // min(size)))


def shown_width(png: bytes) -> int:
    """Width in CSS pixels at which a page shows a picture: small ones with their pixels."""
    with Image.open(io.BytesIO(png)) as image:
        return image.width * enlargement(image.size, HEAT_EDGE)


__all__ = ["picture_png", "shown_width"]
