"""Which level of access finds which plant, and at what price: audits of organisms, and of the model without the plant.

Every audit is a cell with a file of its own, written when it is done, so that a run which was cut off goes on where it ended.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from geobased.auditing.canonical import canonical_json, read_json, sha256
from geobased.auditing.configuration import AuditConfiguration, read_configuration, run_configuration
from geobased.auditing.ledger import ledger_problems
from geobased.auditing.model_loading import ModelSource, model_sha256
from geobased.training.artifacts import versions, write_json
from geobased.training.worker_processes import ThisProcess, device_pool, worker_device

PLANT_FILE, CELLS, RESULTS = "plant.json", "cells", "results.json"
PLANTED, CONTROL = "planted", "control"
Cell = dict[str, Any]


@dataclass(frozen=True)
class TableSettings:
    """How the table is made.

    Attributes:
        seeds: audits of each question, with seeds from 0.
        budget_scale: factor of the configurations' budgets.
        most_items: of each question; all if None.
        questions: names of configurations ("audit", "probe", …); all if empty.
        device: "cpu", "cuda" or "cuda:<number>".
    """

    seeds: int = 5
    budget_scale: float = 1.0
    most_items: int | None = None
    questions: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.budget_scale > 0 or (self.most_items is not None and self.most_items < 1):
            raise ValueError("seeds, budget_scale and most_items must be positive")


@dataclass(frozen=True)
class _Part:
    """An audit to be done, and where its cell lies."""

    place: Path
    names: dict[str, Any]
    configuration: AuditConfiguration
    digest: str

    def stored(self) -> Cell | None:
        """The cell, if its file holds the same audit of the same model."""
        cell = read_json(self.place.read_bytes()) if self.place.is_file() else None
        return cell if cell is not None and cell["audit_sha256"] == self.digest else None


def measure_organisms(
    organisms: Sequence[str | Path],
    output: str | Path,
    settings: TableSettings | None = None,
    report: Callable[[str], None] | None = None,
    *,
    workers: int = 1,
    max_seconds: float | None = None,
) -> dict[str, Any]:
    """Asks every question of every organism, and of its base as the control; writes and returns the results.

    Args:
        organisms: folders with a `plant.json` and configurations, as `geobased audit train-organism` leaves them, or names of
            shipped ones.
        output: folder of cells, where they are looked for first, and of results.json.
        report: gets a line for each cell.
        workers: processes that audit side by side, spread over all GPUs if the device is "cuda".
        max_seconds: no audit begins after this time; the next call goes on.

    Raises:
        ValueError: a folder that is no organism, no configuration of the wanted names, or fewer than one worker.
    """
    settings, output, say = settings or TableSettings(), Path(output), report or (lambda line: None)
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    started = time.monotonic()
    parts = [part for organism in organisms for part in _parts(organism, output, settings)]
    # the first seed of all questions first, so that a call that ends early leaves a whole table
    missing = sorted((part for part in parts if part.stored() is None), key=lambda part: part.names["seed"])
    deadline = None if max_seconds is None else time.time() + max_seconds
    for line in _done(missing, torch.device(settings.device), workers, deadline):
        say(line)
    cells = [cell for part in parts if (cell := part.stored()) is not None]
    if len(cells) < len(parts):
        say(f"{len(parts) - len(cells)} of {len(parts)} audits are left: call again to go on")
    results = {
        "settings": asdict(settings),
        "versions": versions(),
        "complete": len(cells) == len(parts),
        "workers": workers,
        "seconds": round(time.monotonic() - started, 1),
        **table(cells),
    }
    write_json(output / RESULTS, results)
    return results


def _parts(organism: str | Path, output: Path, settings: TableSettings) -> list[_Part]:
    folder = ModelSource(str(organism)).folder()
    if not (folder / PLANT_FILE).is_file():
        raise ValueError(f"{organism} is no organism: it has no {PLANT_FILE}")
    plant = read_json((folder / PLANT_FILE).read_bytes())
    found = sorted(folder.glob("*.yaml"))
    chosen = [path for path in found if not settings.questions or path.stem in settings.questions]
    if not chosen:
        raise ValueError(f"{organism} has no configuration named {' or '.join(settings.questions) or '*.yaml'}")
    models = {PLANTED: str(folder), CONTROL: plant["base"]}
    digests = {model: model_sha256(ModelSource(name).folder()) for model, name in models.items()}
    parts = []
    for path in chosen:
        asked_there = read_configuration(path)
        for model, name in models.items():
            for seed in range(settings.seeds):
                configuration = _adapted(asked_there, name, seed, settings)
                names = {"organism": folder.name, "plant": plant["plant"], "audit": path.stem, "model": model, "seed": seed}
                names["trigger"] = plant["truth"].get("trigger")
                asked = {"configuration": configuration.to_dict(), "model": digests[model]}
                # where the model's folder lies does not matter
                asked["configuration"]["model"]["name"] = model
                place = output / CELLS / f"{folder.name}-{path.stem}-{model}-{seed}.json"
                parts.append(_Part(place, names, configuration, sha256(canonical_json(asked))))
    return parts


def _adapted(configuration: AuditConfiguration, name: str, seed: int, settings: TableSettings) -> AuditConfiguration:
    question = configuration.question
    question = replace(question, budget=question.budget * settings.budget_scale, items=question.items[: settings.most_items])
    if not isinstance(configuration.model, ModelSource):
        raise ValueError("an organism is a folder, not an endpoint")
    model = replace(configuration.model, name=name, device=settings.device)
    # the process of its own costs time and does not change what is found
    return replace(configuration, model=model, question=question, seed=seed, mode="in_process")


def _done(parts: Sequence[_Part], device: torch.device, workers: int, deadline: float | None) -> Iterator[str]:
    """Does what can begin before the deadline (of `time.time`), and gives a line for each part that is done."""
    if workers == 1 or len(parts) < 2:
        here = ThisProcess(device)
        yield from filter(None, (here.submit(_audited, part, deadline).result() for part in parts))
        return
    with device_pool(device, workers) as pool:
        futures = [pool.submit(_audited, part, deadline) for part in parts]
        try:
            yield from filter(None, (future.result() for future in as_completed(futures)))
        finally:
            pool.shutdown(cancel_futures=True)


def _audited(part: _Part, deadline: float | None) -> str | None:
    """Writes a part's cell; a line about it, or None if it is too late to begin."""
    if deadline is not None and time.time() > deadline:
        return None
    started = time.monotonic()
    source = part.configuration.model
    assert isinstance(source, ModelSource)
    findings, ledger, _ = run_configuration(replace(part.configuration, model=replace(source, device=str(worker_device()))))
    if problems := ledger_problems(ledger):
        raise RuntimeError(f"{part.place.stem}: {problems[0]}")
    seconds = time.monotonic() - started
    cell = {**part.names, "audit_sha256": part.digest, "seconds": round(seconds, 2), "results": findings.results}
    write_json(part.place, cell)
    rates = ", ".join(f"{level['access']} {level['rate']:.2f}" for level in findings.results["levels"] if level["techniques"])
    return f"{part.place.stem}: {rates or 'no level'} ({seconds:.0f} s)"


def table(cells: Iterable[Cell]) -> dict[str, Any]:
    """Levels and techniques over the seeds: {"levels": rows, "techniques": rows}."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["organism"], cell["plant"], cell["audit"], cell["model"]), []).append(cell)
    rows: dict[str, list[dict[str, Any]]] = {"levels": [], "techniques": []}
    for key, group in groups.items():
        names = dict(zip(("organism", "plant", "audit", "model"), key, strict=True))
        for part, label in (("levels", "access"), ("techniques", "name")):
            for place, first in enumerate(group[0]["results"][part]):
                runs = [cell["results"][part][place] for cell in group]
                if part == "levels" and not first["techniques"]:
                    continue
                row = {**names, label: first[label], **_over_seeds(runs)}
                if part == "techniques":
                    row |= {"level": first["level"], "reachable": first["reachable"], **_of_techniques(runs)}
                    row["holds_trigger"] = _share_with(group[0]["trigger"], runs)
                rows[part].append(row)
        budgets = group[0]["results"]["budgets"]
        for row in rows["levels"]:
            row.setdefault("budgets", budgets)
    return rows


def _over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rates = [run["rate"] for run in runs]
    costs = [item["spent_at_success"] for run in runs for item in run["items"]]
    return {
        "rates": rates,
        "rate": statistics.mean(rates),
        "num_items": len(runs[0]["items"]),
        "median_spent_at_success": _median_with_failures(costs),
        "solved_curve": [statistics.mean(points) for points in zip(*(run["solved_curve"] for run in runs), strict=True)],
    }


def _median_with_failures(costs: Sequence[float | None]) -> float | None:
    """Over all items, those that were not solved last; None if these are half of them or more."""
    ordered = sorted(float("inf") if cost is None else cost for cost in costs)
    middle = ordered[len(ordered) // 2]
    return None if middle == float("inf") else middle


def _share_with(trigger: str | None, runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the inputs that succeeded which hold the planted trigger in full; None without either."""
    found = [str(item["candidate"]) for run in runs for item in run["items"] if item["success"]]
    return statistics.mean(trigger in text for text in found) if trigger and found else None


def _of_techniques(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    items = [item for run in runs for item in run["items"]]
    names = {name for item in items for name in item["measures"]}
    sizes = [item["perturbation"] for item in items if item["success"] and item["perturbation"] is not None]
    return {
        "mean_spent": statistics.mean(run["spent"] for run in runs),
        "median_perturbation": statistics.median(sizes) if sizes else None,
        "perturbation_unit": runs[0]["perturbation_unit"],
        "measures": {
            name: statistics.mean(item["measures"][name] for item in items if name in item["measures"]) for name in sorted(names)
        },
    }


__all__ = ["CONTROL", "PLANTED", "TableSettings", "measure_organisms", "table"]
