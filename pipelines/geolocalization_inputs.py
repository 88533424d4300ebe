"""What the image geolocalization pipeline takes for an image: paths, URLs, bytes, open files, PIL images, rows of datasets."""

import http.client
import io
import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from geobased.modeling_streetclip.image_decoding import ImageSource, UnreadableImageError

MAX_DOWNLOAD_BYTES = 1 << 26
TIMEOUT_SECONDS = 10.0
KINDS = "a path, a URL, the bytes of a file, an open file, a PIL image, or a dictionary that holds one as 'image'"


class LazyImage:
    """An open file whose bytes are had when they are first read: in the thread that decodes the image, and failing with it."""

    def __init__(self, name: str, contents: Callable[[], bytes]) -> None:
        self.name = name
        self._contents = contents
        self._file: io.BytesIO | None = None

    def _opened(self) -> io.BytesIO:
        if self._file is None:
            self._file = io.BytesIO(self._contents())
        return self._file

    def read(self, size: int = -1) -> bytes:
        return self._opened().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._opened().seek(offset, whence)

    def tell(self) -> int:
        return self._opened().tell()


def is_one_image(inputs: Any) -> bool:
    """Whether `inputs` stands for one image, and not for many."""
    return isinstance(inputs, str | bytes | bytearray | os.PathLike | Image.Image | Mapping) or hasattr(inputs, "read")


def each_image(inputs: Any) -> Iterator[Any]:
    """The images of a list, a generator, a data set of torch or of the `datasets` library, or any other iterable.

    Raises `ValueError` for what is none of these, and for arrays, of which nobody knows the channels and their range.
    """
    if isinstance(inputs, np.ndarray | torch.Tensor):
        raise ValueError(f"{type(inputs).__name__} is no image: give {KINDS} (Image.fromarray makes one of an array)")
    if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
        # a torch Dataset need not raise the IndexError that ends iteration by index
        return (inputs[i] for i in range(len(inputs)))
    if not isinstance(inputs, Iterable):
        raise ValueError(f"{type(inputs).__name__} is no image: give {KINDS}, or several of these")
    return iter(inputs)


def image_source(item: Any, timeout: float = TIMEOUT_SECONDS) -> ImageSource:
    """What `decode_image` takes for an image of the pipeline. It never raises: what is wrong shows when the image is decoded.

    Args:
        item: an image (see `KINDS`). A dictionary holds it as "image", or as `datasets` stores undecoded ones: "bytes", "path".
        timeout: seconds that a server may be silent.
    """
    if isinstance(item, Mapping):
        for key in ("image", "bytes", "path"):
            if item.get(key) is not None:
                return image_source(item[key], timeout)
        return _unusable(f"a dictionary with {', '.join(map(repr, item)) or 'nothing in it'}")
    if isinstance(item, bytearray):
        return bytes(item)
    if isinstance(item, str) and item.startswith(("http://", "https://")):
        return cast(ImageSource, LazyImage(item, lambda: _download(item, timeout)))
    if not is_one_image(item):
        return _unusable(type(item).__name__)
    return cast(ImageSource, item)


def _unusable(what: str) -> ImageSource:
    def contents() -> bytes:
        raise UnreadableImageError(f"{what} is no image: give {KINDS}")

    return cast(ImageSource, LazyImage(what, contents))


def _download(url: str, timeout: float) -> bytes:
    try:
        # many servers refuse urllib's own name
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (compatible; geobased)"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnreadableImageError(f"{url} cannot be downloaded: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise UnreadableImageError(f"{url} is larger than {MAX_DOWNLOAD_BYTES:,} bytes: download it and scale it down first")
    return data


__all__ = ["KINDS", "LazyImage", "each_image", "image_source", "is_one_image"]
