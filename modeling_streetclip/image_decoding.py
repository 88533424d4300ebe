# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Image files to uint8 tensors, in threads, each failing alone. Of their metadata only the orientation is used."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
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
IMAGES_PER_TASK = 4
EXIF_SEGMENT, EXIF, XMP_ORIENTATION = b"\xff\xe1", b"Exif\0\0", b"tiff:Orientation"
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
    the interpreter's lock, which Pillow holds while it reads headers and hands pixels over.

    Raises `UnreadableImageError` (a `ValueError`) for files that are missing, no image, truncated or damaged, above max_pixels,
    and for 32-bit pixels, of which the range is unknown.
    """
    name = _name(source)
    try:
        contents = _contents(source)
        if contents is not None and jpeg_edge is None and (decoded := _jpeg_pixels(contents, max_pixels)) is not None:
            return torch.from_numpy(decoded).permute(2, 0, 1)
        image = source if isinstance(source, Image.Image) else _open(cast(BinaryIO, source) if contents is None else contents)
        if image.width * image.height > max_pixels:
            raise UnreadableImageError(
                f"{name} has {image.width} x {image.height} pixels, more than max_pixels={max_pixels}: a decompression bomb, or"
                " an image to be scaled down first"
            )
        if jpeg_edge is not None and image is not source and image.format == "JPEG":
            image.draft(None, (jpeg_edge, jpeg_edge))
        image.load()
        pixels, turn = _rgb(image, name), _turn(image.getexif)
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


def decode_picture(source: ImageSource, **options: Any) -> Image.Image:
    """`decode_image` as a PIL image: upright RGB pixels without metadata."""
    return Image.fromarray(decode_image(source, **options).permute(1, 2, 0).contiguous().numpy())


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
    images are decoded before they are asked for, so sources may be endless. num_threads is `usable_cores()` if None.

    Raises `ValueError` for num_threads or ahead below 1.

    Example:

    ```python
    >>> from geobased.modeling_streetclip.image_decoding import decode_images
    >>> [str(result) for result in decode_images([b"no image"])]
    ['image of 8 bytes is no image that Pillow can read']
    ```
    """
    num_threads = usable_cores() if num_threads is None else num_threads
    if num_threads < 1 or ahead < 1:
        raise ValueError(f"num_threads={num_threads} and ahead={ahead} must be at least 1")
    if num_threads > 1 and _jpeg_library() is None:
        logger.warning_once(
            "simplejpeg is not installed: Pillow decodes JPEG files, whose threads wait for each other; pip install simplejpeg"
        )
    return _decode_ahead(sources, num_threads, ahead, {"max_pixels": max_pixels, "jpeg_edge": jpeg_edge})


def usable_cores() -> int:
    """CPU cores that this process may use: containers and `taskset` leave it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_ahead(
    sources: Iterable[ImageSource], num_threads: int, ahead: int, options: dict[str, Any]
) -> Iterator[torch.Tensor | UnreadableImageError]:
    def attempt(source: ImageSource) -> torch.Tensor | UnreadableImageError:
        try:
            return decode_image(source, **options)
        except UnreadableImageError as error:
            return error

    def attempt_each(part: list[ImageSource]) -> list[torch.Tensor | UnreadableImageError]:
        return [attempt(source) for source in part]

    # handing a task to a thread costs as much of the interpreter as decoding an image; a few images are shared out evenly though
    most = max(1, min(IMAGES_PER_TASK, ahead // (4 * num_threads)))
    remaining, waiting, read = iter(sources), 0, 0
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    pending: deque[Future[list[torch.Tensor | UnreadableImageError]]] = deque()
    try:
        while part := list(islice(remaining, 1 if read < 2 * num_threads else most)):
            pending.append(pool.submit(attempt_each, part))
            waiting, read = waiting + len(part), read + len(part)
            while waiting > ahead:
                decoded = pending.popleft().result()
                waiting -= len(decoded)
                yield from decoded
        while pending:
            yield from pending.popleft().result()
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


def _jpeg_pixels(contents: bytes, max_pixels: int) -> np.ndarray | None:
    """uint8 [height, width, 3] of a colour JPEG file, upright; None for what Pillow has to judge, and without simplejpeg."""
    library = _jpeg_library()
    if library is None or not contents.startswith(JPEG_START):
        return None
    header = _jpeg_header(contents)
    start = header.find(EXIF)
    # an orientation elsewhere than in one EXIF segment
    if XMP_ORIENTATION in header or header.count(EXIF) > 1 or (start >= 0 and header[start - 4 : start - 2] != EXIF_SEGMENT):
        return None
    try:
        height, width, colors, _ = library.decode_jpeg_header(contents)
        if height * width > max_pixels or colors not in ("YCbCr", "RGB"):
            return None
        pixels = library.decode_jpeg(contents, colorspace="RGB")
    except ValueError:  # anything that is not quite a JPEG
        return None
    if start < 0:
        return pixels
    turn = _turn(lambda: _loaded_exif(header[start : start - 2 + int.from_bytes(header[start - 2 : start], "big")]))
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _jpeg_header(contents: bytes) -> bytes:
    """The segments before a JPEG file's first scan: a search in them does not go through the picture."""
    at = len(JPEG_START) - 1
    while contents[at : at + 1] == b"\xff" and contents[at + 1 : at + 2] not in (b"\xda", b"\xff", b""):
        at += 2 + int.from_bytes(contents[at + 2 : at + 4], "big")
    # what is not made of segments is looked through as a whole
    return contents[:at] if contents[at : at + 2] == b"\xff\xda" else contents


def _loaded_exif(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(block)
    return exif


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The first frame as 8-bit RGB."""
    # older Pillow opens 16-bit PNG files as 32-bit images
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"{name} has 32-bit pixels (mode {image.mode}), of unknown range: convert it to 8 bits first")
    return image.convert("RGB")


def _turn(exif: Callable[[], Image.Exif]) -> Image.Transpose | None:
    """What turns an image upright, as its EXIF orientation says. An EXIF block that cannot be read says nothing."""
    try:
        orientation = exif().get(ORIENTATION)
    except Exception:  # as above; the pixels are good
        return None
    # no dictionary lookup: a damaged block can hold a value of any type
    return next((method for value, method in TRANSPOSE.items() if value == orientation), None)


__all__ = [
    "MAX_PIXELS",
    "ImageSource",
    "UnreadableImageError",
    "decode_image",
    "decode_images",
    "decode_picture",
    "usable_cores",
]
