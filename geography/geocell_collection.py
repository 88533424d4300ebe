"""Geocells as a model uses them: where a point belongs, where a cell lies, and what is known about it."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geobased.geography.coordinates import check_coordinates
from geobased.geography.geocell_format import decode_polygons, encode_polygons, pack, unpack
from geobased.geography.polygon_distance import PolygonIndex
from geobased.whole_file import whole_file

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# resolved: tools read the package through links
WORLD_CELLS_FILE = Path(__file__).resolve().parent / "data" / "world.geocells"
# one decimal of a degree more than the borders would not be seen: centroids and radii are kept as coarse as this
CENTROID_DECIMALS = 5
RADIUS_DECIMALS = 2


@dataclass
class Geocells:
    """A partition of land into cells, with what the points that made it say about each. All arrays are [cells].

    Attributes:
        polygons: shapely polygons or multipolygons in degrees (object array), disjoint; parts on both sides of the dateline are
            one cell.
        country_codes: key of the country that the cell lies in (ISO 3166 for the shipped cells).
        countries: its name.
        regions: name of the administrative unit that most of the cell's points lie in.
        sizes: number of points.
        centroids: [cells, 2] (latitude, longitude), spherical mean of the points: the cell's location as a prediction.
        radii_km: distance from the centroid within which nine tenths of the points lie.
        metadata: how the cells were made, and what to report (cells outside the sizes asked for).
        decimals: decimal places of a degree on which the borders lie.

    Raises:
        ValueError: no cells, or arrays of different lengths.

    Example:
        >>> cells = Geocells.world()
        >>> str(cells.countries[cells.locate(55.7047, 13.1910)])
        'Sweden'
    """

    polygons: np.ndarray
    country_codes: np.ndarray
    countries: np.ndarray
    regions: np.ndarray
    sizes: np.ndarray
    centroids: np.ndarray
    radii_km: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    decimals: int = 5

    def __post_init__(self) -> None:
        if not len(self.polygons):
            raise ValueError("there are no geocells; they need at least one point")
        for name in ("country_codes", "countries", "regions", "sizes", "centroids", "radii_km"):
            if len(getattr(self, name)) != len(self.polygons):
                raise ValueError(f"there are {len(self.polygons)} polygons but {len(getattr(self, name))} {name}")
        self._index: PolygonIndex | None = None

    def __len__(self) -> int:
        return len(self.polygons)

    def __repr__(self) -> str:
        return f"Geocells({len(self)} cells of {len(np.unique(self.country_codes))} countries, {int(self.sizes.sum())} points)"

    @classmethod
    def world(cls) -> "Geocells":
        """The cells of the world that come with the package. One copy is shared: do not change it."""
        return _world()

    @property
    def index(self) -> PolygonIndex:
        """Search over the polygons, made on first use."""
        if self._index is None:
            self._index = PolygonIndex(self.polygons)
        return self._index

    def locate(self, latitude: "ArrayLike", longitude: "ArrayLike") -> Any:
        """Cell of each point: the one that covers it (the first of several, on a border), else the nearest on the sphere.

        Args:
            latitude, longitude: degrees, numbers or arrays of one shape.

        Returns:
            Index of the cell: an integer for numbers, an int64 array of the same shape for arrays.

        Raises:
            ValueError: NaN, coordinates out of range or swapped.
        """
        lat, lng = check_coordinates(latitude, longitude, name="points to locate")
        found = self.index.locate(lat.ravel(), lng.ravel())
        return int(found[0]) if lat.ndim == 0 else found.reshape(lat.shape)

    def covers(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Whether points lie inside any cell, and not at sea or on land without cells."""
        lat, lng = check_coordinates(latitude, longitude, name="points to locate")
        return (self.index.covering(lat.ravel(), lng.ravel()) >= 0).reshape(lat.shape)

    def statistics(self) -> dict[str, Any]:
        """Numbers of cells, countries and points, sizes and radii, and the cells outside the sizes asked for."""
        low, high = self.metadata.get("min_size"), self.metadata.get("max_size")
        statistics: dict[str, Any] = {
            "cells": len(self),
            "countries": len(np.unique(self.country_codes)),
            "points": int(self.sizes.sum()),
            "size": {
                "min": int(self.sizes.min()),
                "median": float(np.median(self.sizes)),
                "mean": float(self.sizes.mean()),
                "max": int(self.sizes.max()),
            },
            "radius_km": {
                "median": float(np.median(self.radii_km)),
                "median_over_points": _weighted_median(self.radii_km, self.sizes),
                "max": float(self.radii_km.max()),
            },
        }
        if low is not None and high is not None:
            small, large = self.sizes < low, self.sizes > high
            statistics["undersized"] = {"cells": int(small.sum()), "points": int(self.sizes[small].sum())}
            statistics["oversized"] = {"cells": int(large.sum()), "points": int(self.sizes[large].sum())}
        return statistics

    def save(self, path: str | Path) -> None:
        """Write the compact file: `load` reads it with numpy and shapely alone, and equal cells give equal bytes."""
        texts = {}
        sections = encode_polygons(self.polygons, self.decimals)
        for name, values in (("country_codes", self.country_codes), ("countries", self.countries), ("regions", self.regions)):
            texts[name], sections[name] = np.unique(values.astype(str), return_inverse=True)
        sections["sizes"] = self.sizes
        sections["latitude"] = np.rint(self.centroids[:, 0] * 10.0**CENTROID_DECIMALS)
        sections["longitude"] = np.rint(self.centroids[:, 1] * 10.0**CENTROID_DECIMALS)
        sections["radius"] = np.rint(self.radii_km * 10.0**RADIUS_DECIMALS)
        header = {
            "decimals": self.decimals,
            "texts": {name: [str(text) for text in values] for name, values in texts.items()},
            "metadata": self.metadata,
        }
        with whole_file(path) as temporary:
            temporary.write_bytes(pack(sections, header))

    @classmethod
    def load(cls, path: str | Path) -> "Geocells":
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no file of geocells {path}")
        sections, header = unpack(path.read_bytes(), str(path))
        texts = {name: np.array(values)[sections[name]] for name, values in header["texts"].items()}
        centroids = np.stack([sections["latitude"], sections["longitude"]], axis=1) / 10.0**CENTROID_DECIMALS
        return cls(
            polygons=decode_polygons(sections, header["decimals"]),
            sizes=sections["sizes"],
            centroids=centroids,
            radii_km=sections["radius"] / 10.0**RADIUS_DECIMALS,
            metadata=header["metadata"],
            decimals=header["decimals"],
            **texts,
        )

    def to_geodataframe(self) -> Any:
        """A GeoPandas GeoDataFrame, one row per cell, in EPSG:4326."""
        import geopandas

        columns = {
            "geocell": np.arange(len(self)),
            "country_code": self.country_codes,
            "country": self.countries,
            "region": self.regions,
            "size": self.sizes,
            "latitude": self.centroids[:, 0],
            "longitude": self.centroids[:, 1],
            "radius_km": self.radii_km,
        }
        return geopandas.GeoDataFrame(columns, geometry=self.polygons, crs="EPSG:4326")

    def export(self, path: str | Path) -> None:
        """Write GeoParquet (.parquet) or GeoJSON (.geojson) with GeoPandas.

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        if path.suffix not in (".parquet", ".geojson"):
            raise ValueError(f"{path.name} must end in .parquet (GeoParquet) or .geojson")
        frame = self.to_geodataframe()
        with whole_file(path) as temporary:
            if path.suffix == ".parquet":
                frame.to_parquet(temporary, index=False)
            else:
                frame.to_file(temporary, driver="GeoJSON", COORDINATE_PRECISION=self.decimals)

    def plot(self, values: "ArrayLike | None" = None, *, ax: Any = None, label: str | None = None, log: bool = True) -> Any:
        """Map of the cells with matplotlib.

        Args:
            values: [cells] number that colours a cell, a probability for instance; the number of points by default.
            ax: matplotlib axes; new ones by default.
            label: caption of the colour bar.
            log: colours by the logarithm; cells whose value is not positive stay grey.

        Returns:
            The axes.
        """
        import matplotlib
        import matplotlib.pyplot as plt
        import shapely
        from matplotlib.collections import PathCollection
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.path import Path as Outline

        numbers = self.sizes.astype(float) if values is None else np.asarray(values, dtype=np.float64)
        if numbers.shape != (len(self),):
            raise ValueError(f"values must be [{len(self)}], one number per cell, not of shape {numbers.shape}")
        if ax is None:
            _, ax = plt.subplots(figsize=(14, 7))
        parts, cell_of = shapely.get_parts(self.polygons, return_index=True)
        outlines = [
            Outline.make_compound_path(*(Outline(shapely.get_coordinates(ring), closed=True) for ring in shapely.get_rings(part)))
            for part in parts
        ]
        shown = np.ma.masked_less_equal(numbers, 0) if log else np.ma.masked_invalid(numbers)
        norm = LogNorm() if log else Normalize()
        colours = matplotlib.colormaps["viridis"].with_extremes(bad="lightgrey")
        drawn = PathCollection(outlines, linewidths=0.2, edgecolors="white", cmap=colours, norm=norm)
        drawn.set_array(shown[cell_of])
        ax.add_collection(drawn)
        west, south, east, north = shapely.total_bounds(self.polygons)
        ax.set(xlim=(west, east), ylim=(south, north), xlabel="longitude", ylabel="latitude")
        # a degree of longitude is shorter away from the equator
        ax.set_aspect(1 / max(np.cos(np.radians((south + north) / 2)), 0.1))
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7, label=label or ("points" if values is None else ""))
        return ax


@lru_cache(maxsize=1)
def _world() -> Geocells:
    return Geocells.load(WORLD_CELLS_FILE)


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


__all__ = ["WORLD_CELLS_FILE", "Geocells"]
