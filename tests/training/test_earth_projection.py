"""Crops are checked pixel by pixel on a picture whose colours say where they lie."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.geography.coordinates import haversine_km, unit_vectors
from geobased.training.earth_projection import EarthImage, crop_coordinates, crop_rays

KM_PER_DEGREE = 111.195
CENTRES = [(0, 0), (45, 10), (-33, 151), (-17, 179.9), (71, -179.99), (82, -40), (90, 0), (-90, 30), (89.9, 120), (-60, 180)]


def colour_picture(height: int) -> np.ndarray:
    """uint8 [height, 2 * height, 3]: red, green and blue are x, y and z of the point, from -1 to 1."""
    latitude = 90 - (np.arange(height) + 0.5) * 180 / height
    longitude = (np.arange(2 * height) + 0.5) * 180 / height - 180
    return np.rint((unit_vectors(*np.meshgrid(latitude, longitude, indexing="ij")) + 1) * 127.5).astype(np.uint8)


@pytest.fixture(scope="module")
def picture() -> EarthImage:
    return EarthImage(colour_picture(360))


def inverse_gnomonic(latitude, longitude, degrees, rotation, size):
    """Snyder, Map Projections: A Working Manual (1987), equations 20-14, 20-15 and 22-3 to 22-5, for one crop."""
    step = (np.arange(size) + 0.5) * 2 / size - 1
    right, up = np.meshgrid(step, -step)
    half, turn = np.tan(np.radians(degrees) / 2), np.radians(rotation)
    x = half * (right * np.cos(turn) + up * np.sin(turn))
    y = half * (up * np.cos(turn) - right * np.sin(turn))
    rho = np.hypot(x, y)
    c, phi = np.arctan(rho), np.radians(latitude)
    lat = np.arcsin(np.clip(np.cos(c) * np.sin(phi) + y * np.sin(c) * np.cos(phi) / rho, -1, 1))
    lng = np.radians(longitude) + np.arctan2(x * np.sin(c), rho * np.cos(phi) * np.cos(c) - y * np.sin(phi) * np.sin(c))
    return np.degrees(lat), np.degrees(lng)


@settings(deadline=None, max_examples=100)
@given(st.floats(-90, 90), st.floats(-180, 180), st.floats(0.1, 120), st.floats(-360, 360), st.sampled_from([2, 8, 10]))
def test_pixels_lie_where_the_inverse_projection_says(latitude, longitude, degrees, rotation, size):
    lat, lng = crop_coordinates([latitude], [longitude], [degrees], [rotation], size)
    expected = inverse_gnomonic(latitude, longitude, degrees, rotation, size)
    # arcsin near a pole leaves a thousandth of a kilometre
    assert haversine_km(lat[0], lng[0], *expected).max() < 1e-2


@pytest.mark.parametrize("degrees", [2.0, 8.0, 20.0, 90.0])
@pytest.mark.parametrize("rotation", [0.0, 90.0, -137.0])
def test_colours_of_a_crop_are_those_of_its_places(picture, degrees, rotation):
    latitude, longitude = np.array(CENTRES, dtype=float).T
    crops = picture.crops(latitude, longitude, degrees, rotation, size=32)
    rays = torch.nn.functional.normalize(crop_rays(latitude, longitude, degrees, rotation, 32), dim=-1)
    assert crops.shape == (len(CENTRES), 3, 32, 32)
    # half a step of 255 in each colour, and what averaging over neighbours makes of a curve
    assert (crops * 2 - 1 - rays.permute(0, 3, 1, 2)).abs().max() < 0.008


def test_north_is_up_and_east_right_at_rotation_0_and_east_up_at_90():
    lat, lng = crop_coordinates([20.0, 20.0], [30.0, 30.0], 8.0, [0.0, 90.0], 9)
    assert lat[0, 0, 4] == pytest.approx(20 + 8 * 4 / 9, abs=0.05) and lng[0, 0, 4] == pytest.approx(30)
    assert lng[0, 4, 8] > 33 and lng[0, 4, 0] < 27
    assert lng[1, 0, 4] > 33 and lat[1, 4, 8] < 17
    np.testing.assert_allclose([lat[:, 4, 4], lng[:, 4, 4]], [[20, 20], [30, 30]])


@pytest.mark.parametrize("latitude", [0.0, 60.0, 85.0, -89.0])
def test_crops_are_as_wide_as_high_at_any_latitude(latitude):
    lat, lng = crop_coordinates([latitude], [179.0], 4.0, 0.0, 401)
    across = haversine_km(lat[0, 200, 0], lng[0, 200, 0], lat[0, 200, -1], lng[0, 200, -1])
    high = haversine_km(lat[0, 0, 200], lng[0, 0, 200], lat[0, -1, 200], lng[0, -1, 200])
    assert across == pytest.approx(high) == pytest.approx(4 * KM_PER_DEGREE * 400 / 401, rel=1e-3)


def test_crops_do_not_depend_on_their_batch(picture):
    rng = np.random.default_rng(0)
    latitude, longitude = rng.uniform(-80, 80, 150), rng.uniform(-180, 180, 150)
    degrees, rotation = rng.uniform(1, 30, 150), rng.uniform(-180, 180, 150)
    together = picture.crops(latitude, longitude, degrees, rotation, size=64)
    for row in (0, 70, 149):
        one = slice(row, row + 1)
        alone = picture.crops(latitude[one], longitude[one], degrees[one], rotation[one], size=64)
        torch.testing.assert_close(together[one], alone, atol=1e-6, rtol=0)
    assert picture.crops([], [], 4.0, size=8).shape == (0, 3, 8, 8)


def test_fine_patterns_become_grey_where_the_crop_is_coarse():
    checks = np.indices((64, 128)).sum(0) % 2 * 255
    image = EarthImage(np.repeat(checks[:, :, None], 3, axis=2).astype(np.uint8))
    # a pixel of the crop is four of the picture
    coarse = image.crops([0.0], [0.0], 90.0, size=8)
    assert (coarse - 0.5).abs().max() < 1e-3
    sharp = image.crops([0.0], [0.0], 8.0, size=64)
    assert sharp.min() < 0.1 and sharp.max() > 0.9


def test_rows_at_the_poles_are_averaged_and_keep_their_mean():
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, ::2] = 200
    image = EarthImage(stripes)
    equator = image.crops([0.0], [0.0], 9.0, size=64)
    pole = image.crops([90.0], [0.0], 9.0, size=64)
    assert equator.max() - equator.min() > 0.7
    # 25 columns wide, one stripe more or less
    assert (pole - 100 / 255).abs().max() < 0.02
    flat = EarthImage(np.full((40, 80, 3), 77, np.uint8))
    assert (flat.crops([90.0, 50.0], [0.0, 180.0], 30.0) - 77 / 255).abs().max() < 1e-6


def test_a_picture_is_read_from_a_file(tmp_path):
    from PIL import Image

    pixels = colour_picture(20)
    Image.fromarray(pixels).save(tmp_path / "earth.png")
    crops = EarthImage.from_file(tmp_path / "earth.png").crops([10.0], [20.0], 30.0, size=4)
    torch.testing.assert_close(crops, EarthImage(pixels).crops([10.0], [20.0], 30.0, size=4))
    with pytest.raises(ValueError, match="there is no image"):
        EarthImage.from_file(tmp_path / "moon.png")


def test_workers_get_a_picture_on_the_cpu_alone(picture):
    copy = pickle.loads(pickle.dumps(picture))
    torch.testing.assert_close(copy.crops([1.0], [2.0], 3.0), picture.crops([1.0], [2.0], 3.0))
    picture_elsewhere = EarthImage(colour_picture(4), device="meta")
    with pytest.raises(ValueError, match="num_workers=0"):
        pickle.dumps(picture_elsewhere)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([95.0], [0.0], 4.0, 0.0, 8), "latitude"),
        (([0.0], [np.nan], 4.0, 0.0, 8), "not finite"),
        ((0.0, 0.0, 4.0, 0.0, 8), r"must be \[n\]"),
        (([0.0], [0.0], 0.0, 0.0, 8), "above 0"),
        (([0.0], [0.0], 130.0, 0.0, 8), "at most 120"),
        (([0.0], [0.0], [4.0, 4.0], 0.0, 8), "degrees must be one number"),
        (([0.0], [0.0], 4.0, np.inf, 8), "finite"),
        (([0.0], [0.0], 4.0, 0.0, 0), "at least 1 pixel"),
    ],
)
def test_crops_that_are_none_are_refused(picture, arguments, message):
    with pytest.raises(ValueError, match=message):
        crop_rays(*arguments)
    with pytest.raises(ValueError, match=message):
        picture.crops(*arguments[:4], size=arguments[4])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [(np.zeros((4, 8, 3)), "uint8"), (np.zeros((4, 8), np.uint8), "uint8"), (np.zeros((4, 9, 3), np.uint8), "twice as wide")],
)
def test_other_pictures_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        EarthImage(pixels)
