import csv
import gzip

import numpy as np
import pytest

from geobased.geography import build_world_geocells
from geobased.geography.geocell_collection import WORLD_CELLS_FILE, Geocells

shapely = pytest.importorskip("shapely", minversion="2.1")

PLACES = [  # latitude, longitude, country
    (55.7047, 13.1910, "SE"),
    (-22.5609, 17.0658, "NA"),
    (-18.1416, 178.4419, "FJ"),
    (66.0, -173.0, "RU"),  # Chukotka, beyond the dateline
    (-43.95, -176.56, "NZ"),  # Chatham Islands
    (42.6629, 21.1655, "XK"),
    (31.95, 35.2, "PS"),
    (-21.1151, 55.5364, "RE"),
    (12.2, -68.26, "BQ"),
    (78.22, 15.65, "SJ"),
    (-90.0, 0.0, "AQ"),
    (21.3069, -157.8583, "US"),
    (1.3521, 103.8198, "SG"),
]


@pytest.fixture(scope="module")
def world():
    return Geocells.world()


def test_shipped_cells_are_small_and_say_where_they_come_from(world):
    assert WORLD_CELLS_FILE.stat().st_size < 5_000_000
    assert len(world) == 2659 and int(world.sizes.sum()) == 100_000
    assert "public domain" in world.metadata["boundaries"]
    assert world is Geocells.world()


def test_shipped_cells_are_disjoint_valid_and_of_the_sizes_reported(world):
    assert shapely.is_valid(world.polygons).all() and shapely.coverage_is_valid(world.polygons)
    statistics = world.statistics()
    assert (world.metadata["min_size"], world.metadata["max_size"]) == (30, 60)
    within = (world.sizes >= 30) & (world.sizes <= 60)
    outside = statistics["undersized"]["cells"] + statistics["oversized"]["cells"]
    assert within.sum() + outside == len(world) and statistics["oversized"]["cells"] <= 2
    # what is too small is all that its country has, or an island or exclave of it
    totals = {code: int(world.sizes[world.country_codes == code].sum()) for code in set(world.country_codes)}
    assert sum(totals[world.country_codes[i]] >= 60 for i in np.flatnonzero(world.sizes < 30)) < 40
    assert sorted({c for c, total in totals.items() if total == 0}) == world.metadata["countries_without_points"]


@pytest.mark.parametrize(("latitude", "longitude", "country"), PLACES)
def test_places_lie_in_cells_of_their_country(world, latitude, longitude, country):
    assert world.country_codes[world.locate(latitude, longitude)] == country


def test_centroids_lie_in_or_near_their_cell(world):
    nearest = world.locate(world.centroids[:, 0], world.centroids[:, 1])
    same_country = world.country_codes[nearest] == world.country_codes
    assert (nearest == np.arange(len(world))).mean() > 0.9 and same_country.mean() > 0.98
    assert np.median(world.radii_km) < 30


def test_saving_gives_the_same_bytes(world, tmp_path):
    world.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == WORLD_CELLS_FILE.read_bytes()


@pytest.fixture
def small_world(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    pytest.importorskip("pyarrow")
    pytest.importorskip("sklearn")
    rows = [
        ("FRA", "FR", "France", "FRA-1", "Finistère", "Bretagne"),
        ("FRA", "FR", "France", "FRA-2", "Finistère", None),
        ("FRA", "FR", "France", "FRA-3", "La Réunion", "Réunion"),
        ("KOS", "-1", "Kosovo", "KOS-1", "Peć", None),
        ("PGA", "-1", "Spratly Is.", "PGA-1", "Spratly Islands", None),
    ]
    names = ["adm0_a3", "iso_a2", "country", "adm1_code", "name", "region"]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    shapes = [shapely.box(3 * i, 0, 3 * i + 1.5, 2) for i in range(len(rows))]
    geopandas.GeoDataFrame(columns, geometry=shapes, crs=4326).to_parquet(tmp_path / "units.parquet")
    rng = np.random.default_rng(0)
    with gzip.open(tmp_path / "points.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lat", "lng", "cc"])
        writer.writerows((*point, "NA") for point in rng.uniform((0, 0), (2, 10.5), (400, 2)))
    return tmp_path


def test_build_command_gives_the_same_file_again(small_world, capsys):
    inputs = ["--boundaries", str(small_world / "units.parquet"), "--points", str(small_world / "points.csv.gz")]
    for name, more in (
        ("a", []),
        ("b", ["--checkpoint-dir", str(small_world / "kept")]),
        ("c", ["--checkpoint-dir", str(small_world / "kept")]),
    ):
        build_world_geocells.main([*inputs, "--output", str(small_world / name), *more])
    assert len(list((small_world / "kept").iterdir())) == 3
    assert (small_world / "a").read_bytes() == (small_world / "b").read_bytes() == (small_world / "c").read_bytes()
    assert "cells, 0.0" in capsys.readouterr().out
    cells = Geocells.load(small_world / "a")
    assert set(cells.country_codes) == {"FR", "RE", "XK"} and "Spratly Is." not in cells.countries
    assert cells.countries[cells.locate(1.0, 6.5)] == "Réunion" and "Finistère" in cells.regions


def test_build_command_draws_and_exports(small_world):
    pytest.importorskip("matplotlib").use("Agg")
    inputs = ["--boundaries", str(small_world / "units.parquet"), "--points", str(small_world / "points.csv.gz")]
    outputs = ["--output", str(small_world / "cells"), "--plot", str(small_world / "map.png")]
    build_world_geocells.main(
        [*inputs, *outputs, "--export", str(small_world / "cells.parquet"), "--min-size", "20", "--max-size", "50"]
    )
    assert (small_world / "map.png").stat().st_size > 5_000 and (small_world / "cells.parquet").is_file()
    assert Geocells.load(small_world / "cells").metadata["max_size"] == 50


def test_bad_points(tmp_path):
    (tmp_path / "points.csv").write_text("latitude,longitude\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns lat and lng"):
        build_world_geocells.read_points(tmp_path / "points.csv")
    (tmp_path / "swapped.csv").write_text("lat,lng\n100,2\n")
    with pytest.raises(ValueError, match=r"swapped.csv at position 0: .* swapped\?"):
        build_world_geocells.read_points(tmp_path / "swapped.csv")
