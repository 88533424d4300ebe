# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Image files to uint8 tensors, in threads, each failing alone. Of their metadata only the orientation is used."""

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_PIXELS = 89_478_485  # Pillow warns above, a quarter of a gigabyte as RGB
ORIENTATION = 0x0112
JPEG_START = b"\xff\xd8\xff"
# of the blocks in which a JPEG file may tell an orientation
METADATA = (b"Exif\0\0", b"tiff:Orientation")
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource = str | os.PathLike | bytes | BinaryIO | Image.Image


class UnreadableImageError(ValueError):
    """An image that cannot be used; the message says which and why."""


def decode_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, jpeg_edge: int | None = None) -> torch.Tensor:
    """An image as uint8 [3, height, width], upright.

    source is a path, the bytes of a file, an open file or a PIL image. What is done with unusual images:

    - EXIF orientation is applied. GPS tags, and all other metadata, are not looked at and not passed on. (Pillow's own reader of
      TIFF files loads their tags with the pixels; they are dropped with it.)
    - Grey, palette, CMYK and other colour images become RGB as Pillow converts them; transparency is dropped, as CLIP does.
    - Of 16-bit channels the upper eight bits are kept. (Pillow's own conversion would make all but the darkest white.)
    - Of animations and multi-page files the first frame is taken.
    - An image may be as small as one pixel; resizing makes a uniform picture of it.

    max_pixels (width * height) refuses decompression bombs before they are decoded. jpeg_edge decodes large JPEG files at a half,
    a quarter or an eighth of their size, several times faster, as long as no edge gets shorter than this; it is off by default
    since the result is not quite what full decoding and resizing gives.

    Where `simplejpeg` is installed (it comes with `geobased[geo]`), it decodes colour JPEG files: to Pillow's pixels, but without
    the interpreter's lock, which Pillow holds while it hands pixels over. Files without EXIF do not pass through Pillow at all.

    Raises `UnreadableImageError` (a `ValueError`) for files that are missing, no image, truncated or damaged, above max_pixels,
    and for 32-bit pixels, of which the range is unknown.
    """
    name = _name(source)
    try:
        contents = _contents(source)
        if contents is not None and jpeg_edge is None and (decoded := _plain_jpeg(contents, max_pixels)) is not None:
            return torch.from_numpy(decoded).permute(2, 0, 1)
        image = source if isinstance(source, Image.Image) else _open(cast(BinaryIO, source) if contents is None else contents)
        if image.width * image.height > max_pixels:
            raise UnreadableImageError(
                f"{name} has {image.width} x {image.height} pixels, more than max_pixels={max_pixels}: a decompression bomb, or"
                " an image to be scaled down first"
            )
        if jpeg_edge is not None and image is not source and image.format == "JPEG":
            image.draft(None, (jpeg_edge, jpeg_edge))
        elif contents is not None and image.mode == "RGB" and image.format in ("JPEG", "MPO"):
            # an MPO file is a JPEG with further pictures behind the first
            decoded = _jpeg_pixels(contents)
            if decoded is not None:
                turn = _turn(image)
                upright = decoded if turn is None else np.array(Image.fromarray(decoded).transpose(turn))
                return torch.from_numpy(upright).permute(2, 0, 1)
        image.load()
        pixels, turn = _rgb(image, name), _turn(image)
        return torch.from_numpy(np.array(pixels if turn is None else pixels.transpose(turn))).permute(2, 0, 1)
    except UnreadableImageError:
        raise
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{name} does not exist") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{name} is no image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name} is too large to decode: {error}") from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise UnreadableImageError(f"{name} cannot be decoded: {error or type(error).__name__}") from error


def decode_images(
    sources: Iterable[ImageSource],
    *,
    num_threads: int | None = None,
    ahead: int = 64,
    max_pixels: int = MAX_PIXELS,
    jpeg_edge: int | None = None,
) -> Iterator[torch.Tensor | UnreadableImageError]:
    """Decodes sources in threads (decoders leave the interpreter's lock while they work); gives the results in order.

    A result is what `decode_image` gives, or the error that it raises: one bad image does not stop the others. At most `ahead`
    images are decoded before they are asked for, so sources may be endless. num_threads is the number of CPU cores if None.

    Raises `ValueError` for num_threads or ahead below 1.

    Example:

    ```python
    >>> from geobased.modeling_streetclip.image_decoding import decode_images
    >>> [str(result) for result in decode_images([b"no image"])]
    ['image of 8 bytes is no image that Pillow can read']
    ```
    """
    num_threads = (os.cpu_count() or 1) if num_threads is None else num_threads
    if num_threads < 1 or ahead < 1:
        raise ValueError(f"num_threads={num_threads} and ahead={ahead} must be at least 1")
    if num_threads > 1 and _jpeg_library() is None:
        logger.warning_once(
            "simplejpeg is not installed: Pillow decodes JPEG files, whose threads wait for each other; pip install simplejpeg"
        )
    return _decode_ahead(sources, num_threads, ahead, {"max_pixels": max_pixels, "jpeg_edge": jpeg_edge})


def _decode_ahead(
    sources: Iterable[ImageSource], num_threads: int, ahead: int, options: dict[str, Any]
) -> Iterator[torch.Tensor | UnreadableImageError]:
    def attempt(source: ImageSource) -> torch.Tensor | UnreadableImageError:
        try:
            return decode_image(source, **options)
        except UnreadableImageError as error:
            return error

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    pending: deque[Future[torch.Tensor | UnreadableImageError]] = deque()
    try:
        for source in sources:
            pending.append(pool.submit(attempt, source))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _name(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"image of {source.width} x {source.height} pixels"
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "open file")
    return str(name)


def _contents(source: ImageSource) -> bytes | None:
    """The whole file, so that it does not stay open however a decoder fails; None for what is open already."""
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    return source if isinstance(source, bytes) else None


def _open(source: bytes | BinaryIO) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


@lru_cache(maxsize=1)
def _jpeg_library() -> Any:
    """simplejpeg, or None where it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _plain_jpeg(contents: bytes, max_pixels: int) -> np.ndarray | None:
    """uint8 [height, width, 3] of a colour JPEG file that says nothing of being turned; None for what Pillow has to look at."""
    library = _jpeg_library()
    if library is None or not contents.startswith(JPEG_START) or any(word in contents for word in METADATA):
        return None
    try:
        height, width, colors, _ = library.decode_jpeg_header(contents)
    except ValueError:
        return None
    return _jpeg_pixels(contents) if height * width <= max_pixels and colors in ("YCbCr", "RGB") else None


def _jpeg_pixels(contents: bytes) -> np.ndarray | None:
    """uint8 [height, width, 3] of a colour JPEG file, as it lies; None without simplejpeg, and for what is not quite a JPEG."""
    library = _jpeg_library()
    try:
        return None if library is None else library.decode_jpeg(contents, colorspace="RGB")
    except ValueError:
        return None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The first frame as 8-bit RGB."""
    # older Pillow opens 16-bit PNG files as 32-bit images
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"{name} has 32-bit pixels (mode {image.mode}), of unknown range: convert it to 8 bits first")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright, as its EXIF orientation says. An EXIF block that cannot be read says nothing."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # as above; the pixels are good
        return None
    # no dictionary lookup: a damaged block can hold a value of any type
    return next((method for value, method in TRANSPOSE.items() if value == orientation), None)


__all__ = ["MAX_PIXELS", "ImageSource", "UnreadableImageError", "decode_image", "decode_images"]
