"""Captions of rows: what the columns say about a place, and the gazetteer where they say nothing."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from geobased.modeling_streetclip.captions import PlaceDescription, make_captions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from geobased.geography.gazetteer import Gazetteer

# column names that mean a fact, the first that is there wins
FACT_COLUMNS = {
    "country": ("country", "country_name"),
    "region": ("region", "admin1", "state"),
    "town": ("town", "city"),
    "climate": ("climate", "koppen", "koeppen"),
    "driving_side": ("driving_side", "drive_side"),
    "heading": ("heading", "compass"),
    "month": ("month",),
}
Fill = Literal["gazetteer", "none"]


class CaptionWriter:
    """Writes the caption of one row in one epoch.

    Which parts it has depends on the seed, the epoch and the row's number alone: not on batches, workers or a resumption.

    Args:
        places: [n] descriptions by row number.
        mixture: "streetclip", "pigeon" or "pigeotto".
        seed: of the mixture's draws.
    """

    def __init__(self, places: Sequence[PlaceDescription | None], mixture: str = "streetclip", seed: int = 0) -> None:
        self.places, self.mixture, self.seed = places, mixture, seed

    def caption(self, place: PlaceDescription | None, row: int, epoch: int = 0) -> str:
        """The caption of a place that is image number `row`. Raises `ValueError` if its country is not known (None)."""
        if place is None:
            raise ValueError(f"image {row} has no country, which every caption names")
        # distinct for every epoch, as the caption module asks for
        return make_captions([place], self.mixture, seed=self.seed + 1_000_003 * epoch, first=row)[0]


def describe_rows(
    columns: Mapping[str, Sequence[Any]], coordinates: np.ndarray, fill: Fill = "gazetteer", progress: bool = True
) -> list[PlaceDescription | None]:
    """What is known about each row's place.

    Args:
        columns: name: [n] values; `FACT_COLUMNS` lists the names that are read, in any case.
        coordinates: [n, 2], (latitude, longitude) in degrees.
        fill: "gazetteer" takes country, region, town and driving side of a row without a country from the nearest town of the
            gazetteer (GeoNames, without a network); "none" leaves such rows without a description.
        progress: whether a progress bar is shown.

    Returns:
        [n] descriptions; None where the country is not known.

    Raises:
        ValueError: another `fill`, or values that are none (a thirteenth month); the message names the row.
    """
    if fill not in ("gazetteer", "none"):
        raise ValueError(f"fill={fill!r} is unknown; choose from gazetteer, none")
    by_name = {name.lower(): values for name, values in columns.items()}
    facts = {fact: next((by_name[name] for name in names if name in by_name), None) for fact, names in FACT_COLUMNS.items()}
    count = len(coordinates)
    rows = [{fact: values[row] for fact, values in facts.items() if values is not None} for row in range(count)]
    unknown = [row for row in range(count) if not rows[row].get("country")]
    if unknown and fill == "gazetteer":
        for row, found in zip(unknown, _nearest(coordinates[unknown], progress), strict=True):
            rows[row] = found | {fact: value for fact, value in rows[row].items() if value not in (None, "")}
    return [_description(row, facts) if facts.get("country") else None for row, facts in enumerate(rows)]


def _nearest(coordinates: np.ndarray, progress: bool) -> list[dict[str, Any]]:
    from geobased.geography.gazetteer import find_country

    gazetteer = _gazetteer()
    found = []
    for start in tqdm(range(0, len(coordinates), 4096), desc="naming places", disable=not progress):
        part = coordinates[start : start + 4096]
        for place in gazetteer.nearest(part[:, 0], part[:, 1])[0]:
            names = gazetteer.describe(place)
            side = find_country(place.country_code).driving_side
            fact = {"country": names["country"], "region": names["region"], "town": names["city"], "driving_side": side}
            found.append({key: value for key, value in fact.items() if value})
    return found


def token_table(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int) -> dict[str, "torch.Tensor"]:
    """input_ids and attention_mask [n, length] of texts, padded to the longest."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@lru_cache(maxsize=1)
def _gazetteer() -> "Gazetteer":
    from geobased.geography.gazetteer import Gazetteer

    return Gazetteer()


def _description(row: int, facts: dict[str, Any]) -> PlaceDescription:
    known: dict[str, Any] = {fact: value for fact, value in facts.items() if value not in (None, "")}
    known |= {fact: str(value) for fact, value in known.items() if fact not in ("heading", "month")}
    try:
        for fact, convert in (("heading", float), ("month", lambda value: int(float(value)))):
            if fact in known:
                known[fact] = convert(known[fact])
        return PlaceDescription(**known)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error


__all__ = ["FACT_COLUMNS", "CaptionWriter", "describe_rows", "token_table"]
