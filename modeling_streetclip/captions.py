# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Captions of places: what StreetCLIP, PIGEON and PIGEOTTO are pretrained on.

StreetCLIP (Haas et al. 2023) has one sentence. PIGEON and PIGEOTTO (Haas et al. 2024) mix it at random with sentences about the
climate, the side of the road that people drive on, the direction the camera faces and the month, so that a model learns to see
these as well. Which sentences a caption has depends on the seed and the place's number alone, not on the order or the batches in
which captions are asked for.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .koeppen_climates import KOEPPEN_CLIMATES

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# names that take "the" although no word of THE_WORDS tells
THE_NAMES = frozenset(
    (
        *("Bahamas", "Caribbean Netherlands", "Comoros", "Congo", "DR Congo", "Gambia", "Gaza Strip", "Holy See", "Maldives"),
        *("Netherlands", "Philippines", "Seychelles", "UAE", "UK", "US", "USA", "Vatican", "Vatican City State", "West Bank"),
    )
)
THE_WORDS = re.compile(
    r"\b(Antilles|Emirates|Federation|Islands|Kingdom|Lands|Republic|States|Territor(?:y|ies))\b|^(?:Isle|State) of "
)
# "Islands" ends these names, but they begin with an island's own
NO_THE = re.compile(r"^(?:Heard Island|South Georgia)\b")


@dataclass(frozen=True)
class PlaceDescription:
    """What is known about the place of a photo; None where it is not.

    Args:
        country: name, with or without "the".
        region: name of the first administrative level.
        town: name of a town close by.
        climate: a Köppen-Geiger code ("Csb"), or words: a noun phrase with its article for PIGEON's sentence ("a temperate
            oceanic climate"), adjectives for PIGEOTTO's ("temperate, dry summer, warm summer").
        driving_side: side of the road.
        heading: direction the camera faces in degrees, clockwise from north.
        month: 1 to 12.

    Raises `ValueError` for an empty country, an unknown driving side, a month that is none and a heading that is not finite.
    """

    country: str
    region: str | None = None
    town: str | None = None
    climate: str | None = None
    driving_side: Literal["left", "right"] | None = None
    heading: float | None = None
    month: int | None = None

    def __post_init__(self) -> None:
        if not self.country.strip():
            raise ValueError(f"country={self.country!r} is empty: every caption names the country")
        if self.driving_side not in (None, "left", "right"):
            raise ValueError(f"driving_side={self.driving_side!r} must be 'left', 'right' or None")
        if self.month is not None and self.month not in range(1, 13):
            raise ValueError(f"month={self.month!r} must be 1 (January) to 12 (December)")
        if self.heading is not None and not abs(self.heading) < float("inf"):
            raise ValueError(f"heading={self.heading!r} must be a number of degrees")


@dataclass(frozen=True)
class CaptionMixture:
    """How likely each part of a caption is, where it is known.

    Args:
        opening: begins the sentence about the location.
        town, region: that the location names them.
        climate: that the climate is told.
        location_beside_climate: that the location is told too if the climate is. Without climate it always is.
        driving_side: that the driving side is told if the climate is not.
        compass, month: that they are told.
        climate_wording: "phrase" tells the climate by a noun phrase, "adjectives" by adjectives before the word "climate".
    """

    opening: str
    town: float = 1.0
    region: float = 1.0
    climate: float = 0.0
    location_beside_climate: float = 1.0
    driving_side: float = 0.0
    compass: float = 0.0
    month: float = 0.0
    climate_wording: Literal["phrase", "adjectives"] = "phrase"


STREETCLIP = CaptionMixture("A Street View photo")
PIGEON = CaptionMixture(
    "A Street View photo",
    town=0.4,
    region=0.6,
    climate=0.4,
    location_beside_climate=0.7,
    driving_side=0.3,
    compass=0.3,
    month=0.3,
)
PIGEOTTO = CaptionMixture(
    "A photo I took", climate=0.45, location_beside_climate=0.8, driving_side=0.2, climate_wording="adjectives"
)
MIXTURES = {"streetclip": STREETCLIP, "pigeon": PIGEON, "pigeotto": PIGEOTTO}


def make_captions(
    places: Sequence[PlaceDescription],
    mixture: str | CaptionMixture = "streetclip",
    *,
    seed: int = 0,
    first: int = 0,
) -> list[str]:
    """One caption for each place.

    mixture is "streetclip", "pigeon", "pigeotto" or one of your own. Place number i of the list draws from a generator of its
    own, seeded by `seed` and `first + i`: pass the number of the first place where a data set is captioned in parts, and another
    seed in each epoch.

    Raises `ValueError` for an unknown mixture.

    Example:

    ```python
    >>> from geobased.modeling_streetclip.captions import PlaceDescription, make_captions
    >>> make_captions([PlaceDescription("Netherlands", region="Utrecht", town="Zeist")])
    ['A Street View photo close to the town of Zeist in the region of Utrecht in the Netherlands.']
    ```
    """
    if isinstance(mixture, str):
        if mixture not in MIXTURES:
            raise ValueError(f"mixture={mixture!r} is unknown: choose from {', '.join(MIXTURES)}, or give a CaptionMixture")
        mixture = MIXTURES[mixture]
    # seeded by text: the same on every machine and version of Python, and streams of neighbours have nothing in common
    return [_caption(place, mixture, random.Random(f"{seed}/{first + i}")) for i, place in enumerate(places)]


def in_country(country: str) -> str:
    """The country's name as it follows "in": with "the" where English has it.

    Example:
        >>> in_country("Netherlands"), in_country("The Gambia"), in_country("Japan"), in_country("United States Of America")
        ('the Netherlands', 'the Gambia', 'Japan', 'the United States')
    """
    name = " ".join(country.split())
    if name.casefold() == "united states of america":
        return "the United States"
    bare = re.sub(r"^the ", "", name, flags=re.IGNORECASE)
    takes_the = bare != name or bare in THE_NAMES or (THE_WORDS.search(bare) and not NO_THE.match(bare))
    return f"the {bare}" if takes_the else name


def compass_direction(heading: float) -> str:
    """The nearest of the four directions to heading in degrees; halves belong to the lower one, as 45 to the north.

    Example:
        >>> [compass_direction(degrees) for degrees in (45, 46, 180, 270, -10)]
        ['north', 'east', 'south', 'west', 'north']
    """
    turned = heading % 360
    return next((name for name, last in (("north", 45), ("east", 135), ("south", 225), ("west", 315)) if turned <= last), "north")


def _caption(place: PlaceDescription, mixture: CaptionMixture, rng: random.Random) -> str:
    # all draws are taken, in one order, whatever is known: adding a fact to a place changes that part of its caption alone
    has_town, has_region, has_climate, has_location, has_side, has_compass, has_month = (
        rng.random() < p
        for p in (
            *(mixture.town, mixture.region, mixture.climate, mixture.location_beside_climate),
            *(mixture.driving_side, mixture.compass, mixture.month),
        )
    )
    extras = []
    if place.climate and has_climate:
        extras.append(f"This location has {_climate(place.climate, mixture.climate_wording)}.")
    elif place.driving_side and has_side:
        extras.append(f"In this location, people drive on the {place.driving_side} side of the road.")
    if place.heading is not None and has_compass:
        extras.append(f"This photo is facing {compass_direction(place.heading)}.")
    if place.month is not None and has_month:
        extras.append(f"The photo was taken in {MONTHS[place.month - 1]}.")
    rng.shuffle(extras)

    if place.climate and has_climate and not has_location:
        return " ".join(extras)
    town = f" close to the town of {place.town}" if place.town and has_town else ""
    region = f" in the region of {place.region}" if place.region and has_region else ""
    return " ".join([f"{mixture.opening}{town}{region} in {in_country(place.country)}.", *extras])


def _climate(climate: str, wording: str) -> str:
    phrase, adjectives = KOEPPEN_CLIMATES.get(climate, (climate, climate))
    if wording == "phrase":
        return _lower_first(phrase)
    return f"{_article(adjectives)} {_lower_first(adjectives)} climate"


def _lower_first(text: str) -> str:
    """Text as it stands inside a sentence: data sets capitalise phrases, and "Mediterranean" keeps its capital."""
    return text if text.startswith("Mediterranean") else text[:1].lower() + text[1:]


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


__all__ = [
    "MIXTURES",
    "CaptionMixture",
    "PlaceDescription",
    "compass_direction",
    "in_country",
    "make_captions",
]
