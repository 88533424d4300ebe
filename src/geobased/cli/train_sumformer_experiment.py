"""`geobased train sumformer-experiment`: Sumformers and attention as approximators of functions of sets."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CommandError
from .options import Debug, Device, Json, add_command
from .sources import parse_device

EXAMPLES = (
    "geobased train sumformer-experiment --preset smoke --output-dir runs/approximation",
    "geobased train sumformer-experiment --output-dir runs/approximation --max-seconds 540",
    "geobased train sumformer-experiment --plot-only --output-dir runs/approximation",
)


def sumformer_experiment(
    output_dir: Annotated[Path, typer.Option(help="Folder for results.json and plots.")],
    preset: Annotated[str, typer.Option(help="smoke (small, does it run?) or standard.")] = "standard",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each model and target.", show_default=False)] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; four per GPU or one per two CPU cores by default.", show_default=False)
    ] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0, help="Stop then; call again to go on.", show_default=False)] = None,
    plot_only: Annotated[bool, typer.Option("--plot-only", help="Draw the results that are there, and do nothing else.")] = False,
    device: Device = "auto",
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train Sumformers and five kinds of peers, all of equal size, on functions of sets, and compare their errors.

    By target, width of the sum, size and dimension of the sets, and on lengths not trained on. A later call with the same
    settings does what is missing.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise CommandError(f"--output-dir {output_dir} is a file")
    place = parse_device(device)
    from geobased.training import sumformer_experiment as module

    if plot_only:
        results = module.load_results(output_dir)
    else:
        results = module.run_experiment(
            preset,
            output_dir,
            seeds=seeds,
            device=place,
            workers=workers,
            max_seconds=max_seconds,
            # standard output is for the result
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
    files = _plot(results, output_dir)
    if json_output:
        print(json.dumps(results | {"files": [str(path) for path in files]}, ensure_ascii=False))
        return
    print(_summary(results))
    for path in (output_dir / "results.json", *files):
        print(path)
    if not results["complete"]:
        print("not everything is done: the same command goes on", file=sys.stderr)


def _plot(results: dict[str, Any], output_dir: Path) -> list[Path]:
    if not results["entries"]:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed; --plot-only draws them later from results.json", file=sys.stderr)
        return []
    from geobased.training.sumformer_experiment_plots import plot_experiment

    return plot_experiment(results, output_dir)


def _summary(results: dict[str, Any]) -> str:
    """Medians over seeds of the first ladder, and what they say."""
    from statistics import median

    from geobased.training.sumformer_experiment_findings import findings, ladder_entries, measured, targets_of, title
    from geobased.training.sumformer_experiment_models import FAMILIES

    entries = ladder_entries(results, "models")
    targets = targets_of(entries)
    lines = [f"{'normalised mean squared error':<34}" + "".join(f"{title(target):>19}" for target in targets)]
    for family in dict.fromkeys(entry["family"] for entry in entries):
        errors = {entry["target"]: median(measured(entry)) for entry in entries if entry["family"] == family}
        cells = "".join(f"{errors[target]:>19.2e}" if target in errors else " " * 19 for target in targets)
        lines.append(f"{FAMILIES[family].title:<34}{cells}")
    lines += [f"{finding.claim}: {finding.verdict}; {finding.evidence}" for finding in findings(results)]
    return "\n".join(lines)


def add_sumformer_experiment(app: typer.Typer) -> None:
    """Adds the command to `geobased train`."""
    add_command(app, "sumformer-experiment", sumformer_experiment, EXAMPLES)
