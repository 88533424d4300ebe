"""Pictures and heat maps of a report, as PNG files made of pixels alone."""

import io

import numpy as np
from PIL import Image

from .technique import Picture

SUPPORTING, OPPOSING = (209, 36, 47), (9, 105, 218)
STRONGEST_OPACITY = 0.75
LEAST_EDGE = 192


def picture_png(picture: Picture) -> bytes:
    """The bytes of the picture, with its heat drawn over it: red supports, blue opposes. Raises `ValueError` for other shapes."""
    pixels = picture.pixels
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    image = Image.fromarray(pixels)
    # small images are shown with their pixels
    scale = max(1, -(-LEAST_EDGE // min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    if picture.heat is not None:
        if picture.heat.ndim != 2 or not np.isfinite(picture.heat).all():
            raise ValueError("heat is finite numbers [height, width]")
        heat = Image.fromarray(picture.heat.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
        values = np.asarray(heat)[..., None] / max(float(np.abs(picture.heat).max()), 1e-12)
        opacity = STRONGEST_OPACITY * np.abs(values).clip(0, 1)
        mixed = (1 - opacity) * np.asarray(image) + opacity * np.where(values > 0, SUPPORTING, OPPOSING)
        image = Image.fromarray(mixed.round().astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


__all__ = ["picture_png"]
