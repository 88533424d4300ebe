import csv
import gzip
import json

import numpy as np
import pytest

from geobased.recall import build_places
from geobased.recall.places import PLACES_FILE, Place, is_held_out, load_places


def test_shipped_table_is_complete_and_small():
    places = load_places()
    assert 8_000 <= len(places) <= 15_000
    assert PLACES_FILE.stat().st_size < 1_500_000
    assert len({place.name for place in places}) == len({place.geonames_id for place in places}) == len(places)
    assert any(place.country_code == "NA" and place.country == "Namibia" for place in places)
    for place in places:
        assert place.name and place.country and place.region and place.climate
        assert place.driving_side in ("left", "right")
        assert place.population > 0 and abs(place.latitude) <= 90 and abs(place.longitude) <= 180


def test_known_places():
    by_name = {place.name: place for place in load_places()}
    walvis_bay = by_name["Walvis Bay"]
    assert (walvis_bay.country_code, walvis_bay.region, walvis_bay.driving_side) == ("NA", "Erongo", "left")
    assert walvis_bay.climate == "hot desert" and walvis_bay.latitude == pytest.approx(-22.96, abs=0.05)
    assert set(build_places.CLIMATES.values()) >= {place.climate for place in load_places()}


def test_split_is_disjoint_and_a_tenth():
    train, held_out = load_places("train"), load_places("held_out")
    assert len(train) + len(held_out) == len(load_places())
    assert not {p.geonames_id for p in train} & {p.geonames_id for p in held_out}
    assert 0.08 < len(held_out) / len(load_places()) < 0.11
    assert [is_held_out(i) for i in range(1, 9)] == [is_held_out(i) for i in range(1, 9)]


def test_load_places_errors(tmp_path):
    with pytest.raises(ValueError, match="split must be"):
        load_places("test")
    table = tmp_path / "places.csv.gz"
    with gzip.open(table, "wt") as file:
        file.write("name,country\nA,B\n")
    with pytest.raises(ValueError, match="expected the columns"):
        load_places(path=table)


def test_climate_raster(tmp_path):
    image = pytest.importorskip("PIL.Image")
    zones = np.full((18, 36), 32, np.uint8)  # 10 degrees a cell, sea everywhere
    zones[4, 20] = 7
    image.fromarray(zones).save(tmp_path / "climate.png")
    (tmp_path / "zones.csv").write_text(",kg_zone,zoneNum\n1,BWh,7\n2,Ocean,32\n")
    raster = build_places.ClimateRaster(tmp_path / "climate.png", tmp_path / "zones.csv")
    assert raster.words(45, 25) == "hot desert"  # row (90 - 45) / 10, column (25 + 180) / 10
    assert raster.words(15, 25) == "hot desert"  # at sea, within three cells of land
    assert raster.words(-45, 25) is None


def test_region_names_need_a_photo_nearby():
    cities = [
        {"countrycode": "DE", "admin1code": "01", "name": "Neustadt", "latitude": 50.0, "longitude": 10.0},
        {"countrycode": "DE", "admin1code": "02", "name": "Altdorf", "latitude": 48.0, "longitude": 11.0},
    ]
    photos = {("DE", "Neustadt"): [(50.1, 10.1, "Near"), (54.0, 10.0, "Far")]}
    assert build_places.region_names(cities, photos) == {("DE", "01"): "Near"}


def test_selection_keeps_held_out_names_out_of_other_texts():
    held_out = next(i for i in range(1000) if is_held_out(i))
    train = next(i for i in range(1000) if not is_held_out(i))

    def row(geonames_id, name, region="Region", population=10):
        return {"geonames_id": geonames_id, "name": name, "region": region, "population": population}

    def names(*rows):
        rows = [{"country": "Land", "climate": "hot desert", **r} for r in rows]
        return [r["name"] for r in build_places.select(rows, 10)]

    assert names(row(held_out, "York"), row(train, "New York")) == ["New York"]
    assert names(row(held_out, "York"), row(train, "Leeds", region="York")) == ["Leeds"]
    assert names(row(held_out, "York"), row(train, "Yorkton")) == ["York", "Yorkton"]
    assert names(row(held_out, "New York"), row(train, "York")) == ["New York", "York"]


def test_written_table_is_the_same_each_time(tmp_path):
    rows = [{key: str(getattr(place, key)) for key in build_places.COLUMNS} for place in load_places()[:20]]
    for name in "ab":
        build_places.write(rows, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with gzip.open(tmp_path / "a", "rt", encoding="utf-8", newline="") as file:
        assert json.dumps(list(csv.DictReader(file))) == json.dumps(rows)
    assert [Place(**vars_) for vars_ in map(_fields, load_places(path=tmp_path / "a"))] == load_places()[:20]


def _fields(place):
    return {name: getattr(place, name) for name in Place.__slots__}
