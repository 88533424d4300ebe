"""Areas of geocells: what is nearest to a centre, bounded, right at the date line and the poles; the package's own borders."""

import numpy as np
import pytest

from geobased.geography.coordinates import haversine_km, haversine_matrix_km
from geobased.geography.geocell_collection import Geocells
from geobased.pipelines.geolocalization_cells import CellAreas

shapely = pytest.importorskip("shapely")


def scattered(count: int = 200) -> np.ndarray:
    generator = np.random.default_rng(0)
    latitude = np.degrees(np.arcsin(generator.uniform(-1, 1, count)))
    return np.stack([latitude, generator.uniform(-180, 180, count)], axis=1)


def test_an_area_holds_what_is_nearest_to_its_centre():
    centroids = scattered()
    areas = CellAreas(centroids, np.full(len(centroids), 400.0))
    generator = np.random.default_rng(1)
    for cell in range(0, 200, 20):
        (ring,) = areas.rings(cell)
        # in degrees edges bend near the poles
        if abs(centroids[cell, 0]) > 60:
            continue
        polygon = shapely.Polygon(ring)
        points = centroids[cell] + generator.uniform(-8, 8, (300, 2))
        distances = haversine_matrix_km(points, centroids)
        own = (distances.argmin(axis=1) == cell) & (distances[:, cell] < 640)
        inside = shapely.contains_xy(polygon, points[:, 1], points[:, 0])
        assert polygon.is_valid and (own == inside).mean() > 0.97


def test_an_area_does_not_reach_beyond_its_radius():
    areas = CellAreas(np.array([[0.0, 179.5], [10.0, -20.0]]), np.array([100.0, 100.0]))
    (ring,) = areas.rings(0)
    assert ring[:, 0].max() > 180  # on across the date line
    distances = haversine_km(0.0, 179.5, ring[:, 1], (ring[:, 0] + 180) % 360 - 180)
    assert distances == pytest.approx(160.0, rel=0.01)


def test_the_packages_own_cells_have_their_borders():
    world = Geocells.world()
    areas = CellAreas(world.centroids, world.radii_km)
    cell = world.locate(55.7, 13.2)
    assert areas.exact and shapely.contains_xy(shapely.Polygon(areas.rings(cell)[0]), 13.2, 55.7)
    assert not CellAreas(world.centroids[:-1], world.radii_km[:-1]).exact


def test_unlikely_cells_are_left_out():
    areas = CellAreas(scattered(), np.full(200, 400.0))
    cells = [{"geocell": 3, "probability": 0.9}, {"geocell": 5, "probability": 0.0001}]
    assert [(area.geocell, area.probability) for area in areas.areas(cells)] == [(3, 0.9)]


def test_lengths_must_fit():
    with pytest.raises(ValueError, match=r"centroids must be \[3, 2\]"):
        CellAreas(np.zeros((2, 2)), np.zeros(3))
