import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.geography.boundaries import Boundaries, boundaries_from_places, clean_coverage, read_boundaries
from geobased.geography.polygon_distance import PolygonIndex

shapely = pytest.importorskip("shapely", minversion="2.1")


def boundaries(polygons, **arrays):
    names = np.array([f"unit {i}" for i in range(len(polygons))])
    values = {
        "countries": np.full(len(polygons), "A"),
        "country_names": np.full(len(polygons), "A"),
        "regions": names,
        "units": names,
    }
    return Boundaries(np.array(polygons, dtype=object), **{**values, **arrays})


def test_overlaps_go_to_the_smaller_and_slivers_to_a_neighbour():
    large, small = shapely.box(0, 0, 4, 4), shapely.box(3, 1, 5, 2)
    beside = shapely.box(-2, 0, 0, 4).difference(shapely.box(-0.00004, 1, 0, 3))  # a gap of 4 m
    clean = clean_coverage(np.array([large, small, beside], dtype=object), decimals=5)
    assert shapely.coverage_is_valid(clean)
    assert shapely.area(clean).tolist() == pytest.approx([15, 2, 8], abs=1e-3)
    assert shapely.area(clean).sum() == pytest.approx(25, abs=1e-9)
    assert shapely.union_all(clean).geom_type == "Polygon"


def test_lakes_stay_empty():
    shore = shapely.box(0, 0, 4, 4).difference(shapely.box(1, 1, 3, 3))
    clean = clean_coverage(np.array([shore, shapely.box(4, 0, 5, 4)], dtype=object), decimals=3)
    assert clean[0].area == pytest.approx(12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-5, 5, width=32)] * 2, *[st.floats(0.5, 4, width=32)] * 2), min_size=1, max_size=6))
def test_clean_polygons_are_disjoint_and_cover_the_same(bounds):
    polygons = np.array([shapely.box(x, y, x + w, y + h) for x, y, w, h in bounds], dtype=object)
    clean = clean_coverage(polygons, decimals=4)
    assert shapely.coverage_is_valid(clean)
    assert shapely.area(clean).sum() == pytest.approx(shapely.union_all(polygons).area, abs=0.02)


def test_simplified_borders_stay_common():
    wave = np.stack([np.linspace(0, 1, 200), 0.01 * np.sin(np.arange(200))], axis=1)
    south = shapely.Polygon([*wave, (1, -1), (0, -1)])
    north = shapely.Polygon([*wave, (1, 1), (0, 1)])
    simple = boundaries([south, north]).cleaned(decimals=5, simplify_degrees=0.05)
    assert simple.is_clean and shapely.coverage_is_valid(simple.polygons)
    assert shapely.get_num_coordinates(simple.polygons).sum() < 40


def test_units_that_vanish_are_named():
    tiny = shapely.box(0, 0, 0.001, 0.001)
    with pytest.raises(ValueError, match=r"1 units vanish at 1 decimals \(unit 1\)"):
        boundaries([shapely.box(1, 1, 2, 2), tiny]).cleaned(decimals=1)


@pytest.mark.parametrize(
    ("polygons", "arrays", "message"),
    [
        ([], {}, "hold no polygons"),
        ([shapely.box(0, 0, 1, 1)], {"units": np.array([])}, "1 polygons but 0 units"),
        ([shapely.Polygon()], {}, "polygon 0 .* is empty"),
        ([shapely.box(0, 0, 500_000, 5_000_000)], {}, "reproject them to EPSG:4326"),
    ],
)
def test_bad_boundaries(polygons, arrays, message):
    with pytest.raises(ValueError, match=message):
        boundaries(polygons, **arrays)


def frame(**columns):
    geopandas = pytest.importorskip("geopandas")
    return geopandas.GeoDataFrame(columns, crs="EPSG:4326")


def test_read_three_levels(tmp_path):
    shapes = [shapely.box(i, 0, i + 1, 1) for i in range(4)]
    table = frame(iso=["NA", "NA", "NA", "ZM"], region=["N", "N", None, "S"], name=["a", "a", "b", "c"], geometry=shapes)
    table.to_file(tmp_path / "units.geojson", driver="GeoJSON")
    read = read_boundaries(tmp_path / "units.geojson", ["iso", "region", "name"])
    assert read.countries.tolist() == ["NA", "NA", "ZM"]
    assert read.regions.tolist() == ["", "N", "S"] and read.units.tolist() == ["b", "a", "c"]
    assert shapely.area(read.polygons).tolist() == pytest.approx([1, 2, 1])
    one = read_boundaries(table, ["iso"], country_name="region")
    assert len(one) == 2 and one.units.tolist() == ["NA", "ZM"] and one.country_names.tolist() == ["N", "S"]
    two = read_boundaries(table, ["iso", "name"])
    assert two.units.tolist() == ["a", "b", "c"] and two.regions.tolist() == ["", "", ""]
    assert two.select(np.array([2])).countries.tolist() == ["ZM"]


def test_read_reprojects_repairs_and_cuts_at_the_dateline():
    bow_tie = shapely.Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])
    table = frame(iso=["A", "B"], geometry=[bow_tie, shapely.box(175, 0, 190, 1)])
    read = read_boundaries(table, ["iso"])
    assert shapely.is_valid(read.polygons).all() and read.polygons[0].area == pytest.approx(0.5)
    assert shapely.bounds(shapely.get_parts(read.polygons[1]))[:, [0, 2]].tolist() == [[-180, -170], [175, 180]]
    mercator = read_boundaries(table.iloc[:1].to_crs(3857), ["iso"])
    assert mercator.polygons[0].area == pytest.approx(0.5, rel=1e-3)


def test_rows_without_geometry_are_left_out_with_a_warning():
    table = frame(iso=["A", "B"], geometry=[shapely.box(0, 0, 1, 1), None])
    with pytest.warns(UserWarning, match="1 rows without geometry"):
        assert read_boundaries(table, ["iso"]).countries.tolist() == ["A"]


def test_bad_files(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    square = [shapely.box(0, 0, 1, 1)]
    with pytest.raises(ValueError, match="there is no boundary file"):
        read_boundaries(tmp_path / "none.geojson", ["iso"])
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(ValueError, match="empty.geojson holds no polygons"):
        read_boundaries(tmp_path / "empty.geojson", ["iso"])
    with pytest.raises(ValueError, match="no column 'iso'; it has name, geometry"):
        read_boundaries(frame(name=["A"], geometry=square), ["iso"])
    with pytest.raises(ValueError, match="row 0 of the boundaries has no country"):
        read_boundaries(frame(iso=[None], geometry=square), ["iso"])
    with pytest.raises(ValueError, match="one to three columns"):
        read_boundaries(frame(iso=["A"], geometry=square), [])
    with pytest.raises(ValueError, match="holds no polygons"):
        read_boundaries(geopandas.GeoDataFrame({"iso": ["A"]}, geometry=[shapely.Point(0, 0)], crs=4326), ["iso"])


def test_places_make_boundaries_over_the_dateline_and_to_the_poles():
    latitude = np.array([-17.0, -17.0, 65.0, -80.0])
    longitude = np.array([178.0, -179.0, 0.0, 50.0])
    made = boundaries_from_places(latitude, longitude, ["FJ", "FJ", "NO", "AQ"], units=["west", "east", "north", "south"])
    assert made.units.tolist() == ["south", "east", "west", "north"]
    clean = made.cleaned(decimals=5)
    assert shapely.area(clean.polygons).sum() == pytest.approx(360 * 180, rel=1e-6)
    index = PolygonIndex(clean.polygons)
    found = index.covering(np.array([*latitude, -17.0, -17.0, -90.0]), np.array([*longitude, 179.2, 179.8, 0.0]))
    assert clean.units[found].tolist() == ["west", "east", "north", "south", "west", "east", "south"]


def test_every_spot_belongs_to_its_nearest_place():
    from geobased.geography.coordinates import haversine_matrix_km

    rng = np.random.default_rng(1)
    places = np.stack([rng.uniform(45, 70, 60), rng.uniform(5, 30, 60)], axis=1)
    names = [str(i) for i in range(60)]
    made = boundaries_from_places(*places.T, ["A"] * 60, units=names)
    points = np.stack([rng.uniform(48, 67, 500), rng.uniform(8, 27, 500)], axis=1)
    found = made.units[PolygonIndex(made.polygons).locate(*points.T)].astype(int)
    distances = haversine_matrix_km(points, places)
    excess = distances[np.arange(500), found] / distances.min(axis=1)
    assert excess.max() < 1.05 and (excess == 1).mean() > 0.97


def test_bad_places():
    with pytest.raises(ValueError, match="two different places"):
        boundaries_from_places([1.0, 1.0], [2.0, 2.0], ["A", "B"])
    with pytest.raises(ValueError, match="2 places but 1 countries"):
        boundaries_from_places([1.0, 2.0], [2.0, 2.0], ["A"], ["", ""], ["", ""])
    with pytest.raises(ValueError, match="swapped"):
        boundaries_from_places([100.0, 99.0], [2.0, 2.0], ["A", "A"])
