"""Names of places that do not exist, made of parts of real ones: "Aylesbury" and "Netrakona" give "Aylekona".

A model that meets the same towns in every epoch learns their names by heart, and with them how to look them up. There are so many
recombined names that hardly one comes twice.
"""

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache

from geobased.recall.places import Place

VOWELS = frozenset("aeiouyāăąâáàäãåæēĕėęěéèêëīĭįıíìîïōŏőøóòôöõūŭůűųúùûüýÿə")
# shorter words are particles such as "San" or "de": they stay as they are
MIN_LETTERS = 4
MAX_TRIES = 1000
_WORD = re.compile(r"[^\W\d_]+")


@lru_cache(maxsize=65_536)
def _cuts(word: str) -> tuple[int, ...]:
    """Where a word may be cut: after a vowel that a consonant follows, or in its middle where there is no such place."""
    letters = word.lower()
    places = range(2, len(word) - 1)
    syllables = tuple(i for i in places if letters[i - 1] in VOWELS and letters[i] not in VOWELS)
    return syllables or (len(word) // 2,)


@lru_cache(maxsize=65_536)
def _words(name: str) -> tuple[str, ...]:
    """The words of a name that may be cut; the longest one where all are short."""
    words = _WORD.findall(name) or [name]
    return tuple(word for word in words if len(word) >= MIN_LETTERS) or (max(words, key=len),)


def _recombined(name: str, places: Sequence[Place], rng: random.Random) -> str:
    """`name` with the ending of each of its longer words taken from a word of another name."""
    cut = _words(name)

    def with_other_ending(match: re.Match[str]) -> str:
        word = match.group()
        if word not in cut:
            return word
        other = rng.choice(_words(rng.choice(places).name))
        return word[: rng.choice(_cuts(word))] + other[rng.choice(_cuts(other)) :].lower()

    return _WORD.sub(with_other_ending, name)


def _is_real(name: str, real_names: Collection[str]) -> bool:
    """Whether a name, or some of its words in a row, are the name of a real place."""
    pieces = re.findall(r"\w+|\W+", name)
    return any("".join(pieces[i:j]) in real_names for i in range(len(pieces)) for j in range(i + 1, len(pieces) + 1))


def with_recombined_names(
    chosen: Sequence[Place], places: Sequence[Place], real_names: Collection[str], rng: random.Random
) -> list[Place]:
    """Towns under names that are no real ones and differ from each other.

    Each word of four letters or more begins as a word of the town's own name and ends as a word of another one.

    Args:
        chosen: towns to name anew.
        places: towns whose names give the endings.
        real_names: no name, and no run of its words, is one of these.

    Raises:
        ValueError: too few names to make new ones of.

    Example:
        >>> from geobased.recall.places import load_places
        >>> places, real = load_places("train"), {place.name for place in load_places()}
        >>> [place.name for place in with_recombined_names(places[:3], places, real, random.Random(0))]
        ['Shada-e Qone', 'Alvany', 'Qangshan']
    """
    renamed: list[Place] = []
    taken: set[str] = set()
    for place in chosen:
        for attempt in range(MAX_TRIES):
            # where a town's own name gives no new one (its particles may be towns, too), another town's begins it
            name = _recombined(rng.choice(places).name if attempt else place.name, places, rng)
            if name not in taken and not _is_real(name, real_names):
                break
        else:
            raise ValueError(f"the names of {len(places)} places are too few to make new ones of: use counterfactual_names=0")
        taken.add(name)
        renamed.append(replace(place, name=name))
    return renamed


__all__ = ["with_recombined_names"]
