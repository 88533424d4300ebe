"""`geobased recall twins`: equal twins, trained and compared."""

import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from .errors import CommandError
from .options import Debug, Device, Json, add_command
from .sources import load_tokenizer, parse_device, resolve_model

EXAMPLES = (
    "geobased recall twins --preset smoke --output-dir runs/twins",
    "geobased recall twins --preset standard --output-dir runs/twins --text book.txt --held-out-text other.txt",
    "geobased recall twins --plot-only --output-dir runs/twins",
)


def twins(
    output_dir: Annotated[Path, typer.Option(help="Folder for results.json, plots and data.")],
    preset: Annotated[str, typer.Option(help="smoke (small, does it run?), standard, or long.")] = "standard",
    models: Annotated[list[str] | None, typer.Option("--model", help="A model to train; repeat for several.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file to train on as well; repeat for several.")] = None,
    held_out_text: Annotated[list[Path] | None, typer.Option(help="Text file for perplexity; repeat for several.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens of one model.", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each model.", show_default=False)] = None,
    learning_rates: Annotated[
        list[float] | None,
        typer.Option("--learning-rate", help="Peak rate; of several, seed 0 finds the best.", show_default=False),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder, shipped checkpoint or Hub id that has the tokenizer.")] = "based-mini",
    max_seconds: Annotated[float | None, typer.Option(help="Stop in good time; call again to go on.", show_default=False)] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core.", show_default=False)] = None,
    throughput: Annotated[bool, typer.Option(help="Time how fast the models generate.")] = True,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Save the trained models.")] = False,
    plot_only: Annotated[bool, typer.Option("--plot-only", help="Draw the results that are there, and do nothing else.")] = False,
    device: Device = "auto",
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train BASED, full attention and sliding windows alike, and compare recall, perplexity and speed of generation.

    Models have as many parameters and see the same tokens. A later call with the same settings does what is missing.
    """
    started = time.perf_counter()  # before the imports, which take seconds
    if plot_only:
        _plot(output_dir)
        return
    place, source = parse_device(device), resolve_model(tokenizer)
    from geobased.recall.twins import DEFAULT_MODELS, PRESETS, run_twins

    if preset not in PRESETS:
        raise CommandError(f"--preset {preset!r} is not one of {', '.join(PRESETS)}")
    changed: dict[str, Any] = {
        "tokens": tokens,
        "num_seeds": seeds,
        "learning_rates": tuple(learning_rates) if learning_rates else None,
    }
    results = run_twins(
        replace(PRESETS[preset], **{name: value for name, value in changed.items() if value is not None}),
        output_dir,
        load_tokenizer(tokenizer, source),
        models=models or DEFAULT_MODELS,
        device=place,
        text=text or (),
        held_out_text=held_out_text or (),
        num_workers=num_workers or os.cpu_count() or 1,
        max_seconds=max_seconds,
        started=started,
        throughput=throughput,
        keep_models=keep_models,
        # standard output is for the result
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if json_output:
        print(json.dumps(results))
        return
    print(_table(results))
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed; --plot-only draws them later from results.json", file=sys.stderr)
    elif results["rows"]:
        _plot(output_dir)


def _plot(output_dir: Path) -> None:
    from geobased.recall.twins import load_results, plot_throughput_against_recall, plot_twins

    results = load_results(output_dir)
    drawn = [output_dir / "twins.png"]
    plot_twins(results, drawn[0])
    if any(row["tokens_per_second"] is not None for row in results["rows"]):
        drawn.append(output_dir / "throughput_against_recall.png")
        plot_throughput_against_recall(results, drawn[1])
    for path in drawn:
        print(path)


def _table(results: dict[str, Any]) -> str:
    """Means over seeds, by length: recall of held-out and of training places, and tokens per second where they were timed."""
    rows = results["rows"]
    lines = [f"{'model':<16}{'tokens':>8}{'recall':>10}{'known places':>14}{'tokens/s':>12}{'state':>14}"]
    for name in dict.fromkeys(row["model"] for row in rows):
        for length in dict.fromkeys(row["length"] for row in rows):
            group = [row for row in rows if (row["model"], row["length"]) == (name, length)]
            recall, known = (100 * mean(row[name] for row in group) for name in ("accuracy", "training_places_accuracy"))
            speed = group[0]["tokens_per_second"]
            shown = "" if speed is None else f"{speed:,.0f}"
            lines.append(f"{name:<16}{length:>8,}{recall:>8.1f} %{known:>12.1f} %{shown:>12}{group[0]['state_bytes']:>12,} B")
    return "\n".join(lines)


def add_twins(app: typer.Typer) -> None:
    """Adds the command to `geobased recall`."""
    add_command(app, "twins", twins, EXAMPLES)
