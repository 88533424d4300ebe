"""The recall-memory trade-off by one command: trains every model of a preset and writes down how well it recalls.

Each finished run is a file of its own, so that a sweep goes on where it was stopped. The learning rate of a configuration is
chosen on validation examples with the first seed; the test segments are read once per run, after its training.
"""

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from geobased.training.artifacts import versions, write_json
from geobased.training.worker_processes import default_workers, device_pool, worker_device

from .mqar import Examples, Segment, generate_examples, segment_seeds
from .mqar_presets import ABSENT, PRESETS, Configuration, Preset
from .mqar_training import TrainedModel, TrainingSettings, on_device, query_accuracy, train_cohort
from .state_size import state_bytes

REFERENCE_SEED = 123  # zoology's, of which the first seed's examples are drawn
VALIDATION_EXAMPLES = 500  # per segment
DEFAULT_WORKERS = 4  # per GPU: while one compiles kernels, the others train

# of a worker process
_examples: dict[int, tuple[list[Examples], ...]] = {}


def load_preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is none of {', '.join(PRESETS)}")
    return PRESETS[name]


def load_examples(
    preset: Preset, seeds: Sequence[int], cache_dir: Path, *, progress: bool = False
) -> list[tuple[list[Examples], list[Examples], list[Examples]]]:
    """Train, validation and test segments of each seed; those of seed 0 are the reference's.

    Validation segments have the tests' sizes and seeds of their own.
    """
    validation = [replace(segment, num_examples=min(VALIDATION_EXAMPLES, segment.num_examples)) for segment in preset.test]
    segments: list[Segment] = []
    segment_seed: list[int] = []
    for seed in seeds:
        train_seeds, test_seeds = segment_seeds(REFERENCE_SEED + seed, len(preset.train), len(preset.test))
        segments += [*preset.train, *validation, *preset.test]
        segment_seed += [*train_seeds, *((value + 1) % 2**32 for value in test_seeds), *test_seeds]
    found = iter(generate_examples(segments, segment_seed, preset.vocab_size, cache_dir=cache_dir, progress=progress))

    def take(count: int) -> list[Examples]:
        return [next(found) for _ in range(count)]

    return [(take(len(preset.train)), take(len(preset.test)), take(len(preset.test))) for _ in seeds]


def run_name(configuration: Configuration, learning_rate: float, seed: int) -> str:
    """File name of a run, without its ending."""
    return f"{configuration.label.replace(' ', '-')}-lr{learning_rate:.1e}-seed{seed}"


def _settings(preset: Preset) -> dict[str, Any]:
    """What the runs of a folder must share."""
    settings = asdict(preset)
    for name in ("name", "description", "configurations", "seeds"):
        settings.pop(name)
    return json.loads(json.dumps(settings))


def prepare_folder(preset: Preset, output_dir: Path) -> None:
    """Creates the folder of a sweep, or checks that it belongs to it.

    A `results.json` alone, of another machine, is enough to go on from: its rows become the files of finished runs.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    for name in ("runs", "unfinished"):
        (output_dir / name).mkdir(parents=True, exist_ok=True)
    path, settings = output_dir / "settings.json", {"preset": preset.name, "settings": _settings(preset)}
    results = output_dir / "results.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    elif results.exists():
        whole = json.loads(results.read_text(encoding="utf-8"))
        whole["settings"].pop("seeds")
        found = {"preset": whole["preset"], "settings": whole["settings"]}
    else:
        found, whole = settings, None
    if found != settings:
        raise ValueError(f"{output_dir} holds runs of preset {found.get('preset')!r} with other settings: choose another folder")
    if not path.exists():
        write_json(path, settings)
        configurations = {configuration.label: configuration for configuration in preset.configurations}
        for row in whole["rows"] if whole is not None else []:
            row.pop("chosen_learning_rate")
            if row["label"] in configurations:
                name = run_name(configurations[row["label"]], row["learning_rate"], row["seed"])
                write_json(output_dir / "runs" / f"{name}.json", row)


def _row(preset: Preset, configuration: Configuration, trained: TrainedModel, test: Sequence[Examples]) -> dict[str, Any]:
    settings, model = trained.settings, trained.model
    accuracies = {
        f"{segment.input_seq_len}/{segment.num_kv_pairs}": query_accuracy(model, examples, settings.precision)
        for segment, examples in zip(preset.test, test, strict=True)
    }
    longest = max(segment.input_seq_len for segment in preset.test)
    return {
        **asdict(configuration),
        "label": configuration.label,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "num_parameters": model.num_parameters(),
        "state_bytes": state_bytes(model.config, longest),
        "validation_accuracy": trained.validation_accuracy[-1],
        "validation_history": trained.validation_accuracy,
        "accuracy": sum(accuracies.values()) / len(accuracies),
        "accuracy_by_test": accuracies,
        "diverged": trained.diverged,
        "epochs": len(trained.validation_accuracy),
        "seconds": trained.seconds,
    }


def _prepare_worker() -> None:
    # every worker compiles a few small functions; the default is as many processes each as there are cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    torch.set_float32_matmul_precision("high")
    # one compiled form per width and state size; beyond the default of 8 it would run uncompiled
    torch._dynamo.config.recompile_limit = 128


def train_configuration(
    preset: Preset, configuration: Configuration, output_dir: Path, deadline: float | None
) -> list[dict[str, Any]]:
    """Trains what is missing of a configuration: all learning rates with the first seed, then the other seeds with the best.

    Returns:
        the rows of all its finished runs.
    """
    cache = output_dir / "examples"

    def train(rates: Sequence[float], seed: int) -> list[dict[str, Any]]:
        paths = [output_dir / "runs" / f"{run_name(configuration, rate, seed)}.json" for rate in rates]
        missing = [rate for rate, path in zip(rates, paths, strict=True) if not path.exists()]
        if missing and (deadline is None or time.monotonic() < deadline):
            if seed not in _examples:
                # copied to the device once, for all cohorts
                parts = load_examples(preset, [seed], cache)[0]
                _examples[seed] = tuple([on_device(examples, worker_device()) for examples in part] for part in parts)
            train_set, validation, test = _examples[seed]
            config = configuration.model_config(preset.vocab_size)
            settings = TrainingSettings(missing[0], preset.epochs, preset.batch_size, seed=seed, precision=preset.precision)
            runs = [(config, replace(settings, learning_rate=rate)) for rate in missing]
            unfinished = [output_dir / "unfinished" / f"{run_name(configuration, rate, seed)}.pt" for rate in missing]
            cohort = train_cohort(runs, train_set, validation, device=worker_device(), deadline=deadline, checkpoints=unfinished)
            for trained in cohort:
                if trained is not None:
                    name = run_name(configuration, trained.settings.learning_rate, seed)
                    write_json(output_dir / "runs" / f"{name}.json", _row(preset, configuration, trained, test))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]

    rows = train(preset.learning_rates, preset.seeds[0])
    if len(rows) == len(preset.learning_rates):
        rate = best_learning_rate(rows)
        for seed in preset.seeds[1:]:
            rows += train([rate], seed)
    return rows


def best_learning_rate(rows: Sequence[dict[str, Any]]) -> float:
    """That of the highest validation accuracy; of equals, the one that needed fewer epochs, then the lower one."""
    return min(rows, key=lambda row: (-row["validation_accuracy"], row["epochs"], row["learning_rate"]))["learning_rate"]


def collect_rows(preset: Preset, output_dir: Path) -> list[dict[str, Any]]:
    """The rows of all finished runs of a folder, in the preset's order, the chosen learning rates marked.

    A learning rate is chosen once all have been tried.
    """
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output_dir / "runs").glob("*.json"))]
    ordered: list[dict[str, Any]] = []
    for configuration in preset.configurations:
        own = [row for row in rows if row["label"] == configuration.label]
        first = [row for row in own if row["seed"] == preset.seeds[0]]
        complete = {row["learning_rate"] for row in first} == set(preset.learning_rates)
        best = best_learning_rate(first) if complete else None
        for row in sorted(own, key=lambda row: (row["seed"], row["learning_rate"])):
            ordered.append(row | {"chosen_learning_rate": row["learning_rate"] == best})
    return ordered


def expected_runs(preset: Preset, configurations: Sequence[Configuration]) -> int:
    """How many trainings a sweep consists of."""
    return len(configurations) * (len(preset.learning_rates) + len(preset.seeds) - 1)


def run_sweep(
    preset: str,
    output_dir: Path,
    *,
    families: Sequence[str] | None = None,
    seeds: int | None = None,
    device: torch.device | None = None,
    workers: int | None = None,
    max_seconds: float | None = None,
) -> dict[str, Any]:
    """Trains what a folder lacks of a preset's runs and writes `results.json`.

    Args:
        preset: one of `PRESETS`.
        output_dir: folder of this sweep; finished runs in it are kept.
        families: train these alone; all by default.
        seeds: how many seeds; the preset's by default.
        device: "cuda" uses all visible GPUs, "cuda:0" one, "cpu" none; a GPU if there is one by default.
        workers: processes; four per GPU or one per two CPU cores by default.
        max_seconds: the trainings stop then; the next call goes on from the last whole epoch of each.

    Returns:
        what `results.json` holds: preset, device, versions, settings, absent families, and a row for each run.

    Raises:
        ValueError: unknown preset or family, a folder of other settings, or sizes out of range.

    Example:
        >>> results = run_sweep("smoke", Path("runs/smoke"))  # doctest: +SKIP
        >>> len(results["rows"])  # doctest: +SKIP
        6
    """
    chosen = load_preset(preset)
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"seeds={seeds} must be at least 1")
        chosen = replace(chosen, seeds=tuple(range(seeds)))
    configurations = chosen.select(families)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output_dir = Path(output_dir)
    prepare_folder(chosen, output_dir)
    started = time.monotonic()
    deadline = None if max_seconds is None else started + max_seconds
    earlier = _earlier_seconds(output_dir)

    def write() -> dict[str, Any]:
        return _write_results(chosen, output_dir, device, earlier + time.monotonic() - started)

    try:
        _train_all(chosen, configurations, output_dir, device, workers, deadline, write)
    finally:
        results = write()
    return results


def _train_all(
    preset: Preset,
    configurations: Sequence[Configuration],
    output_dir: Path,
    device: torch.device,
    workers: int | None,
    deadline: float | None,
    write: Callable[[], object],
) -> None:
    labels = {configuration.label for configuration in configurations}

    def count_done() -> int:
        runs = sum(row["label"] in labels and row["seed"] in preset.seeds for row in collect_rows(preset, output_dir))
        return min(runs, total)

    total = expected_runs(preset, configurations)
    if count_done() == total:
        return
    # generated once, before every worker would, and all seeds' side by side
    load_examples(preset, preset.seeds, output_dir / "examples", progress=True)
    pool = device_pool(device, workers or default_workers(device, DEFAULT_WORKERS), _prepare_worker)
    # those that take longest first, so that none of them is left for the end
    ordered = sorted(configurations, key=lambda item: (-item.hidden_size * sum(map(_relative_cost, item.mixers)), item.label))
    with pool, tqdm(total=total, initial=count_done(), desc=f"{preset.name}: trainings", unit="run") as bar:
        pending: dict[Future, str] = {
            pool.submit(train_configuration, preset, item, output_dir, deadline): item.label for item in ordered
        }
        failures: list[tuple[str, BaseException]] = []
        try:
            while pending:
                done, still = wait(pending, timeout=5, return_when=FIRST_COMPLETED)
                failures += [(pending[future], error) for future in done if (error := future.exception()) is not None]
                pending = {future: pending[future] for future in still}
                if (runs := count_done()) > bar.n:
                    bar.update(runs - bar.n)
                    write()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(configurations)} configurations failed, the others are done:"
            f" {', '.join(label for label, _ in failures)}"
        ) from failures[0][1]


def _relative_cost(mixer: str) -> int:
    return 3 if mixer in ("mamba2", "gated_deltanet", "performer") else 1


def _earlier_seconds(output_dir: Path) -> float:
    path = output_dir / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0


def _write_results(preset: Preset, output_dir: Path, device: torch.device, seconds: float) -> dict[str, Any]:
    gpu = device.type == "cuda"
    results = {
        "preset": preset.name,
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu ({platform.machine()})",
        "num_devices": torch.cuda.device_count() if gpu and device.index is None else 1,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "seconds": seconds,
        "settings": _settings(preset) | {"seeds": list(preset.seeds)},
        "absent": dict(ABSENT),
        "rows": collect_rows(preset, output_dir),
    }
    write_json(output_dir / "results.json", results)
    return results


__all__ = [
    "best_learning_rate",
    "collect_rows",
    "expected_runs",
    "load_examples",
    "load_preset",
    "prepare_folder",
    "run_name",
    "run_sweep",
    "train_configuration",
]
