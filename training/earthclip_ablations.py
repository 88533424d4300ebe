"""The ablation table of earthclip-mini, in the form of PIGEON's: what the answer loses with one part left out.

    python -m geobased.training.earthclip_ablations runs/earthclip-mini/ablations

Reads `<part>-<seed>/evaluation.json` of runs that differ in one part and their training seed. Prints the table as Markdown and
writes it with its numbers to `ablations.json` in the same folder.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from geobased.training.artifacts import write_json

# name of a run -> what it left out; the first is the whole
RUNS = {
    "whole": "all parts",
    "no_smoothing": "without haversine smoothing",
    "naive_cells": "rectangles for semantic geocells",
    "world_cells": "geocells made for photos",
    "no_pretraining": "without CLIP pretraining",
    "no_multitask": "without elevation and climate heads",
}
# measured on the whole runs: steps of the answer need no training of their own
STEPS = {
    "pigeon_without_refinement": "without prototype refinement",
    "pigeon_prototype_places": "places by prototypes, not by likelihood",
    "pigeon_centroids": "places at centroids, without prototypes",
}
SETS = {"seen": "seen", "held_out": "held out"}
METRICS = {"median_km": "median km", "within_200km": "200 km, %", "country_accuracy": "country, %"}


def summarize(folder: Path) -> list[dict[str, Any]]:
    """Rows of the table: label, seeds, and for each set and metric mean and standard deviation over the seeds (None for one).

    Raises:
        FileNotFoundError: no evaluations of whole runs.
    """
    rows = []
    for run, label in RUNS.items():
        paths = sorted(folder.glob(f"{run}-*/evaluation.json"))
        evaluations = [json.loads(path.read_text(encoding="utf-8"))["sets"] for path in paths]
        if not evaluations and run == "whole":
            raise FileNotFoundError(f"{folder} has no whole-*/evaluation.json: run the whole model first")
        parts = {"pigeon": label, **(STEPS if run == "whole" else {})}
        rows += [_row(name, evaluations, part) for part, name in parts.items() if evaluations]
    return rows


def _row(label: str, evaluations: list[dict[str, Any]], part: str) -> dict[str, Any]:
    row: dict[str, Any] = {"label": label, "seeds": len(evaluations)}
    for name in SETS:
        for metric in METRICS:
            values = [sets[name][part][metric]["value"] for sets in evaluations]
            spread = statistics.stdev(values) if len(values) > 1 else None
            row[f"{name}/{metric}"] = {"mean": statistics.mean(values), "deviation": spread}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = [f"{name}: {metric}" for name in SETS.values() for metric in METRICS.values()]
    lines = [f"| | seeds | {' | '.join(columns)} |", "|---|---:|" + "---:|" * len(columns)]
    for row in rows:
        cells = []
        for name in SETS:
            for metric in METRICS:
                found = row[f"{name}/{metric}"]
                spread = "" if found["deviation"] is None else f" ± {found['deviation']:.1f}"
                cells.append(f"{found['mean']:.1f}{spread}")
        lines.append(f"| {row['label']} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Sentences that say which parts help, by the median error of held-out places; "" where no part has several seeds.

    A difference counts if it is more than twice the root of both variances over the seeds.
    """
    key = "held_out/median_km"
    whole, *others = rows
    changes: dict[str, list[str]] = {"help": [], "nothing": [], "harm": []}
    for row in others:
        if whole[key]["deviation"] is None or row[key]["deviation"] is None:
            continue
        difference = row[key]["mean"] - whole[key]["mean"]
        if abs(difference) <= 2 * math.hypot(whole[key]["deviation"], row[key]["deviation"]):
            changes["nothing"].append(row["label"])
        else:
            changes["help" if difference > 0 else "harm"].append(f"{row['label']} ({difference:+.0f} km)")
    sentences = {
        "help": "The median error of held-out places is larger",
        "nothing": "It is the same within twice the spread",
        "harm": "It is smaller",
    }
    return " ".join(f"{sentence}: {', '.join(changes[name])}." for name, sentence in sentences.items() if changes[name])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the runs")
    folder = parser.parse_args(arguments).folder
    try:
        rows = summarize(folder)
    except FileNotFoundError as error:
        sys.exit(f"earthclip_ablations: {error}")
    text = table(rows)
    write_json(folder / "ablations.json", {"rows": rows, "table": text})
    print(text, verdict(rows), sep="\n\n")


__all__ = ["main", "summarize", "table", "verdict"]


if __name__ == "__main__":
    main()
