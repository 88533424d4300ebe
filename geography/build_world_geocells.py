"""Build `data/world.geocells`: the geocells of the world that come with the package.

    python -m geobased.geography.build_world_geocells --boundaries ne_admin1_global.parquet --points geoclip_100K_enriched.csv.gz

Borders come from Natural Earth's map of first-level units (1:10 million, public domain), sizes from the coordinates of 100,000
photos (the GeoCLIP gallery, MIT). The file depends on these inputs and the options alone. Finished countries are kept in
`--checkpoint-dir`: started again, the command goes on from there.
"""

import argparse
import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from geobased.geography.boundaries import Boundaries, read_boundaries
from geobased.geography.coordinates import check_coordinates
from geobased.geography.geocell_collection import WORLD_CELLS_FILE, Geocells
from geobased.geography.geocells import PIGEON_OPTICS, create_geocells

# Natural Earth's map gives these no ISO code of their own: the code that GeoNames lists their places under
CODES_BY_ADM0 = {
    "CLP": "FR",
    "CSI": "AU",
    "CYN": "CY",
    "ESB": "CY",
    "KAB": "KZ",
    "KOS": "XK",
    "SOL": "SO",
    "USG": "CU",
    "WSB": "CY",
}
# parts that the map counts to their country, and ISO 3166 and GeoNames do not: (Natural Earth's country, unit) -> code and name
PARTS_WITH_CODES = {
    ("FRA", "Guadeloupe"): ("GP", "Guadeloupe"),
    ("FRA", "Guyane française"): ("GF", "French Guiana"),
    ("FRA", "La Réunion"): ("RE", "Réunion"),
    ("FRA", "Martinique"): ("MQ", "Martinique"),
    ("FRA", "Mayotte"): ("YT", "Mayotte"),
    ("IOA", "Christmas Island"): ("CX", "Christmas Island"),
    ("IOA", "Cocos (Keeling) Islands"): ("CC", "Cocos (Keeling) Islands"),
    ("NLD", "Bonaire"): ("BQ", "Caribbean Netherlands"),
    ("NLD", "Saba"): ("BQ", "Caribbean Netherlands"),
    ("NLD", "St. Eustatius"): ("BQ", "Caribbean Netherlands"),
    ("NOR", "Bouvet Island"): ("BV", "Bouvet Island"),
    ("NOR", "Svalbard"): ("SJ", "Svalbard and Jan Mayen"),
    ("NZL", "Tokelau"): ("TK", "Tokelau"),
}
BOUNDARY_DECIMALS = 3  # the map's own precision is some hundred metres
SIMPLIFY_DEGREES = 0.01


def world_boundaries(path: Path) -> Boundaries:
    """First-level units of Natural Earth by ISO country, regions where the map has them, as a coverage."""
    import geopandas

    frame = geopandas.read_parquet(path)
    codes, names = [], []
    for adm0, iso, country, unit in zip(frame["adm0_a3"], frame["iso_a2"], frame["country"], frame["name"], strict=True):
        code, name = PARTS_WITH_CODES.get((adm0, unit), (CODES_BY_ADM0.get(adm0, iso), country))
        codes.append(code)
        names.append(name)
    frame["code"] = codes
    frame["country"] = names
    # one name per code, that of most of its units; for PS the map has only the names of two parts
    common = frame.groupby("code")["country"].agg(lambda column: column.value_counts().sort_index().idxmax())
    frame["country"] = frame["code"].map(common).where(frame["code"] != "PS", "Palestine")
    # reefs and a glacier that several countries claim
    frame = frame[frame["code"] != "-1"]
    # some units share their name, so the code tells them apart and the name is put back
    boundaries = read_boundaries(frame, ["code", "region", "adm1_code"], country_name="country")
    unit_names = dict(zip(frame["adm1_code"], frame["name"], strict=True))
    units = np.array([unit_names[code] for code in boundaries.units])
    named = Boundaries(boundaries.polygons, boundaries.countries, boundaries.country_names, boundaries.regions, units)
    return named.cleaned(decimals=BOUNDARY_DECIMALS, simplify_degrees=SIMPLIFY_DEGREES)


def read_points(path: Path) -> np.ndarray:
    """[n, 2] (latitude, longitude) of a table with the columns lat and lng, gzipped or not.

    Raises:
        ValueError: other columns, or coordinates that are none.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {"lat", "lng"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} must have the columns lat and lng, not {rows.fieldnames}")
        values = np.array([(float(row["lat"]), float(row["lng"])) for row in rows])
    latitude, longitude = check_coordinates(values[:, 0], values[:, 1], name=str(path))
    return np.stack([latitude, longitude], axis=1)


def build(
    boundaries: Path,
    points: Path,
    *,
    min_size: int = 30,
    max_size: int = 60,
    seed: int = 330,
    checkpoint_dir: Path | None = None,
    progress: bool = True,
) -> Geocells:
    """The cells of the world: PIGEON's sizes and OPTICS settings."""
    cells = create_geocells(
        read_points(points),
        world_boundaries(boundaries),
        min_size=min_size,
        max_size=max_size,
        optics=PIGEON_OPTICS,
        seed=seed,
        # a point in Antarctica is not in Chile
        empty_countries=True,
        checkpoint_dir=checkpoint_dir,
        progress=progress,
    )
    cells.metadata["boundaries"] = "Natural Earth 1:10m, states and provinces (public domain)"
    cells.metadata["points"] = "GeoCLIP gallery of 100,000 photo coordinates (MIT); they are not in this file"
    return cells


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boundaries", type=Path, required=True, help="Natural Earth's first-level units (GeoParquet)")
    parser.add_argument("--points", type=Path, required=True, help="table with the columns lat and lng (CSV, gzipped or not)")
    parser.add_argument("--min-size", type=int, default=30, help="points that a cell should have")
    parser.add_argument("--max-size", type=int, default=60, help="points that a cell may have")
    parser.add_argument("--seed", type=int, default=330)
    parser.add_argument("--checkpoint-dir", type=Path, help="keep finished countries here and go on from them")
    parser.add_argument("--output", type=Path, default=WORLD_CELLS_FILE)
    parser.add_argument("--plot", type=Path, help="also draw a map of the cells (PNG)")
    parser.add_argument("--export", type=Path, help="also write GeoParquet (.parquet) or GeoJSON (.geojson)")
    options = parser.parse_args(arguments)
    cells = build(
        options.boundaries,
        options.points,
        min_size=options.min_size,
        max_size=options.max_size,
        seed=options.seed,
        checkpoint_dir=options.checkpoint_dir,
        progress=sys.stderr.isatty(),
    )
    cells.save(options.output)
    if options.plot:
        cells.plot().figure.savefig(options.plot, dpi=150, bbox_inches="tight")
    if options.export:
        cells.export(options.export)
    print(json.dumps({**cells.statistics(), "steps": cells.metadata["steps"]}, indent=1))
    print(f"{len(cells)} cells, {options.output.stat().st_size / 1e6:.2f} MB in {options.output}")


if __name__ == "__main__":
    main()
