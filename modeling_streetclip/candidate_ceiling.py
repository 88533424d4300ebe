# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""How near a set of candidate places lets a perfect model come."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geobased.geography.coordinates import EARTH_RADIUS_KM, check_coordinates, haversine_km, unit_vectors

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

RADII_KM = (1.0, 25.0, 200.0, 750.0, 2500.0)  # street, city, region, country, continent
MAX_ELEMENTS = 1 << 23  # of a block of cosines: 64 MB


@dataclass(frozen=True)
class CandidateCeiling:
    """distance_km float64 [points] from each true place to the nearest candidate, which is number nearest int64 [points]."""

    distance_km: np.ndarray
    nearest: np.ndarray

    @property
    def median_km(self) -> float:
        return float(np.median(self.distance_km))

    @property
    def mean_km(self) -> float:
        return float(np.mean(self.distance_km))

    def percent_within(self, radii_km: Sequence[float] = RADII_KM) -> dict[float, float]:
        """Radius -> percentage of points that have a candidate within it (at most so far away)."""
        return {radius: 100 * float(np.mean(self.distance_km <= radius)) for radius in radii_km}


def candidate_ceiling(
    candidate_latitude: "ArrayLike",
    candidate_longitude: "ArrayLike",
    true_latitude: "ArrayLike",
    true_longitude: "ArrayLike",
    *,
    radius_km: float = EARTH_RADIUS_KM,
) -> CandidateCeiling:
    """The best that a choice among candidates can reach for given true places, all in degrees.

    No model that answers with a candidate can be nearer than this; report it beside the model's own distances.

    Raises `ValueError` if there is no candidate or no true place, and for coordinates that are none.

    Example:

    ```python
    >>> ceiling = candidate_ceiling([48.9, 51.5], [2.4, -0.1], [48.8, 55.9], [2.3, -3.2])
    >>> ceiling.nearest.tolist(), ceiling.percent_within([25])
    ([0, 1], {25: 50.0})
    ```
    """
    lat, lng = (x.reshape(-1) for x in check_coordinates(candidate_latitude, candidate_longitude, name="candidates"))
    true_lat, true_lng = (x.reshape(-1) for x in check_coordinates(true_latitude, true_longitude, name="true places"))
    if not len(lat) or not len(true_lat):
        raise ValueError(f"{len(lat)} candidates and {len(true_lat)} true places: there must be at least one of each")
    candidates, truths = unit_vectors(lat, lng), unit_vectors(true_lat, true_lng)
    per_block = max(MAX_ELEMENTS // len(lat), 1)
    blocks = [truths[start : start + per_block] @ candidates.T for start in range(0, len(truths), per_block)]
    nearest = np.concatenate([block.argmax(axis=1) for block in blocks])
    return CandidateCeiling(haversine_km(lat[nearest], lng[nearest], true_lat, true_lng, radius_km=radius_km), nearest)


__all__ = ["RADII_KM", "CandidateCeiling", "candidate_ceiling"]
