import numpy as np
import pytest

from geobased.geography.coordinates import EARTH_RADIUS_KM, haversine_matrix_km
from geobased.geography.polygon_distance import PolygonIndex

shapely = pytest.importorskip("shapely")


def boxes(*bounds):
    return np.array([shapely.box(*bound) for bound in bounds], dtype=object)


def test_covering_takes_the_first_on_a_border_and_none_outside():
    index = PolygonIndex(boxes((0, 0, 1, 1), (1, 0, 2, 1)))
    found = index.covering(np.array([0.5, 0.5, 0.5, 5.0]), np.array([0.5, 1.0, 1.5, 0.5]))
    assert found.tolist() == [0, 0, 1, -1]


def test_dateline_is_one_meridian():
    index = PolygonIndex(boxes((170, 0, 180, 10), (-180, 20, -170, 30)))
    assert index.covering(np.array([5.0, 5.0, 25.0, 25.0]), np.array([180.0, -180.0, 180.0, -180.0])).tolist() == [0, 0, 1, 1]


def test_all_longitudes_are_one_point_at_a_pole():
    index = PolygonIndex(boxes((-180, -90, 0, -70), (0.001, -90, 180, -70)))
    longitudes = np.array([-180.0, -90.0, 0.0, 90.0, 180.0])
    assert len(set(index.locate(np.full(5, -90.0), longitudes).tolist())) == 1


def test_nearest_goes_over_the_dateline_and_the_pole():
    index = PolygonIndex(boxes((178, 0, 179, 1), (-170, 0, -169, 1), (170, 80, 175, 85)))
    nearest, distance = index.nearest(np.array([0.5, 88.0]), np.array([-178.0, -8.0]))
    assert nearest.tolist() == [0, 2]
    assert distance[0] == pytest.approx(3 * 111.19, rel=1e-3)
    assert distance[1] == pytest.approx(7 * 111.19, rel=1e-3)


def test_a_degree_of_longitude_is_short_in_the_north():
    # in degrees the box to the south is nearer (4 against 5), on the ground the one to the east
    index = PolygonIndex(boxes((0, 60, 10, 66), (15, 69, 20, 71)))
    assert index.locate(np.array([70.0]), np.array([10.0])).tolist() == [1]


def test_distances_agree_with_dense_sampling():
    rng = np.random.default_rng(0)
    shapes = []
    for _ in range(12):
        x, y = rng.uniform(-175, 170), rng.uniform(-80, 75)
        shapes.append(shapely.MultiPolygon([shapely.box(x, y, x + 2, y + 3), shapely.box(x + 3, y, x + 4, y + 1)]))
    index = PolygonIndex(np.array(shapes, dtype=object))
    latitude, longitude = rng.uniform(-90, 90, 60), rng.uniform(-180, 180, 60)
    nearest, distance = index.nearest(latitude, longitude)
    border = [shapely.get_coordinates(shapely.segmentize(shape, 0.02))[:, ::-1] for shape in shapes]
    sampled = np.stack(
        [haversine_matrix_km(np.stack([latitude, longitude], axis=1), points).min(axis=1) for points in border], axis=1
    )
    assert (nearest == sampled.argmin(axis=1)).all()
    # edges are arcs here and straight on the map there
    np.testing.assert_allclose(distance, sampled.min(axis=1), atol=4.0)


def test_holes_are_no_part_of_a_polygon():
    ring = shapely.box(0, 0, 10, 10).difference(shapely.box(4, 4, 6, 6))
    index = PolygonIndex(np.array([ring], dtype=object))
    assert index.covering(np.array([5.0]), np.array([5.0])).tolist() == [-1]
    assert index.nearest(np.array([5.0]), np.array([5.0]))[1][0] == pytest.approx(np.radians(1) * EARTH_RADIUS_KM, rel=1e-2)


def test_bad_polygons():
    with pytest.raises(ValueError, match="no polygons"):
        PolygonIndex(np.array([], dtype=object))
    with pytest.raises(ValueError, match="polygon 1 is empty"):
        PolygonIndex(np.array([shapely.box(0, 0, 1, 1), shapely.Polygon()], dtype=object))
