"""Splitting of geocells that hold too many points (PIGEON, section 3.1): OPTICS finds clusters, Voronoi regions part the cell.

What density does not split is halved at the widest gap, so that no cell stays too large unless its points coincide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from geobased.geography.coordinates import unit_vectors
from geobased.geography.geocell_merge import WorkingCell
from geobased.geography.polygon_distance import PolygonIndex

PIGEON_OPTICS = ((8, 0.05), (10, 0.025), (15, 0.015))
PIGEOTTO_OPTICS = ((300, 0.05), (400, 0.005), (1000, 0.0001))
# OPTICS takes time by the square of the number of points: 5 s for so many
MAX_OPTICS_POINTS = 10_000
HALVING_ANGLES = (0.0, 90.0, 45.0, 135.0, 22.5, 67.5, 112.5, 157.5)
CUTS_PER_ANGLE = 4


@dataclass
class SplitSettings:
    """How cells are split: sizes in points, OPTICS settings (min_samples, xi) in their order, decimals of new borders."""

    min_size: int
    max_size: int
    optics: Sequence[tuple[int, float]] = PIGEON_OPTICS
    decimals: int = 5
    counts: dict[str, int] = field(default_factory=lambda: {"optics": 0, "halving": 0})


def split_large_cells(
    cells: list[WorkingCell], latitude: np.ndarray, longitude: np.ndarray, settings: SplitSettings
) -> list[WorkingCell]:
    """Split cells of one country until none holds more than `max_size` points.

    For each OPTICS setting in turn, cells that are too large are split, and their parts again, as long as clusters part them.
    Cells that are still too large then are halved. Every part holds at least `min_size` points, and every point goes to the part
    that covers it, or to the nearest part if it lies outside the cell.

    Args:
        cells: cells of one country, in one frame.
        latitude, longitude: [points] of the country, degrees in that frame; `WorkingCell.points` are rows of them.
        settings: sizes and OPTICS settings; `settings.counts` is counted up by the splits of each kind.

    Returns:
        Cells with disjoint polygons. One that stays too large holds coinciding points that no line parts into two large halves.
    """
    done = list(cells)
    for min_samples, xi in settings.optics:
        queue, done = done, []
        while queue:
            cell = queue.pop(0)
            if cell.size <= settings.max_size:
                done.append(cell)
                continue
            if cell.size > MAX_OPTICS_POINTS:
                parts = _halve(cell, latitude, longitude, settings)
                kind = "halving"
            else:
                parts = _split_by_optics(cell, latitude, longitude, settings, min_samples, xi)
                kind = "optics"
            if parts:
                settings.counts[kind] += 1
                queue = parts + queue
            else:
                done.append(cell)
    queue, done = done, []
    while queue:
        cell = queue.pop(0)
        parts = _halve(cell, latitude, longitude, settings) if cell.size > settings.max_size else None
        if parts:
            settings.counts["halving"] += 1
            queue = parts + queue
        else:
            done.append(cell)
    return done


def optics_labels(latitude: np.ndarray, longitude: np.ndarray, min_samples: int, xi: float) -> np.ndarray:
    """Cluster of each point by OPTICS on the sphere, -1 for noise. Arrays [n] in degrees; the order of points does not matter.

    Distances are chords between unit vectors, which rank as great circles do; points that coincide are 0.1 mm apart.
    """
    from sklearn.cluster import cluster_optics_xi

    if len(latitude) < max(min_samples, 2):
        return np.full(len(latitude), -1)
    order = np.lexsort((longitude, latitude))
    ordering, reachability, predecessor = _optics_graph(unit_vectors(latitude[order], longitude[order]), min_samples)
    labels, _ = cluster_optics_xi(
        # steepness is a ratio of reachabilities, which zeros have none of
        reachability=np.maximum(reachability, 1.5e-11),
        predecessor=predecessor,
        ordering=ordering,
        min_samples=min_samples,
        xi=xi,
    )
    result = np.empty(len(labels), dtype=np.int64)
    result[order] = labels
    return result


def _optics_graph(vectors: np.ndarray, min_samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order, reachability and predecessor of OPTICS without a largest distance (Ankerst et al. 1999).

    The same as scikit-learn's `compute_optics_graph`, whose checks of arguments take milliseconds a point.
    """
    x, y, z = np.ascontiguousarray(vectors.T)
    n = len(x)

    def distances(rows: Any) -> np.ndarray:
        return np.sqrt((x - x[rows, None]) ** 2 + (y - y[rows, None]) ** 2 + (z - z[rows, None]) ** 2)

    blocks = [np.arange(start, min(start + 256, n)) for start in range(0, n, 256)]
    # a point is its own first neighbour
    core = np.concatenate([np.partition(distances(rows), min_samples - 1, axis=1)[:, min_samples - 1] for rows in blocks])
    reachability, predecessor = np.full(n, np.inf), np.full(n, -1)
    ordering = np.empty(n, dtype=np.int64)
    # what to visit next: the nearest point reached, else the first of those that are left; chords are at most 2
    waiting = np.full(n, 3.0)
    for step in range(n):
        point = int(np.argmin(waiting))
        ordering[step], reachability[point] = point, waiting[point] if waiting[point] < 3.0 else np.inf
        waiting[point] = np.inf
        reached = np.maximum(np.sqrt((x - x[point]) ** 2 + (y - y[point]) ** 2 + (z - z[point]) ** 2), core[point])
        nearer = (reached < waiting) & np.isfinite(waiting)
        waiting[nearer], predecessor[nearer] = reached[nearer], point
    return ordering, reachability, predecessor


def voronoi_regions(sites: np.ndarray, polygon: Any) -> np.ndarray:
    """Voronoi region of each site, around and beyond a polygon.

    Args:
        sites: [n, 2] different (longitude, latitude) in degrees, in the polygon's frame.
        polygon: what the regions must reach beyond.

    Returns:
        [n] shapely polygons in the order of the sites. Degrees of longitude count by the cosine of the sites' mean latitude, so
        that "nearest" is right on the ground; where the polygon goes around the Earth, so do the regions.
    """
    import shapely

    shrink = max(float(np.cos(np.radians(sites[:, 1].mean()))), 0.01)
    west, south, east, north = polygon.bounds
    repeated = [sites]
    if east - west > 180.0:
        repeated += [sites - (360.0, 0.0), sites + (360.0, 0.0)]
    scaled = np.concatenate(repeated) * (shrink, 1.0)
    reach = shapely.box((west - 1.0) * shrink, south - 1.0, (east + 1.0) * shrink, north + 1.0)
    if len(sites) == 1:
        return np.array([shapely.box(west - 1.0, south - 1.0, east + 1.0, north + 1.0)], dtype=object)
    regions = shapely.get_parts(shapely.voronoi_polygons(shapely.multipoints(scaled), extend_to=reach, ordered=True))
    regions = shapely.transform(regions, lambda xy: xy / (shrink, 1.0))
    if len(repeated) == 1:
        return regions
    n = len(sites)
    return np.array([shapely.union_all(regions[[i, i + n, i + 2 * n]]) for i in range(n)], dtype=object)


def _split_by_optics(
    cell: WorkingCell, latitude: np.ndarray, longitude: np.ndarray, settings: SplitSettings, min_samples: int, xi: float
) -> list[WorkingCell] | None:
    import shapely

    lat, lng = latitude[cell.points], longitude[cell.points]
    labels = optics_labels(lat, lng, min_samples, xi)
    sizes = np.bincount(labels[labels >= 0]) if (labels >= 0).any() else np.zeros(0, dtype=np.int64)
    large = np.flatnonzero(sizes >= settings.min_size)
    noise = ~np.isin(labels, large)
    if not len(large) or (len(large) == 1 and not settings.min_size <= noise.sum() <= settings.max_size):
        return None

    step = 10.0**-settings.decimals
    # coordinates in which a step north and a step east are equally long
    ground = np.stack([lng * np.cos(np.radians(lat.mean())), lat], axis=1)
    means = np.array([ground[labels == group].mean(axis=0) for group in large])
    if len(large) > 2:
        sites = np.array([(lng[labels == group].mean(), lat[labels == group].mean()) for group in large])
        regions = voronoi_regions(sites, cell.polygon)
        polygons = list(shapely.intersection(regions, cell.polygon, grid_size=step))
    else:
        if len(large) == 2:
            group = (((ground[:, None] - means) ** 2).sum(axis=-1)).argmin(axis=1)
            group = np.where(noise, group, np.searchsorted(large, labels))
            # the smaller one is carved out of the cell
            carved = group == np.argmin(np.bincount(group, minlength=2))
        else:
            carved = ~noise
        sites, site_of = np.unique(np.stack([lng, lat], axis=1), axis=0, return_inverse=True)
        inside = np.unique(site_of.ravel()[carved])
        area = shapely.intersection(shapely.union_all(voronoi_regions(sites, cell.polygon)[inside]), cell.polygon, grid_size=step)
        rings = shapely.get_exterior_ring(shapely.get_parts(_polygonal(area)))
        # what a cluster encloses belongs to it, but holes of the cell itself stay
        area = _polygonal(shapely.intersection(shapely.union_all(shapely.polygons(rings)), cell.polygon, grid_size=step))
        polygons = [area, shapely.difference(cell.polygon, area, grid_size=step)]
    return _parts(cell, [_polygonal(polygon) for polygon in polygons], lat, lng, settings)


def _halve(cell: WorkingCell, latitude: np.ndarray, longitude: np.ndarray, settings: SplitSettings) -> list[WorkingCell] | None:
    """Two halves by a straight line through one of the widest gaps between the points, or None."""
    import shapely

    lat, lng = latitude[cell.points], longitude[cell.points]
    shrink = max(float(np.cos(np.radians(lat.mean()))), 0.01)
    ground = np.stack([lng * shrink, lat], axis=1)
    # a point outside the cell counts where the nearest part is, so its foot on the cell's border must lie on the right side
    scaled = shapely.transform(cell.polygon, lambda xy: xy * (shrink, 1.0))
    shapely.prepare(scaled)
    outside = ~shapely.intersects_xy(scaled, ground)
    if outside.any():
        ground[outside] = shapely.get_coordinates(shapely.shortest_line(scaled, shapely.points(ground[outside])))[::2]
    step = 10.0**-settings.decimals
    tried: list[list[Any]] = []
    tall = np.ptp(ground[:, 1]) > np.ptp(ground[:, 0])
    # a quarter of the points on either side, or else as many as a cell must have
    for margin in dict.fromkeys((max(settings.min_size, cell.size // 4), settings.min_size)):
        for angle in HALVING_ANGLES:
            turn = np.radians(angle + (90.0 if tall else 0.0))
            direction = np.array([np.cos(turn), np.sin(turn)])
            position = np.sort(ground @ direction)
            gaps = np.diff(position)[margin - 1 : cell.size - margin]
            for gap in np.argsort(-gaps, kind="stable")[:CUTS_PER_ANGLE]:
                if gaps[gap] <= 0:
                    break
                middle = position[margin - 1 + gap] + gaps[gap] / 2
                across = np.array([-direction[1], direction[0]]) * 1e4
                corners = np.array(
                    [middle * direction + a * 1e4 * direction + b * across for a, b in ((0, -1), (0, 1), (1, 1), (1, -1))]
                )
                half = shapely.polygons(corners / (shrink, 1.0))
                here = shapely.intersection(cell.polygon, half, grid_size=step)
                there = shapely.difference(cell.polygon, half, grid_size=step)
                halves = [_polygonal(here), _polygonal(there)]
                parts = _parts(cell, halves, lat, lng, settings)
                if parts:
                    return parts
                tried.append(halves)
    # several islands, none of which fills a cell: then a line may part one of them
    attempts = (_parts(cell, halves, lat, lng, settings, keep_fragments=True) for halves in tried)
    return next((parts for parts in attempts if parts), None)


def _polygonal(shape: Any) -> Any:
    """The polygons of a shape, without the lines and points that an intersection leaves where borders only touch."""
    import shapely

    if shape.geom_type in ("Polygon", "MultiPolygon"):
        return shape
    parts = shapely.get_parts(shape)
    parts = shapely.get_parts(parts[np.isin(shapely.get_type_id(parts), (3, 6))])
    return shapely.multipolygons(parts)


def _parts(
    cell: WorkingCell,
    polygons: list[Any],
    lat: np.ndarray,
    lng: np.ndarray,
    settings: SplitSettings,
    *,
    keep_fragments: bool = False,
) -> list[WorkingCell] | None:
    """Cells from the parts of a polygon, each of at least min_size points; None if fewer than two come of it."""
    import shapely

    shapes = np.array([polygon for polygon in polygons if not shapely.is_empty(polygon)], dtype=object)
    if len(shapes) < 2:
        return None
    if not keep_fragments:
        shapes = _without_fragments(shapes, lat, lng, settings.min_size)
    owners = PolygonIndex(shapes).locate(lat, lng)
    groups = [[i] for i in range(len(shapes))]
    sizes = np.bincount(owners, minlength=len(shapes))
    while len(groups) > 1 and min(sizes[group].sum() for group in groups) < settings.min_size:
        smallest = min(range(len(groups)), key=lambda g: (sizes[groups[g]].sum(), g))
        group = groups.pop(smallest)
        nearest = _neighbour(shapely.union_all(shapes[group]), [shapely.union_all(shapes[g]) for g in groups])
        groups[nearest] += group
    if len(groups) < 2:
        return None
    return [
        WorkingCell(
            polygon=shapely.union_all(shapes[sorted(group)]) if len(group) > 1 else shapes[group[0]],
            points=cell.points[np.isin(owners, group)],
            region=cell.region,
            unit=cell.unit,
        )
        for group in groups
    ]


def _without_fragments(shapes: np.ndarray, lat: np.ndarray, lng: np.ndarray, min_size: int) -> np.ndarray:
    """Pieces that a split cut off from their part go to the part that they border on.

    A piece goes if it holds fewer than min_size points, is not the piece with the most points of its part, and shares a border
    with another part. Islands share none, so they stay.
    """
    import shapely

    pieces, part = shapely.get_parts(shapes, return_index=True)
    if len(pieces) == len(shapes):
        return shapes
    sizes = np.bincount(PolygonIndex(pieces).locate(lat, lng), minlength=len(pieces))
    areas = shapely.area(pieces)
    order = np.lexsort((-areas, -sizes, part))
    main = order[np.concatenate([[True], part[order][1:] != part[order][:-1]])]
    loose = np.setdiff1d(np.flatnonzero(sizes < min_size), main)
    if not len(loose):
        return shapes
    tree = shapely.STRtree(pieces[main])
    new_part = part.copy()
    for piece in loose:
        near = tree.query(pieces[piece], predicate="intersects")
        near = near[part[main[near]] != part[piece]]
        if len(near):
            common = shapely.length(shapely.intersection(pieces[piece], pieces[main[near]]))
            if common.max() > 0:
                new_part[piece] = part[main[near[np.argmax(common)]]]
    return np.array([shapely.union_all(pieces[new_part == i]) for i in range(len(shapes))], dtype=object)


def _neighbour(shape: Any, others: list[Any]) -> int:
    """Index of the shape with the longest common border, or of the nearest."""
    import shapely

    candidates = np.array(others, dtype=object)
    common = shapely.length(shapely.intersection(shape, candidates))
    return int(np.argmax(common)) if common.max() > 0 else int(np.argmin(shapely.distance(shape, candidates)))


__all__ = [
    "MAX_OPTICS_POINTS",
    "PIGEON_OPTICS",
    "PIGEOTTO_OPTICS",
    "SplitSettings",
    "optics_labels",
    "split_large_cells",
    "voronoi_regions",
]
