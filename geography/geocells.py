"""Semantic geocells (PIGEON, section 3.1): administrative units, merged and split until each holds about as many points.

The method follows the paper: every point is given to an administrative unit; units without points join the nearest one; small
cells merge with neighbours; large ones are split by OPTICS clusters and Voronoi regions. What is different is told by the
docstring of `create_geocells`.
"""

import hashlib
import json
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geobased.geography.boundaries import Boundaries, clean_coverage
from geobased.geography.coordinates import check_coordinates, grouped_spherical_means, haversine_km, unit_vectors
from geobased.geography.geocell_collection import CENTROID_DECIMALS, RADIUS_DECIMALS, Geocells
from geobased.geography.geocell_merge import CountryFrame, WorkingCell, merge_small_cells
from geobased.geography.geocell_split import PIGEON_OPTICS, PIGEOTTO_OPTICS, SplitSettings, split_large_cells
from geobased.geography.polygon_distance import PolygonIndex
from geobased.whole_file import whole_file

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

RADIUS_SHARE = 0.9


def create_geocells(
    points: "ArrayLike",
    boundaries: Boundaries | None,
    *,
    min_size: int,
    max_size: int,
    optics: Sequence[tuple[int, float]] = PIGEON_OPTICS,
    seed: int = 330,
    decimals: int = 5,
    empty_countries: bool = False,
    checkpoint_dir: str | Path | None = None,
    progress: bool = False,
) -> Geocells:
    """Make geocells from points and administrative boundaries.

    Differences from the published code: the result depends on the points (not on their order), the boundaries and the seed
    alone; no point is lost, and `locate` gives each the cell that counts it; a point outside every polygon belongs to the nearest
    one; cells that density does not split are halved at a wide gap, so that none exceeds max_size unless its points, or their
    nearest spots on land, coincide; no split makes a cell below min_size; distances hold on the sphere, over the dateline and
    near the poles.

    Args:
        points: [n, 2] (latitude, longitude) in degrees.
        boundaries: administrative units (`read_boundaries`, `boundaries_from_places`), cleaned to a coverage here unless they are
            one; None takes the whole Earth as one country and cells from the points alone.
        min_size: points that a cell should have. A cell has fewer only where no neighbour of its country is left.
        max_size: points that a cell may have, at least twice min_size.
        optics: (min_samples, xi) of OPTICS, tried in order: `PIGEON_OPTICS` for 50 points a cell, `PIGEOTTO_OPTICS` for 1,500.
        seed: decides the order in which small cells merge.
        decimals: decimal places of a degree on which borders lie (5: a metre).
        empty_countries: whether a country without points gets a cell of size 0, located in its middle, instead of none.
        checkpoint_dir: folder that keeps every finished country; a second call with the same input goes on from it.
        progress: show a bar over the points.

    Returns:
        Cells in the order of their country's key. `metadata` names what is outside the sizes asked for, the countries without
        points and the number of points outside every polygon.

    Raises:
        ValueError: no points, NaN, coordinates out of range or swapped, sizes that do not fit.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> cells = create_geocells(rng.uniform((40, 0), (50, 9), (200, 2)), None, min_size=20, max_size=50)
        >>> int(cells.sizes.sum()), bool((cells.sizes >= 20).all() and (cells.sizes <= 50).all())
        (200, True)
    """
    import shapely

    latitude, longitude = _check_points(points)
    if min_size < 1 or max_size < 2 * min_size:
        raise ValueError(
            f"max_size must be at least twice min_size, and that at least 1: not max_size {max_size}, min_size {min_size}"
        )
    if not 1 <= decimals <= 7:
        raise ValueError(f"decimals must be 1 to 7, not {decimals}")
    # the same points in another order must give the same cells
    order = np.lexsort((longitude, latitude))
    latitude, longitude = latitude[order], longitude[order]
    if boundaries is None:
        boundaries = _whole_earth()
    elif not boundaries.is_clean:
        boundaries = boundaries.cleaned(decimals=decimals)

    index = PolygonIndex(boundaries.polygons)
    unit_of = index.covering(latitude, longitude)
    outside = np.flatnonzero(unit_of < 0)
    if len(outside):
        unit_of[outside] = index.nearest(latitude[outside], longitude[outside])[0]
    parameters = {
        "min_size": min_size,
        "max_size": max_size,
        "optics": [list(pair) for pair in optics],
        "seed": seed,
        "decimals": decimals,
    }
    counts = {"units": 0, "merged": 0, "optics": 0, "halving": 0}
    polygons: list[Any] = []
    cell_countries: list[str] = []
    country_of_unit = boundaries.countries.astype(str)
    present = np.unique(country_of_unit[unit_of])
    bar = _progress_bar(len(latitude), progress)
    for country in present:
        units = np.flatnonzero(country_of_unit == country)
        rows = np.flatnonzero(country_of_unit[unit_of] == country)
        part = boundaries.select(units)
        inputs = (part, np.searchsorted(units, unit_of[rows]), latitude[rows], longitude[rows], parameters)
        bar.set_postfix_str(country)
        made, made_counts = _country_from_checkpoint(country, inputs, checkpoint_dir)
        polygons += made
        cell_countries += [country] * len(made)
        counts = {name: counts[name] + made_counts[name] for name in counts}
        bar.update(len(rows))
    bar.close()
    absent = sorted(set(country_of_unit.tolist()) - set(present.tolist()))
    if empty_countries:
        polygons += [shapely.union_all(boundaries.polygons[country_of_unit == country]) for country in absent]
        cell_countries += absent

    names = dict(zip(country_of_unit, boundaries.country_names.astype(str), strict=True))
    return _finish(
        np.array(polygons, dtype=object),
        np.array(cell_countries),
        names,
        (latitude, longitude, boundaries.units.astype(str)[unit_of]),
        decimals,
        {
            **parameters,
            "steps": counts,
            "points_outside": len(outside),
            "countries_without_points": absent,
        },
        empty=set(absent),
    )


def create_naive_geocells(points: "ArrayLike", *, max_size: int, decimals: int = 5) -> Geocells:
    """Rectangles instead of semantic cells: the box of all points, halved along its longer side until none holds too many points.

    The baseline of PIGEON's ablation. Rectangles without points are left out; borders mean nothing to them.

    Args:
        points: [n, 2] (latitude, longitude) in degrees.
        max_size: points that a rectangle may have; one whose points coincide has more.
        decimals: decimal places of a degree on which borders lie; no rectangle gets narrower than that.

    Raises:
        ValueError: no points, NaN, coordinates out of range or swapped, max_size below 1.
    """
    import shapely

    latitude, longitude = _check_points(points)
    if max_size < 1:
        raise ValueError(f"max_size must be at least 1, not {max_size}")
    step = 10.0**-decimals
    low = np.floor(np.array([longitude.min(), latitude.min()]) / step) * step
    high = np.ceil(np.array([longitude.max(), latitude.max()]) / step) * step
    boxes: list[Any] = []
    queue = [(low, high, np.arange(len(latitude)))]
    while queue:
        low, high, rows = queue.pop()
        axis = int(np.argmax(high - low))
        middle = np.rint((low[axis] + high[axis]) / 2 / step) * step
        if len(rows) <= max_size or not low[axis] < middle < high[axis]:
            boxes.append(shapely.box(*low, *np.maximum(high, low + step)))
            continue
        upper = (longitude if axis == 0 else latitude)[rows] >= middle
        for side, half in ((True, rows[upper]), (False, rows[~upper])):
            if len(half):
                new_low, new_high = low.copy(), high.copy()
                (new_low if side else new_high)[axis] = middle
                queue.append((new_low, new_high, half))
    labels = np.full(len(latitude), "")
    metadata = {"max_size": max_size, "decimals": decimals}
    cells = np.array(boxes, dtype=object)
    return _finish(cells, np.full(len(cells), ""), {"": ""}, (latitude, longitude, labels), decimals, metadata)


def _check_points(points: "ArrayLike") -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise ValueError(f"points must be [n, 2] (latitude, longitude) with at least one row, not of shape {values.shape}")
    latitude, longitude = check_coordinates(values[:, 0], values[:, 1], name="points")
    return latitude, np.where(longitude == 180.0, -180.0, longitude)


def _whole_earth() -> Boundaries:
    import shapely

    polygons = np.array([shapely.box(-180.0, -90.0, 180.0, 90.0)], dtype=object)
    empty = np.array([""])
    return Boundaries(polygons, empty, empty, empty, empty, is_clean=True)


def _progress_bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not shown, unit="points", desc="geocells")


def _cells_of_country(
    part: Boundaries, unit_of: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, parameters: dict[str, Any]
) -> tuple[list[Any], dict[str, int]]:
    """Polygons of one country's cells, in [-180, 180], and how many came and went in each step."""
    import shapely

    frame = CountryFrame.around(part.polygons)
    polygons = np.array([frame.enter(polygon) for polygon in part.polygons], dtype=object)
    longitude = frame.longitudes(longitude)
    owner = _join_units_without_points(polygons, np.bincount(unit_of, minlength=len(part)))
    cells = []
    for unit in np.unique(owner):
        members = np.flatnonzero(owner == unit)
        polygon = polygons[unit] if len(members) == 1 else shapely.union_all(polygons[members])
        cells.append(WorkingCell(polygon, np.flatnonzero(unit_of == unit), str(part.regions[unit]), str(part.units[unit])))
    # every country has random numbers of its own, so one can be made again without the others
    key = zlib.crc32(str(part.countries[0]).encode("utf-8"))
    rng = np.random.default_rng([parameters["seed"], key])
    merged = merge_small_cells(cells, min_size=parameters["min_size"], rng=rng)
    settings = SplitSettings(parameters["min_size"], parameters["max_size"], parameters["optics"], parameters["decimals"])
    done = split_large_cells(merged, latitude, longitude, settings)
    counts = {"units": len(cells), "merged": len(merged), **settings.counts}
    return [frame.leave(cell.polygon) for cell in done], counts


def _join_units_without_points(polygons: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Unit that each unit goes with: itself if it has points, else the one whose middle is nearest."""
    import shapely

    owner = np.arange(len(polygons))
    empty, filled = np.flatnonzero(sizes == 0), np.flatnonzero(sizes > 0)
    if len(empty):
        middles = shapely.get_coordinates(shapely.centroid(polygons))
        vectors = unit_vectors(middles[:, 1], middles[:, 0])
        owner[empty] = filled[np.argmax(vectors[empty] @ vectors[filled].T, axis=1)]
    return owner


def _country_from_checkpoint(
    country: str, inputs: tuple[Any, ...], checkpoint_dir: str | Path | None
) -> tuple[list[Any], dict[str, int]]:
    """The result for a country from the checkpoint folder, else computed and written there."""
    if checkpoint_dir is None:
        return _cells_of_country(*inputs)
    import shapely

    part, unit_of, latitude, longitude, parameters = inputs
    digest = hashlib.sha256(json.dumps([country, parameters], sort_keys=True).encode("utf-8"))
    for texts in (part.regions, part.units):
        digest.update("\0".join(map(str, texts)).encode("utf-8"))
    for polygon in part.polygons:
        digest.update(shapely.to_wkb(polygon))
    for array in (unit_of.astype(np.int64), latitude, longitude):
        digest.update(array.tobytes())
    folder = Path(checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # the digest names the input, so another run's file is never taken for this one's
    path = folder / f"{digest.hexdigest()[:24]}.json"
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        return list(shapely.from_wkb(stored["polygons"])), stored["counts"]
    polygons, counts = _cells_of_country(*inputs)
    stored = {"country": country, "counts": counts, "polygons": [shapely.to_wkb(polygon, hex=True) for polygon in polygons]}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(stored), encoding="utf-8")
    return polygons, counts


def _finish(
    polygons: np.ndarray,
    countries: np.ndarray,
    names: dict[str, str],
    points: tuple[np.ndarray, np.ndarray, np.ndarray],
    decimals: int,
    metadata: dict[str, Any],
    *,
    empty: Collection[str] = (),
) -> Geocells:
    """Geocells from polygons: borders on the grid, points counted where `locate` puts them, none only in countries `empty`."""
    import shapely

    latitude, longitude, units = points
    polygons = clean_coverage(polygons, decimals=decimals)
    filled = ~shapely.is_empty(polygons)
    polygons, countries = polygons[filled], countries[filled]
    cell_of = PolygonIndex(polygons).locate(latitude, longitude)
    used = np.flatnonzero((np.bincount(cell_of, minlength=len(polygons)) > 0) | np.isin(countries, list(empty)))
    polygons, countries, cell_of = polygons[used], countries[used], np.searchsorted(used, cell_of)
    sizes = np.bincount(cell_of, minlength=len(polygons))
    centroids = grouped_spherical_means(latitude, longitude, cell_of, len(polygons))
    without = sizes == 0
    centroids[without] = shapely.get_coordinates(shapely.point_on_surface(polygons[without]))[:, ::-1]
    centroids = np.round(centroids, CENTROID_DECIMALS)
    distances = haversine_km(latitude, longitude, centroids[cell_of, 0], centroids[cell_of, 1])
    order = np.lexsort((distances, cell_of))
    radii, regions = np.zeros(len(polygons)), []
    for cell, end in enumerate(np.cumsum(sizes)):
        rows = order[end - sizes[cell] : end]
        regions.append(_most_common(units[rows]) if len(rows) else names[countries[cell]])
        if len(rows):
            radii[cell] = distances[rows[int(np.ceil(RADIUS_SHARE * len(rows))) - 1]]
        else:
            # nothing is known but the shape
            corners = shapely.get_coordinates(polygons[cell])
            radii[cell] = haversine_km(corners[:, 1], corners[:, 0], *centroids[cell]).max()
    return Geocells(
        polygons=polygons,
        country_codes=countries,
        countries=np.array([names[country] for country in countries]),
        regions=np.array(regions),
        sizes=sizes,
        centroids=centroids,
        radii_km=np.round(radii, RADIUS_DECIMALS),
        metadata=metadata,
        decimals=decimals,
    )


def _most_common(values: np.ndarray) -> str:
    texts, counts = np.unique(values, return_counts=True)
    return str(texts[np.argmax(counts)])


__all__ = ["PIGEON_OPTICS", "PIGEOTTO_OPTICS", "Geocells", "create_geocells", "create_naive_geocells"]
