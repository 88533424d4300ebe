import gzip

import numpy as np
import pytest

from geobased.training.earth_labels import ElevationRaster, KoeppenRaster, UnitNames

LATITUDES = np.arange(-87.5, 90, 5.0)


def elevation(start: float = 20.25, last: bool = True) -> ElevationRaster:
    """10 m a degree of latitude, and 100 m times the cosine of longitude; longitudes start at `start`."""
    longitudes = start + np.arange(721 if last else 720) * 0.5
    return ElevationRaster(10 * LATITUDES[:, None] + 100 * np.cos(np.radians(longitudes)), LATITUDES, longitudes)


@pytest.mark.parametrize("last", [True, False])
def test_elevation_is_interpolated_all_around_the_earth(last):
    raster = elevation(last=last)
    rng = np.random.default_rng(0)
    lat, lng = rng.uniform(-87, 87, (20, 50)), rng.uniform(-180, 180, (20, 50))
    np.testing.assert_allclose(raster(lat, lng), 10 * lat + 100 * np.cos(np.radians(lng)), atol=2e-3)
    # the dateline, the seam of the grid and its points
    for place in (-180, 180, 20.25, 20.0, 20.249, -0.0):
        assert raster(2.5, place) == pytest.approx(25 + 100 * np.cos(np.radians(place)), abs=2e-3)


def test_nearest_elevation_and_the_poles():
    raster = elevation()
    assert raster(3.0, 20.3, method="nearest") == pytest.approx(25 + 100 * np.cos(np.radians(20.25)), abs=1e-4)
    assert raster(5.1, 20.6, method="nearest") == pytest.approx(75 + 100 * np.cos(np.radians(20.75)), abs=1e-4)
    assert raster(90, 0.25) == pytest.approx(raster(87.5, 0.25))
    assert raster(-90, 0.25, method="nearest") == pytest.approx(raster(-87.5, 0.25))


def test_elevation_of_rounded_tables_is_read_from_files(tmp_path):
    # as ETOPO20 is written: thirds of a degree rounded, so that the last longitude misses 360 degrees
    longitudes = 20.1666667 + np.arange(1081) * 0.33333330
    latitudes = -89.8333333 + np.arange(540) * 0.33333330
    values = np.zeros((540, 1081), dtype=int)
    values[300] = 700
    for name, table in (("data", values), ("lats", latitudes), ("lons", longitudes)):
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            np.savetxt(file, table, fmt="%.9g")
    raster = ElevationRaster.from_files(*(tmp_path / f"{name}.gz" for name in ("data", "lats", "lons")))
    assert raster.values.shape == (540, 1081)
    np.testing.assert_allclose(raster([latitudes[300]] * 3, [20.1, 20.2, -180]), 700, atol=1e-6)
    with pytest.raises(ValueError, match="there is no file"):
        ElevationRaster.from_files(tmp_path / "none", tmp_path / "lats.gz", tmp_path / "lons.gz")
    (tmp_path / "text").write_text("no numbers")
    with pytest.raises(ValueError, match="no table of numbers"):
        ElevationRaster.from_files(tmp_path / "text", tmp_path / "lats.gz", tmp_path / "lons.gz")


@pytest.mark.parametrize(
    ("values", "latitudes", "longitudes", "message"),
    [
        (np.zeros((2, 3)), [-45, 45], [-180, 0], "do not fit"),
        (np.zeros((2, 2)), [45, -45], [-90, 90], "latitudes must ascend"),
        (np.zeros((2, 2)), [-45, 95], [-90, 90], "beyond a pole"),
        (np.zeros((2, 3)), [-45, 45], [0, 10, 20], "leave a gap"),
        (np.full((2, 2), np.nan), [-45, 45], [-90, 90], "no value for missing"),
        (np.full((2, 2), -99999.0), [-45, 45], [-90, 90], "between -12000 and 9500"),
    ],
)
def test_grids_that_are_none_are_refused(values, latitudes, longitudes, message):
    with pytest.raises(ValueError, match=message):
        ElevationRaster(values, latitudes, longitudes)


def test_questions_that_are_none_are_refused():
    with pytest.raises(ValueError, match="method='cubic'"):
        elevation()(0.0, 0.0, method="cubic")
    for raster in (elevation(), climate()):
        with pytest.raises(ValueError, match="swapped"):
            raster([100.0], [10.0])
        with pytest.raises(ValueError, match="not finite"):
            raster([np.nan], [10.0])


def climate() -> KoeppenRaster:
    """Four columns of 90 degrees from the dateline, three rows of 60: zones 1 to 3, 4 the ocean, 0 nothing."""
    return KoeppenRaster(np.array([[1, 2, 3, 4], [4, 4, 1, 1], [2, 2, 2, 2]], np.uint8), ["", "Af", "BWh", "ET", "Ocean"])


def test_climates_by_coordinates():
    raster = climate()
    assert raster.land_codes == ("Af", "BWh", "ET")
    lat = [90, 31, 29, 29, -31, -90, 60, 60, 60]
    lng = [-180, -179, -179, 91, 0, 179, 180, -180, 179.9]
    assert raster(lat, lng).tolist() == ["Af", "Af", "Ocean", "Af", "BWh", "BWh", "Af", "Af", "Ocean"]
    assert raster.classes(lat, lng).tolist() == [0, 0, -1, 0, 1, 1, 0, 0, -1]
    assert raster.is_land(lat, lng).tolist() == [True, True, False, True, True, True, True, True, False]
    # borders belong to the box in the south and in the east
    assert raster(30.0, 0.0) == "Af" and raster(60.0, 0.0) == "ET"


def test_climates_are_read_from_files(tmp_path):
    from PIL import Image

    zones = climate().zones
    Image.fromarray(zones).save(tmp_path / "zones.png")
    (tmp_path / "codes.csv").write_text(",kg_zone,zoneNum\n1,Af,1\n2,BWh,2\n3,ET,3\n4,Ocean,4\n")
    raster = KoeppenRaster.from_files(tmp_path / "zones.png", tmp_path / "codes.csv")
    assert (raster.zones == zones).all() and raster.codes.tolist() == ["", "Af", "BWh", "ET", "Ocean"]
    with pytest.raises(ValueError, match="there is no file"):
        KoeppenRaster.from_files(tmp_path / "none.png", tmp_path / "codes.csv")
    Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match="mode RGB"):
        KoeppenRaster.from_files(tmp_path / "colours.png", tmp_path / "codes.csv")
    (tmp_path / "codes.csv").write_text("zone,code\n1,Af\n")
    with pytest.raises(ValueError, match="columns zoneNum"):
        KoeppenRaster.from_files(tmp_path / "zones.png", tmp_path / "codes.csv")


@pytest.mark.parametrize(
    ("zones", "codes", "message"),
    [
        (np.zeros((2, 4)), ["Ocean"], "integers"),
        (np.zeros((2, 4), int), ["Af"], "once, not 0"),
        (np.zeros((2, 4), int), ["", "Ocean"], "no code"),
        (np.full((2, 4), 2), ["Af", "Ocean"], "no code"),
        (np.full((2, 4), -1), ["Af", "Ocean"], "no code"),
    ],
)
def test_climates_that_are_none_are_refused(zones, codes, message):
    with pytest.raises(ValueError, match=message):
        KoeppenRaster(zones, codes)


def test_names_of_units():
    import shapely

    from geobased.geography.boundaries import Boundaries

    polygons = np.array([shapely.box(0, 0, 10, 10), shapely.box(10, 0, 20, 10)])
    text = np.array(["", ""])
    names = UnitNames(Boundaries(polygons, text, text, text, np.array(["Westland", "Eastland"])))
    assert names([5, 5, 50], [5, 15, 5]).tolist() == ["Westland", "Eastland", ""]
