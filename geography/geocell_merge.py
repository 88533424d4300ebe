"""Merging of geocells that hold too few points (PIGEON, section 3.1): in the same region first, never across a country."""

from dataclasses import dataclass
from typing import Any

import numpy as np

TOUCHING_SCALE = 1.01  # of a cell's shape around its middle: what it then meets is its neighbour
REACHING_SCALE = 2.0  # the second try, over water or over land that belongs to nobody


@dataclass
class WorkingCell:
    """A cell of one country while cells are being built.

    `polygon` is a shapely (multi)polygon in the country's frame (see `CountryFrame`), `points` [n] are rows of the country's
    points, `region` and `unit` the administrative names it started with.
    """

    polygon: Any
    points: np.ndarray
    region: str
    unit: str

    @property
    def size(self) -> int:
        """Number of points."""
        return len(self.points)


@dataclass(frozen=True)
class CountryFrame:
    """Longitudes of a country made contiguous: what lies west of `cut` is moved 360 degrees to the east.

    The cut is the middle of the widest gap between the country's parts, so that no part of it is far from the others only because
    the dateline lies between them. Around the pole there is no gap; then nothing moves.
    """

    cut: float

    @classmethod
    def around(cls, polygons: np.ndarray) -> "CountryFrame":
        """Frame of polygons in [-180, 180]."""
        import shapely

        bounds = shapely.bounds(shapely.get_parts(polygons))
        order = np.argsort(bounds[:, 0], kind="stable")
        starts, ends = bounds[order, 0], np.maximum.accumulate(bounds[order, 2])
        gaps = np.append(starts[1:], starts[0] + 360.0) - ends
        widest = int(np.argmax(gaps))
        # a gap over the dateline needs no cut
        if gaps[widest] <= 0 or widest == len(gaps) - 1:
            return cls(-180.0)
        return cls(float(ends[widest] + gaps[widest] / 2))

    def longitudes(self, longitude: np.ndarray) -> np.ndarray:
        """Longitudes of points, in the frame."""
        return np.where(longitude < self.cut, longitude + 360.0, longitude)

    def enter(self, polygon: Any) -> Any:
        """A polygon in [-180, 180], in the frame; parts that met at the dateline become one."""
        import shapely

        if self.cut == -180.0:
            return polygon
        parts = shapely.get_parts(polygon)
        west = shapely.bounds(parts)[:, 2] < self.cut
        if not west.any():
            return polygon
        moved = np.where(west, shapely.transform(parts, lambda xy: xy + (360.0, 0.0)), parts)
        return shapely.union_all(moved)

    def leave(self, polygon: Any) -> Any:
        """A polygon in the frame, back in [-180, 180] and cut at the dateline."""
        import shapely

        if polygon.bounds[2] <= 180.0:
            return polygon
        here = shapely.intersection(polygon, shapely.box(-180.0, -90.0, 180.0, 90.0))
        beyond = shapely.intersection(polygon, shapely.box(180.0, -90.0, 540.0, 90.0))
        parts = shapely.get_parts([here, shapely.transform(beyond, lambda xy: xy - (360.0, 0.0))])
        parts = shapely.get_parts(parts)
        return shapely.multipolygons(parts[(shapely.get_type_id(parts) == 3) & ~shapely.is_empty(parts)])


def merge_small_cells(cells: list[WorkingCell], *, min_size: int, rng: np.random.Generator) -> list[WorkingCell]:
    """Merge cells of one country until each holds `min_size` points or has no neighbour left.

    A small cell is taken at random. It absorbs the largest of the neighbours that it finds in the first of these groups that is
    not empty: small cells of its region; any cell of its region; small cells of the country; any cell of the country; any cell
    that its shape meets when doubled. A cell that finds nobody stays as it is.

    Args:
        cells: cells of one country, in one frame, of a clean coverage.
        min_size: points that a cell should have.
        rng: decides which small cell comes next; the result depends on its seed alone.

    Returns:
        The cells that remain, in the order of `cells`. An absorbing cell keeps its names.
    """
    import shapely
    from shapely import affinity

    originals = np.array([cell.polygon for cell in cells], dtype=object)
    tree = shapely.STRtree(originals)
    alive: dict[int, WorkingCell] = {i: WorkingCell(c.polygon, c.points, c.region, c.unit) for i, c in enumerate(cells)}
    members = {i: [i] for i in alive}
    cell_of = np.arange(len(cells))
    small = [i for i in alive if alive[i].size < min_size]

    while small and len(alive) > 1:
        i = small[int(rng.integers(len(small)))]
        cell = alive[i]
        chosen = None
        for scale in (TOUCHING_SCALE, REACHING_SCALE):
            shape = affinity.scale(cell.polygon, scale, scale)
            found = np.setdiff1d(cell_of[tree.query(shape, predicate="intersects")], [i])
            groups = (
                [j for j in found if alive[j].region == cell.region and alive[j].size < min_size],
                [j for j in found if alive[j].region == cell.region],
                [j for j in found if alive[j].size < min_size],
                list(found),
            )
            # doubled shapes take whom they meet, wherever it belongs
            group = next((group for group in groups[0 if scale == TOUCHING_SCALE else 3 :] if group), None)
            if group:
                chosen = int(max(group, key=lambda j: (alive[j].size, -j)))
                break
        if chosen is None:
            small.remove(i)
            continue
        other = alive.pop(chosen)
        members[i] += members.pop(chosen)
        cell_of[members[i]] = i
        cell.polygon = shapely.union_all(originals[members[i]])
        cell.points = np.sort(np.concatenate([cell.points, other.points]))
        if chosen in small:
            small.remove(chosen)
        if cell.size >= min_size:
            small.remove(i)
    return [alive[i] for i in sorted(alive)]


__all__ = ["CountryFrame", "WorkingCell", "merge_small_cells"]
