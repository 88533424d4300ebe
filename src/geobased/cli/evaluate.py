"""`geobased evaluate`: how good a model's answers are on images whose places are known."""

import csv
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geobased.whole_file import whole_file

from .errors import CommandError
from .locate import BatchSize, Beam, Dtype, Levels, Model, Threads, load_geolocalizer, locate_images
from .options import Debug, Device, Json
from .sources import DEFAULT_GEOLOCALIZER

if TYPE_CHECKING:
    import numpy as np

    from geobased.geography.evaluation import EvaluationResult
    from geobased.modeling_streetclip.candidate_ceiling import CandidateCeiling
    from geobased.pipelines import ImageGeolocalizationPipeline

EXAMPLES = (
    "geobased evaluate photos.csv --model ./my-pigeon --html report.html --report report.json",
    "geobased evaluate im2gps3k.csv --model geolocal/StreetCLIP --images ./im2gps3k --beam 1",
    "geobased evaluate im2gps3k.csv --model geolocal/StreetCLIP --ceiling",
)
# what the columns are called in lists that others publish
COLUMNS = {
    "image": ("path", "image", "file", "filename", "img_id", "image_path", "id"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon", "lng", "long"),
    "country": ("country", "country_code"),
    "region": ("region",),
}
LABELS = {"median_km": "median km", "mean_km": "mean km", "geoscore": "GeoScore", "country_accuracy": "country %"}


@dataclass(frozen=True)
class ImageList:
    """Images of known places: paths, coordinates [n, 2] as (latitude, longitude), country codes and regions where told."""

    images: list[str]
    coordinates: "np.ndarray"
    countries: list[str | None]
    regions: list[str | None]

    def select(self, rows: list[int]) -> "ImageList":
        picked = [[column[row] for row in rows] for column in (self.images, self.countries, self.regions)]
        return ImageList(picked[0], self.coordinates[rows], picked[1], picked[2])  # type: ignore[arg-type]


def evaluate(
    table: Annotated[
        Path,
        typer.Argument(
            metavar="CSV",
            help="A list with the columns path, latitude, longitude, and country and region if known. Paths start at the list's"
            " folder.",
        ),
    ],
    model: Model = DEFAULT_GEOLOCALIZER,
    images: Annotated[
        Path | None, typer.Option(help="The folder that paths start at, if it is not the list's.", show_default=False)
    ] = None,
    ceiling: Annotated[
        bool,
        typer.Option("--ceiling", help="Only tell how near the model's candidates lie to the true places; reads no image."),
    ] = False,
    json_output: Json = False,
    html: Annotated[Path | None, typer.Option(help="Write a report with curves and a map.", show_default=False)] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write all numbers and each image's answer as JSON.", show_default=False)
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for intervals; 0: none.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
    levels: Levels = None,
    beam: Beam = None,
    batch_size: BatchSize = 16,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Compare a model's answers with the true places of images.

    Reports the share of answers within 1, 25, 200, 750 and 2,500 km, the median and mean distance, GeoScore and country accuracy
    with bootstrap intervals, calibration, errors by country, region and continent, and the ceiling of the model's candidates.
    An image that cannot be read is told, and left out. The true country is the list's, or that of the place on the map.
    """
    for path in (html, report):
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"{path} cannot be written: there is no folder {path.parent}")
    listed = read_list(table, images)
    pipe = load_geolocalizer(model, levels, beam, device, dtype)
    best = _ceiling(pipe, listed)
    if ceiling:
        limits = _ceiling_numbers(pipe, best)
        _write_json(report, {"model": model, "ceiling": limits})
        print(json.dumps({"model": model, "ceiling": limits}) if json_output else _ceiling_text(limits))
        return
    found = evaluate_images(pipe, listed, batch_size, threads, bootstrap, seed, best=best)
    for error in found.left_out.values():
        print(f"left out: {error}", file=sys.stderr)
    numbers = {"model": model, **found.numbers()}
    if html is not None:
        found.save_html(html, title=f"{model} on {table.name}")
    _write_json(report, {**numbers, "images": found.rows()})
    print(json.dumps(numbers, ensure_ascii=False) if json_output else _text(found.measured, found.ceiling))


@dataclass(frozen=True)
class ModelEvaluation:
    """Answers to images of known places, and how good they are.

    Attributes:
        listed: the images that could be read.
        answers: the best place of each.
        measured: metrics with intervals, calibration, groups.
        ceiling: what the model's candidates allow (see `CandidateCeiling`).
        left_out: path: why it could not be read.
    """

    listed: ImageList
    answers: list[dict[str, Any]]
    measured: "EvaluationResult"
    ceiling: dict[str, Any]
    left_out: dict[str, str]

    def numbers(self) -> dict[str, Any]:
        """All but the images' answers, as JSON can hold it."""
        return {**self.measured.to_dict(), "ceiling": self.ceiling, "left_out": self.left_out}

    def rows(self) -> list[dict[str, Any]]:
        """Each image with its true place, distance and answer."""
        measured = self.measured
        rows = zip(self.listed.images, self.answers, measured.truths.tolist(), measured.distances_km.tolist(), strict=True)
        return [{"image": i, "truth": t, "distance_km": round(d, 3), "prediction": a} for i, a, t, d in rows]

    def save_html(self, path: Path, *, title: str) -> None:
        """Writes the report with curves and a map."""
        from geobased.pipelines.geolocalization_map import country_outlines

        self.measured.save_html(path, title=title, outlines=country_outlines())


def evaluate_images(
    pipe: "ImageGeolocalizationPipeline",
    listed: ImageList,
    batch_size: int = 16,
    threads: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    *,
    best: "CandidateCeiling | None" = None,
) -> ModelEvaluation:
    """What the model answers to listed images, and how good it is. Raises `CommandError` if none can be read.

    best is the ceiling of the model's candidates where it is known already.
    """
    best = _ceiling(pipe, listed) if best is None else best
    results = locate_images(pipe, listed.images, batch_size, threads, top_k=1)
    failed = {listed.images[i]: result["error"] for i, result in enumerate(results) if isinstance(result, dict)}
    kept = [row for row, result in enumerate(results) if not isinstance(result, dict)]
    if not kept:
        raise CommandError(f"none of the {len(results)} images can be read: {results[0]['error']}")
    answers, listed = [results[row][0] for row in kept], listed.select(kept)
    best = replace(best, distance_km=best.distance_km[kept], nearest=best.nearest[kept])
    measured = _measure(pipe, listed, answers, best.nearest, bootstrap, seed)
    return ModelEvaluation(listed, answers, measured, _ceiling_numbers(pipe, best), failed)


def read_list(table: Path, folder: Path | None = None) -> ImageList:
    """The images of a CSV file.

    Raises `CommandError` that names the line and the fix for a file that is none, a missing column, coordinates that are no
    places, and a country that nobody calls so.
    """
    import numpy as np

    from geobased.geography.coordinates import check_coordinates
    from geobased.geography.gazetteer import find_country

    if not table.is_file():
        raise CommandError(f"there is no file {table}")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"{table} is no CSV file in UTF-8: {error}") from error
    found = {name: next((key for key in header if key.strip().lower() in keys), None) for name, keys in COLUMNS.items()}
    for name in ("image", "latitude", "longitude"):
        if found[name] is None:
            raise CommandError(
                f"{table} has no column {' or '.join(COLUMNS[name])}: its first line must name the columns, and has"
                f" {', '.join(header) or 'nothing'}"
            )
    if not rows:
        raise CommandError(f"{table} lists no images")
    base = table.parent if folder is None else folder
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for number, row in enumerate(rows, 2):
        texts = {name: (row[key] or "").strip() if key else "" for name, key in found.items()}
        if not texts["image"]:
            raise CommandError(f"line {number} of {table} names no image")
        for name in ("latitude", "longitude"):
            try:
                columns[name].append(float(texts[name]))
            except ValueError as error:
                raise CommandError(f"line {number} of {table}: {name}={texts[name]!r} is no number") from error
        is_url = texts["image"].startswith(("http://", "https://"))
        columns["image"].append(texts["image"] if is_url else str(base / texts["image"]))
        columns["region"].append(texts["region"] or None)
        columns["country"].append(find_country(texts["country"]).code if texts["country"] else None)
    check_coordinates(columns["latitude"], columns["longitude"], name=str(table))
    coordinates = np.array([columns["latitude"], columns["longitude"]]).T
    return ImageList(columns["image"], coordinates, columns["country"], columns["region"])


def places_of(listed: ImageList) -> tuple[list[str], list[str]]:
    """Country codes and regions of the true places: the list's, or those of the place on the map."""
    from geobased.geography.geocell_collection import Geocells

    cells = Geocells.world()
    here = cells.locate(*listed.coordinates.T)
    codes = [told or str(cells.country_codes[cell]) for told, cell in zip(listed.countries, here, strict=True)]
    return codes, [told or str(cells.regions[cell]) for told, cell in zip(listed.regions, here, strict=True)]


def _ceiling(pipe: "ImageGeolocalizationPipeline", listed: ImageList) -> "CandidateCeiling":
    from geobased.modeling_streetclip.candidate_ceiling import candidate_ceiling

    return candidate_ceiling(*pipe.candidate_places().T, *listed.coordinates.T)


def _measure(
    pipe: "ImageGeolocalizationPipeline",
    listed: ImageList,
    answers: list[dict[str, Any]],
    nearest: "np.ndarray",
    bootstrap: int,
    seed: int,
) -> "EvaluationResult":
    import numpy as np

    from geobased.geography import evaluation
    from geobased.geography.gazetteer import countries, find_country

    codes, regions = places_of(listed)
    known = {country.code for country in countries()}
    # an answer is right if no other candidate is nearer to the truth
    places = pipe.candidate_places()
    right = [
        answer["geocell"] == cell
        if answer["geocell"] is not None
        else bool(np.allclose(places[cell], (answer["latitude"], answer["longitude"])))
        for answer, cell in zip(answers, nearest.tolist(), strict=True)
    ]
    coverage = getattr(pipe.model.config, "radius_coverage", 0.9)
    return evaluation.evaluate(
        [(answer["latitude"], answer["longitude"]) for answer in answers],
        listed.coordinates,
        predicted_countries=[answer["country_code"] for answer in answers],
        countries=codes,
        groups={
            "region": [f"{code}, {region}" if region else None for code, region in zip(codes, regions, strict=True)],
            "continent": [find_country(code).continent if code in known else None for code in codes],
        },
        confidences=[min(answer["score"], 1.0) for answer in answers],
        correct=right,
        error_radii_km={coverage: [answer["error_radius_km"] for answer in answers]},
        abstained=[answer["abstain"] for answer in answers],
        bootstrap=bootstrap,
        seed=seed,
        progress=sys.stderr.isatty(),
    )


def _ceiling_numbers(pipe: "ImageGeolocalizationPipeline", best: "CandidateCeiling") -> dict[str, Any]:
    within = {f"within_{radius:g}km": share for radius, share in best.percent_within().items()}
    sizes = {"candidates": len(pipe.candidate_places()), "images": len(best.distance_km)}
    return {**sizes, **within, "median_km": best.median_km, "mean_km": best.mean_km}


def _write_json(path: Path | None, numbers: dict[str, Any]) -> None:
    if path is None:
        return
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def metric_label(metric: str) -> str:
    """What reports call a metric of `EvaluationResult`."""
    if metric.startswith("within_"):
        return f"within {float(metric.removeprefix('within_').removesuffix('km')):,.0f} km %"
    return LABELS[metric]


def _ceiling_text(numbers: dict[str, Any]) -> str:
    rows = [f"ceiling of {numbers['candidates']:,} candidates on {numbers['images']:,} places"]
    rows += [f"  {metric_label(name):<18}{value:>10,.1f}" for name, value in numbers.items() if name.endswith("km")]
    return "\n".join(rows)


def _text(measured: "EvaluationResult", ceiling: dict[str, Any]) -> str:
    level = measured.settings["level"]
    rows = [f"{measured.count:,} images", f"  {'':<18}{'value':>10}{f'{level:.0%} interval':>22}{'ceiling':>10}"]
    for name, estimate in measured.metrics.items():
        interval = "" if estimate.low is None else f"{estimate.low:,.1f} to {estimate.high:,.1f}"
        limit = f"{ceiling[name]:,.1f}" if name in ceiling else ""
        rows.append(f"  {metric_label(name):<18}{estimate.value:>10,.1f}{interval:>22}{limit:>10}".rstrip())
    calibration = measured.calibration
    rows.append(
        f"calibration: error {calibration['expected_calibration_error']:.3f}; confidence {calibration['mean_confidence']:.1%},"
        f" the nearest candidate in {calibration['accuracy']:.1%}"
    )
    for row in calibration["radius"]:
        rows.append(
            f"error radius: {row['coverage'].value:.1%} of the truths inside (meant: {row['nominal']:.0%}), median"
            f" {row['median_radius_km']:,.0f} km"
        )
    if measured.answered is not None and measured.answered["count"] < measured.count:
        median = measured.answered["metrics"].get("median_km")
        rows.append(
            f"abstained from {measured.count - measured.answered['count']:,}; median of the others"
            f" {math.nan if median is None else median.value:,.1f} km"
        )
    return "\n".join(rows)
