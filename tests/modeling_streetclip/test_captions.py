"""Captions against samples and frequencies of the original mixtures, which the fixture holds as digests of their lower case."""

import collections
import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.modeling_streetclip.captions import (
    MIXTURES,
    MONTHS,
    CaptionMixture,
    PlaceDescription,
    compass_direction,
    in_country,
    make_captions,
)
from geobased.modeling_streetclip.koeppen_climates import KOEPPEN_CLIMATES

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "geo" / "captions.json").read_text(encoding="utf-8"))
DRAWS = 20_000
# the originals' two settings: all parts, or the location alone
LOCATION_ONLY = {
    "pigeon": CaptionMixture("A Street View photo", town=0.4, region=0.6),
    "yfcc": CaptionMixture("A photo I took"),
}
CASES = {
    "pigeon_auxTrue": MIXTURES["pigeon"],
    "pigeon_auxFalse": LOCATION_ONLY["pigeon"],
    "yfcc_auxTrue": MIXTURES["pigeotto"],
    "yfcc_auxFalse": LOCATION_ONLY["yfcc"],
}
PARTS = {
    "location": re.compile(r"^A (Street View photo|photo I took)"),
    "region": re.compile("in the region of"),
    "town": re.compile("close to the town of"),
    "climate": re.compile("This location has"),
    "driving": re.compile("people drive on the"),
    "compass": re.compile("is facing"),
    "month": re.compile("was taken in"),
}
PLACE = PlaceDescription("Netherlands", "Utrecht", "Zeist", "Cfb", "right", 200.0, 1)


def places(case: str) -> list[PlaceDescription]:
    rows = REFERENCE["inputs"][case.split("_")[0]]
    # The originals' captions say "left" of the United Kingdom, where the table says right: they looked the country up. And they
    # face 90 degrees on from the table's heading, as the second of four views does.
    return [
        PlaceDescription(
            country=row["country_name"],
            region=row["geo_area"],
            town=row["town"],
            climate=row["climate_zone"],
            driving_side="right" if row["driving_right"] and row["country_name"] != "United Kingdom" else "left",
            heading=None if row["heading"] is None else row["heading"] + 90,
            month=row["month"] + 1,
        )
        for row in rows
    ]


def digest(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[collections.Counter]]:
    """Case -> for each place how often each caption comes, in lower case: the originals write "mediterranean"."""
    return {
        case: [
            collections.Counter(caption.lower() for caption in make_captions([place] * (1500 if row else DRAWS), mixture))
            for row, place in enumerate(places(case))
        ]
        for case, mixture in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_every_sample_of_the_originals_can_be_drawn(drawn, case):
    digests = [{digest(caption) for caption in counts} for counts in drawn[case]]
    for sample in REFERENCE[case]["samples"]:
        assert sample["sha256"] in digests[sample["row"]], sample


@pytest.mark.parametrize("case", CASES)
def test_frequencies_of_the_parts(drawn, case):
    counts = drawn[case][0]
    for part, expected in REFERENCE[case]["component_frequency_row0"].items():
        pattern = re.compile(PARTS[part].pattern, re.IGNORECASE)
        frequency = sum(n for caption, n in counts.items() if pattern.search(caption)) / DRAWS
        assert frequency == pytest.approx(expected, abs=0.015), part


@pytest.mark.parametrize("case", CASES)
def test_frequencies_of_whole_captions(drawn, case):
    counts = {digest(caption): count for caption, count in drawn[case][0].items()}
    for caption, expected in REFERENCE[case]["most_common"]:
        assert counts[caption] / DRAWS == pytest.approx(expected, abs=0.015), caption
    # rare captions may be missing from either
    assert len(counts) == pytest.approx(REFERENCE[case]["n_distinct_row0"], rel=0.05)


def test_the_mediterranean_keeps_its_capital():
    captions = make_captions([places("pigeon_auxTrue")[0]] * 50, "pigeon")
    assert any("has a Mediterranean climate with a warm summer." in caption for caption in captions)
    assert not any("mediterranean" in caption for caption in captions)


def test_compass_directions():
    for heading, expected in REFERENCE["heading_to_direction"].items():
        assert compass_direction(float(heading)) == expected
    assert [compass_direction(x) for x in (0, 360, 405, -1, 45.5, 315.5)] == ["north", "north", "north", "north", "east", "north"]


@given(st.floats(-1e4, 1e4))
def test_compass_directions_are_quarters(heading):
    turned = heading % 360
    centers = {"north": (0, 360), "east": (90,), "south": (180,), "west": (270,)}
    assert min(abs(turned - center) for center in centers[compass_direction(heading)]) <= 45.0000001


# --- the template of StreetCLIP ---------------------------------------------------------------------------------------


def test_streetclip_template():
    assert make_captions(
        [
            PLACE,
            PlaceDescription("United States Of America", "California", "Stanford"),
            PlaceDescription("Japan", town="Nara"),
            PlaceDescription("Kenya", region="Nakuru"),
            PlaceDescription("The Gambia"),
        ]
    ) == [
        "A Street View photo close to the town of Zeist in the region of Utrecht in the Netherlands.",
        "A Street View photo close to the town of Stanford in the region of California in the United States.",
        "A Street View photo close to the town of Nara in Japan.",
        "A Street View photo in the region of Nakuru in Kenya.",
        "A Street View photo in the Gambia.",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Netherlands", "the Netherlands"),
        ("The Netherlands", "the Netherlands"),
        ("the Bahamas", "the Bahamas"),
        ("United States", "the United States"),
        ("United States Of America", "the United States"),
        ("United Kingdom", "the United Kingdom"),
        ("United Arab Emirates", "the United Arab Emirates"),
        ("Czech Republic", "the Czech Republic"),
        ("Czechia", "Czechia"),
        ("Democratic Republic of the Congo", "the Democratic Republic of the Congo"),
        ("Palestinian Territory", "the Palestinian Territory"),
        ("Philippines", "the Philippines"),
        ("Isle of Man", "the Isle of Man"),
        ("Solomon Islands", "the Solomon Islands"),
        ("Heard Island and McDonald Islands", "Heard Island and McDonald Islands"),
        ("South Georgia and the South Sandwich Islands", "South Georgia and the South Sandwich Islands"),
        ("Georgia", "Georgia"),
        ("Ireland", "Ireland"),
        ("Micronesia", "Micronesia"),
        ("Thessaly", "Thessaly"),
        ("Bonaire, Saint Eustatius and Saba ", "Bonaire, Saint Eustatius and Saba"),
        ("Côte d'Ivoire", "Côte d'Ivoire"),
    ],
)
def test_articles_of_countries(name, expected):
    assert in_country(name) == expected


@given(st.from_regex(r"(the |The )?([A-Z][a-z]+ ?){1,3}(of|and|Islands|Republic)?", fullmatch=True))
def test_articles_are_not_doubled(name):
    assert in_country(in_country(name)) == in_country(name)


# --- climates ---------------------------------------------------------------------------------------------------------


def test_every_climate_has_words():
    assert len(KOEPPEN_CLIMATES) == 31
    assert {"Af", "Aw", "BWh", "Csa", "Cfb", "Dwd", "ET", "EF"} <= KOEPPEN_CLIMATES.keys()
    for phrase, adjectives in KOEPPEN_CLIMATES.values():
        assert re.match("(a [^aeiou]|an [aeiou])", phrase)
        assert "climate" in phrase
        assert "climate" not in adjectives
    assert len({phrase for phrase, _ in KOEPPEN_CLIMATES.values()}) == 31


@pytest.mark.parametrize(
    ("mixture", "climate", "expected"),
    [
        ("pigeon", "Csb", "This location has a Mediterranean climate with a warm summer."),
        ("pigeon", "A temperate oceanic climate", "This location has a temperate oceanic climate."),
        ("pigeotto", "Csb", "This location has a temperate, dry summer, warm summer climate."),
        ("pigeotto", "BWh", "This location has an arid, desert, hot climate."),
        ("pigeotto", "Temperate, dry summer, warm summer", "This location has a temperate, dry summer, warm summer climate."),
        ("pigeotto", "Mediterranean", "This location has a Mediterranean climate."),
    ],
)
def test_wording_of_climates(mixture, climate, expected):
    captions = make_captions([PlaceDescription("Chile", climate=climate)] * 100, mixture)
    assert {caption for caption in captions if "climate" in caption} == {
        expected,
        f"{MIXTURES[mixture].opening} in Chile. {expected}",
    }


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_seed_gives_the_same_captions_in_any_batches(mixture):
    together = make_captions([PLACE] * 50, mixture, seed=3)
    assert together == make_captions([PLACE] * 50, mixture, seed=3)
    in_parts = [c for first in range(0, 50, 7) for c in make_captions([PLACE] * min(7, 50 - first), mixture, seed=3, first=first)]
    assert together == in_parts
    if mixture != "streetclip":
        assert together != make_captions([PLACE] * 50, mixture, seed=4)


def test_captions_are_the_same_on_every_machine():
    assert make_captions([PLACE] * 5, "pigeon", seed=1)[3:] == [
        "A Street View photo close to the town of Zeist in the region of Utrecht in the Netherlands. This photo is facing south."
        " The photo was taken in January. In this location, people drive on the right side of the road.",
        "This location has a temperate oceanic climate.",
    ]


@settings(max_examples=200)
@given(
    st.builds(
        PlaceDescription,
        country=st.sampled_from(["Japan", "Netherlands", "Côte d'Ivoire"]),
        region=st.none() | st.just("Nara"),
        town=st.none() | st.just("Uda"),
        climate=st.none() | st.sampled_from(sorted(KOEPPEN_CLIMATES)),
        driving_side=st.sampled_from([None, "left", "right"]),
        heading=st.none() | st.floats(-720, 720),
        month=st.none() | st.integers(1, 12),
    ),
    st.sampled_from(sorted(MIXTURES)),
    st.integers(0, 10**6),
)
def test_captions_are_sentences_and_tell_what_is_known_alone(place, mixture, seed):
    [caption] = make_captions([place], mixture, seed=seed)
    assert re.fullmatch(r"([A-Z][^.]*\.)( [A-Z][^.]*\.)*", caption), caption
    assert "  " not in caption
    assert "None" not in caption
    told = {part for part, pattern in PARTS.items() if pattern.search(caption)}
    known = {
        "location": True,
        "region": place.region,
        "town": place.town,
        "climate": place.climate,
        "driving": place.driving_side,
        "compass": place.heading is not None,
        "month": place.month,
    }
    assert told <= {part for part, value in known.items() if value}
    assert told & {"location", "climate"}
    assert not {"climate", "driving"} <= told
    if "month" in told:
        assert f"taken in {MONTHS[place.month - 1]}." in caption


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"country": " "}, "country"),
        ({"driving_side": "middle"}, "driving_side='middle'"),
        ({"month": 0}, "month=0"),
        ({"month": 13}, "month=13"),
        ({"heading": float("nan")}, "heading=nan"),
        ({"heading": float("inf")}, "heading=inf"),
    ],
)
def test_bad_descriptions(fields, message):
    with pytest.raises(ValueError, match=message):
        PlaceDescription(**{"country": "Japan", **fields})


def test_unknown_mixture():
    with pytest.raises(ValueError, match="mixture='yfcc' is unknown: choose from streetclip, pigeon, pigeotto"):
        make_captions([PLACE], "yfcc")
