"""Administrative boundaries for geocells: read from files, made from places, cleaned to a coverage without overlaps.

Polygons are in degrees, x = longitude in [-180, 180], y = latitude. shapely (2.1 or newer) does the geometry, GeoPandas reads
files.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geobased.geography.coordinates import check_coordinates

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# gaps between neighbours that are narrower than so many grid steps are errors of the map, not land in between
SLIVER_WIDTH_STEPS = 10
MERCATOR_LIMIT = 85.0
# files that were cut at the dateline miss it by rounding
DATELINE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Boundaries:
    """Administrative units and what they belong to; arrays [units] side by side.

    Attributes:
        polygons: shapely polygons or multipolygons (object array).
        countries: key of the country, an ISO code for instance: no cell goes over its border.
        country_names: its name.
        regions: level between country and unit; "" where there is none. Small cells merge inside a region first.
        units: name of the unit itself, the finest level.
        is_clean: whether the polygons are a coverage: disjoint, with the same vertices on both sides of a border.

    Raises:
        ValueError: no units, arrays of different lengths, empty polygons, or coordinates that are not degrees.
    """

    polygons: np.ndarray
    countries: np.ndarray
    country_names: np.ndarray
    regions: np.ndarray
    units: np.ndarray
    is_clean: bool = False

    def __post_init__(self) -> None:
        import shapely

        if not len(self.polygons):
            raise ValueError("the boundaries hold no polygons; create_geocells takes boundaries=None where there are none")
        for name in ("countries", "country_names", "regions", "units"):
            if len(getattr(self, name)) != len(self.polygons):
                raise ValueError(f"there are {len(self.polygons)} polygons but {len(getattr(self, name))} {name}")
        empty = shapely.is_empty(self.polygons) | shapely.is_missing(self.polygons)
        if empty.any():
            raise ValueError(f"polygon {int(np.argmax(empty))} ({self.units[np.argmax(empty)]!r}) is empty; leave it out")
        west, south, east, north = shapely.total_bounds(self.polygons)
        if west < -180.0 or east > 180.0 or south < -90.0 or north > 90.0:
            raise ValueError(
                f"the boundaries reach from {west}, {south} to {east}, {north} (longitude, latitude), which are no degrees within"
                " ±180 and ±90: reproject them to EPSG:4326"
            )

    def __len__(self) -> int:
        return len(self.polygons)

    def select(self, rows: np.ndarray) -> "Boundaries":
        """The units of some rows."""
        return Boundaries(
            self.polygons[rows],
            self.countries[rows],
            self.country_names[rows],
            self.regions[rows],
            self.units[rows],
            self.is_clean,
        )

    def cleaned(self, *, decimals: int = 5, simplify_degrees: float = 0.0) -> "Boundaries":
        """The same units as a coverage: overlaps go to the smaller unit, slivers between neighbours to one of them.

        Args:
            decimals: decimal places of a degree that coordinates are rounded to (5: a metre, 3: 110 m).
            simplify_degrees: if positive, borders are simplified, on both sides alike and keeping every part: triangles of less
                than its square go.

        Raises:
            ValueError: a unit is smaller than the rounding.
        """
        import shapely

        polygons = clean_coverage(self.polygons, decimals=decimals)
        empty = shapely.is_empty(polygons)
        if empty.any():
            names = ", ".join(map(str, self.units[empty][:5]))
            raise ValueError(f"{int(empty.sum())} units vanish at {decimals} decimals ({names}); keep more decimals")
        if simplify_degrees > 0:
            polygons = shapely.coverage_simplify(polygons, simplify_degrees)
        return replace(self, polygons=polygons, is_clean=True)


def clean_coverage(polygons: np.ndarray, *, decimals: int) -> np.ndarray:
    """Polygons made disjoint, with shared vertices along shared borders, on a grid of 10**-decimals degrees.

    All boundary lines are noded and rounded together, and the faces between them are given out: a face in several polygons to the
    smallest of them, a sliver in none to the neighbour with the longest common border.

    Returns:
        Object array like `polygons`; empty where a polygon was smaller than the grid.
    """
    import shapely

    step = 10.0**-decimals
    lines = shapely.union_all(shapely.boundary(polygons), grid_size=step)
    faces = shapely.get_parts(shapely.polygonize(shapely.get_parts(lines)))
    face, owner = shapely.STRtree(polygons).query(shapely.point_on_surface(faces), predicate="intersects")
    order = np.lexsort((owner, shapely.area(polygons)[owner], face))
    face, owner = face[order], owner[order]
    first = np.concatenate([[True], face[1:] != face[:-1]]) if len(face) else np.zeros(0, dtype=bool)
    owners = np.full(len(faces), -1)
    owners[face[first]] = owner[first]
    _give_slivers_to_neighbours(faces, owners, SLIVER_WIDTH_STEPS * step)

    order = np.argsort(owners, kind="stable")
    ends = np.searchsorted(owners[order], np.arange(len(polygons) + 1))
    clean = np.empty(len(polygons), dtype=object)
    for i in range(len(polygons)):
        clean[i] = shapely.coverage_union_all(faces[order[ends[i] : ends[i + 1]]])
    return on_grid(clean, decimals)


def on_grid(polygons: np.ndarray, decimals: int) -> np.ndarray:
    """Coordinates as the doubles nearest to the grid's decimals, and rings in a canonical order: equal shapes, equal bytes."""
    import shapely

    scale = 10.0**decimals
    # adding 0 turns -0.0 into 0.0
    return shapely.normalize(shapely.transform(polygons, lambda xy: np.rint(xy * scale) / scale + 0.0))


def _give_slivers_to_neighbours(faces: np.ndarray, owners: np.ndarray, width: float) -> None:
    """Set `owners` of narrow faces that have none to that of the owned face with the longest common border."""
    import shapely

    narrow = 2 * shapely.area(faces) < width * shapely.length(faces)
    slivers, owned = np.flatnonzero((owners < 0) & narrow), np.flatnonzero(owners >= 0)
    if not len(slivers):
        return
    sliver, neighbour = shapely.STRtree(faces[owned]).query(faces[slivers], predicate="intersects")
    sliver, neighbour = slivers[sliver], owned[neighbour]
    common = shapely.length(shapely.intersection(faces[sliver], faces[neighbour]))
    order = np.lexsort((neighbour, -common, sliver))
    sliver, neighbour, common = sliver[order], neighbour[order], common[order]
    first = np.concatenate([[True], sliver[1:] != sliver[:-1]]) & (common > 0)
    owners[sliver[first]] = owners[neighbour[first]]


def read_boundaries(source: "str | Path | Any", levels: Sequence[str], *, country_name: str | None = None) -> Boundaries:
    """Boundaries from a file that GeoPandas reads (GeoParquet, GeoJSON, TopoJSON, shapefile, GeoPackage, …) or a GeoDataFrame.

    Args:
        source: path or GeoDataFrame. Another coordinate system than degrees is reprojected; without one, degrees are taken.
        levels: one to three columns, from the country down to the unit: `["iso"]`, `["iso", "name"]` or
            `["iso", "region", "name"]`. Rows that agree in all of them become one unit. A missing region is "", a missing unit
            name is taken as a unit of its own; every row must have its country.
        country_name: column with the country's name; the country key itself by default.

    Raises:
        ValueError: no rows, an unknown column, more than three levels, a row without a country, or no degrees.
    """
    import geopandas
    import shapely

    if not 1 <= len(levels) <= 3:
        raise ValueError(f"levels must name one to three columns from country to unit, not {list(levels)}")
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no boundary file {path}")
        frame = geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)
        name = path.name
    else:
        frame, name = source, "the boundaries"
    if not len(frame) or not isinstance(frame, geopandas.GeoDataFrame):
        raise ValueError(f"{name} holds no polygons")
    missing = [column for column in [*levels, *([country_name] if country_name else [])] if column not in frame.columns]
    if missing:
        raise ValueError(f"{name} has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}")
    if frame.crs is not None and not frame.crs.is_geographic:
        frame = frame.to_crs(4326)
    geometry = np.asarray(frame.geometry.values, dtype=object)
    kept = ~(shapely.is_missing(geometry) | shapely.is_empty(geometry))
    if not kept.all():
        warnings.warn(f"{name}: {int((~kept).sum())} rows without geometry are left out", stacklevel=2)
        frame, geometry = frame[kept], geometry[kept]
    geometry = np.array([_within_the_dateline(_polygons_only(shape)) for shape in geometry], dtype=object)
    if not len(geometry) or shapely.is_empty(geometry).all():
        raise ValueError(f"{name} holds no polygons")

    columns = [["" if _is_missing(value) else str(value) for value in frame[column]] for column in levels]
    if "" in columns[0]:
        raise ValueError(
            f"row {columns[0].index('')} of {name} has no country in column {levels[0]!r}; fill it in or leave it out"
        )
    names = ["" if _is_missing(value) else str(value) for value in frame[country_name]] if country_name else columns[0]
    groups: dict[tuple[str, ...], list[int]] = {}
    for row in range(len(frame)):
        key = tuple(column[row] for column in columns)
        groups.setdefault((*key, "" if key[-1] else f"row {row}"), []).append(row)
    keys = sorted(groups)
    polygons = np.empty(len(keys), dtype=object)
    for i, key in enumerate(keys):
        rows = groups[key]
        polygons[i] = geometry[rows[0]] if len(rows) == 1 else shapely.union_all(geometry[rows])
    filled = ~shapely.is_empty(polygons)
    return Boundaries(
        polygons=polygons[filled],
        countries=np.array([key[0] for key in keys])[filled],
        country_names=np.array([names[groups[key][0]] for key in keys])[filled],
        regions=np.array([key[1] if len(levels) == 3 else "" for key in keys])[filled],
        units=np.array([key[len(levels) - 1] for key in keys])[filled],
    )


def _is_missing(value: object) -> bool:
    return value is None or value != value or not str(value).strip()  # NaN is unequal to itself


def _polygons_only(shape: Any) -> Any:
    """A valid polygon or multipolygon; lines and points that repairing leaves behind are dropped."""
    import shapely

    if not shapely.is_valid(shape):
        shape = shapely.make_valid(shape)
    if shape.geom_type in ("Polygon", "MultiPolygon"):
        return shape
    parts = shapely.get_parts(shapely.get_parts(shape))
    return shapely.union_all(parts[shapely.get_type_id(parts) == 3])


def _within_the_dateline(shape: Any) -> Any:
    """A shape with longitudes up to 540 degrees either way, cut at the dateline and brought to [-180, 180]."""
    import shapely

    if shapely.is_empty(shape):
        return shape
    west, _, east, _ = shape.bounds
    if west < -180.0 - DATELINE_TOLERANCE or east > 180.0 + DATELINE_TOLERANCE:
        pieces = []
        for shift in (-360.0, 0.0, 360.0):
            piece = shapely.intersection(shape, shapely.box(-180.0 + shift, -90.0, 180.0 + shift, 90.0))
            pieces.append(shapely.transform(piece, lambda xy, shift=shift: xy - (shift, 0.0)))
        shape = _polygons_only(shapely.union_all(pieces))
    return shapely.transform(shape, lambda xy: np.clip(xy, (-180.0, -90.0), (180.0, 90.0))) if max(-west, east) > 180.0 else shape


def boundaries_from_places(
    latitude: "ArrayLike",
    longitude: "ArrayLike",
    countries: Sequence[str],
    regions: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
) -> Boundaries:
    """Pseudo-boundaries where no map exists: every spot of the Earth belongs to the unit of the nearest place.

    The Voronoi regions of the places are dissolved by (country, region, unit). They are computed in Mercator's projection, which
    is true to angles, so that "nearest" is right at every latitude, and with the places repeated beyond the dateline.

    Args:
        latitude, longitude: [n] degrees, towns of a gazetteer for instance.
        countries: [n] country of each place.
        regions: [n] region of each place; none by default.
        units: [n] unit of each place; by default its region, or the country where there are no regions.

    Raises:
        ValueError: fewer than two different places, lists of other lengths, or coordinates out of range.
    """
    import shapely

    lat, lng = check_coordinates(latitude, longitude, name="places")
    regions = list(regions) if regions is not None else [""] * len(lat)
    units = list(units) if units is not None else [region or country for region, country in zip(regions, countries, strict=True)]
    for name, values in (("countries", countries), ("regions", regions), ("units", units)):
        if len(values) != len(lat):
            raise ValueError(f"there are {len(lat)} places but {len(values)} {name}")
    lng = np.where(lng == 180.0, -180.0, lng)
    sites, first = np.unique(np.stack([lng, np.clip(lat, -MERCATOR_LIMIT, MERCATOR_LIMIT)], axis=1), axis=0, return_index=True)
    if len(sites) < 2:
        raise ValueError("boundaries from places need at least two different places")
    y = np.degrees(np.arctanh(np.sin(np.radians(sites[:, 1]))))
    xy = np.concatenate([np.stack([sites[:, 0] + shift, y], axis=1) for shift in (0.0, -360.0, 360.0)])
    top = float(np.degrees(np.arctanh(np.sin(np.radians(89.999)))))
    world = shapely.box(-180.0, -top, 180.0, top)
    cells = shapely.get_parts(shapely.voronoi_polygons(shapely.multipoints(xy), extend_to=world, ordered=True))
    cells = shapely.segmentize(shapely.intersection(cells, world), 1.0)

    def to_degrees(points: np.ndarray) -> np.ndarray:
        degrees = np.degrees(np.arcsin(np.tanh(np.radians(points[:, 1]))))
        # the projection never reaches the poles; the cells do
        return np.stack([points[:, 0], np.where(np.abs(degrees) > 89.99, np.sign(degrees) * 90.0, degrees)], axis=1)

    cells = shapely.transform(cells, to_degrees)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for site, place in enumerate(first):
        key = (str(countries[place]), str(regions[place]), str(units[place]))
        groups.setdefault(key, []).extend(site + k * len(sites) for k in range(3))
    keys = sorted(groups)
    polygons = np.empty(len(keys), dtype=object)
    for i, key in enumerate(keys):
        # where a region only touches the dateline, the cut leaves a line
        polygons[i] = _polygons_only(shapely.union_all(cells[groups[key]], grid_size=1e-7))
    return Boundaries(
        polygons=polygons,
        countries=np.array([key[0] for key in keys]),
        country_names=np.array([key[0] for key in keys]),
        regions=np.array([key[1] for key in keys]),
        units=np.array([key[2] for key in keys]),
    )


__all__ = ["Boundaries", "boundaries_from_places", "clean_coverage", "on_grid", "read_boundaries"]
