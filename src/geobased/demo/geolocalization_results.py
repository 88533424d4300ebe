"""Answers as the page and its endpoints give them: sentences, trees, tables, and files to keep."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from geobased.cli.sources import quiet_transformers
from geobased.pipelines.geolocalization_answers import NOWHERE, place_title
from geobased.pipelines.geolocalization_cells import MAX_CELLS
from geobased.pipelines.geolocalization_map import LocatedImage, save_map, thumbnail

from .geolocalization_models import Models
from .geolocalization_uploads import MAX_IMAGES, too_large

BATCH_SIZE = 16
COLUMNS = ("image", "rank", "latitude", "longitude", "score", "error_radius_km", "abstain", "country", "region", "city", "error")


def located(
    models: Models, name: str, files: Sequence[str], top_k: int, step: Callable[[int, int], Any] | None = None
) -> Iterator[list[LocatedImage]]:
    """What a model answers to files: all that is known so far, after every few images. The first `MAX_IMAGES` are pictured.

    step is told how many are done, and of how many.
    """
    pipe, areas = models.pipe(name), models.areas(name)
    images: list[LocatedImage] = []
    for start in range(0, len(files), BATCH_SIZE):
        batch = files[start : start + BATCH_SIZE]
        refused = {file: reason for file in batch if (reason := too_large(file))}
        opened = [file for file in batch if file not in refused]
        with quiet_transformers():
            answers = iter(pipe(opened, batch_size=len(opened), top_k=top_k, cells=MAX_CELLS) if opened else [])
        for file in batch:
            answer = {"error": refused[file]} if file in refused else next(answers)
            if isinstance(answer, dict):
                # without the server's path
                images.append(LocatedImage(Path(file).name, error=answer["error"].replace(str(Path(file).parent) + os.sep, "")))
                continue
            cells = answer[0].pop("cells", [])
            pictured = len(images) < MAX_IMAGES
            images.append(
                LocatedImage(
                    Path(file).name,
                    answer,
                    thumbnail=thumbnail(file) if pictured else None,
                    cells=areas.areas(cells) if areas is not None and pictured else (),
                    exact_cells=areas is not None and areas.exact,
                )
            )
        if step is not None:
            step(len(images), len(files))
        yield images


def summary(images: Sequence[LocatedImage], total: int | None = None) -> str:
    """A sentence of what was answered; total if that is not all yet."""
    answered = [image for image in images if image.predictions]
    uncertain = sum(bool(image.predictions[0]["abstain"]) for image in answered)
    parts = [f"{len(answered) - uncertain:,} of {len(images):,} located"]
    parts += [f"{uncertain:,} too uncertain to say"] if uncertain else []
    parts += [f"{len(images) - len(answered):,} not readable"] if len(answered) < len(images) else []
    rest = "" if total is None or total == len(images) else f" {total - len(images):,} to go."
    return "; ".join(parts) + "." + rest


def country_tree(images: Sequence[LocatedImage]) -> str:
    """Nested lists of countries, regions and cities with the shares of the images' probability, as HTML."""
    answered = [image for image in images if image.predictions]
    tree: dict[str, Any] = {}
    for place in (place for image in answered for place in image.predictions):
        names = [place.get(level) for level in ("country", "region", "city")]
        node = tree
        for name in [name for name in names if name] or [NOWHERE]:
            entry = node.setdefault(name, {"score": 0.0, "below": {}})
            entry["score"] += place["score"] / len(answered)
            node = entry["below"]

    def listed(nodes: dict[str, Any], depth: int) -> str:
        rows = []
        for name, entry in sorted(nodes.items(), key=lambda item: -item[1]["score"]):
            label = f"{escape(name)} <b>{entry['score']:.1%}</b>"
            if entry["below"]:
                opened = " open" if depth == 0 and entry["score"] >= 0.5 else ""
                label = f"<details{opened}><summary>{label}</summary>{listed(entry['below'], depth + 1)}</details>"
            rows.append(f"<li>{label}</li>")
        return f"<ul>{''.join(rows)}</ul>"

    return f'<div class="places tree"><h2>By country</h2>{listed(tree, 0)}</div>' if answered else ""


def as_report(images: Sequence[LocatedImage]) -> list[dict[str, Any]]:
    """The places of every image as JSON can hold them, and the error of those that could not be read."""
    return [
        {"image": image.name, "predictions": image.predictions, **({"error": image.error} if image.error else {})}
        for image in images
    ]


def as_csv(images: Sequence[LocatedImage]) -> str:
    """A row for each place of each image, and one for each image that could not be read."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for image in images:
        for rank, place in enumerate(image.predictions, 1):
            writer.writerow({"image": image.name, "rank": rank, **place})
        if image.error is not None:
            writer.writerow({"image": image.name, "error": image.error})
    return file.getvalue()


def as_geojson(images: Sequence[LocatedImage]) -> str:
    """A point for each place of each image (RFC 7946: longitude first)."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [place["longitude"], place["latitude"]]},
            "properties": {"image": image.name, "rank": rank}
            | {name: value for name, value in place.items() if name not in ("latitude", "longitude")},
        }
        for image in images
        for rank, place in enumerate(image.predictions, 1)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False)


def answer_table(images: Sequence[LocatedImage]) -> str:
    """A row for each image, its best place or why there is none, as an HTML table."""
    rows = []
    for image in images:
        if not image.predictions:
            reason = escape(image.error or "")
            rows.append(f'<tr class="failed"><td>{escape(image.name)}</td><td colspan="5">not readable: {reason}</td></tr>')
            continue
        best = image.predictions[0]
        rows.append(
            f"<tr><td>{escape(image.name)}</td><td>{escape(place_title(best))}</td><td>{best['score']:.1%}</td>"
            f"<td>{best['latitude']:.2f}, {best['longitude']:.2f}</td><td>{best['error_radius_km']:,.0f} km</td>"
            f"<td>{'too uncertain' if best['abstain'] else ''}</td></tr>"
        )
    return (
        '<div class="places rows" tabindex="0" role="region" aria-label="best place of each image"><table><thead>'
        "<tr><th>image</th><th>best place</th><th>probability</th><th>latitude, longitude</th><th>radius</th><th></th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def new_folder() -> Path:
    """For files to download; the page deletes what lies in it after an hour."""
    return Path(tempfile.mkdtemp(prefix="geobased-"))


def save_answers(images: Sequence[LocatedImage]) -> list[str]:
    """Paths of the places as GeoJSON and CSV, and of a map that opens without a network."""
    folder = new_folder()
    for name, text in (("places.geojson", as_geojson(images)), ("places.csv", as_csv(images))):
        (folder / name).write_text(text, encoding="utf-8")
    save_map(folder / "map.html", images)
    return [str(folder / name) for name in ("places.geojson", "places.csv", "map.html")]


__all__ = [
    "answer_table",
    "as_csv",
    "as_geojson",
    "as_report",
    "country_tree",
    "located",
    "new_folder",
    "save_answers",
    "summary",
]
