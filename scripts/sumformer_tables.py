"""Measurements of docs/sumformer.md, from benchmarks/results/<gpu>/{sumformer_experiment,sumformer_mixers}/results.json.

python scripts/sumformer_tables.py [--folder benchmarks/results/h200]   # the sections of docs/sumformer.md; says what is missing
python scripts/sumformer_tables.py --write                              # puts them between the page's markers
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from page_sections import Section, fill_page, link_to_results, markdown_table, measured_on, page_sections
from performance_tables import RESULTS, ROOT, Rows, number, plot

from geobased.training.sumformer_experiment_findings import Entry, findings, ladder_entries, measured, targets_of, title
from geobased.training.sumformer_experiment_models import FAMILIES

PAGE = ROOT / "docs" / "sumformer.md"
EXPERIMENT, MIXERS = "sumformer_experiment", "sumformer_mixers"
COMMANDS = {
    EXPERIMENT: "geobased train sumformer-experiment --preset standard",
    MIXERS: "python benchmarks/sumformer_mixers.py",
}
FIGURES = {
    "models": "Errors of all models",
    "latent": "Errors against the width of the sum",
    "set_size": "Errors against the size of the sets",
    "dimension": "Errors against the dimension of the points",
    "lengths": "Errors on sets of other sizes than those of the training",
    "times": "Time of a pass against the size of the sets",
}


def experiment(name: str, folder: Path, results: dict[str, Any]) -> str:
    """Tables of the first ladder, the figures, and the findings."""
    entries = ladder_entries(results, "models")
    number_of_trainings = sum(len(entry["tried"]) + len(entry["seeds"]) - 1 for entry in results["entries"])
    training = results["settings"]["training"]
    rates = ", ".join(f"{rate:g}" for rate in results["settings"]["learning_rates"])
    lines = [measured_on(results, number_of_trainings, "training")]
    lines.append(
        f"At most {number(training['max_steps'] + training['cooldown_steps'])} steps of"
        f" {number(training['points_per_step'])} points; learning rates {rates}; {results['seconds'] / 60:,.0f} minutes in all."
    )
    if not results["complete"]:
        lines.append("Not all trainings are done.")
    parts = ["\n".join(lines + link_to_results(name, folder))]
    if entries:
        n, d = entries[0]["num_elements"], entries[0]["num_coordinates"]
        parts += [
            f"Normalised mean squared error, medians over seeds, at n = {n}, d = {d}; the lowest is bold:",
            errors(entries, "nmse"),
            "Largest error on the test sets, in standard deviations of the target:",
            errors(entries, "sup_error"),
            "Size, work and equivariance of the models:",
            models(entries),
        ]
    parts += [text for stem, label in FIGURES.items() for text in plot(folder / name, stem, label)]
    verdicts = [f"- {finding.claim}: **{finding.verdict}**. {finding.evidence}." for finding in findings(results)]
    return "\n\n".join([*parts, "### Findings", "\n".join(verdicts)])


def errors(entries: Sequence[Entry], measure: str) -> str:
    """A line for each family, a column for each target."""
    targets = targets_of(entries)
    medians = {(entry["family"], entry["target"]): median(measured(entry, measure)) for entry in entries}
    best = {target: min(value for (_, own), value in medians.items() if own == target) for target in targets}
    table = []
    for family in dict.fromkeys(entry["family"] for entry in entries):
        cells = [_error(medians.get((family, target)), best[target]) for target in targets]
        table.append([FAMILIES[family].title, *cells])
    return markdown_table(["model", *map(title, targets)], table)


def _error(value: float | None, best: float) -> str:
    if value is None:
        return ""
    text = f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"
    return f"**{text}**" if value == best else text


def models(entries: Sequence[Entry]) -> str:
    """Parameters, operations and equivariance errors of each family; shares of trainings that stood still."""
    table = []
    for family in dict.fromkeys(entry["family"] for entry in entries):
        own = [entry for entry in entries if entry["family"] == family]
        equivariance = max(value for entry in own for value in measured(entry, "equivariance_error"))
        reached = [value for entry in own for value in entry["plateau"]]
        table.append(
            [
                *(FAMILIES[family].title, number(own[0]["num_parameters"]), number(own[0]["flops_per_point"])),
                *(f"{equivariance:.1e}", f"{100 * sum(reached) / len(reached):.0f} %"),
            ]
        )
    headings = ["model", "parameters", "operations a point", "largest equivariance error", "plateau reached"]
    return markdown_table(headings, table)


def mixers(name: str, folder: Path, results: dict[str, Any]) -> str:
    """Milliseconds of each mixer by length, with shares of the floor, and times softmax's."""
    rows: Rows = results["rows"]
    parts = ["\n".join([measured_on(results, len(rows), "timing"), *link_to_results(name, folder)])]
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        own = [row for row in rows if row["benchmark"] == benchmark]
        lengths = sorted({row["case"]["seq_len"] for row in own})
        table = []
        for implementation in dict.fromkeys(row["implementation"] for row in own):
            by_length = {row["case"]["seq_len"]: row for row in own if row["implementation"] == implementation}
            table.append([implementation, *(_time(by_length.get(length)) for length in lengths)])
        parts += [f"{HEADINGS[benchmark]}:", markdown_table(["mixer", *map(number, lengths)], table)]
        parts += plot(folder / name, benchmark, HEADINGS[benchmark])
    if results.get("absent"):
        parts.append("Not measured: " + "; ".join(f"{case} ({reason})" for case, reason in results["absent"].items()) + ".")
    return "\n\n".join(parts)


HEADINGS = {
    "sumformer_layers": "Layers, bidirectional; milliseconds by length, in brackets how many times the floor",
    "sumformer_layers_causal": "The same, causal",
    "sumformer_cores": "What mixes alone, without projections, bidirectional",
    "sumformer_cores_causal": "The same, causal",
}


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    floor = row["floor_milliseconds"]
    return f"{row['milliseconds']:.2f}" + (f" ({row['milliseconds'] / floor:.1f})" if floor else "")


SECTIONS: dict[str, Section] = {EXPERIMENT: (EXPERIMENT, experiment), MIXERS: (MIXERS, mixers)}


def sections(folder: Path = RESULTS) -> tuple[dict[str, str], list[str]]:
    """Text of each marker, and the files that are missing."""
    return page_sections(SECTIONS, COMMANDS, folder)


if __name__ == "__main__":
    fill_page(PAGE, str(__doc__), sections)
