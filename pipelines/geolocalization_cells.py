"""Areas of a PIGEON model's geocells, as maps draw them."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from geobased.geography.coordinates import EARTH_RADIUS_KM, from_unit_vectors, unit_vectors

if TYPE_CHECKING:
    from .image_geolocalization import ImageGeolocalizationPipeline

# cells that a map shows, and the least probability that can be seen on it
MAX_CELLS, LEAST_PROBABILITY = 40, 0.002
# degrees: borders finer than this cannot be seen
SIMPLIFICATION = 0.02
NEIGHBOURS = 48
CIRCLE_POINTS = 36
# a cell without any neighbour on one side ends there, at so many times its radius
REACH, LEAST_REACH_KM, MOST_REACH_KM = 1.6, 60.0, 1500.0
# degrees between a centroid of the model and of the package's geocells that are the same
SAME_DEGREES = 1e-3


@dataclass(frozen=True)
class CellArea:
    """A geocell on a map: its probability, and rings [points, 2] of (longitude, latitude) in degrees, which may run past 180."""

    geocell: int
    probability: float
    rings: tuple[np.ndarray, ...]


class CellAreas:
    """Where the geocells of a PIGEON model lie.

    A model saves its cells' centroids and radii, not their borders. If its cells are those of the package, their borders are
    taken from there (`exact`); else a cell is drawn as what is nearer to its centroid than to any other, and not farther than
    about its radius.

    Args:
        centroids: [cells, 2] (latitude, longitude) in degrees.
        radii_km: [cells].

    Raises:
        ValueError: lengths that do not fit.
    """

    def __init__(self, centroids: np.ndarray, radii_km: np.ndarray) -> None:
        self.centroids, self.radii_km = np.asarray(centroids, dtype=np.float64), np.asarray(radii_km, dtype=np.float64)
        if self.centroids.shape != (len(self.radii_km), 2):
            raise ValueError(f"centroids must be [{len(self.radii_km)}, 2], as many as radii, not {self.centroids.shape}")
        self._vectors = unit_vectors(*self.centroids.T)
        self._rings: dict[int, tuple[np.ndarray, ...]] = {}

    @classmethod
    def of(cls, pipe: "ImageGeolocalizationPipeline") -> "CellAreas | None":
        """Those of a pipeline's model; None for a model without geocells."""
        if (table := getattr(pipe.model, "geocells", None)) is None:
            return None
        return cls(table.centroids().double().cpu().numpy(), table.radii_km().double().cpu().numpy())

    @cached_property
    def _polygons(self) -> Any:
        """The package's polygons if the cells are the package's."""
        from geobased.geography.geocell_collection import Geocells

        world = Geocells.world()
        if len(world) != len(self.centroids) or np.abs(world.centroids - self.centroids).max() > SAME_DEGREES:
            return None
        import shapely

        return shapely.coverage_simplify(world.polygons, SIMPLIFICATION)

    @property
    def exact(self) -> bool:
        """Whether areas are the cells' own."""
        return self._polygons is not None

    def areas(self, cells: list[dict[str, Any]]) -> tuple[CellArea, ...]:
        """The areas of the likeliest cells, from what the pipeline gives as `cells`: those that can be seen on a map."""
        shown = [cell for cell in cells if cell["probability"] >= LEAST_PROBABILITY][:MAX_CELLS]
        return tuple(CellArea(cell["geocell"], cell["probability"], self.rings(cell["geocell"])) for cell in shown)

    def rings(self, cell: int) -> tuple[np.ndarray, ...]:
        """Outlines of a cell; no ring has less than three points."""
        if cell not in self._rings:
            self._rings[cell] = self._outlines(cell)
        return self._rings[cell]

    def _outlines(self, cell: int) -> tuple[np.ndarray, ...]:
        if self._polygons is None:
            ring = self._nearest_area(cell)
            # centroids at one place leave nothing between them
            return (ring,) if len(ring) > 2 else ()
        import shapely

        parts = shapely.get_parts(self._polygons[cell])
        return tuple(shapely.get_coordinates(shapely.get_exterior_ring(part)) for part in parts)

    def _nearest_area(self, cell: int) -> np.ndarray:
        """The spherical Voronoi cell, in a gnomonic projection, where it is a polygon with straight edges."""
        centre = self._vectors[cell]
        latitude, longitude = np.radians(self.centroids[cell])
        east = np.array([-np.sin(longitude), np.cos(longitude), 0.0])
        north = np.cross(centre, east)
        reach = np.clip(REACH * self.radii_km[cell], LEAST_REACH_KM, MOST_REACH_KM) / EARTH_RADIUS_KM
        turn = np.linspace(0, 2 * np.pi, CIRCLE_POINTS, endpoint=False)
        ring = np.tan(reach) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        nearest = np.argsort(-self._vectors @ centre, kind="stable")[1 : NEIGHBOURS + 1]
        for other in self._vectors[nearest]:
            away = centre - other
            # x east + y north + centre is on this side where its product with `away` is not negative
            ring = _half_plane(ring, np.array([east @ away, north @ away]), centre @ away)
        places = centre + ring[:, :1] * east + ring[:, 1:] * north
        lat, lng = from_unit_vectors(places)
        # around the centroid, also across the date line
        middle = self.centroids[cell, 1]
        return np.stack([middle + (lng - middle + 180) % 360 - 180, lat], axis=1)


def _half_plane(ring: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    """The part of a convex ring [points, 2] where normal @ point + offset >= 0."""
    values = ring @ normal + offset
    if (values >= 0).all():
        return ring
    kept: list[np.ndarray] = []
    for point, value, following, next_value in zip(ring, values, np.roll(ring, -1, axis=0), np.roll(values, -1), strict=True):
        if value >= 0:
            kept.append(point)
        if (value >= 0) != (next_value >= 0):
            kept.append(point + value / (value - next_value) * (following - point))
    return np.array(kept).reshape(-1, 2)


__all__ = ["CellArea", "CellAreas"]
