"""The measured recall as Markdown, from benchmarks/results/<gpu>/{mqar_figure2,mqar_figure2_quick,recall_twins}/results.json.

python scripts/recall_tables.py [--folder benchmarks/results/h200]   # the sections of docs/recall.md; says what is missing
python scripts/recall_tables.py --write                              # puts them between the page's markers
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from performance_tables import RESULTS, ROOT, Rows, between, headline, number, plot

from geobased.recall.pareto import read_runs, readable_bytes, spread_of, summarise, summary_tables
from geobased.recall.pareto_paper import compare_with_figure, verdict_table

PAGE = ROOT / "docs" / "recall.md"
TWINS = {"based": "BASED", "attention": "attention", "sliding_window": "sliding window"}
COMMANDS = {
    "mqar_figure2": "geobased recall mqar --preset figure2",
    "mqar_figure2_quick": "geobased recall mqar --preset figure2-quick",
    "recall_twins": "python benchmarks/recall_twins.py",
}


def about(name: str, folder: Path, results: dict[str, Any], num_trainings: int) -> str:
    """Where and when it was measured, and with which settings."""
    # what is absent stands below the tables
    measured = headline("results", {**results, "absent": {}}).replace("`results.json`: ", "")
    lines = [f"{num_trainings:,} training{'s' if num_trainings != 1 else ''} on {measured}"]
    settings = results.get("settings", {})
    if "epochs" in settings:
        rates = ", ".join(f"{rate:.1e}" for rate in settings.get("learning_rates", []))
        lines.append(
            f"{settings['epochs']} epochs at most, batches of {settings.get('batch_size')}, {settings.get('precision')};"
            f" learning rates {rates}; {results['seconds'] / 60:,.0f} minutes in all."
        )
    path = folder.resolve() / name / "results.json"
    if ROOT in path.parents:
        lines.append(f"The runs: [results.json](../{path.relative_to(ROOT).as_posix()}).")
    return "\n".join(lines)


def sweep(name: str, folder: Path, results: dict[str, Any]) -> str:
    parts = [
        about(name, folder, results, len(results["rows"])),
        *plot(folder / name, "pareto", "Accuracy against the bytes of the state"),
    ]
    parts += [summary_tables(results), *plot(folder / name, "pareto_by_length", "Accuracy by test segment")]
    return "\n\n".join(parts)


def verdicts(name: str, folder: Path, results: dict[str, Any]) -> str:
    return f"By `{results['preset']}`:\n\n{verdict_table(compare_with_figure(summarise(read_runs(results))))}"


def of_each(rows: Rows, field: str) -> list[Any]:
    return list(dict.fromkeys(row[field] for row in rows))


def over_seeds(rows: Rows, field: str, form: Callable[[float], str]) -> str:
    """Mean of a field over the seeds, with the sample standard deviation if there are several."""
    values = [row[field] for row in rows if row.get(field) is not None]
    if not values:
        return ""
    spread = spread_of(values)
    return form(spread.mean) + (f" ± {form(spread.std)}" if spread.std is not None else "")


def selected(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row[field] == value for field, value in wanted.items())]


def twins(name: str, folder: Path, results: dict[str, Any]) -> str:
    """Accuracy by length, then perplexity, for each model; means and standard deviations over seeds."""
    rows, lengths = results["rows"], of_each(results["rows"], "length")
    parts = [about(name, folder, results, len({(row["model"], row["seed"]) for row in rows}))]
    for title, field, form in (
        ("Answers recalled exactly, %, by tokens of context:", "accuracy", lambda value: f"{100 * value:.1f}"),
        ("Perplexity of tokens that repeat a bigram of the context:", "perplexity_repeated", lambda value: f"{value:.2f}"),
        ("Perplexity of all other tokens:", "perplexity_rest", lambda value: f"{value:.2f}"),
    ):
        lines = [title, "", "| model | parameters | seeds | " + " | ".join(map(number, lengths)) + " |"]
        lines.append("|---|---:|---:|" + "---:|" * len(lengths))
        for model in of_each(rows, "model"):
            own = selected(rows, model=model)
            cells = [over_seeds(selected(own, length=length), field, form) for length in lengths]
            start = (TWINS.get(model, model), number(own[0]["num_parameters"]), str(len(of_each(own, "seed"))))
            lines.append("| " + " | ".join([*start, *cells]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *plot(folder / name, "recall_by_length", "Recall by length of the context")])


def throughput(name: str, folder: Path, results: dict[str, Any]) -> str:
    """State and speed beside recall, at every length."""
    rows = results["rows"]
    lines = ["| tokens | model | state of a sequence | tokens/s | answers recalled exactly, % |", "|---:|---|---:|---:|---:|"]
    for length in of_each(rows, "length"):
        for model in of_each(rows, "model"):
            own = selected(rows, length=length, model=model)
            if own:
                cells = (
                    *(number(length), TWINS.get(model, model), over_seeds(own[:1], "state_bytes", readable_bytes)),
                    over_seeds(own, "tokens_per_second", lambda value: f"{value:,.0f}"),
                    over_seeds(own, "accuracy", lambda value: f"{100 * value:.1f}"),
                )
                lines.append("| " + " | ".join(cells) + " |")
    return "\n\n".join(["\n".join(lines), *plot(folder / name, "throughput_against_recall", "Throughput against recall")])


# marker of the page -> folder of the results, and what is made of them
SECTIONS: dict[str, tuple[str, Callable[[str, Path, dict[str, Any]], str]]] = {
    "recall_figure2": ("mqar_figure2", sweep),
    "recall_figure2_quick": ("mqar_figure2_quick", sweep),
    "recall_twins": ("recall_twins", twins),
    "recall_throughput": ("recall_twins", throughput),
    "recall_verdicts": ("mqar_figure2", verdicts),
}


def sections(folder: Path = RESULTS) -> tuple[dict[str, str], list[str]]:
    """Text of each marker, and the files that are missing; their sections say so, and hold no number."""
    texts, missing = {}, []
    for marker, (name, text) in SECTIONS.items():
        path = folder / name / "results.json"
        if path.is_file():
            texts[marker] = text(name, folder, json.loads(path.read_text(encoding="utf-8")))
        else:
            missing += [str(path)] if str(path) not in missing else []
            texts[marker] = f"No results are stored here yet; `{COMMANDS[name]}` measures them."
    return texts, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="update docs/recall.md")
    arguments = parser.parse_args()
    texts, missing = sections(arguments.folder)
    for path in missing:
        print(f"missing: {path}", file=sys.stderr)
    for marker, text in texts.items():
        start, end = f"<!-- {marker}:start -->", f"<!-- {marker}:end -->"
        if arguments.write:
            between(PAGE, start, end, text)
        else:
            print(f"{start}\n{text}\n{end}\n")


if __name__ == "__main__":
    main()
