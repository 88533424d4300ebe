import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.geography import geocells as module
from geobased.geography.boundaries import Boundaries, boundaries_from_places
from geobased.geography.geocells import Geocells, create_geocells, create_naive_geocells

shapely = pytest.importorskip("shapely", minversion="2.1")
pytest.importorskip("sklearn")

SIZES = {"min_size": 8, "max_size": 16, "optics": ((4, 0.05), (5, 0.02))}


def grid_of_units(west=0.0, south=0.0, countries=("A", "B"), rows=4):
    """Countries side by side, each of `rows` x 2 units of one degree; the lower half is one region, the upper another."""
    polygons, names = [], []
    for i, country in enumerate(countries):
        for x in range(2):
            for y in range(rows):
                # units beyond the dateline start over at -180
                low = ((west + 2 * i + x + 180) % 360 - 180, south + y)
                polygons.append(shapely.box(*low, low[0] + 1, low[1] + 1))
                names.append((country, f"region {2 * y // rows}", f"{country} {x} {y}"))
    keys, regions, units = (np.array(column) for column in zip(*names, strict=True))
    return Boundaries(np.array(polygons, dtype=object), keys, np.char.add("Country ", keys), regions, units)


def some_points(seed=0, count=300, west=0.0, south=0.0):
    rng = np.random.default_rng(seed)
    clusters = rng.uniform((south, west), (south + 4, west + 4), (5, 2))
    near = clusters[rng.integers(5, size=count * 2 // 3)] + rng.normal(0, 0.08, (count * 2 // 3, 2))
    return np.concatenate([near, rng.uniform((south - 0.3, west - 0.3), (south + 4.3, west + 4.3), (count - len(near), 2))])


def check(cells, points, boundaries=None):
    """What must hold of all geocells."""
    located = cells.locate(points[:, 0], points[:, 1])
    assert np.bincount(located, minlength=len(cells)).tolist() == cells.sizes.tolist()
    assert int(cells.sizes.sum()) == len(points)
    assert shapely.coverage_is_valid(cells.polygons) and shapely.is_valid(cells.polygons).all()
    if boundaries is not None:
        for country in np.unique(cells.country_codes):
            outside = shapely.difference(
                shapely.union_all(cells.polygons[cells.country_codes == country]),
                shapely.union_all(boundaries.polygons[boundaries.countries == country]),
            )
            assert outside.area < 1e-3
            # nothing of a country with points is left out
            assert shapely.area(cells.polygons[cells.country_codes == country]).sum() == pytest.approx(
                shapely.union_all(boundaries.polygons[boundaries.countries == country]).area, rel=1e-4
            )


def test_every_point_in_one_cell_of_its_country_and_of_the_right_size():
    boundaries, points = grid_of_units(), some_points()
    cells = create_geocells(points, boundaries, **SIZES)
    check(cells, points, boundaries)
    assert cells.sizes.min() >= 8 and cells.sizes.max() <= 16
    assert set(cells.countries) == {"Country A", "Country B"} and all(region[0] in "AB" for region in cells.regions)
    inside = (points > 0.01).all(axis=1) & (points < 3.99).all(axis=1) & (np.abs(points[:, 1] - 2) > 0.01)
    assert (cells.country_codes[cells.locate(*points[inside].T)] == np.where(points[inside, 1] < 2, "A", "B")).all()
    steps = cells.metadata["steps"]
    assert steps["units"] >= steps["merged"] and steps["merged"] + steps["optics"] + steps["halving"] <= len(cells)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 260),
    st.sampled_from([(0.0, 0.0), (178.0, -2.0), (-180.0, 60.0), (20.0, -89.5), (30.0, 85.5)]),
)
def test_invariants_hold_anywhere(seed, count, corner):
    west, south = corner
    boundaries = grid_of_units(west, south)
    points = some_points(seed, count, west, south)
    points[:, 1] = (points[:, 1] + 180) % 360 - 180
    cells = create_geocells(points, boundaries, **SIZES)
    check(cells, points, boundaries)
    by_country = {country: cells.sizes[cells.country_codes == country] for country in set(cells.country_codes)}
    for sizes in by_country.values():
        assert sizes.max() <= 16 and (sizes.min() >= 8 or len(sizes) == 1)


def test_order_of_points_does_not_matter_and_the_seed_does_not_lose_any(tmp_path):
    boundaries, points = grid_of_units(), some_points(1)
    files = []
    for i, order in enumerate((np.arange(len(points)), np.random.default_rng(0).permutation(len(points)))):
        create_geocells(points[order], boundaries, **SIZES).save(tmp_path / str(i))
        files.append((tmp_path / str(i)).read_bytes())
    assert files[0] == files[1]
    check(create_geocells(points, boundaries, **SIZES, seed=7), points, boundaries)


def test_a_country_over_the_dateline_is_one(tmp_path):
    halves = [shapely.box(179, -1, 180, 1), shapely.box(-180, -1, -179, 1)]
    names = np.array(["F", "F"])
    boundaries = Boundaries(np.array(halves, dtype=object), names, names, np.array(["", ""]), np.array(["west", "east"]))
    rng = np.random.default_rng(0)
    few = np.stack([rng.uniform(-0.2, 0.2, 12), (rng.uniform(179.8, 180.2, 12) + 180) % 360 - 180], axis=1)
    cells = create_geocells(few, boundaries, **SIZES)
    assert len(cells) == 1 and abs(cells.centroids[0, 1]) > 179.8 and cells.radii_km[0] < 40
    bounds = shapely.bounds(shapely.get_parts(cells.polygons[0]))
    assert sorted(bounds[:, [0, 2]].tolist()) == [[-180, -179], [179, 180]]
    many = np.concatenate([few - (0.6, 0.0), few + (0.6, 0.0)])
    both = Boundaries(np.array([shapely.MultiPolygon(halves)], dtype=object), *[names[:1]] * 4)
    split = create_geocells(many, both, **SIZES)
    check(split, many, both)
    # north and south, and not east and west of the dateline
    assert split.locate([-0.6, -0.6], [179.9, -179.9]).tolist() == [split.locate(-0.6, 180.0)] * 2
    assert len(split) == 2
    assert split.locate(0.0, 180.0) == split.locate(0.0, -180.0)
    split.save(tmp_path / "fiji")
    assert shapely.equals_exact(Geocells.load(tmp_path / "fiji").polygons, split.polygons).all()


def test_islands_stay_and_a_lonely_one_is_reported():
    mainland = shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(1.2, 0, 1.4, 0.2)])
    far = shapely.box(30, 30, 31, 31)
    names = np.array(["A", "A"])
    boundaries = Boundaries(np.array([mainland, far], dtype=object), names, names, np.array(["", ""]), np.array(["land", "far"]))
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(0, 1, (30, 2)), rng.uniform(30, 31, (3, 2))])
    cells = create_geocells(points, boundaries, **SIZES)
    check(cells, points, boundaries)
    assert cells.statistics()["undersized"] == {"cells": 1, "points": 3}
    assert cells.locate(0.1, 1.3) == cells.locate(0.1, 1.21) and cells.covers(0.1, 1.3) and not cells.covers(0.1, 1.1)


def test_coinciding_points_are_kept_together_and_reported():
    points = np.concatenate([np.full((40, 2), 0.5), some_points(count=60)])
    cells = create_geocells(points, grid_of_units(), **SIZES)
    check(cells, points)
    assert cells.statistics()["oversized"]["cells"] == 1 and cells.sizes.max() >= 40


def test_from_points_alone_and_from_places_alone():
    points = some_points(3)
    cells = create_geocells(points, None, **SIZES)
    check(cells, points)
    assert cells.sizes.min() >= 8 and cells.sizes.max() <= 16
    assert shapely.area(cells.polygons).sum() == pytest.approx(360 * 180, rel=1e-6)
    places = np.array([(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (3.0, 3.0)])
    made = boundaries_from_places(*places.T, ["A", "A", "B", "B"], units=list("abcd"))
    cells = create_geocells(points, made, **SIZES)
    check(cells, points)
    assert (cells.country_codes[cells.locate([0.5, 3.5], [2.0, 2.0])] == ["A", "B"]).all()


def test_countries_without_points():
    points = some_points(count=40) * (1, 0.4)  # all in the western country
    boundaries = grid_of_units()
    cells = create_geocells(points, boundaries, **SIZES)
    assert set(cells.country_codes) == {"A"} and cells.metadata["countries_without_points"] == ["B"]
    cells = create_geocells(points, boundaries, **SIZES, empty_countries=True)
    check(cells, points, boundaries)
    empty = cells.locate(2.0, 3.5)
    assert cells.sizes[empty] == 0 and cells.country_codes[empty] == "B" and cells.locate(*cells.centroids[empty]) == empty
    assert 200 < cells.radii_km[empty] < 500


def test_interrupted_work_goes_on(tmp_path, monkeypatch):
    boundaries, points = grid_of_units(countries=("A", "B", "C")), some_points(4) * (1, 1.5)
    create_geocells(points, boundaries, **SIZES).save(tmp_path / "whole")
    work, done = module._cells_of_country, []

    def stopped(part, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(part.countries[0])
        return work(part, *arguments)

    monkeypatch.setattr(module, "_cells_of_country", stopped)
    with pytest.raises(KeyboardInterrupt):
        create_geocells(points, boundaries, **SIZES, checkpoint_dir=tmp_path / "kept")
    assert done == ["A", "B"]
    done.clear()
    create_geocells(points, boundaries, **SIZES, checkpoint_dir=tmp_path / "kept").save(tmp_path / "resumed")
    assert done == ["C"]
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    done.clear()
    with pytest.raises(KeyboardInterrupt):  # other sizes are other work
        create_geocells(points, boundaries, min_size=9, max_size=20, checkpoint_dir=tmp_path / "kept")


def test_progress_is_shown_on_request(capsys):
    create_geocells(some_points(count=50), grid_of_units(), **SIZES)
    assert capsys.readouterr().err == ""
    create_geocells(some_points(count=50), grid_of_units(), **SIZES, progress=True)
    assert "50/50" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("points", "arguments", "message"),
    [
        (np.zeros((0, 2)), {}, "at least one row"),
        (np.zeros((4, 3)), {}, r"points must be \[n, 2\]"),
        (np.array([[1.0, np.nan]]), {}, "not finite"),
        (np.array([[120.0, 30.0]]), {}, "swapped"),
        (np.array([[10.0, 300.0]]), {}, "longitudes lie between"),
        (np.ones((4, 2)), {"max_size": 15}, "at least twice min_size"),
        (np.ones((4, 2)), {"min_size": 0}, "at least 1"),
        (np.ones((4, 2)), {"decimals": 9}, "decimals must be 1 to 7"),
    ],
)
def test_bad_input(points, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_geocells(points, None, **{**SIZES, **arguments})


def test_naive_cells_are_rectangles_that_halve_the_longer_side():
    points = some_points(5)
    cells = create_naive_geocells(points, max_size=20)
    check(cells, points)
    assert cells.sizes.max() <= 20 and all(polygon.equals(polygon.envelope) for polygon in cells.polygons)
    assert (create_naive_geocells(points[::-1], max_size=20).centroids == cells.centroids).all()
    assert create_naive_geocells(np.ones((30, 2)), max_size=20).sizes.tolist() == [30]
    with pytest.raises(ValueError, match="max_size must be at least 1"):
        create_naive_geocells(points, max_size=0)


def test_export_and_plot(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    cells = create_geocells(some_points(count=60), grid_of_units(), **SIZES)
    cells.export(tmp_path / "cells.geojson")
    read = geopandas.read_file(tmp_path / "cells.geojson")
    assert read["size"].tolist() == cells.sizes.tolist() and read.crs.to_epsg() == 4326
    assert shapely.equals_exact(shapely.normalize(read.geometry.values), shapely.normalize(cells.polygons), tolerance=1e-9).all()
    pytest.importorskip("pyarrow")
    cells.export(tmp_path / "cells.parquet")
    assert geopandas.read_parquet(tmp_path / "cells.parquet")["country_code"].tolist() == cells.country_codes.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.geojson", "cells.parquet"]
    with pytest.raises(ValueError, match="must end in .parquet"):
        cells.export(tmp_path / "cells.shp")


def test_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    cells = create_geocells(some_points(count=60), grid_of_units(), **SIZES)
    axes = cells.plot()
    axes.figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5_000
    assert cells.plot(np.linspace(0, 1, len(cells)), log=False, label="probability") is not axes
    with pytest.raises(ValueError, match="one number per cell"):
        cells.plot([1.0])


def test_locating_checks_its_input_and_keeps_shapes():
    cells = create_geocells(some_points(count=60), grid_of_units(), **SIZES)
    assert isinstance(cells.locate(1.0, 1.0), int)
    assert cells.locate(np.ones((2, 3)), np.ones((2, 3))).shape == (2, 3)
    assert cells.locate([], []).shape == (0,)
    with pytest.raises(ValueError, match="swapped"):
        cells.locate(100.0, 2.0)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no file of geocells"):
        Geocells.load(tmp_path / "none")
    with pytest.raises(ValueError, match="0 countries|no geocells"):
        Geocells(*[np.array([])] * 7)


def test_locating_needs_numpy_and_shapely_alone(tmp_path):
    create_geocells(some_points(count=60), grid_of_units(), **SIZES).save(tmp_path / "cells")
    code = f"""
import sys
for name in ("geopandas", "pandas", "sklearn", "scipy", "matplotlib", "pyproj", "pyogrio"):
    sys.modules[name] = None
from geobased.geography.geocell_collection import Geocells
cells = Geocells.load({str(tmp_path / "cells")!r})
print(cells.locate([1.0], [1.0]).shape)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["(1,)"]
