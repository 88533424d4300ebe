"""Nearest polygon on the sphere, by numpy and shapely alone.

Whether a polygon covers a point is decided in the plane of longitude and latitude, as every map file means it. How far a point
outside lies from a polygon is decided on the sphere, along great circles, so the dateline, the poles and high latitudes need no
special case. Edges are arcs of great circles here, which for edges of up to a degree is the straight line of the map to 100 m.
"""

import numpy as np

from geobased.geography.coordinates import EARTH_RADIUS_KM, unit_vectors

SEGMENTS_PER_CHUNK = 32
QUERIES_PER_BLOCK = 256


class PolygonIndex:
    """Index over polygons in degrees, for the questions "which polygon covers this point" and "which is nearest to it".

    Args:
        polygons: object array of shapely polygons or multipolygons, x = longitude in [-180, 180], y = latitude.

    Raises:
        ValueError: no polygons, or an empty one.
    """

    def __init__(self, polygons: np.ndarray) -> None:
        import shapely

        self.polygons = np.asarray(polygons, dtype=object)
        if not len(self.polygons):
            raise ValueError("there are no polygons to search in")
        empty = shapely.is_empty(self.polygons)
        if empty.any():
            raise ValueError(f"polygon {int(np.argmax(empty))} is empty; leave empty polygons out")
        self.tree = shapely.STRtree(self.polygons)
        self._chunks: tuple[np.ndarray, ...] | None = None

    def covering(self, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        """Index of the polygon that covers each point, the first of several, or -1. Arrays [n] in degrees."""
        import shapely

        # all longitudes are the same point at a pole; 180 and -180 are one meridian
        x = np.where(np.abs(latitude) == 90, 0.0, longitude)
        found = np.full(len(x), len(self.polygons))
        for meridian in (None, 180.0, -180.0):
            at = np.arange(len(x)) if meridian is None else np.flatnonzero(x == -meridian)
            if len(at):
                lng = x[at] if meridian is None else np.full(len(at), meridian)
                point, polygon = self.tree.query(shapely.points(lng, latitude[at]), predicate="intersects")
                np.minimum.at(found, at[point], polygon)
        return np.where(found < len(self.polygons), found, -1)

    def nearest(self, latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest polygon's index, the first of equally near ones, and kilometres to its boundary. Arrays [n] in degrees.

        Meant for points that no polygon covers: for one inside, this is the distance to a boundary, its own or another's.
        """
        centers, radii, starts, ends, normals, owners = self._boundary()
        points = unit_vectors(latitude, longitude)
        index, distance = np.empty(len(points), dtype=np.int64), np.empty(len(points))
        for begin in range(0, len(points), QUERIES_PER_BLOCK):
            block = points[begin : begin + QUERIES_PER_BLOCK]
            angles = np.arccos(np.clip(block @ centers.T, -1.0, 1.0))
            lower = angles - radii
            upper = (angles + radii).min(axis=1)
            for row, point in enumerate(block):
                chunks = np.flatnonzero(lower[row] <= upper[row] + 1e-9)
                arcs = _point_to_arcs(point, starts[chunks], ends[chunks], normals[chunks])
                per_chunk = arcs.min(axis=1)
                best = per_chunk.min()
                # a border that two polygons share is equally far from both, up to rounding
                index[begin + row] = owners[chunks[per_chunk <= best + 1e-12]].min()
                distance[begin + row] = best
        return index, distance * EARTH_RADIUS_KM

    def locate(self, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        """Index of the polygon that covers each point, else of the nearest one. Arrays [n] in degrees."""
        found = self.covering(latitude, longitude)
        outside = np.flatnonzero(found < 0)
        if len(outside):
            found[outside] = self.nearest(latitude[outside], longitude[outside])[0]
        return found

    def _boundary(self) -> tuple[np.ndarray, ...]:
        """Boundary segments in chunks: cap centers [c, 3], cap radii [c], starts, ends and normals [c, s, 3], owners [c]."""
        if self._chunks is None:
            import shapely

            parts, polygon_of = shapely.get_parts(self.polygons, return_index=True)
            rings, part_of = shapely.get_rings(parts, return_index=True)
            owner = polygon_of[part_of]
            xy, ring = shapely.get_coordinates(rings, return_index=True)
            vectors = unit_vectors(xy[:, 1], xy[:, 0])
            inner = ring[1:] == ring[:-1]
            starts, ends, segment_owner = vectors[:-1][inner], vectors[1:][inner], owner[ring[:-1][inner]]
            # chunks never mix owners; the last segment of an owner fills its last chunk up
            counts = np.bincount(segment_owner, minlength=len(self.polygons))
            chunk_counts = -(-counts // SEGMENTS_PER_CHUNK)
            first = np.concatenate([[0], np.cumsum(counts)[:-1]])
            owners = np.repeat(np.arange(len(counts)), chunk_counts)
            rank = np.arange(len(owners)) - np.repeat(np.cumsum(chunk_counts) - chunk_counts, chunk_counts)
            within = rank[:, None] * SEGMENTS_PER_CHUNK + np.arange(SEGMENTS_PER_CHUNK)
            rows = first[owners][:, None] + np.minimum(within, counts[owners][:, None] - 1)
            starts, ends = starts[rows], ends[rows]
            sums = starts.sum(axis=1) + ends.sum(axis=1)
            lengths = np.linalg.norm(sums, axis=1, keepdims=True)
            centers = np.where(lengths > 1e-6, sums / np.maximum(lengths, 1e-6), starts[:, 0])
            ends_of_all = np.concatenate([starts, ends], axis=1)
            cosines = np.einsum("csk,ck->cs", ends_of_all, centers)
            # an arc of a great circle stays in a cap that holds both its ends, if the cap is at most a hemisphere
            radii = np.arccos(np.clip(cosines.min(axis=1), -1.0, 1.0)) + 1e-9
            radii = np.where(radii > np.pi / 2, np.pi, radii)
            self._chunks = (centers, radii, starts, ends, np.cross(starts, ends), owners)
        return self._chunks


def _point_to_arcs(point: np.ndarray, starts: np.ndarray, ends: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Angle in radians from a point [3] to each arc [..., 3]."""
    lengths = np.linalg.norm(normals, axis=-1)
    height = normals @ point
    # beside the arc (and not before or behind it) the perpendicular counts, else the nearer end
    foot = point - (height / np.maximum(lengths, 1e-15) ** 2)[..., None] * normals
    beside = (
        (np.einsum("...k,...k->...", np.cross(starts, foot), normals) > 0)
        & (np.einsum("...k,...k->...", np.cross(foot, ends), normals) > 0)
        & (lengths > 1e-15)
    )
    perpendicular = np.arcsin(np.clip(np.abs(height) / np.maximum(lengths, 1e-15), 0.0, 1.0))
    chord = np.sqrt(np.minimum(((starts - point) ** 2).sum(axis=-1), ((ends - point) ** 2).sum(axis=-1)))
    to_ends = 2 * np.arcsin(np.clip(chord / 2, 0.0, 1.0))
    return np.where(beside, perpendicular, to_ends)


__all__ = ["PolygonIndex"]
