# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""CLIP's image preprocessing in torch, for batches, on the device where the model is: no torchvision."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .resampling import resize_crop

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True)
class GpuImagePreprocessor:
    """Resizes the shortest edge (bicubic, antialiased), crops the centre, rescales and normalises, as CLIP's image processor.

    It gives what transformers' `CLIPImageProcessorPil` gives, grey level by grey level before normalisation and to 1e-5 after it
    (where an image shrinks to less than an eighth, single grey levels may differ by one), on a CPU and on a GPU.

    Only the part of an image that the crop shows is moved to the device and resized, so a strip of 1 x 10,000 pixels needs no
    more memory than any other image.

    Args:
        shortest_edge: pixels to which the shorter edge is resized.
        crop_height, crop_width: pixels of the result.
        rescale_factor: what grey levels are multiplied with.
        image_mean, image_std: of each channel, after rescaling.

    Raises `ValueError` for sizes that are not positive and a crop larger than the resized image.

    Example:

    ```python
    >>> import torch
    >>> from geobased.modeling_streetclip.image_processing_gpu import GpuImagePreprocessor
    >>> photos = [torch.zeros(3, 480, 640, dtype=torch.uint8), torch.zeros(3, 900, 600, dtype=torch.uint8)]
    >>> GpuImagePreprocessor(336, 336, 336)(photos).shape
    torch.Size([2, 3, 336, 336])
    ```
    """

    shortest_edge: int
    crop_height: int
    crop_width: int
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if min(self.shortest_edge, self.crop_height, self.crop_width) < 1:
            raise ValueError(
                f"shortest_edge={self.shortest_edge}, crop_height={self.crop_height} and crop_width={self.crop_width} must be"
                " at least 1"
            )
        if max(self.crop_height, self.crop_width) > self.shortest_edge:
            raise ValueError(
                f"a crop of {self.crop_height} x {self.crop_width} does not fit into an image of which the shorter edge is"
                f" shortest_edge={self.shortest_edge}: padding is not implemented"
            )

    @classmethod
    def from_image_processor(cls, image_processor: Any) -> "GpuImagePreprocessor":
        """What `image_processor` (a `CLIPImageProcessor` of any backend) is configured to do.

        Raises `ValueError` if it does something else than CLIP's: no resize or no crop, a fixed aspect ratio, another filter.
        """
        size, crop = image_processor.size, image_processor.crop_size
        edge = size.get("shortest_edge") if size is not None else None
        if not image_processor.do_resize or not image_processor.do_center_crop or edge is None:
            raise ValueError(
                f"{type(image_processor).__name__} does not resize the shortest edge and crop the centre (size={size},"
                f" crop_size={crop}): this is CLIP's preprocessing alone; use the image processor itself"
            )
        if int(image_processor.resample) != BICUBIC:
            raise ValueError(f"resample={image_processor.resample} is not implemented: CLIP resizes by bicubic interpolation, 3")
        normalize = image_processor.do_normalize
        return cls(
            shortest_edge=edge,
            crop_height=crop["height"],
            crop_width=crop["width"],
            rescale_factor=image_processor.rescale_factor if image_processor.do_rescale else 1.0,
            image_mean=tuple(image_processor.image_mean) if normalize else (0.0, 0.0, 0.0),
            image_std=tuple(image_processor.image_std) if normalize else (1.0, 1.0, 1.0),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "GpuImagePreprocessor":
        """What the `preprocessor_config.json` of a checkpoint (a folder or a Hub id) says; kwargs as in transformers.

        It needs no torchvision, which `AutoImageProcessor` of transformers 5.17 asks for. Raises `ValueError` as
        `from_image_processor`, and transformers' `OSError` if there is no such file.
        """
        return cls.from_image_processor(CLIPImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **kwargs))

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """uint8 images [n, 3, h, w], or a list of uint8 [3, h, w] of any sizes -> pixel_values [n, 3, crop_height, crop_width].

        The work is done on `device` (that of the first image if None); images of one size are resized together.

        Raises `ValueError` for an empty list and for images of another type or shape; the message names the image.
        """
        if len(images) == 0:
            raise ValueError("there are no images: give at least one")
        by_size: dict[tuple[int, int, torch.device], list[int]] = defaultdict(list)
        for number, image in enumerate(images):
            if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or not image.numel():
                raise ValueError(
                    f"image {number} is {image.dtype} of shape {tuple(image.shape)}: give uint8 RGB images [3, height, width]"
                    " (decode_image makes them)"
                )
            by_size[image.shape[1], image.shape[2], image.device].append(number)
        device = images[0].device if device is None else torch.device(device)

        pixels = torch.empty(len(images), 3, self.crop_height, self.crop_width, dtype=torch.uint8, device=device)
        for (height, width, _), numbers in by_size.items():
            pixels[numbers] = self._resize_crop([images[n] for n in numbers], height, width, device)
        mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (self.image_mean, self.image_std))
        return (pixels.float().mul_(self.rescale_factor).sub_(mean).div_(std)).to(dtype)

    def _resize_crop(self, images: list[torch.Tensor], height: int, width: int, device: torch.device) -> torch.Tensor:
        """Images of one size, uint8 [3, height, width] each -> uint8 [n, 3, crop_height, crop_width] on the device."""
        long = int(self.shortest_edge * max(height, width) / min(height, width))
        size = (long, self.shortest_edge) if width <= height else (self.shortest_edge, long)
        top, left = (size[0] - self.crop_height) // 2, (size[1] - self.crop_width) // 2
        crop = (top, left, top + self.crop_height, left + self.crop_width)
        return resize_crop(images, size, crop, device)


__all__ = ["GpuImagePreprocessor"]
