"""The measured recall as Markdown, from benchmarks/results/<gpu>/{mqar_figure2,mqar_figure2_quick,recall_twins}/results.json.

python scripts/recall_tables.py [--folder benchmarks/results/h200]   # the sections of docs/recall.md; says what is missing
python scripts/recall_tables.py --write                              # puts them between the page's markers
"""

from pathlib import Path
from typing import Any

from page_sections import Section, fill_page, link_to_results, markdown_table, measured_on, over_seeds, page_sections
from performance_tables import RESULTS, ROOT, Rows, number, plot

from geobased.recall.pareto import read_runs, readable_bytes, summarise, summary_tables
from geobased.recall.pareto_paper import compare_with_figure, verdict_table

PAGE = ROOT / "docs" / "recall.md"
TWINS = {
    "based": "BASED",
    "attention": "full attention",
    "sliding_window": "sliding windows",
    "llama": "full attention in every layer",
    "transformers_llama": "Llama of transformers",
}
COMMANDS = {
    "mqar_figure2": "geobased recall mqar --preset figure2",
    "mqar_figure2_quick": "geobased recall mqar --preset figure2-quick",
    "recall_twins": "geobased recall twins --preset long",
}


def about(name: str, folder: Path, results: dict[str, Any], num_trainings: int) -> str:
    """Where and when it was measured, and with which settings."""
    lines = [measured_on(results, num_trainings, "training")]
    settings = results.get("settings", {})
    if "epochs" in settings:
        rates = ", ".join(f"{rate:.1e}" for rate in settings.get("learning_rates", []))
        lines.append(
            f"{settings['epochs']} epochs at most, batches of {settings.get('batch_size')}, {settings.get('precision')};"
            f" learning rates {rates}; {results['seconds'] / 60:,.0f} minutes in all."
        )
    return "\n".join(lines + link_to_results(name, folder))


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


def selected(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row[field] == value for field, value in wanted.items())]


def twins(name: str, folder: Path, results: dict[str, Any]) -> str:
    """Recall by length and perplexity of each model; means and standard deviations over seeds."""
    rows = results["rows"]
    lengths = of_each(rows, "length")
    recall, of_training_places, perplexity = [], [], []
    sources = list(rows[0]["perplexity"]) if rows else []
    for model in of_each(rows, "model"):
        own = selected(rows, model=model)
        one_each = selected(own, length=lengths[0])  # what does not depend on the length stands in every row of a seed
        start = (TWINS.get(model, model), number(own[0]["num_parameters"]), str(len(one_each)))
        cells, cells_of_training_places = (
            [over_seeds([100 * row[field] for row in selected(own, length=length)], ".1f") for length in lengths]
            for field in ("accuracy", "training_places_accuracy")
        )
        recall.append([*start, *cells, over_seeds([100 * row["closed_book"] for row in one_each], ".1f")])
        of_training_places.append([start[0], *cells_of_training_places])
        kinds = [(source, kind) for source in sources for kind in ("repeated", "other")]
        perplexity.append(
            [
                start[0],
                *(over_seeds([row["perplexity"][s][kind]["token_perplexity"] for row in one_each], ".2f") for s, kind in kinds),
            ]
        )
    headings = [f"{source.replace('_', ' ')}: {kind}" for source in sources for kind in ("repeated", "all others")]
    parts = [
        about(name, folder, results, len({(row["model"], row["seed"]) for row in rows})),
        "Answers about held-out places recalled exactly, %, by tokens of context; in the last column without the record, from"
        " memory:",
        markdown_table(["model", "parameters", "seeds", *map(number, lengths), "without"], recall),
        "The same about places whose names stand in training documents:",
        markdown_table(["model", *map(number, lengths)], of_training_places),
        "Perplexity of tokens that repeat a bigram of the context, and of all others:",
        markdown_table(["model", *headings], perplexity),
    ]
    return "\n\n".join(parts + plots(name, folder, throughput=False))


def throughput(name: str, folder: Path, results: dict[str, Any]) -> str:
    """Speed and state of each model and length, beside its recall at that length."""
    table = [
        [
            *(number(entry["length"]), TWINS.get(entry["model"], entry["model"]), entry["way"]),
            *(readable_bytes(entry["state_bytes"]), f"{entry['tokens_per_second']:,.0f}"),
            f"{entry['end_to_end_tokens_per_second']:,.0f}",
            over_seeds(
                [100 * row["accuracy"] for row in selected(results["rows"], model=entry["model"], length=entry["length"])], ".1f"
            ),
        ]
        for entry in results["throughput"]
    ]
    sizes = ", ".join(str(size) for size in of_each(results["throughput"], "batch_size"))
    headings = ["tokens", "model", "by", "state of a sequence", "tokens/s", "with the prompt", "recalled, %"]
    parts = [f"Batches of {sizes} sequences:", markdown_table(headings, table)] if table else ["Speed was not measured."]
    if results.get("absent"):
        cases = [
            f"- {TWINS.get(case['model'], case['model'])} at {number(case['length'])} tokens, {case['way']}: {case['reason']}"
            for case in results["absent"]
        ]
        parts.append("\n".join(["Not measured:", "", *cases]))
    return "\n\n".join(parts + plots(name, folder, throughput=True))


def plots(name: str, folder: Path, *, throughput: bool) -> list[str]:
    """The figures that lie beside the results of twins: those of speed, or the others."""
    stems = sorted(path.stem for path in (folder / name).glob("*.png"))
    shown = [stem for stem in stems if ("throughput" in stem) == throughput]
    return [text for stem in shown for text in plot(folder / name, stem, stem.replace("_", " "))]


# marker of the page -> folder of the results, and what is made of them
SECTIONS: dict[str, Section] = {
    "recall_figure2": ("mqar_figure2", sweep),
    "recall_figure2_quick": ("mqar_figure2_quick", sweep),
    "recall_twins": ("recall_twins", twins),
    "recall_throughput": ("recall_twins", throughput),
    "recall_verdicts": ("mqar_figure2", verdicts),
}


def sections(folder: Path = RESULTS) -> tuple[dict[str, str], list[str]]:
    """Text of each marker, and the files that are missing."""
    return page_sections(SECTIONS, COMMANDS, folder)


if __name__ == "__main__":
    fill_page(PAGE, str(__doc__), sections)
