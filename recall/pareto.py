"""State size against recall: what a sweep over MQAR measured, its Pareto frontiers, tables and CSV.

`geobased.recall.mqar_sweep` writes results.json; everything here is computed from its rows. Plots are in
`geobased.recall.pareto_plots`, the comparison with the published figure in `geobased.recall.pareto_paper`.
"""

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from geobased.whole_file import whole_file

# name in results.json -> name on a page, in the order of tables and legends
FAMILIES = {
    "based": "BASED",
    "based_window": "BASED with a window",
    "attention": "attention",
    "sliding_window": "sliding window",
    "linear_attention": "linear attention alone",
    "window_alone": "sliding window alone",
    "convolution": "convolution alone",
    "mamba2": "Mamba-2",
    "gated_deltanet": "Gated DeltaNet",
    "performer": "Performer",
    "sumformer": "Sumformer",
}
BASED_FAMILIES = ("based", "based_window")
# what tells one part of a sweep from another part of the same sweep
SETTINGS_OF_A_PART = ("families", "seeds", "device", "workers", "max_seconds")


@dataclass(frozen=True, slots=True)
class Run:
    """One training of one configuration: a row of results.json."""

    family: str
    label: str
    mixers: tuple[str, ...]
    hidden_size: int
    feature_dim: int | None
    sliding_window: int | None
    state_size: int | None
    learning_rate: float
    seed: int
    num_parameters: int
    state_bytes: int
    validation_accuracy: float | None
    accuracy: float
    accuracy_by_test: dict[str, float]
    epochs: float
    seconds: float
    chosen_learning_rate: bool

    @property
    def configuration(self) -> tuple[Any, ...]:
        """What runs of one configuration have in common."""
        return (
            *(self.family, self.label, self.mixers, self.hidden_size),
            *(self.feature_dim, self.sliding_window, self.state_size),
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation over `n` seeds; with one seed there is no deviation."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.std is None else f"{self.mean:.3f} ± {self.std:.3f}"


@dataclass(frozen=True, slots=True)
class TriedRate:
    """A learning rate that was tried with the first seed."""

    learning_rate: float
    validation_accuracy: float | None
    accuracy: float


@dataclass(frozen=True, slots=True)
class Entry:
    """A configuration with its chosen learning rate; accuracies are shares in [0, 1], over the seeds of that rate."""

    family: str
    label: str
    mixers: tuple[str, ...]
    hidden_size: int
    feature_dim: int | None
    sliding_window: int | None
    state_size: int | None
    num_parameters: int
    state_bytes: int
    learning_rate: float
    accuracy: Spread
    accuracy_by_test: dict[str, Spread]
    tried: tuple[TriedRate, ...]

    @property
    def log2_bytes(self) -> float:
        """Position on the horizontal axis; -inf for a configuration without a state."""
        return math.log2(self.state_bytes) if self.state_bytes else -math.inf


def load_results(path: str | Path) -> dict[str, Any]:
    """The results.json of a sweep, in a file or in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not the file of a sweep.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there are no results; `geobased recall mqar` writes them")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or "preset" not in results or not isinstance(results.get("rows"), list):
        raise ValueError(f"{path} is not the results.json of `geobased recall mqar`: it lacks `preset` or `rows`")
    return results


def read_runs(results: Mapping[str, Any]) -> list[Run]:
    """The rows of results, typed.

    Raises:
        ValueError: a row lacks a field, or an accuracy is not in [0, 1].
    """
    names = [field.name for field in fields(Run)]
    runs = []
    for number, row in enumerate(results["rows"]):
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(f"row {number} ({row.get('label', 'without a label')}) lacks {', '.join(missing)}")
        run = Run(**{name: row[name] for name in names} | {"mixers": tuple(row["mixers"])})
        for name, value in {"accuracy": run.accuracy, **run.accuracy_by_test}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"row {number} ({run.label}): the accuracy {name} is {value}, not a share in [0, 1]")
        runs.append(run)
    return runs


def merge_results(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One sweep of parts that were run apart, by families, seeds or machines.

    Raises:
        ValueError: no part, parts of different presets or settings, or parts that differ about the same run.
    """
    if not parts:
        raise ValueError("there are no results to merge")
    first = parts[0]
    for part in parts[1:]:
        if part["preset"] != first["preset"]:
            raise ValueError(f"results of the presets {first['preset']!r} and {part['preset']!r} cannot be merged")
        ours, theirs = first.get("settings", {}), part.get("settings", {})
        names = [name for name in {**ours, **theirs} if name not in SETTINGS_OF_A_PART and ours.get(name) != theirs.get(name)]
        if names:
            differences = "; ".join(f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}" for name in names)
            raise ValueError(f"results with different settings cannot be merged: {differences}")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        for row, run in zip(part["rows"], read_runs(part), strict=True):
            key = (*run.configuration, run.learning_rate, run.seed)
            if rows.setdefault(key, row) != row:
                raise ValueError(f"two results of {run.label} with rate {run.learning_rate:g} and seed {run.seed}; drop one")
    families = {row["family"] for row in rows.values()}
    absent = {name: reason for part in parts for name, reason in part.get("absent", {}).items() if name not in families}
    names = list(dict.fromkeys(name for part in parts for name in part.get("versions", {})))
    return {
        **first,
        "device": _joined(part.get("device") for part in parts),
        "versions": {name: _joined(part.get("versions", {}).get(name) for part in parts) for name in names},
        "date": max(str(part.get("date", "")) for part in parts),
        "seconds": sum(part.get("seconds") or 0.0 for part in parts),
        "absent": absent,
        "rows": list(rows.values()),
    }


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def summarise(runs: Iterable[Run]) -> list[Entry]:
    """One entry for each configuration whose learning rate is chosen, by family and state size.

    Raises:
        ValueError: a configuration has two chosen rates, or the same run twice.
    """
    entries = []
    for runs_of_one in _by_configuration(runs):
        chosen = sorted((run for run in runs_of_one if run.chosen_learning_rate), key=lambda run: run.seed)
        if not chosen:
            continue
        run = chosen[0]
        rates = sorted({other.learning_rate for other in chosen})
        if len(rates) > 1:
            raise ValueError(f"{run.label} ({run.family}) has {len(rates)} chosen learning rates: {rates}")
        if len({other.seed for other in chosen}) < len(chosen):
            raise ValueError(f"{run.label} ({run.family}): a seed occurs twice at the learning rate {rates[0]:g}")
        first_seed = min(other.seed for other in runs_of_one)
        tried = sorted((other for other in runs_of_one if other.seed == first_seed), key=lambda other: other.learning_rate)
        entries.append(
            Entry(
                family=run.family,
                label=run.label,
                mixers=run.mixers,
                hidden_size=run.hidden_size,
                feature_dim=run.feature_dim,
                sliding_window=run.sliding_window,
                state_size=run.state_size,
                num_parameters=run.num_parameters,
                state_bytes=run.state_bytes,
                learning_rate=run.learning_rate,
                accuracy=spread_of([other.accuracy for other in chosen]),
                accuracy_by_test={
                    test: spread_of([other.accuracy_by_test[test] for other in chosen]) for test in run.accuracy_by_test
                },
                tried=tuple(TriedRate(r.learning_rate, r.validation_accuracy, r.accuracy) for r in tried),
            )
        )
    order = list(FAMILIES)
    return sorted(
        entries,
        key=lambda e: (order.index(e.family) if e.family in order else len(order), e.family, e.state_bytes, e.label),
    )


def unfinished(runs: Iterable[Run]) -> list[str]:
    """Configurations whose learning rate is not chosen yet, as "label (family)"; `summarise` leaves them out."""
    return [
        f"{runs_of_one[0].label} ({runs_of_one[0].family})"
        for runs_of_one in _by_configuration(runs)
        if not any(run.chosen_learning_rate for run in runs_of_one)
    ]


def _by_configuration(runs: Iterable[Run]) -> list[list[Run]]:
    grouped: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.configuration, []).append(run)
    return list(grouped.values())


def spread_of(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one number per seed."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def pareto_frontier(entries: Iterable[Entry]) -> list[Entry]:
    """Entries that no other one matches with at most their state, by state size; accuracy rises strictly along it."""
    frontier: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (e.state_bytes, -e.accuracy.mean)):
        if not frontier or entry.accuracy.mean > frontier[-1].accuracy.mean:
            frontier.append(entry)
    return frontier


def by_family(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries of each family, in the order of `FAMILIES`; families without any are left out."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.family, []).append(entry)
    order = [*FAMILIES, *grouped]
    return dict(sorted(grouped.items(), key=lambda item: order.index(item[0])))


def family_frontiers(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The frontier of each family by itself."""
    return {family: pareto_frontier(own) for family, own in by_family(entries).items()}


def best_of_each_family(entries: Iterable[Entry]) -> dict[str, Entry]:
    """The most accurate configuration of each family; of equal ones that with the smallest state."""
    return {family: frontier[-1] for family, frontier in family_frontiers(entries).items()}


def family_name(family: str) -> str:
    return FAMILIES.get(family, family.replace("_", " "))


def readable_bytes(number: float) -> str:
    """Bytes in powers of 1,024: "512 B", "48.7 KiB", "1 MiB"."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} B"


def write_csv(runs: Sequence[Run], path: str | Path) -> None:
    """One line per run; the accuracy of test segment "64/4" stands in the column `accuracy_64_4`."""
    tests = list(dict.fromkeys(test for run in runs for test in run.accuracy_by_test))
    columns = [field.name for field in fields(Run) if field.name != "accuracy_by_test"]
    with whole_file(path) as unfinished_file, unfinished_file.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *(f"accuracy_{test.replace('/', '_')}" for test in tests)])
        for run in runs:
            cells = asdict(run) | {"mixers": "+".join(run.mixers)}
            writer.writerow([*(cells[name] for name in columns), *(run.accuracy_by_test.get(test) for test in tests)])


def summary_tables(results: Mapping[str, Any]) -> str:
    """Markdown: every configuration, the overall frontier in bold; then the best of each family by test segment."""
    runs = read_runs(results)
    entries = summarise(runs)
    if not entries:
        return "No configuration has a chosen learning rate yet."
    frontier = pareto_frontier(entries)
    lines = ["| family | configuration | parameters | state | log2 bytes | accuracy | seeds | learning rate |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for entry in entries:
        accuracy = f"**{entry.accuracy}**" if entry in frontier else str(entry.accuracy)
        tried = ", ".join(f"{rate.learning_rate:.1e}: {rate.accuracy:.2f}" for rate in entry.tried)
        cells = (
            *(family_name(entry.family), entry.label, f"{entry.num_parameters:,}"),
            *(readable_bytes(entry.state_bytes), f"{entry.log2_bytes:.1f}" if entry.state_bytes else "", accuracy),
            *(str(entry.accuracy.n), f"{entry.learning_rate:.1e} (of {tried})"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    best = best_of_each_family(entries)
    tests = list(dict.fromkeys(test for entry in best.values() for test in entry.accuracy_by_test))
    lines += ["", "The best configuration of each family by test segment (tokens/pairs):", ""]
    lines.append("| family | configuration | " + " | ".join(tests) + " |")
    lines.append("|---|---|" + "---:|" * len(tests))
    for entry in best.values():
        shown = [str(entry.accuracy_by_test[test]) if test in entry.accuracy_by_test else "" for test in tests]
        lines.append("| " + " | ".join([family_name(entry.family), entry.label, *shown]) + " |")
    notes = [f"{name}: {reason}." for name, reason in results.get("absent", {}).items()]
    notes += [f"{name}: its learning rate is not chosen yet." for name in unfinished(runs)]
    if notes:
        lines += ["", "Not in the table:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines)


__all__ = [
    "FAMILIES",
    "Entry",
    "Run",
    "Spread",
    "TriedRate",
    "best_of_each_family",
    "by_family",
    "family_frontiers",
    "load_results",
    "merge_results",
    "pareto_frontier",
    "read_runs",
    "readable_bytes",
    "spread_of",
    "summarise",
    "summary_tables",
    "unfinished",
    "write_csv",
]
