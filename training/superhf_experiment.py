"""SuperHF beside reinforcement learning and simpler ways to the same preferences, by one command.

Two policies of equal size, BASED and a Llama, are asked for facts that stand in their prompt. A reward model, made from the
first half of the preferences (`preference_rules`), is what every arm sees; its twin, made from the second half, and the rules
themselves measure on held-out places what was learnt. Arms that sample see equally many completions; of learning rates and KL
weights the first seed finds the best, by the held-out reward on validation prompts.

Parts are done by processes side by side. Each finished part is a file, and `results.json` is written after each; a later call
with the same settings does what is missing.
"""

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from geobased.training.artifacts import load_results, versions, write_json
from geobased.training.superhf_experiment_settings import (
    ARMS,
    BASED,
    LLAMA,
    LLAMA_ARMS,
    POLICIES,
    ExperimentSettings,
    Run,
    num_runs,
    planned_runs,
)
from geobased.training.superhf_experiment_stages import HELD_OUT_REWARD, REWARD, Job, prepare_data, stages
from geobased.training.superhf_experiment_verdicts import comparisons, marked_rows, verdicts
from geobased.training.superhf_experiment_worker import do_part, prepare_process, result_path
from geobased.training.superhf_metrics import meteor_name
from geobased.training.worker_processes import ThisProcess, num_cores

RESULTS_FILE = "results.json"
DEFAULT_WORKERS = 7  # per GPU: the models are small, and most of a step is work of the host
# settings that a later call may change: what is there stays as it is
EXTENSIBLE = ("num_seeds",)
Part = Run | str


def run_experiment(
    settings: ExperimentSettings,
    output_dir: str | Path,
    *,
    arms: Sequence[str] = ARMS,
    policies: Sequence[str] = POLICIES,
    based: str = BASED,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    max_seconds: float | None = None,
    started: float | None = None,
    text: Sequence[str | Path] = (),
    held_out_text: Sequence[str | Path] = (),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Does what `output_dir` lacks of the experiment.

    Args:
        arms: of `ARMS`.
        policies: of `POLICIES`.
        based: folder, shipped checkpoint or Hub name of the first policy.
        device: "cuda" uses all visible GPUs, "cuda:0" one, "cpu" none.
        workers: processes in all; seven per GPU, or one per two CPU cores, by default. One on the CPU is this process itself.
        max_seconds: no part begins that would probably last longer, and one that turns out to do so is given up; `complete` is
            then false, and the next call goes on.
        started: what `max_seconds` counts from, of `time.time`; now by default.
        text: files that the Llama is trained on beside documents.
        held_out_text: files for perplexities, beside documents of held-out places.
        report: called with a line for every finished part.

    Returns:
        the content of results.json. `rows` has an entry for each run with its `curve` of measures by step; `comparisons` and
        `verdicts` are about the chosen settings.

    Raises:
        FileNotFoundError: a text file is missing.
        ValueError: an unknown arm or policy, sizes out of range, or a folder of other settings or another device.
        RuntimeError: parts that failed; the others are done and kept.
    """
    started = time.time() if started is None else started
    planned_runs(settings, [], arms, policies)  # an unknown name had better be known now
    _check_sizes(settings, workers)
    for path in (*text, *held_out_text):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such text file: {path}")
    folder, device = Path(output_dir), torch.device(device)
    earlier = _check_folder(folder, settings, based, text, held_out_text, device)
    deadline = None if max_seconds is None else started + max_seconds
    slots = _slots(device, workers)
    job = Job(
        settings=settings,
        folder=str(folder),
        device="cpu" if device.type == "cpu" else device.type,
        based=based,
        text=tuple(map(str, text)),
        held_out_text=tuple(map(str, held_out_text)),
        num_workers=max(1, num_cores() // 2),
        deadline=deadline,
    )
    work = _Work(job, tuple(arms), tuple(policies), slots, report, earlier, started)
    prepare_data(job)
    try:
        work.run()
    finally:
        results = work.write()
    if work.failures:
        names = ", ".join(name for name, _ in work.failures)
        raise RuntimeError(f"{len(work.failures)} parts failed, the others are kept: {names}") from work.failures[0][1]
    return results


class _Slot:
    """A process that does one part after the other, or this process itself."""

    def __init__(self, gpu: str | None, threads: int, inline: bool = False) -> None:
        self.gpu, self.inline = gpu, inline
        context = multiprocessing.get_context("spawn")
        self.pool = None if inline else ProcessPoolExecutor(1, context, initializer=prepare_process, initargs=(threads,))

    def submit(self, job: Job, part: Part) -> "Future[float]":
        if self.pool is None:
            return ThisProcess(torch.device("cpu")).submit(do_part, job, part)
        # the process starts with the first part. It must see one GPU: trainers spread over all that they see
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        try:
            return self.pool.submit(do_part, job, part)
        finally:
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
            elif self.gpu is not None:
                del os.environ["CUDA_VISIBLE_DEVICES"]

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def _slots(device: torch.device, workers: int | None) -> list[_Slot]:
    if device.type != "cuda":
        number = workers or max(1, num_cores() // 2)
        return [_Slot(None, max(1, num_cores() // number), inline=number == 1) for _ in range(number)]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    gpus = visible if device.index is None else [visible[device.index]]
    number = workers or DEFAULT_WORKERS * len(gpus)
    return [_Slot(gpus[i % len(gpus)], max(1, num_cores() // number)) for i in range(number)]


@dataclass
class _Work:
    """What hands parts to processes, and gathers their results."""

    job: Job
    arms: tuple[str, ...]
    policies: tuple[str, ...]
    slots: list[_Slot]
    report: Callable[[str], None]
    earlier_seconds: float
    started: float

    def __post_init__(self) -> None:
        self.failures: list[tuple[str, BaseException]] = []
        self.given_up: set[Part] = set()
        self.late: str | None = None
        self.unwritten = False

    def run(self) -> None:
        running: dict[Future[float], tuple[Part, _Slot]] = {}
        free = list(self.slots)
        try:
            while True:
                busy = {part for part, _ in running.values()}
                for part in self._ready(busy):
                    if not free or self._too_late(part):
                        break
                    slot = free.pop(0)
                    running[slot.submit(self.job, part)] = (part, slot)
                    if slot.inline:
                        break
                if self.unwritten:  # the processes are busy again meanwhile
                    self.write()
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    part, slot = running.pop(future)
                    if self._finish(part, future):
                        free.append(slot)
        finally:
            for slot in self.slots:
                slot.close()

    def _finish(self, part: Part, future: "Future[float]") -> bool:
        """Whether the process can go on with another part."""
        name, error = part if isinstance(part, str) else part.name, future.exception()
        if error is None:
            self.unwritten = True
            self.report(f"{name}: {future.result():.0f} s")
            return True
        self.given_up.add(part)
        if isinstance(error, TimeoutError):
            self.late = self.late or name
            return True
        self.failures.append((name, error))
        self.report(f"{name} failed: {type(error).__name__}: {error}")
        return not isinstance(error, BrokenProcessPool)

    def _needed_stages(self) -> list[str]:
        twins = self.policies if set(self.arms) & set(LLAMA_ARMS) else (BASED,)
        return list(stages(self.job, twins))

    def _ready(self, busy: set[Part]) -> list[Part]:
        folder = self.job.folder
        there = {name for name in self._needed_stages() if result_path(folder, name).exists()}
        ready: list[Part] = [name for name in self._needed_stages() if name not in there]
        if {REWARD, HELD_OUT_REWARD} <= there:
            policies = [policy for policy in self.policies if policy == BASED or LLAMA in there]
            if policies:
                ready += planned_runs(self.job.settings, self.stored(), self.arms, policies)
        return [part for part in ready if part not in busy | self.given_up]

    def _too_late(self, part: Part) -> bool:
        """Whether a part would probably not be done by the deadline; then nothing else begins."""
        deadline = self.job.deadline
        if self.late is None and deadline is not None:
            alike = [row for row in self.stored() if isinstance(part, Run) and row["arm"] == part.arm]
            if time.time() + max((row["seconds"] for row in alike), default=0.0) > deadline:
                self.late = part if isinstance(part, str) else part.name
        return self.late is not None

    def stored(self) -> list[dict[str, Any]]:
        """The rows of all finished runs, also of other arms and policies than are asked for now."""
        paths = sorted(Path(self.job.folder, "runs").glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def write(self) -> dict[str, Any]:
        settings, rows = self.job.settings, marked_rows(self.job.settings, self.stored())
        found = comparisons(rows)
        paths = [result_path(self.job.folder, name) for name in (LLAMA, REWARD, HELD_OUT_REWARD)]
        missing = [name for name in self._needed_stages() if not result_path(self.job.folder, name).exists()]
        wanted = [row for row in rows if row["arm"] in self.arms and row["policy"] in self.policies]
        on_gpu = self.job.device != "cpu"
        results = {
            "device": versions()["device"] if on_gpu else f"cpu ({platform.machine()})",
            "num_devices": len({slot.gpu for slot in self.slots}),
            "num_workers": len(self.slots),
            "versions": versions(),
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": round(self.earlier_seconds + time.time() - self.started, 1),
            "complete": not missing and len(wanted) >= num_runs(settings, self.arms, self.policies),
            "settings": _described(settings, self.job.based, self.job.text, self.job.held_out_text),
            "similarity": meteor_name(),
            "stages": {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()},
            "rows": [{key: value for key, value in row.items() if key not in ("each", "history")} for row in rows],
            "comparisons": found,
            "verdicts": verdicts(found),
        }
        write_json(Path(self.job.folder, RESULTS_FILE), results)
        self.unwritten = False
        return results


def _described(
    settings: ExperimentSettings, based: str, text: Sequence[str | Path], held_out_text: Sequence[str | Path]
) -> dict[str, Any]:
    # as JSON has it: lists, no tuples
    names = {"text": [Path(path).name for path in text], "held_out_text": [Path(path).name for path in held_out_text]}
    return json.loads(json.dumps({**asdict(settings), "based": Path(based).name, **names}))


def _check_folder(
    folder: Path,
    settings: ExperimentSettings,
    based: str,
    text: Sequence[str | Path],
    held_out_text: Sequence[str | Path],
    device: torch.device,
) -> float:
    """-> seconds that earlier calls took. Settings are written down before the first part begins."""
    path, described = folder / "settings.json", _described(settings, based, text, held_out_text)
    described["device"] = device.type
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in described if found.get(key) != described[key] and key not in EXTENSIBLE)
        if different:
            raise ValueError(f"{folder} has results of other settings ({', '.join(different)}): choose another folder")
    write_json(path, described)
    return load_results(folder)["seconds"] if (folder / RESULTS_FILE).is_file() else 0.0


def _check_sizes(settings: ExperimentSettings, workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    for name, least in (("num_seeds", 1), ("steps", 1), ("prompts_per_step", 1), ("num_generations", 2), ("num_evaluations", 1)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least {least}")
    if settings.num_evaluations > settings.steps:
        raise ValueError(f"num_evaluations={settings.num_evaluations} exceeds steps={settings.steps}")


__all__ = ["RESULTS_FILE", "load_results", "run_experiment"]
