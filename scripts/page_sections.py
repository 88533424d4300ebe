"""Sections of a documentation page that are made from stored results, and the tables in them."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from performance_tables import RESULTS, ROOT, between, headline

from geobased.recall.pareto import spread_of

# name of the results' folder, and what is made of its name, the folder that it lies in, and its content
Section = tuple[str, Callable[[str, Path, dict[str, Any]], str]]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def over_seeds(values: Sequence[float], form: str = ",.0f") -> str:
    """Mean, with the sample standard deviation if there are several values; nothing without a value."""
    if not values:
        return ""
    spread = spread_of(values)
    return f"{spread.mean:{form}}" + (f" ± {spread.std:{form}}" if spread.std is not None else "")


def measured_on(results: dict[str, Any], number: int, noun: str) -> str:
    """How many trainings or runs were done, where and when."""
    # what is absent stands below the tables
    measured = headline("results", {**results, "absent": {}}).replace("`results.json`: ", "")
    return f"{number:,} {noun}{'s' if number != 1 else ''} on {measured}"


def link_to_results(name: str, folder: Path) -> list[str]:
    """A line that points at the file, where it is part of this repository."""
    path = folder.resolve() / name / "results.json"
    return [f"The runs: [results.json](../{path.relative_to(ROOT).as_posix()})."] if ROOT in path.parents else []


def page_sections(
    sections: Mapping[str, Section], commands: Mapping[str, str], folder: Path = RESULTS
) -> tuple[dict[str, str], list[str]]:
    """Text of each marker, and the files that are missing; their sections say so, and hold no number."""
    texts, missing = {}, []
    for marker, (name, text) in sections.items():
        path = folder / name / "results.json"
        if path.is_file():
            texts[marker] = text(name, folder, json.loads(path.read_text(encoding="utf-8")))
        else:
            missing += [str(path)] if str(path) not in missing else []
            texts[marker] = f"No results are stored here yet; `{commands[name]}` measures them."
    return texts, missing


def fill_page(page: Path, description: str, sections: Callable[[Path], tuple[dict[str, str], list[str]]]) -> None:
    """The command line of a script: prints the sections, or writes them between the page's markers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help=f"update docs/{page.name}")
    arguments = parser.parse_args()
    texts, missing = sections(arguments.folder)
    for path in missing:
        print(f"missing: {path}", file=sys.stderr)
    for marker, text in texts.items():
        start, end = f"<!-- {marker}:start -->", f"<!-- {marker}:end -->"
        if arguments.write:
            between(page, start, end, text)
        else:
            print(f"{start}\n{text}\n{end}\n")
