"""Distances, means and boxes on the sphere. Latitudes and longitudes are degrees, distances kilometres.

Every function here is right across the dateline and at the poles: it works on angles or on unit vectors, never on differences
of longitudes taken as they stand.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

EARTH_RADIUS_KM = 6371.0088  # mean radius (IUGG)
PIGEON_EARTH_RADIUS_KM = 6378.137  # equatorial radius: 0.11 % more; what PIGEON measures distances with


def _is_tensor(value: Any) -> bool:
    # torch is not imported for this: who passes a tensor has imported it
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def haversine_km(
    latitude_a: Any, longitude_a: Any, latitude_b: Any, longitude_b: Any, *, radius_km: float = EARTH_RADIUS_KM
) -> Any:
    """Great-circle distance between points, element by element, with broadcasting.

    Args:
        latitude_a, longitude_a, latitude_b, longitude_b: degrees; numpy arrays (or numbers), or torch tensors. One tensor
            among them makes the result a tensor, on its device and differentiable; float32 is exact to about a metre.
        radius_km: radius of the sphere; `PIGEON_EARTH_RADIUS_KM` for PIGEON's numbers.

    Returns:
        Kilometres, of the broadcast shape.

    Example:
        >>> float(haversine_km(48.8566, 2.3522, 51.5072, -0.1276).round(1))  # Paris, London
        343.5
    """
    values = (latitude_a, longitude_a, latitude_b, longitude_b)
    if any(_is_tensor(value) for value in values):
        return _haversine_torch(values, radius_km)
    lat_a, lng_a, lat_b, lng_b = (np.radians(np.asarray(value, dtype=np.float64)) for value in values)
    half = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lng_b - lng_a) / 2) ** 2
    # rounding takes antipodes above 1
    return 2 * radius_km * np.arcsin(np.sqrt(np.minimum(half, 1.0)))


def _haversine_torch(values: tuple[Any, ...], radius_km: float) -> Any:
    import torch

    like = next(value for value in values if _is_tensor(value))
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    lat_a, lng_a, lat_b, lng_b = (torch.deg2rad(torch.as_tensor(value, device=like.device).to(dtype)) for value in values)
    half = torch.sin((lat_b - lat_a) / 2) ** 2 + torch.cos(lat_a) * torch.cos(lat_b) * torch.sin((lng_b - lng_a) / 2) ** 2
    return 2 * radius_km * torch.asin(torch.sqrt(half.clamp(max=1.0)))


def haversine_matrix_km(a: Any, b: Any, *, radius_km: float = EARTH_RADIUS_KM) -> Any:
    """Distances between all points of two lists.

    Args:
        a: [n, 2] (latitude, longitude) in degrees, array or tensor.
        b: [m, 2], likewise.

    Returns:
        [n, m] kilometres.

    Raises:
        ValueError: a or b is not of shape [points, 2].
    """
    a, b = (value if _is_tensor(value) else np.asarray(value, dtype=np.float64) for value in (a, b))
    for name, value in (("a", a), ("b", b)):
        if value.ndim != 2 or value.shape[1] != 2:
            raise ValueError(f"{name} must be [points, 2] (latitude, longitude), not of shape {tuple(value.shape)}")
    return haversine_km(a[:, None, 0], a[:, None, 1], b[None, :, 0], b[None, :, 1], radius_km=radius_km)


def check_coordinates(
    latitude: "ArrayLike", longitude: "ArrayLike", *, name: str = "coordinates"
) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes as float64 arrays, or a clear error.

    Args:
        latitude, longitude: degrees, of one shape.
        name: what the error calls them.

    Returns:
        (latitude, longitude), float64.

    Raises:
        ValueError: other shapes, NaN or infinity, latitude outside [-90, 90] (the message says so when the two look swapped),
            longitude outside [-180, 180].
    """
    try:
        lat, lng = np.asarray(latitude, dtype=np.float64), np.asarray(longitude, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: latitudes and longitudes must be numbers of one shape ({error})") from error
    if lat.shape != lng.shape:
        raise ValueError(
            f"{name}: latitudes of shape {lat.shape} but longitudes of shape {lng.shape}; give one of each per point"
        )

    def place(bad: np.ndarray) -> str:
        index = np.unravel_index(int(np.argmax(bad)), bad.shape) if bad.ndim else ()
        where = f" at position {', '.join(map(str, index))}" if index else ""
        return f"{name}{where}: latitude {lat[index]}, longitude {lng[index]}"

    bad = ~(np.isfinite(lat) & np.isfinite(lng))
    if bad.any():
        raise ValueError(f"{place(bad)} is not finite; leave out points without coordinates ({int(bad.sum())} of {bad.size})")
    bad = np.abs(lat) > 90
    if bad.any():
        swapped = bool(np.all(np.abs(lng[bad]) <= 90) and np.all(np.abs(lat[bad]) <= 180))
        hint = "are latitude and longitude swapped?" if swapped else "latitudes lie between -90 and 90 degrees"
        raise ValueError(f"{place(bad)}: {hint}")
    bad = np.abs(lng) > 180
    if bad.any():
        raise ValueError(f"{place(bad)}: longitudes lie between -180 and 180 degrees; wrap_longitude brings others there")
    return lat, lng


def wrap_longitude(longitude: "ArrayLike") -> np.ndarray:
    """Longitudes brought to [-180, 180); values that lie in it already stay as they are, to the last bit."""
    lng = np.asarray(longitude, dtype=np.float64)
    return np.where((lng >= -180) & (lng < 180), lng, (lng + 180) % 360 - 180)


def unit_vectors(latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
    """[..., 3] unit vectors: x to latitude 0, longitude 0; z to the north pole."""
    lat, lng = np.radians(np.asarray(latitude, dtype=np.float64)), np.radians(np.asarray(longitude, dtype=np.float64))
    return np.stack([np.cos(lat) * np.cos(lng), np.cos(lat) * np.sin(lng), np.sin(lat)], axis=-1)


def from_unit_vectors(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(latitude, longitude) in degrees of vectors [..., 3], which need not be of length one."""
    latitude = np.degrees(np.arctan2(vectors[..., 2], np.hypot(vectors[..., 0], vectors[..., 1])))
    return latitude, np.degrees(np.arctan2(vectors[..., 1], vectors[..., 0]))


def spherical_mean(latitude: "ArrayLike", longitude: "ArrayLike", weights: "ArrayLike | None" = None) -> tuple[float, float]:
    """Mean of points on the sphere: the direction of the sum of their unit vectors.

    Raises:
        ValueError: no points, weights that are negative or sum to nothing, or points that cancel each other (antipodes).

    Example:
        >>> latitude, longitude = spherical_mean([0, 0], [179, -177])
        >>> round(longitude)
        -179
    """
    lat, lng = check_coordinates(latitude, longitude)
    vectors = unit_vectors(lat.ravel(), lng.ravel())
    if not len(vectors):
        raise ValueError("the mean of no points is not defined; give at least one")
    factors = np.ones(len(vectors)) if weights is None else np.asarray(weights, dtype=np.float64).ravel()
    if factors.shape != (len(vectors),) or not np.isfinite(factors).all() or (factors < 0).any() or factors.sum() <= 0:
        raise ValueError(f"weights must be {len(vectors)} numbers of at least 0 that do not sum to 0, not {weights!r}")
    total = factors @ vectors / factors.sum()
    if np.linalg.norm(total) < 1e-9:
        raise ValueError("the points cancel each other (they lie around the whole Earth), so they have no mean direction")
    mean_latitude, mean_longitude = from_unit_vectors(total)
    return float(mean_latitude), float(mean_longitude)


def grouped_spherical_means(latitude: "ArrayLike", longitude: "ArrayLike", groups: "ArrayLike", count: int) -> np.ndarray:
    """Spherical mean of every group of points.

    Args:
        latitude, longitude: [n] degrees.
        groups: [n] group of each point, 0 to count - 1.
        count: number of groups.

    Returns:
        [count, 2] (latitude, longitude); NaN for a group without points. A group whose points cancel each other has no mean
        direction and gets its first point.
    """
    lat, lng = check_coordinates(latitude, longitude)
    labels = np.asarray(groups)
    vectors = unit_vectors(lat, lng)
    sums = np.stack([np.bincount(labels, weights=vectors[:, axis], minlength=count) for axis in range(3)], axis=1)
    sizes = np.bincount(labels, minlength=count)
    means = np.stack(from_unit_vectors(sums), axis=1)
    for group in np.flatnonzero((sizes > 0) & (np.linalg.norm(sums, axis=1) < 1e-9 * np.maximum(sizes, 1))):
        first = int(np.argmax(labels == group))
        means[group] = lat[first], lng[first]
    means[sizes == 0] = np.nan
    return means


@dataclass(frozen=True, slots=True)
class BoundingBox:
    """A box of latitudes and longitudes in degrees. Where west > east, it goes over the dateline."""

    south: float
    west: float
    north: float
    east: float

    def __post_init__(self) -> None:
        check_coordinates([self.south, self.north], [self.west, self.east], name="bounding box")
        if self.south > self.north:
            raise ValueError(f"south {self.south} lies north of north {self.north}; swap them")

    @property
    def width(self) -> float:
        """Degrees of longitude."""
        return self.east - self.west + (360.0 if self.west > self.east else 0.0)

    @property
    def height(self) -> float:
        """Degrees of latitude."""
        return self.north - self.south

    def contains(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Whether points lie in the box or on its edge; at a pole the longitude does not matter."""
        lat, lng = check_coordinates(latitude, longitude)
        # 180 and -180 are one meridian
        offset = (lng - self.west) % 360
        inside = (offset <= self.width) | (np.abs(lat) == 90)
        return (lat >= self.south) & (lat <= self.north) & inside


def bounding_box(latitude: "ArrayLike", longitude: "ArrayLike") -> BoundingBox:
    """The narrowest box around points: it leaves out the widest gap between their longitudes.

    Raises:
        ValueError: no points.

    Example:
        >>> bounding_box([-17, -16], [179, -179])
        BoundingBox(south=-17.0, west=179.0, north=-16.0, east=-179.0)
    """
    lat, lng = check_coordinates(latitude, longitude)
    if not lat.size:
        raise ValueError("the bounding box of no points is not defined; give at least one")
    lngs = np.unique(lng)
    gaps = np.append(lngs[1:], lngs[0] + 360) - lngs
    last = int(np.argmax(gaps))
    return BoundingBox(float(lat.min()), float(lngs[(last + 1) % len(lngs)]), float(lat.max()), float(lngs[last]))


__all__ = [
    "EARTH_RADIUS_KM",
    "PIGEON_EARTH_RADIUS_KM",
    "BoundingBox",
    "bounding_box",
    "check_coordinates",
    "from_unit_vectors",
    "grouped_spherical_means",
    "haversine_km",
    "haversine_matrix_km",
    "spherical_mean",
    "unit_vectors",
    "wrap_longitude",
]
