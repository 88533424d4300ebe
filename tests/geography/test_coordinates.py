import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.geography.coordinates import (
    EARTH_RADIUS_KM,
    PIGEON_EARTH_RADIUS_KM,
    BoundingBox,
    bounding_box,
    check_coordinates,
    from_unit_vectors,
    grouped_spherical_means,
    haversine_km,
    haversine_matrix_km,
    spherical_mean,
    unit_vectors,
    wrap_longitude,
)

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures/geo/haversine.json").read_text())
LATITUDES = st.floats(-90, 90)
LONGITUDES = st.floats(-180, 180)


def fixture_points():
    return np.array(FIXTURE["coords"])[:, ::-1].copy()  # the file has (longitude, latitude)


def test_matrix_equals_reference_values():
    points = fixture_points()
    matrix = haversine_matrix_km(points, points, radius_km=PIGEON_EARTH_RADIUS_KM)
    np.testing.assert_allclose(matrix, FIXTURE["matrix_km"], rtol=1e-12, atol=1e-6)
    consecutive = haversine_km(*points[:-1].T, *points[1:].T, radius_km=PIGEON_EARTH_RADIUS_KM)
    np.testing.assert_allclose(consecutive, FIXTURE["pairwise_consecutive_km"], rtol=1e-12)
    ratio = haversine_matrix_km(points, points)[0, 1] / matrix[0, 1]
    assert ratio == pytest.approx(EARTH_RADIUS_KM / PIGEON_EARTH_RADIUS_KM, rel=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_tensors_give_the_same_distances(dtype, tolerance):
    points = torch.tensor(fixture_points(), dtype=dtype)
    matrix = haversine_matrix_km(points, points, radius_km=PIGEON_EARTH_RADIUS_KM)
    assert matrix.dtype == dtype
    # antipodes, where float32 has few digits, are left out
    near = torch.tensor(FIXTURE["matrix_km"]) < 19_000
    np.testing.assert_allclose(matrix[near].numpy(), np.array(FIXTURE["matrix_km"])[near.numpy()], rtol=tolerance, atol=1e-6)


def test_distance_of_tensors_has_a_gradient():
    latitude = torch.tensor([48.0, 10.0], dtype=torch.float64, requires_grad=True)
    haversine_km(latitude, torch.tensor([2.0, 3.0]), 50.0, 2.0).sum().backward()
    assert latitude.grad is not None and latitude.grad[0].item() == pytest.approx(-EARTH_RADIUS_KM * np.pi / 180, rel=1e-6)


@settings(deadline=None)
@given(LATITUDES, LONGITUDES, LATITUDES, LONGITUDES)
def test_distance_is_symmetric_bounded_and_blind_to_whole_turns(lat_a, lng_a, lat_b, lng_b):
    distance = haversine_km(lat_a, lng_a, lat_b, lng_b)
    assert 0 <= distance <= np.pi * EARTH_RADIUS_KM + 1e-6
    assert distance == pytest.approx(haversine_km(lat_b, lng_b, lat_a, lng_a), abs=1e-6)
    assert distance == pytest.approx(haversine_km(lat_a, lng_a + 360, lat_b, lng_b), abs=1e-3)
    angle = np.arccos(np.clip(unit_vectors(lat_a, lng_a) @ unit_vectors(lat_b, lng_b), -1, 1))
    assert distance == pytest.approx(angle * EARTH_RADIUS_KM, abs=0.2)  # arccos has eight digits near 0


def test_matrix_wants_pairs():
    with pytest.raises(ValueError, match=r"b must be \[points, 2\]"):
        haversine_matrix_km(np.zeros((2, 2)), np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("latitude", "longitude", "message"),
    [
        ([1.0, np.nan], [1.0, 2.0], "position 1: latitude nan, longitude 2.0 is not finite"),
        ([np.inf], [0.0], "not finite"),
        ([120.0, 10.0], [40.0, 10.0], "are latitude and longitude swapped"),
        ([120.0], [170.0], "latitudes lie between -90 and 90"),
        ([10.0], [181.0], "wrap_longitude"),
        ([1.0, 2.0], [1.0], r"shape \(2,\) but longitudes of shape \(1,\)"),
        (["north"], [1.0], "must be numbers"),
    ],
)
def test_bad_coordinates_are_named(latitude, longitude, message):
    with pytest.raises(ValueError, match=message):
        check_coordinates(latitude, longitude)


def test_error_of_a_single_point_has_no_position():
    with pytest.raises(ValueError, match=r"^here: latitude 95.0, longitude 3.0: are"):
        check_coordinates(95.0, 3.0, name="here")


@settings(deadline=None)
@given(st.floats(-1e4, 1e4))
def test_wrapped_longitude_is_the_same_meridian(longitude):
    wrapped = float(wrap_longitude(longitude))
    assert -180 <= wrapped < 180
    assert np.cos(np.radians(wrapped - longitude)) == pytest.approx(1, abs=1e-12)
    assert float(wrap_longitude(wrapped)) == wrapped


@settings(deadline=None)
@given(LATITUDES, LONGITUDES)
def test_unit_vectors_round_trip(latitude, longitude):
    lat, lng = from_unit_vectors(unit_vectors(latitude, longitude))
    assert haversine_km(lat, lng, latitude, longitude) < 1e-6


def test_mean_over_the_dateline_and_the_pole():
    latitude, longitude = spherical_mean([0.0, 0.0], [179.0, -177.0])
    assert (latitude, longitude) == (pytest.approx(0), pytest.approx(-179))
    assert spherical_mean([80.0] * 4, [0.0, 90.0, 180.0, -90.0])[0] == pytest.approx(90)
    assert spherical_mean([0.0, 0.0], [0.0, 90.0], [3.0, 0.0]) == (pytest.approx(0), pytest.approx(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "mean of no points"),
        (([0.0, 0.0], [0.0, 180.0]), "cancel each other"),
        (([0.0], [0.0], [-1.0]), "weights must be 1 numbers"),
        (([0.0], [0.0], [0.0]), "do not sum to 0"),
    ],
)
def test_mean_that_is_not_defined(arguments, message):
    with pytest.raises(ValueError, match=message):
        spherical_mean(*arguments)


def test_means_of_groups():
    means = grouped_spherical_means([0.0, 0.0, 10.0, 0.0, 0.0], [179.0, -177.0, 20.0, 0.0, 180.0], [0, 0, 1, 3, 3], 4)
    np.testing.assert_allclose(means[:2], [[0, -179], [10, 20]], atol=1e-9)
    assert np.isnan(means[2]).all()
    assert means[3].tolist() == [0.0, 0.0]  # antipodes: the first of them


@settings(deadline=None)
@given(st.lists(st.tuples(LATITUDES, LONGITUDES), min_size=1, max_size=8), st.floats(-180, 180))
def test_bounding_box_holds_its_points_and_is_narrow(points, turn):
    latitude, longitude = np.array(points).T
    box = bounding_box(latitude, longitude)
    assert box.contains(latitude, longitude).all()
    assert 0 <= box.width <= 360 * (1 - 1 / len(points)) + 1e-9
    turned = bounding_box(latitude, wrap_longitude(longitude + turn))
    assert turned.width == pytest.approx(box.width, abs=1e-6)


def test_bounding_box_over_the_dateline():
    box = bounding_box([-17.0, -16.0], [179.0, -179.0])
    assert box == BoundingBox(-17.0, 179.0, -16.0, -179.0) and box.width == 2 and box.height == 1
    assert box.contains([-16.5, -16.5, -16.5, -16.5], [180.0, -180.0, 0.0, 178.9]).tolist() == [True, True, False, False]
    assert BoundingBox(60.0, 0.0, 90.0, 10.0).contains(90.0, 120.0)
    with pytest.raises(ValueError, match="swap them"):
        BoundingBox(10.0, 0.0, 5.0, 1.0)
    with pytest.raises(ValueError, match="no points"):
        bounding_box([], [])
