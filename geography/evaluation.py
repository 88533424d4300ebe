"""How good answers about places are: distances, GeoScore, names, calibration, by country and region, and a report of it all."""

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from geobased.whole_file import whole_file

from .calibration import expected_calibration_error, reliability_table, risk_coverage_curve
from .coordinates import EARTH_RADIUS_KM, check_coordinates, haversine_km

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

THRESHOLDS_KM = (1.0, 25.0, 200.0, 750.0, 2500.0)  # street, city, region, country, continent
GEOSCORE_MAXIMUM, GEOSCORE_DECAY_KM = 5000.0, 1492.7
# numbers resampled at once
BOOTSTRAP_ELEMENTS = 4_000_000
MAP_POINTS = 3000


def geoscore(distance_km: "ArrayLike", *, rounded: bool = True) -> np.ndarray:
    """Points of the game GeoGuessr for answers so far off: 5000 * exp(-distance / 1492.7), rounded to whole points.

    Raises `ValueError` for distances that are negative or NaN.

    Example:
        >>> geoscore([0.0, 200.0]).tolist()
        [5000.0, 4373.0]
    """
    distance = np.asarray(distance_km, dtype=np.float64)
    if not (distance >= 0).all():
        raise ValueError("distances must be kilometres from 0 on; one is negative or NaN")
    points = GEOSCORE_MAXIMUM * np.exp(-distance / GEOSCORE_DECAY_KM)
    return np.round(points) if rounded else points


@dataclass(frozen=True)
class Estimate:
    """A measured value and the bootstrap interval around it (None where there are too few images for one)."""

    value: float
    low: float | None = None
    high: float | None = None


Metrics = dict[str, Estimate]


@dataclass
class EvaluationResult:
    """What `evaluate` found; `to_dict`, `save_json` and `save_html` write it.

    Attributes:
        count: number of images.
        settings: how it was computed (thresholds, comparison, radius of the Earth, bootstrap).
        metrics: "within_25km" (percent) and so on, "median_km", "mean_km", "geoscore" (0 to 5000), "country_accuracy" (percent).
        groups: grouping ("country"): group ("FR"): {"count": images, "metrics": as above}, the largest group first.
        calibration: "expected_calibration_error", "accuracy", "mean_confidence", "reliability" (rows by confidence), "radius"
            (by nominal coverage: the true coverage and the median radius), "risk_coverage" (errors of the most certain answers);
            what there was no input for is left out.
        answered: {"count", "share", "metrics"} of the answers that do not abstain; None if nothing was said about abstaining.
        predictions, truths: [n, 2], (latitude, longitude) in degrees.
        distances_km: [n].
    """

    count: int
    settings: dict[str, Any]
    metrics: Metrics
    groups: dict[str, dict[str, dict[str, Any]]]
    calibration: dict[str, Any]
    answered: dict[str, Any] | None
    predictions: np.ndarray = field(repr=False)
    truths: np.ndarray = field(repr=False)
    distances_km: np.ndarray = field(repr=False)

    def to_dict(self, *, images: bool = False) -> dict[str, Any]:
        """Everything as JSON can hold it; with `images` also each image's places and distance."""
        result = {
            "count": self.count,
            "settings": self.settings,
            "metrics": _plain(self.metrics),
            "answered": _plain(self.answered),
            "calibration": _plain(self.calibration),
            "groups": _plain(self.groups),
        }
        if images:
            columns = (self.predictions.round(6).tolist(), self.truths.round(6).tolist(), self.distances_km.round(3).tolist())
            rows = zip(*columns, strict=True)
            result["images"] = [{"prediction": p, "truth": t, "distance_km": d} for p, t, d in rows]
        return result

    def save_json(self, path: str | os.PathLike[str], *, images: bool = False) -> None:
        """Writes `to_dict` as JSON; the file appears complete or not at all."""
        text = json.dumps(self.to_dict(images=images), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def save_html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Evaluation",
        outlines: Sequence["ArrayLike"] = (),
        max_groups: int = 50,
    ) -> None:
        """Writes a report that opens without a network: tables, curves and a map, in one file without scripts.

        Args:
            title: heading of the report.
            outlines: rings [points, 2] of (longitude, latitude) that the map shows, coasts or borders.
            max_groups: rows of each table of groups; the report says how many it leaves out.
        """
        with whole_file(path) as temporary:
            temporary.write_text(_html(self, title, outlines, max_groups), encoding="utf-8")


def evaluate(
    predictions: "ArrayLike",
    truths: "ArrayLike",
    *,
    predicted_countries: Sequence[str | None] | None = None,
    countries: Sequence[str | None] | None = None,
    groups: Mapping[str, Sequence[str | None]] | None = None,
    confidences: "ArrayLike | None" = None,
    correct: "ArrayLike | None" = None,
    error_radii_km: "Mapping[float, ArrayLike] | None" = None,
    abstained: "ArrayLike | None" = None,
    thresholds_km: Sequence[float] = THRESHOLDS_KM,
    inclusive: bool = True,
    radius_km: float = EARTH_RADIUS_KM,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> EvaluationResult:
    """Compares predicted with true places.

    Args:
        predictions, truths: [n, 2], (latitude, longitude) in degrees. Every image counts, abstained or not: for one without
            any answer give a place that the model would guess without seeing it.
        predicted_countries, countries: [n] country codes or names of predictions and truths. An image whose true country is not
            known (None or "") does not count for country accuracy; a prediction without a country is wrong.
        groups: grouping ("region", "continent"): [n] groups of the truths; None or "" is left out. `countries` makes a grouping
            "country" by itself.
        confidences, correct: [n] probabilities that answers are right (the best cell's, say), and whether they are.
        error_radii_km: nominal coverage (0.9): [n] error radii.
        abstained: [n], whether the model would rather not answer. `answered` then holds the metrics of the others.
        thresholds_km: distances of the "within" metrics.
        inclusive: whether an answer exactly at a threshold counts (GeoCLIP's <=; PIGEON has <).
        radius_km: of the Earth; `PIGEON_EARTH_RADIUS_KM` for PIGEON's numbers.
        bootstrap: number of resamples (with replacement, of whole images) for intervals; 0: none.
        level: share of resamples that an interval holds, between its percentiles.
        seed: of the resampling; equal input gives equal intervals, and a group's do not depend on other groups.
        progress: whether a progress bar over groups is shown.

    Raises:
        ValueError: no images, different lengths, coordinates that are no places (NaN, out of range, swapped).
    """
    places = [np.asarray(value, dtype=np.float64) for value in (predictions, truths)]
    for name, value in zip(("predictions", "truths"), places, strict=True):
        if value.ndim != 2 or value.shape[1] != 2 or not len(value):
            raise ValueError(f"{name} must be [n, 2], (latitude, longitude) in degrees, n > 0, not of shape {value.shape}")
        check_coordinates(value[:, 0], value[:, 1], name=name)
    predicted, true = places
    count = len(true)
    # an ArrayLike has a length that its type does not promise
    columns_by_name: tuple[tuple[str, Any], ...] = (
        ("predictions", predicted),
        ("predicted_countries", predicted_countries),
        ("countries", countries),
        ("confidences", confidences),
        ("correct", correct),
        ("abstained", abstained),
        *((f"groups[{name!r}]", column) for name, column in (groups or {}).items()),
        *((f"error_radii_km[{nominal}]", column) for nominal, column in (error_radii_km or {}).items()),
    )
    for name, column in columns_by_name:
        if column is not None and len(column) != count:
            raise ValueError(f"{name} has {len(column)} rows but truths has {count}")
    if predicted_countries is not None and countries is None:
        raise ValueError("predicted_countries needs countries, the true ones")
    if (confidences is None) != (correct is None):
        raise ValueError("give confidences and correct together, or neither")
    if bootstrap < 0 or not 0 < level < 1:
        raise ValueError(f"bootstrap={bootstrap} must be at least 0 and level={level} lie between 0 and 1")

    distances = haversine_km(predicted[:, 0], predicted[:, 1], true[:, 0], true[:, 1], radius_km=radius_km)
    country_hits = np.full(count, np.nan)
    if predicted_countries is not None and countries is not None:
        pairs = zip(predicted_countries, countries, strict=True)
        country_hits = np.array([float(a == b) if b else np.nan for a, b in pairs])
    columns = _columns(distances, country_hits, thresholds_km, inclusive)

    def measured(rows: np.ndarray | slice, name: str) -> Metrics:
        return _metrics({key: values[rows] for key, values in columns.items()}, bootstrap, level, seed, name)

    groupings = {**({} if countries is None else {"country": countries}), **(groups or {})}
    members = {grouping: _members(labels) for grouping, labels in groupings.items()}
    total = sum(len(rows) for rows in members.values())
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tqdm(total=total, desc="groups", disable=not progress) as bar:
        for grouping, by_group in members.items():
            results[grouping] = {}
            for group, rows in by_group.items():
                results[grouping][group] = {"count": len(rows), "metrics": measured(rows, f"{grouping}/{group}")}
                bar.update()
    answered = None
    if abstained is not None:
        kept = np.flatnonzero(~np.asarray(abstained, dtype=bool))
        answered = {
            "count": len(kept),
            "share": len(kept) / count,
            "metrics": measured(kept, "answered") if len(kept) else {},
        }
    return EvaluationResult(
        count=count,
        settings={
            "thresholds_km": [float(value) for value in thresholds_km],
            "inclusive": inclusive,
            "earth_radius_km": radius_km,
            "bootstrap": bootstrap,
            "level": level,
            "seed": seed,
        },
        metrics=measured(slice(None), "all"),
        groups=results,
        calibration=_calibration(distances, confidences, correct, error_radii_km or {}, bootstrap, level, seed),
        answered=answered,
        predictions=predicted,
        truths=true,
        distances_km=distances,
    )


def distance_metrics(
    distances_km: "ArrayLike", *, thresholds_km: Sequence[float] = THRESHOLDS_KM, inclusive: bool = True
) -> dict[str, float]:
    """The metrics of `evaluate` that depend on distances [n] alone, without intervals. Raises `ValueError` for no distances."""
    distances = np.asarray(distances_km, dtype=np.float64)
    if distances.ndim != 1 or not len(distances):
        raise ValueError(f"distances_km must be [n], n > 0, not of shape {distances.shape}")
    columns = _columns(distances, np.full(len(distances), np.nan), thresholds_km, inclusive)
    return {name: estimate.value for name, estimate in _metrics(columns, 0, 0.95, 0, "").items()}


def _columns(
    distances: np.ndarray, country_hits: np.ndarray, thresholds_km: Sequence[float], inclusive: bool
) -> dict[str, np.ndarray]:
    """One number per image for each metric: all but the median are its mean."""
    within = {
        f"within_{threshold:g}km": 100.0 * (distances <= threshold if inclusive else distances < threshold)
        for threshold in thresholds_km
    }
    columns = {**within, "median_km": distances, "mean_km": distances, "geoscore": geoscore(distances)}
    if not np.isnan(country_hits).all():
        columns["country_accuracy"] = 100.0 * country_hits
    return columns


def _reduced(name: str, values: np.ndarray) -> np.ndarray:
    """A metric of each row of values [..., n]; NaN for a row that holds nothing known."""
    if name == "median_km":
        return np.median(values, axis=-1)
    known = ~np.isnan(values)
    counts = known.sum(axis=-1)
    return np.where(counts > 0, np.where(known, values, 0).sum(axis=-1) / np.maximum(counts, 1), np.nan)


def _metrics(columns: dict[str, np.ndarray], bootstrap: int, level: float, seed: int, name: str) -> Metrics:
    count = len(columns["mean_km"])
    values = {key: float(_reduced(key, column)) for key, column in columns.items()}
    values = {key: value for key, value in values.items() if not math.isnan(value)}
    if not bootstrap or count < 2:
        return {key: Estimate(value) for key, value in values.items()}
    # a generator of its own for each group: its interval must not depend on which other groups there are
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    step = max(1, BOOTSTRAP_ELEMENTS // count)
    resampled: dict[str, list[np.ndarray]] = {key: [] for key in values}
    for start in range(0, bootstrap, step):
        index = generator.integers(0, count, (min(step, bootstrap - start), count))
        for key, parts in resampled.items():
            parts.append(_reduced(key, columns[key][index]))
    tail = (1 - level) / 2
    estimates = {}
    for key, value in values.items():
        low, high = np.nanquantile(np.concatenate(resampled[key]), [tail, 1 - tail])
        estimates[key] = Estimate(value, float(low), float(high))
    return estimates


def _members(labels: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Rows of each group, the largest first, then by name."""
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        # a missing value of pandas is a float NaN
        if label is not None and label != "" and label == label:
            rows.setdefault(str(label), []).append(row)
    return {label: np.array(rows[label]) for label in sorted(rows, key=lambda label: (-len(rows[label]), label))}


def _calibration(
    distances: np.ndarray,
    confidences: "ArrayLike | None",
    correct: "ArrayLike | None",
    radii: "Mapping[float, ArrayLike]",
    bootstrap: int,
    level: float,
    seed: int,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if confidences is not None and correct is not None:
        result["expected_calibration_error"] = expected_calibration_error(confidences, correct)
        result["accuracy"] = float(np.mean(np.asarray(correct, dtype=np.float64)))
        result["mean_confidence"] = float(np.mean(np.asarray(confidences, dtype=np.float64)))
        result["reliability"] = reliability_table(confidences, correct)
        result["risk_coverage"] = risk_coverage_curve(-np.asarray(confidences, dtype=np.float64), distances)
    if radii:
        result["radius"] = []
    for nominal, values in radii.items():
        radius = np.asarray(values, dtype=np.float64)
        if not 0 < float(nominal) < 1 or not (radius >= 0).all():
            raise ValueError(f"error_radii_km[{nominal}] must be radii from 0 on, and {nominal} a coverage between 0 and 1")
        inside = {"mean_km": (distances <= radius).astype(np.float64)}
        coverage = _metrics(inside, bootstrap, level, seed, f"radius/{float(nominal):g}")["mean_km"]
        result["radius"].append({"nominal": float(nominal), "coverage": coverage, "median_radius_km": float(np.median(radius))})
    return result


def _plain(value: Any) -> Any:
    """Estimates and arrays -> what JSON can hold."""
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# the report

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;background:#fff;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}
small{color:#666}
svg{max-width:100%;height:auto}
text{font:11px system-ui,sans-serif;fill:#444}
"""
# of the truth on the map, by the first threshold that the error does not pass
COLORS = ("#1a7f37", "#57ab5a", "#c4a000", "#d9822b", "#cf4f3e", "#8b1a1a")
NAMES = {"median_km": "median error, km", "mean_km": "mean error, km", "geoscore": "GeoScore", "country_accuracy": "country, %"}


def _label(metric: str) -> str:
    if metric.startswith("within_"):
        return f"within {metric.removeprefix('within_').removesuffix('km')} km, %"
    return NAMES[metric]


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _percent(share: Estimate) -> Estimate:
    low, high = (None if bound is None else 100 * bound for bound in (share.low, share.high))
    return Estimate(100 * share.value, low, high)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "<td></td>"
    interval = "" if estimate.low is None or estimate.high is None else f"{_number(estimate.low)} to {_number(estimate.high)}"
    return f"<td>{_number(estimate.value)}{f' <small>{interval}</small>' if interval else ''}</td>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose rows' first items are text and the others cells."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr><td>{escape(row[0])}</td>{''.join(row[1:])}</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def _html(result: EvaluationResult, title: str, outlines: Sequence["ArrayLike"], max_groups: int) -> str:
    settings, metrics = result.settings, result.metrics
    parts = [f"<h1>{escape(title)}</h1>\n<p>{result.count:,} images."]
    if settings["bootstrap"]:
        parts.append(f" Intervals: {settings['level']:.0%}, bootstrap of {settings['bootstrap']:,} resamples.")
    parts.append("</p>\n")
    columns = {"all": metrics}
    if result.answered is not None:
        columns[f"answered ({result.answered['share']:.1%})"] = result.answered["metrics"]
    rows = [[_label(name), *(_cell(column.get(name)) for column in columns.values())] for name in metrics]
    parts.append(_table(["", *columns], rows))
    parts.append(f"<h2>Share of images within a distance</h2>\n{_curve(result.distances_km, settings['thresholds_km'])}")
    parts.append(f"<h2>Map</h2>\n{_map(result, outlines)}")
    calibration = result.calibration
    if calibration:
        parts.append("<h2>Calibration</h2>\n")
    if "reliability" in calibration:
        parts.append(
            f"<p>Expected calibration error {calibration['expected_calibration_error']:.3f}; mean confidence"
            f" {calibration['mean_confidence']:.3f}, accuracy {calibration['accuracy']:.3f}.</p>\n{_reliability(calibration)}"
        )
        rows = [
            [f"{row['share']:.0%}", f"<td>{_number(row['median_km'])}</td>", f"<td>{_number(row['mean_km'])}</td>"]
            for row in calibration["risk_coverage"]
        ]
        parts.append(_table(["most certain answers", NAMES["median_km"], NAMES["mean_km"]], rows))
    if "radius" in calibration:
        rows = [
            [
                f"{row['nominal']:.0%}",
                _cell(_percent(row["coverage"])),
                f"<td>{_number(row['median_radius_km'])}</td>",
            ]
            for row in calibration["radius"]
        ]
        parts.append(_table(["error radius", "truths inside, %", "median radius, km"], rows))
    for grouping, by_group in result.groups.items():
        rows = [
            [group, f"<td>{entry['count']:,}</td>", *(_cell(entry["metrics"].get(name)) for name in metrics)]
            for group, entry in list(by_group.items())[:max_groups]
        ]
        parts.append(f"<h2>By {escape(grouping)}</h2>\n")
        parts.append(_table([grouping, "images", *(_label(name) for name in metrics)], rows))
        if len(by_group) > max_groups:
            parts.append(f"<p>{len(by_group) - max_groups} smaller groups are not shown.</p>\n")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{''.join(parts)}</body></html>\n"
    )


def _svg(width: int, height: int, content: str, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{escape(description)}">{content}</svg>\n'
    )


def _curve(distances: np.ndarray, thresholds: Sequence[float]) -> str:
    """The distribution function of errors, from 100 m to half around the Earth, on a logarithmic axis."""
    width, height, left, bottom = 640, 260, 40, 30

    def x(km: float) -> float:
        return left + (width - left - 10) * (math.log10(min(max(km, 0.1), 20040)) + 1) / (math.log10(20040) + 1)

    def y(share: float) -> float:
        return height - bottom - (height - bottom - 10) * share

    grid = np.logspace(-1, math.log10(20040), 200)
    shares = np.searchsorted(np.sort(distances), grid, side="right") / len(distances)
    points = " ".join(f"{x(km):.1f},{y(share):.1f}" for km, share in zip(grid, shares, strict=True))
    lines = [
        f'<line x1="{x(km):.1f}" x2="{x(km):.1f}" y1="{y(0)}" y2="{y(1)}" stroke="#ddd"/>'
        f'<text x="{x(km):.1f}" y="{height - 12}" text-anchor="middle">{km:g} km</text>'
        for km in thresholds
    ]
    for share in (0.0, 0.5, 1.0):
        lines.append(f'<line x1="{left}" x2="{width - 10}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 5}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    curve = f'<polyline points="{points}" fill="none" stroke="#0969da" stroke-width="2"/>'
    return _svg(width, height, "".join(lines) + curve, "share of images within a distance")


def _reliability(calibration: dict[str, Any]) -> str:
    """Accuracy against confidence; the closer to the diagonal, the better. Areas of dots grow with the number of answers."""
    size, edge = 280, 35
    total = sum(row["count"] for row in calibration["reliability"])

    def at(value: float) -> float:
        return edge + (size - edge - 10) * value

    content = [f'<line x1="{at(0)}" y1="{size - at(0)}" x2="{at(1)}" y2="{size - at(1)}" stroke="#bbb" stroke-dasharray="4"/>']
    for value in (0.0, 0.5, 1.0):
        content.append(f'<text x="{at(value)}" y="{size - 15}" text-anchor="middle">{value:g}</text>')
        content.append(f'<text x="{edge - 8}" y="{size - at(value) + 4}" text-anchor="end">{value:g}</text>')
    content.append(f'<text x="{at(0.5)}" y="{size - 2}" text-anchor="middle">confidence</text>')
    content.append(f'<text x="8" y="{size - at(0.5)}" transform="rotate(-90 8 {size - at(0.5)})">accuracy</text>')
    for row in calibration["reliability"]:
        radius = 3 + 9 * math.sqrt(row["count"] / total)
        center = f'cx="{at(row["confidence"]):.1f}" cy="{size - at(row["accuracy"]):.1f}"'
        content.append(f'<circle {center} r="{radius:.1f}" fill="#0969da" fill-opacity=".6"/>')
    return _svg(size, size, "".join(content), "accuracy against confidence")


def _map(result: EvaluationResult, outlines: Sequence["ArrayLike"]) -> str:
    """True places, coloured by error, with a line to the answer, on an equirectangular map."""
    scale = 2.5

    def xy(latitude: float, longitude: float) -> str:
        return f"{(longitude + 180) * scale:.1f},{(90 - latitude) * scale:.1f}"

    content = ['<rect width="900" height="450" fill="#f2f6fa"/>']
    for ring in outlines:
        points = " ".join(xy(latitude, longitude) for longitude, latitude in np.asarray(ring, dtype=np.float64).tolist())
        content.append(f'<polygon points="{points}" fill="#e3e3dc" stroke="#bbb" stroke-width=".4"/>')
    for degrees in range(-150, 180, 30):
        content.append(f'<path d="M{xy(90, degrees)}L{xy(-90, degrees)}" stroke="#d5dde5" stroke-width=".5"/>')
        if abs(degrees) < 90:
            content.append(f'<path d="M{xy(degrees, -180)}L{xy(degrees, 180)}" stroke="#d5dde5" stroke-width=".5"/>')
    thresholds = sorted(result.settings["thresholds_km"])
    classes = np.searchsorted(thresholds, result.distances_km)
    shown = np.unique(np.linspace(0, result.count - 1, min(result.count, MAP_POINTS)).round().astype(int))
    for row in shown:
        (latitude, longitude), (answer_latitude, answer_longitude) = result.truths[row], result.predictions[row]
        color = COLORS[min(classes[row], len(COLORS) - 1)]
        if abs(longitude - answer_longitude) <= 180:  # not across the whole map where the short way is over the date line
            line = f"M{xy(latitude, longitude)}L{xy(answer_latitude, answer_longitude)}"
            content.append(f'<path d="{line}" stroke="{color}" stroke-width=".5" stroke-opacity=".35"/>')
        x, y = xy(latitude, longitude).split(",")
        content.append(f'<circle cx="{x}" cy="{y}" r="2" fill="{color}"/>')
    names = [*(f"within {km:g} km" for km in thresholds), "farther"]
    legend = " ".join(
        f'<span style="color:{COLORS[min(i, len(COLORS) - 1)]}">&#9679;</span> {name}' for i, name in enumerate(names)
    )
    note = "" if len(shown) == result.count else f" {len(shown):,} of {result.count:,} images are shown."
    caption = f"<p>True places, with lines to the answers. {legend}.{note}</p>\n"
    return _svg(900, 450, "".join(content), "true places and answers") + caption


__all__ = ["THRESHOLDS_KM", "Estimate", "EvaluationResult", "distance_metrics", "evaluate", "geoscore"]
