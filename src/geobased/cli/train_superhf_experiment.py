"""`geobased train superhf-experiment`: SuperHF beside its alternatives."""

import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CommandError
from .options import Debug, Device, Json, add_command
from .sources import parse_device, resolve_model

EXAMPLES = (
    "geobased train superhf-experiment --preset smoke --output-dir runs/comparison",
    "geobased train superhf-experiment --output-dir runs/comparison --text book.txt --held-out-text other.txt",
    "geobased train superhf-experiment --arms base,superhf,rloo --policies based-mini --seeds 1 --output-dir runs/two",
    "geobased train superhf-experiment --plot-only --output-dir runs/comparison",
)


def superhf_experiment(
    output_dir: Annotated[Path, typer.Option(help="Folder for results.json, plots, data and models.")],
    preset: Annotated[str, typer.Option(help="smoke (small, does it run?) or standard.")] = "standard",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each arm.", show_default=False)] = None,
    arms: Annotated[
        str | None, typer.Option(help="Of base,best_of_n,superhf,rloo,dpo,sft,kl_sweep; all by default.", show_default=False)
    ] = None,
    policies: Annotated[str | None, typer.Option(help="Of based-mini,llama; both by default.", show_default=False)] = None,
    based: Annotated[
        str, typer.Option(help="The BASED model: a folder, a checkpoint that ships with geobased, or a Hub id.")
    ] = "based-mini",
    text: Annotated[list[Path] | None, typer.Option(help="Text file that the Llama learns from; repeat for several.")] = None,
    held_out_text: Annotated[list[Path] | None, typer.Option(help="Text file for perplexity; repeat for several.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; seven per GPU or one per two CPU cores by default.", show_default=False)
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0, help="Stop in good time; call again to go on.", show_default=False)
    ] = None,
    plot_only: Annotated[bool, typer.Option("--plot-only", help="Draw the results that are there, and do nothing else.")] = False,
    device: Device = "auto",
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Compare SuperHF with RLOO, DPO, SFT and best-of-n, for several seeds and KL weights, on BASED and a Llama.

    All sampling arms see equally many completions. A later call with the same settings does what is missing.
    """
    started = time.time()  # before the imports, which take seconds
    if output_dir.exists() and not output_dir.is_dir():
        raise CommandError(f"--output-dir {output_dir} is a file")
    if plot_only:
        _plot(output_dir)
        return
    place, source = parse_device(device), resolve_model(based)
    from geobased.training.superhf_experiment_settings import ARMS, POLICIES, PRESETS

    if preset not in PRESETS:
        raise CommandError(f"--preset {preset!r} is not one of {', '.join(PRESETS)}")
    for package in ("trl", "nltk", "datasets"):
        importlib.import_module(package)  # an extra: better missed now than in every process
    from geobased.training.superhf_experiment import run_experiment

    settings = PRESETS[preset] if seeds is None else replace(PRESETS[preset], num_seeds=seeds)
    results = run_experiment(
        settings,
        output_dir,
        arms=_names(arms, ARMS),
        policies=_names(policies, POLICIES),
        based=source,
        device=place,
        workers=workers,
        max_seconds=max_seconds,
        started=started,
        text=text or (),
        held_out_text=held_out_text or (),
        # standard output is for the result
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if json_output:
        print(json.dumps(results))
        return
    print(_table(results))
    if not results["complete"]:
        print("not everything is done: the same command goes on", file=sys.stderr)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed; --plot-only draws them later from results.json", file=sys.stderr)
    else:
        _plot(output_dir)


def _names(given: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    return known if given is None else tuple(name.strip() for name in given.split(",") if name.strip())


def _plot(output_dir: Path) -> None:
    from geobased.training.superhf_experiment import load_results
    from geobased.training.superhf_experiment_plots import plot_experiment

    for path in plot_experiment(load_results(output_dir), output_dir):
        print(path)


def _table(results: dict[str, Any]) -> str:
    """Means over seeds after training, of chosen settings, and the verdicts."""
    from geobased.training.superhf_experiment_verdicts import summary

    columns = ("policy", "arm", "seeds", "reward", "held-out", "rules", "answers", "similarity", "KL")
    lines = [f"{columns[0]:<12}{columns[1]:<22}" + "".join(f"{name:>11}" for name in columns[2:])]
    for row in summary(results["rows"]):
        values = [
            row["means"][name] for name in ("reward", "held_out_reward", "rule_reward", "answers_from_record", "similarity", "kl")
        ]
        shown = "".join(f"{'' if value is None else format(value, '.3f'):>11}" for value in values)
        lines.append(f"{row['policy']:<12}{row['name']:<22}{row['seeds']:>11}{shown}")
    for verdict in results["verdicts"]:
        interval = f"{verdict['difference']:+.3f} ({verdict['low']:+.3f} to {verdict['high']:+.3f})"
        lines.append(f"{verdict['policy']}: {verdict['claim']}: {verdict['verdict']}, {interval}")
    return "\n".join(lines)


def add_experiment(app: typer.Typer) -> None:
    """Adds the command to `geobased train`."""
    add_command(app, "superhf-experiment", superhf_experiment, EXAMPLES)
