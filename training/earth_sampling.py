"""Where crops of the Earth are cut: centres on land, drawn evenly over its area, each a function of the seed and a number.

No order or batch matters: place number 1,000,000 can be asked for alone, and a resumed run goes on with the number it stopped at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from geobased.geography.geocell_collection import Geocells
from geobased.training.earth_labels import ElevationRaster, KoeppenRaster
from geobased.training.earth_projection import MAX_DEGREES, crop_coordinates
from geobased.training.geolocation_splits import BlockHoldout

Side = Literal["training", "evaluation", "all"]
# candidates of one place that are looked at together
CANDIDATES = 16
MAX_ROUNDS = 1000
# points along a crop's edge that are asked whether they are land
LAND_GRID = 8


@dataclass(frozen=True)
class CropSettings:
    """What crops are drawn.

    Args:
        degrees: smallest and largest angle across a crop; logarithms are drawn evenly.
        rotation: a crop's top points at most so many degrees away from north, to either side; 0 keeps north up, 180 turns freely.
        latitudes: southernmost and northernmost centre. The default leaves out Antarctica.
        min_land: least share of a crop's area that is land.
        seed: of all draws.

    Raises:
        ValueError: values outside their ranges.
    """

    degrees: tuple[float, float] = (2.0, 8.0)
    rotation: float = 180.0
    latitudes: tuple[float, float] = (-60.0, 84.0)
    min_land: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.degrees[0] <= self.degrees[1] <= MAX_DEGREES:
            raise ValueError(f"degrees={self.degrees} must be the smallest and largest angle, above 0, at most {MAX_DEGREES:g}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation={self.rotation} must lie between 0 and 180 degrees")
        if not -90 <= self.latitudes[0] < self.latitudes[1] <= 90:
            raise ValueError(f"latitudes={self.latitudes} must be the southernmost and northernmost, in degrees")
        if not 0 <= self.min_land <= 1:
            raise ValueError(f"min_land={self.min_land} must lie between 0 and 1: a share of the crop")


@dataclass(frozen=True)
class EarthPlaces:
    """Crops that were drawn, and what is true of their centres; arrays [n].

    Attributes:
        numbers: int64, what they were drawn by.
        latitude, longitude: degrees.
        degrees: angle across the crop.
        rotation: compass direction of its top in degrees, -180 to 180.
        land: share of the crop that is land, to a 64th.
        geocell: int64, the cell that covers the centre.
        climate: int64, number in the climate raster's `land_codes`.
        elevation: metres.
    """

    numbers: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    degrees: np.ndarray
    rotation: np.ndarray
    land: np.ndarray
    geocell: np.ndarray
    climate: np.ndarray
    elevation: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def coordinates(self) -> np.ndarray:
        """[n, 2] (latitude, longitude) in degrees."""
        return np.stack([self.latitude, self.longitude], axis=1)

    def __getitem__(self, rows: np.ndarray | slice) -> "EarthPlaces":
        return EarthPlaces(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence["EarthPlaces"]) -> "EarthPlaces":
        """The places of all parts, one part after the other."""
        return cls(**{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)})


class EarthSampler:
    """Draws places of crops.

    A centre is land in the climate raster and inside a geocell, evenly by area. Angle and rotation are drawn first and kept while
    centres are tried, so that their distribution is as stated, whatever there is little of.

    Args:
        climate, elevation: rasters.
        cells: geocells; those of the world if None.
        settings: what is drawn.
        holdout: blocks that are held out.
        side: "training": centres outside held-out blocks (and their margin); "evaluation": inside; "all": anywhere.
        disjoint: training crops do not show any ground of held-out blocks (asked at 8 x 8 points of the crop). Without it the
            edges of training crops do: the centre alone decides.

    Raises:
        ValueError: an unknown side, or one that the holdout leaves empty.
    """

    def __init__(
        self,
        climate: KoeppenRaster,
        elevation: ElevationRaster,
        cells: Geocells | None = None,
        *,
        settings: CropSettings | None = None,
        holdout: BlockHoldout | None = None,
        side: Side = "training",
        disjoint: bool = False,
    ) -> None:
        if side not in ("training", "evaluation", "all"):
            raise ValueError(f"side={side!r} is unknown: choose training, evaluation or all")
        self.climate, self.elevation = climate, elevation
        self.cells = Geocells.world() if cells is None else cells
        self.settings = CropSettings() if settings is None else settings
        self.holdout = BlockHoldout() if holdout is None else holdout
        self.side, self.disjoint = side, disjoint
        if side == "evaluation" and self.holdout.fraction == 0:
            raise ValueError("side='evaluation' is empty with fraction=0: hold out some blocks")

    def places(self, numbers: np.ndarray) -> EarthPlaces:
        """The places [n] of integers from 0 on.

        Raises:
            ValueError: negative numbers, and settings that leave (almost) no land to draw from.
        """
        drawn = np.asarray(numbers, dtype=np.int64)
        if drawn.ndim != 1 or (drawn < 0).any():
            raise ValueError(f"numbers must be [n] integers from 0 on, not {numbers!r}")
        settings, count = self.settings, len(drawn)
        low, high = np.log(settings.degrees)
        degrees = np.exp(low + (high - low) * uniform(settings.seed, drawn, 0))
        rotation = settings.rotation * (2 * uniform(settings.seed, drawn, 1) - 1)
        latitude, longitude, land = np.empty(count), np.empty(count), np.empty(count)
        geocell = np.full(count, -1, dtype=np.int64)
        pending = np.arange(count)
        for round_ in range(MAX_ROUNDS):
            if not len(pending):
                break
            lat, lng, found = self._candidates(drawn[pending], round_)
            rows = pending[found]
            shown_lat, shown_lng = crop_coordinates(lat, lng, degrees[rows], rotation[rows], LAND_GRID)
            share = self._land_share(shown_lat, shown_lng)
            good = share >= settings.min_land
            if self.disjoint and self.side == "training":
                good &= ~self.holdout.held_out(shown_lat, shown_lng).any(axis=(1, 2))
            cell = np.full(len(rows), -1, dtype=np.int64)
            cell[good] = self.cells.index.covering(lat[good], lng[good])
            good &= cell >= 0
            for array, values in ((latitude, lat), (longitude, lng), (land, share), (geocell, cell)):
                array[rows[good]] = values[good]
            pending = pending[geocell[pending] < 0]
        if len(pending):
            raise ValueError(
                f"{len(pending)} of {count} crops found no place in {MAX_ROUNDS * CANDIDATES} draws ({settings}, {self.holdout},"
                f" side {self.side!r}): allow less land, smaller crops, more latitudes, or other blocks"
            )
        return EarthPlaces(
            *(drawn, latitude, longitude, degrees, rotation, land, geocell),
            climate=self.climate.classes(latitude, longitude),
            elevation=self.elevation(latitude, longitude),
        )

    def _candidates(self, numbers: np.ndarray, round_: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each number, its first candidate of a round whose centre is on land and on the right side.

        Returns:
            (latitude [m], longitude [m], whether the number has one: bool [n], m of them true).
        """
        south, north = np.sin(np.radians(self.settings.latitudes))
        stream = 2 + 2 * (round_ * CANDIDATES + np.arange(CANDIDATES))
        lat = np.degrees(np.arcsin(south + (north - south) * uniform(self.settings.seed, numbers[:, None], stream)))
        lng = 360 * uniform(self.settings.seed, numbers[:, None], stream + 1) - 180
        good = self.climate.is_land(lat, lng)
        if self.side != "all":
            test = self.holdout.in_training if self.side == "training" else self.holdout.held_out
            good[good] = test(lat[good], lng[good])
        first, found = good.argmax(axis=1), good.any(axis=1)
        rows = np.flatnonzero(found)
        return lat[rows, first[rows]], lng[rows, first[rows]], np.asarray(found)

    def _land_share(self, lat: np.ndarray, lng: np.ndarray) -> np.ndarray:
        return self.climate.is_land(lat, lng).mean(axis=(1, 2))


def uniform(seed: int, numbers: np.ndarray, stream: "int | np.ndarray") -> np.ndarray:
    """Numbers in [0, 1), each a function of seed, number and stream alone, the same on every machine.

    SplitMix64's finaliser (Steele et al. 2014), once over the seed and number and once more with the stream; arrays broadcast.
    """
    with np.errstate(over="ignore"):
        base = _mix(np.asarray(seed % 2**64, dtype=np.uint64))
        state = _mix(base ^ _mix(np.asarray(numbers).astype(np.uint64)))
        state = _mix(state + np.asarray(stream).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


__all__ = ["CropSettings", "EarthPlaces", "EarthSampler", "Side", "uniform"]
