"""`geobased recall mqar`: state size against recall, trained, measured and drawn by one command."""

import importlib
import json
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import CommandError
from .options import Debug, Device, Json
from .sources import parse_device

if TYPE_CHECKING:
    from geobased.recall.pareto import Entry
    from geobased.recall.pareto_paper import Comparison

EXAMPLES = (
    "geobased recall mqar --preset figure2 --output-dir mqar",
    "geobased recall mqar --preset figure2-quick --families based,mamba2 --seeds 1 --output-dir quick",
    "geobased recall mqar --report-only --output-dir mqar --json",
)
DEFAULT_PRESET = "figure2"
BY_LENGTH = "_by_length"  # ending of the second figure's name


def mqar(
    output_dir: Annotated[Path, typer.Option(help="Folder of the sweep; its finished runs are kept.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="figure2, figure2-quick, figure2-paper or smoke; by default the folder's, or figure2.", show_default=False
        ),
    ] = None,
    families: Annotated[
        str | None, typer.Option(help="Train these alone, such as based,mamba2; all by default.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds of a configuration; the preset's by default.", show_default=False)
    ] = None,
    device: Device = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that train side by side; as many as fit by default.", show_default=False)
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0, help="Begin no run after this time; the next call goes on.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to draw; pareto.png in the folder by default.", show_default=False)
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing: tables and figures of what is there.")
    ] = False,
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="<path>",
            help="With --report-only: results.json of another part of the sweep; repeatable.",
            show_default=False,
        ),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train small models of many kinds on multi-query associative recall, and lay their recall beside their state.

    An interrupted sweep goes on where it stopped. Writes results.json, results.csv, pareto.png and pareto_by_length.png.
    """
    if merge and not report_only:
        raise CommandError("--merge goes with --report-only: it trains nothing")
    if plot is not None and not plot.resolve().parent.is_dir():
        raise CommandError(f"--plot {plot}: there is no folder {plot.parent}")
    if plot is not None:
        importlib.import_module("matplotlib")  # an extra: better missed now than after hours of training
    names = [name.strip() for name in families.split(",") if name.strip()] if families is not None else None
    if names == []:
        raise CommandError(f"--families {families!r} names no family")
    earlier = _earlier(output_dir, preset)
    if report_only:
        results = _merged(output_dir, merge or [], earlier)
        if preset not in (None, results["preset"]):
            raise CommandError(f"--preset {preset}: the results are those of {results['preset']}")
    else:
        place = parse_device(device)
        if earlier is not None:
            print(f"{output_dir}: {len(earlier['rows'])} runs are done already", file=sys.stderr)
        from geobased.recall.mqar_sweep import run_sweep

        results = run_sweep(
            preset or (earlier or {}).get("preset", DEFAULT_PRESET),
            output_dir,
            families=names,
            seeds=seeds,
            device=place,
            workers=workers,
            max_seconds=max_seconds,
        )
    _report(results, output_dir, plot, json_output)


def _earlier(output_dir: Path, preset: str | None) -> dict[str, Any] | None:
    """What the folder's results.json holds, if there is one; it must be of this preset."""
    from geobased.recall.pareto import load_results

    if output_dir.exists() and not output_dir.is_dir():
        raise CommandError(f"--output-dir {output_dir} is a file")
    if not (output_dir / "results.json").is_file():
        return None
    earlier = load_results(output_dir)
    if preset not in (None, earlier["preset"]):
        raise CommandError(f"{output_dir} holds a sweep of {earlier['preset']!r}, not of {preset!r}; choose another --output-dir")
    return earlier


def _merged(output_dir: Path, parts: list[Path], earlier: dict[str, Any] | None) -> dict[str, Any]:
    from geobased.recall.pareto import load_results, merge_results
    from geobased.whole_file import whole_file

    if not parts:
        return earlier if earlier is not None else load_results(output_dir)
    results = merge_results([*([earlier] if earlier is not None else []), *map(load_results, parts)])
    output_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(output_dir / "results.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _report(results: dict[str, Any], output_dir: Path, plot: Path | None, json_output: bool) -> None:
    """Writes the CSV file and the figures, and prints the summary."""
    from geobased.recall import pareto, pareto_paper

    runs = pareto.read_runs(results)
    entries = pareto.summarise(runs)
    comparison = pareto_paper.compare_with_figure(entries)
    files = {"results": output_dir / "results.json", "csv": output_dir / "results.csv"}
    pareto.write_csv(runs, files["csv"])
    if entries:
        files |= _draw(results, plot or output_dir / "pareto.png")
    if json_output:
        report = {key: results.get(key) for key in ("preset", "device", "date", "seconds", "absent")} | {
            "files": {name: str(path) for name, path in files.items()},
            "num_runs": len(runs),
            "unfinished": pareto.unfinished(runs),
            "configurations": [asdict(entry) for entry in entries],
            "frontier": [entry.label for entry in pareto.pareto_frontier(entries)],
            "comparison": comparison.to_dict(),
        }
        print(json.dumps(report, ensure_ascii=False))
        return
    _show(entries, comparison)
    for name, reason in (results.get("absent") or {}).items():
        print(f"absent: {name}: {reason}")
    for name in pareto.unfinished(runs):
        print(f"not finished: {name}: its learning rate is not chosen yet; the same command goes on")
    for path in files.values():
        print(path)


def _draw(results: dict[str, Any], path: Path) -> dict[str, Path]:
    """The figures, or a warning where they cannot be drawn; the training is not lost for that."""
    from geobased.recall.pareto_plots import plot_by_test, plot_pareto

    if find_spec("matplotlib") is None:
        hint = 'pip install "geobased[train]", then run again with --report-only'
        print(f"warning: matplotlib is not installed, so nothing is drawn: {hint}", file=sys.stderr)
        return {}
    by_length = path.with_stem(path.stem + BY_LENGTH)
    plot_pareto(results, path)
    plot_by_test(results, by_length)
    return {"pareto": path, "by_length": by_length}


def _show(entries: "list[Entry]", comparison: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from geobased.recall.pareto import pareto_frontier, readable_bytes

    # a pipe gets whole lines, a terminal what fits
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    frontier = pareto_frontier(entries)

    def show(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        console.print(Text(title, style="bold"), soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()

    show(
        "recall by state; * lies on the overall frontier",
        ("", "configuration", "state", "accuracy", "seeds", "learning rate"),
        [
            (
                *("*" if entry in frontier else "", entry.label, readable_bytes(entry.state_bytes), str(entry.accuracy)),
                *(str(entry.accuracy.n), f"{entry.learning_rate:.1e}"),
            )
            for entry in entries
        ],
    )
    if comparison.not_compared:
        console.print(Text(f"not laid beside the paper's figure: {comparison.not_compared}"), soft_wrap=True)
        return
    show(
        "beside the paper's figure, whose values are read off",
        ("in the figure", "state", "accuracy", "ours", "accuracy", "verdict"),
        [
            (
                *(line.point.model, line.point.size, line.point.reading),
                *((line.entry.label, str(line.entry.accuracy)) if line.entry else ("", "")),
                line.verdict,
            )
            for line in comparison.lines
        ],
    )
    show(
        "what the paper states",
        ("statement", "verdict", "evidence"),
        [(statement.claim, statement.verdict, statement.evidence) for statement in comparison.statements],
    )
