"""Crops of a picture of the Earth with what is true of their centres: a data set that costs no disk and is made on the GPU.

`EarthCrops` numbers its crops, and every one is a function of the seed and its number. It is a map-style data set for a
`DataLoader`, gives whole batches made on the device (`batch`, `batches`), and, as `EarthCropSource`, a source of single images
for the trainings that read photos.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from geobased.geography.gazetteer import Country, countries
from geobased.modeling_streetclip.captions import CaptionMixture, PlaceDescription
from geobased.training.earth_labels import UnitNames
from geobased.training.earth_projection import EarthImage
from geobased.training.earth_sampling import EarthPlaces, EarthSampler

# for a picture from above: no streets, no month, and no compass, which tells where a camera on the ground faces
SATELLITE = CaptionMixture("A satellite photo", region=0.8, climate=0.4, location_beside_climate=0.8)
PLACES_PER_BATCH = 4096


class EarthCrops(Dataset):
    """Crops number 0 to length - 1.

    Args:
        image: the picture; crops are made on its device.
        sampler: draws the places; `EarthSampler(side="training")` and `(side="evaluation")` never share a block.
        size: pixels along a crop's edge.
        length: number of crops: an epoch.
        units: names the regions. Without it regions are not known: those of geocells are not the centres' own, for where
            photos are few, a cell is made of many units.

    Raises:
        ValueError: size or length below 1, and geocells whose countries are no ISO codes.

    Example:
        >>> crops = EarthCrops(image, EarthSampler(climate, elevation), length=10_000)  # doctest: +SKIP
        >>> for batch in crops.batches(256):  # doctest: +SKIP
        ...     loss = model(batch["pixel_values"], labels=batch["labels"]).loss
    """

    def __init__(
        self, image: EarthImage, sampler: EarthSampler, *, size: int = 64, length: int = 100_000, units: UnitNames | None = None
    ) -> None:
        if size < 1 or length < 1:
            raise ValueError(f"size={size} and length={length} must be at least 1")
        unknown = sorted(set(sampler.cells.country_codes.tolist()) - set(_countries()))
        if unknown:
            raise ValueError(
                f"the geocells have countries {', '.join(unknown)}, which are no ISO codes: captions need their names"
            )
        self.image, self.sampler, self.size, self.length, self.units = image, sampler, size, length, units

    def __len__(self) -> int:
        return self.length

    def places(self, numbers: Sequence[int] | np.ndarray) -> EarthPlaces:
        """Places of crops; any numbers from 0 on, also beyond `length`. Raises `ValueError` as the sampler."""
        return self.sampler.places(np.asarray(numbers, dtype=np.int64))

    def pixels(self, places: EarthPlaces) -> torch.Tensor:
        """Crops at places: float32 [n, 3, size, size] from 0 to 1, on the picture's device."""
        return self.image.crops(places.latitude, places.longitude, places.degrees, places.rotation, size=self.size)

    def batch(self, numbers: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Crops as models take them.

        Returns:
            pixel_values float32 [n, 3, size, size] from 0 to 1; coordinates float64 [n, 2], degrees; labels int64 [n], the
            geocells; head_labels: {"elevation": float32 [n, 1] metres, "climate": int64 [n]} (see `heads`); all on the
            picture's device. places: `EarthPlaces`, from which `describe` makes captions' input.
        """
        places = self.places(numbers)
        device = self.image.device
        return {
            "pixel_values": self.pixels(places),
            "coordinates": torch.from_numpy(places.coordinates).to(device),
            "labels": torch.from_numpy(places.geocell).to(device),
            "head_labels": {
                "elevation": torch.from_numpy(places.elevation[:, None].astype(np.float32)).to(device),
                "climate": torch.from_numpy(places.climate).to(device),
            },
            "places": places,
        }

    def batches(self, batch_size: int, *, first: int = 0, last: int | None = None) -> Iterator[dict[str, Any]]:
        """Batches of crops number `first` to `last` - 1 (`length` - 1 by default) in their order, the last one as it comes.

        The order is as random as the places are. For another epoch go on with numbers: first = epoch * length.
        """
        if batch_size < 1 or first < 0:
            raise ValueError(f"batch_size={batch_size} must be at least 1 and first={first} at least 0")
        end = first + self.length if last is None else last
        for start in range(first, end, batch_size):
            yield self.batch(np.arange(start, min(start + batch_size, end)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One crop: pixel_values [3, size, size], latitude, longitude, and the facts of `columns` by their names."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """A batch of items; a `DataLoader` asks for its batches at once."""
        outside = [number for number in numbers if not 0 <= number < self.length]
        if outside:
            # what ends an iteration over the data set
            raise IndexError(f"crop {outside[0]} is outside 0 to {self.length - 1}")
        places = self.places(numbers)
        pixels, columns = self.pixels(places), self.columns(places)
        return [
            {
                "pixel_values": pixels[row],
                "latitude": float(places.latitude[row]),
                "longitude": float(places.longitude[row]),
                **{name: values[row] for name, values in columns.items()},
            }
            for row in range(len(places))
        ]

    def country_codes(self, places: EarthPlaces) -> list[str]:
        """ISO codes [n]."""
        return self.sampler.cells.country_codes[places.geocell].tolist()

    def columns(self, places: EarthPlaces) -> dict[str, list[Any]]:
        """What is true of the centres, by the names that the trainings' tables have; lists [n].

        geocell, country_code, country, continent, region ("" if unknown), climate (Köppen-Geiger code), elevation (metres),
        driving_side, heading (compass direction of the crop's top, from 0 to below 360), degrees (across), land (share).
        """
        of = [_countries()[code] for code in self.country_codes(places)]
        return {
            "geocell": places.geocell.tolist(),
            "country_code": [country.code for country in of],
            "country": [country.name for country in of],
            "continent": [country.continent for country in of],
            "region": self._regions(places),
            "climate": np.array(self.sampler.climate.land_codes)[places.climate].tolist(),
            "elevation": places.elevation.tolist(),
            "driving_side": [country.driving_side for country in of],
            "heading": (places.rotation % 360).tolist(),
            "degrees": places.degrees.tolist(),
            "land": places.land.tolist(),
        }

    def describe(self, places: EarthPlaces) -> list[PlaceDescription]:
        """What captions say of the crops [n]: country, region, climate, driving side, and the compass direction of the top."""
        facts = self.columns(places)
        names = ("country", "region", "climate", "driving_side", "heading")
        rows = zip(*(facts[name] for name in names), strict=True)
        return [PlaceDescription(**dict(zip(names, row, strict=True)) | {"region": row[1] or None}) for row in rows]

    def heads(self) -> list[dict[str, Any]]:
        """Auxiliary heads of `PigeonConfig` for the labels of `batch`. Elevation's mean and deviation are left to be fitted."""
        codes = list(self.sampler.climate.land_codes)
        return [
            {"name": "elevation", "kind": "regression", "size": 1},
            {"name": "climate", "kind": "classification", "size": len(codes), "labels": codes},
        ]

    def _regions(self, places: EarthPlaces) -> list[str]:
        return [""] * len(places) if self.units is None else self.units(places.latitude, places.longitude).tolist()


class EarthCropSource:
    """Crops as a source of images (`geobased.training.geolocation_sources.GeolocationSource`): what reads photos reads crops.

    The trainings hold out blocks themselves, so the sampler draws from all.

    Args:
        crops: their first `length` crops are the source's rows.
        progress: whether a progress bar is shown while places are drawn.

    Raises:
        ValueError: a sampler that does not draw from all sides.
    """

    def __init__(self, crops: EarthCrops, progress: bool = True) -> None:
        if crops.sampler.side != "all":
            raise ValueError(f"the sampler has side={crops.sampler.side!r}: use 'all', and let the training hold out blocks")
        self._crops = crops
        starts = range(0, len(crops), PLACES_PER_BATCH)
        parts = [
            crops.places(np.arange(start, min(start + PLACES_PER_BATCH, len(crops))))
            for start in tqdm(starts, desc="drawing places", disable=not progress)
        ]
        self.places = EarthPlaces.concatenate(parts)
        self.coordinates = self.places.coordinates
        self.columns = crops.columns(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def name(self, row: int) -> str:
        """What reports call the crop."""
        return f"crop {row}"

    def image(self, row: int) -> Image.Image:
        """The crop as a picture of 8 bits."""
        return crop_picture(self._crops.pixels(self.places[row : row + 1])[0])


def crop_picture(pixels: torch.Tensor) -> Image.Image:
    """A crop [3, size, size] from 0 to 1 as a picture of 8 bits."""
    return Image.fromarray((pixels * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy())


@lru_cache(maxsize=1)
def _countries() -> dict[str, Country]:
    return {country.code: country for country in countries()}


__all__ = ["SATELLITE", "EarthCropSource", "EarthCrops", "crop_picture"]
