"""How well Sumformers and attention approximate functions of sets, by one command that goes on where it was stopped.

`results.json` holds an entry for each architecture and target, with a value of every error for each seed. It is written after
each cohort and is all that a later call needs.
"""

import datetime
import json
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from geobased.whole_file import whole_file

from .artifacts import load_results, versions
from .sumformer_experiment_cohorts import Cohort, Run, TrainedRun
from .sumformer_experiment_models import SET_TRANSFORMER, Architecture, SetFunction
from .sumformer_experiment_settings import PRESETS, STANDARD_SIZE, Preset
from .sumformer_experiment_targets import random_sets
from .worker_processes import ThisProcess, default_workers, device_pool, worker_device

DEFAULT_WORKERS = 4  # per GPU: while one builds models and graphs, the others train
TIMED_CALLS = 20
LINFORMER_KEYS = 64  # of the timed one, whose sets are longer than its parameters would allow otherwise
# of a run, what an entry holds a list of, one value a seed
MEASURES = ("validation_nmse", "nmse", "sup_error", "equivariance_error", "steps", "plateau")

Entry = dict[str, Any]


def run_experiment(
    preset: str,
    output_dir: str | Path,
    *,
    seeds: int | None = None,
    device: torch.device | None = None,
    workers: int | None = None,
    max_seconds: float | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains what a folder lacks of a preset's models, and writes `results.json`.

    Args:
        preset: one of `PRESETS`.
        output_dir: folder of the results; what is done already is kept.
        seeds: how many; the preset's by default.
        device: "cuda" uses all visible GPUs, "cuda:0" one, "cpu" none; a GPU if there is one by default.
        workers: processes; four per GPU or one per two CPU cores by default. One works in this process.
        max_seconds: no cohort trains beyond it; what it had done is lost, and the next call starts it again.
        report: is told what is done.

    Returns:
        what `results.json` holds.

    Raises:
        ValueError: unknown preset, results of other settings, or seeds below 1.
    """
    started = time.monotonic()
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    chosen = PRESETS[preset] if seeds is None else replace(PRESETS[preset], num_seeds=seeds)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(output_dir) / "results.json"
    results = _earlier(chosen, path) or _empty(chosen, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = results["seconds"]
    deadline = None if max_seconds is None else started + max_seconds

    def write() -> None:
        results["seconds"] = round(earlier + time.monotonic() - started, 1)
        results["complete"] = not _unfinished(chosen, results["entries"]) and bool(results["times"])
        results["date"] = datetime.date.today().isoformat()
        _write(path, results)

    try:
        if not results["times"]:  # first, while nothing else is at work
            results["times"] = measure_times(chosen, device)
            report(f"{len(results['times'])} times: {time.monotonic() - started:.0f} s")
        _train_all(chosen, results["entries"], device, workers, deadline, report, write)
    finally:
        write()
    return results


def _settings(preset: Preset) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(preset).items() if key not in ("name", "ladders", "num_seeds")}
    ladders = {
        name: {"architectures": [architecture.label for architecture in ladder.architectures], "targets": ladder.targets}
        for name, ladder in preset.ladders.items()
    }
    return json.loads(json.dumps(settings | {"ladders": ladders}))


def _empty(preset: Preset, device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "preset": preset.name,
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu ({platform.machine()})",
        "versions": versions(),
        "date": "",
        "seconds": 0.0,
        "complete": False,
        "settings": _settings(preset),
        "times": [],
        "entries": [],
    }


def _earlier(preset: Preset, path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = load_results(path.parent)
    if (found["preset"], found["settings"]) != (preset.name, _settings(preset)):
        raise ValueError(f"{path} is of preset {found['preset']!r} or of other settings: choose another folder")
    return found


def _write(path: Path, results: dict[str, Any]) -> None:
    """One entry a line: a fourth of the length of indented numbers."""
    lists = {key: results[key] for key in ("times", "entries")}
    head = json.dumps({key: value for key, value in results.items() if key not in lists}, indent=1, ensure_ascii=False)
    parts = [head.removesuffix("\n}")]
    for key, rows in lists.items():
        parts.append(f' "{key}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n ]")
    with whole_file(path) as unfinished:
        unfinished.write_text(",\n".join(parts) + "\n}\n", encoding="utf-8")


def _number(value: float) -> float | None:
    """Five digits; JSON has no infinity."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def entry_key(entry: Mapping[str, Any]) -> tuple[Architecture, str]:
    """The architecture and the target that an entry is of."""
    names = ("family", "num_elements", "num_coordinates", "latent_size", "equal_psi")
    return Architecture(**{name: entry[name] for name in names}), entry["target"]


def _unfinished(preset: Preset, entries: Sequence[Entry]) -> list[Architecture]:
    done = {entry_key(entry) for entry in entries if len(entry["seeds"]) >= preset.num_seeds}
    return [
        architecture
        for architecture, targets in preset.targets_of().items()
        if any((architecture, target) not in done for target in targets)
    ]


def _train_all(
    preset: Preset,
    entries: list[Entry],
    device: torch.device,
    workers: int | None,
    deadline: float | None,
    report: Callable[[str], None],
    write: Callable[[], None],
) -> None:
    waiting = deque(_unfinished(preset, entries))
    if not waiting:
        return
    workers = workers or default_workers(device, DEFAULT_WORKERS)
    executor: Executor = ThisProcess(device) if workers == 1 else device_pool(device, workers)
    running: dict[Future[list[Entry]], Architecture] = {}
    total, failures = len(preset.targets_of()), []
    with executor:
        while waiting or running:
            while waiting and len(running) < workers and (deadline is None or time.monotonic() < deadline):
                architecture = waiting.popleft()
                own = [entry for entry in entries if entry_key(entry)[0] == architecture]
                running[executor.submit(train_architecture, preset, architecture, own, deadline)] = architecture
            if not running:
                break  # too late
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                architecture, error = running.pop(future), future.exception()
                if error is not None:
                    failures.append((architecture.label, error))
                    report(f"{architecture.label} failed: {type(error).__name__}: {error}")
                elif found := future.result():
                    replaced = {entry_key(entry) for entry in found}
                    entries[:] = [entry for entry in entries if entry_key(entry) not in replaced] + found
                    write()
                    left = _unfinished(preset, entries)
                    report(f"{architecture.label}: {len(found[0]['seeds'])} seeds; {total - len(left)} of {total} done")
                    if architecture in left:
                        waiting.appendleft(architecture)
    if failures:
        names = ", ".join(label for label, _ in failures)
        raise RuntimeError(f"{len(failures)} architectures failed, the others are kept: {names}") from failures[0][1]


def train_architecture(preset: Preset, architecture: Architecture, entries: list[Entry], deadline: float | None) -> list[Entry]:
    """The next cohort of an architecture: without entries the first seed with all learning rates, which gives them; otherwise
    the seeds that the entries lack, at the chosen rates.

    Returns the entries, or nothing where the deadline came first.
    """
    started = time.monotonic()
    targets = preset.targets_of()[architecture]
    if entries:
        runs = [
            Run(entry["target"], entry["learning_rate"], seed)
            for entry in entries
            for seed in range(len(entry["seeds"]), preset.num_seeds)
        ]
    else:
        runs = [Run(target, rate, 0) for target in targets for rate in preset.learning_rates]
    cohort = Cohort(architecture, runs, preset.training, worker_device())
    if not cohort.train(deadline):
        return []
    first = next(iter(preset.ladders.values())).architectures
    trained = cohort.evaluate(preset.lengths if architecture in first else ())
    seconds = round(time.monotonic() - started, 2)
    if not entries:
        entries = [
            _new_entry(architecture, target, [item for item in trained if item.run.target == target]) for target in targets
        ]
    for entry in entries:
        own = [item for item in trained if item.run.target == entry["target"]]
        if not entry["seeds"]:
            own = [item for item in own if item.run.learning_rate == entry["learning_rate"]]
        for item in sorted(own, key=lambda item: item.run.seed):
            _add(entry, item)
        entry["seconds"].append(seconds)
    return entries


def _new_entry(architecture: Architecture, target: str, tried: Sequence[TrainedRun]) -> Entry:
    """Without a seed: the learning rate of the lowest validation error, of equals the lower one."""

    def error(item: TrainedRun) -> tuple[float, float]:
        last = item.validation[-1]
        return last if math.isfinite(last) else math.inf, item.run.learning_rate

    return {
        **asdict(architecture),
        "target": target,
        "num_parameters": tried[0].num_parameters,
        "flops_per_point": flops_per_point(architecture),
        "tried": {f"{item.run.learning_rate:g}": _number(item.validation[-1]) for item in tried},
        "learning_rate": min(tried, key=error).run.learning_rate,
        "seeds": [],
        **{name: [] for name in MEASURES},
        "nmse_by_length": {},
        "seconds": [],
    }


def _add(entry: Entry, trained: TrainedRun) -> None:
    values = vars(trained) | {"validation_nmse": trained.validation[-1]}
    entry["seeds"].append(trained.run.seed)
    for name in MEASURES:
        entry[name].append(values[name] if isinstance(values[name], bool | int) else _number(values[name]))
    for length, nmse in trained.nmse_by_length.items():
        entry["nmse_by_length"].setdefault(str(length), []).append(_number(nmse))


def flops_per_point(architecture: Architecture) -> int:
    """Floating point operations of matrix products in a forward pass, divided by n; a multiply-add is two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, x = architecture.build().requires_grad_(False), random_sets(1, *architecture.size, seed=0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x)
    return round(counter.get_total_flops() / architecture.num_elements)


def measure_times(preset: Preset, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of a forward and backward pass in float32 against n, for the families of the first ladder.

    A batch holds `preset.timed_points` points in all, or one set. On a GPU the pass is a CUDA graph, as in training.
    """
    rows = []
    for family in preset.families:
        for length in preset.timed_lengths:
            model, x = _timed_model(family, length).to(device), torch.rand(max(1, preset.timed_points // length), length, 2)
            rows.append(
                {
                    "family": family,
                    "num_elements": length,
                    "num_sets": len(x),
                    "milliseconds": _number(_milliseconds(model, x.to(device))),
                }
            )
    return rows


def _timed_model(family: str, length: int) -> SetFunction:
    architecture = Architecture(family, *STANDARD_SIZE)
    if family == SET_TRANSFORMER or architecture.largest_input is None:
        return architecture.build()
    from geobased.modeling_sumformer import SumformerForTokenClassification

    config = architecture.config()
    config.max_linformer_len, config.linformer_size = length, min(LINFORMER_KEYS, length)
    return SetFunction(SumformerForTokenClassification(config))


def _milliseconds(model: nn.Module, x: torch.Tensor) -> float:
    """Median of a forward and backward pass."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def call() -> None:
        torch.autograd.grad(model(x).square().sum(), parameters)

    if x.device.type != "cuda":
        times = []
        for _ in range(3):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return 1e3 * median(times)
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize(x.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_CALLS + 1)]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize(x.device)
    return median(first.elapsed_time(second) for first, second in zip(events, events[1:], strict=False))


__all__ = ["MEASURES", "entry_key", "load_results", "measure_times", "run_experiment", "train_architecture"]
