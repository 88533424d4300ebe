"""What the geolocalization trainings share: arguments about data, the hold-out and resuming, and what a run leaves behind."""

import csv
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, IterableDataset, SequentialSampler
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from geobased.modeling_streetclip.image_processing_gpu import GpuImagePreprocessor
from geobased.training.artifacts import versions
from geobased.training.geolocation_dataset import REPORT_FILE, GeolocationRows, SkippedImages, Split, StreamedRows
from geobased.training.geolocation_sources import GeolocationSource, RecordStream
from geobased.training.geolocation_splits import BlockHoldout
from geobased.training.run_control import RunClock
from geobased.whole_file import whole_file

SHUFFLE_BUFFER = 1000
LOG_FILE, CURVE_FILE, PLOT_FILE = "training_log.json", "learning_curve.csv", "learning_curve.png"
_PANELS = ("loss", "accuracy, %", "kilometres", "GeoScore")


@dataclass
class GeolocationArguments(TrainingArguments):
    """transformers' TrainingArguments with other defaults, the data, and what is held out."""

    data: list[str] = field(
        default_factory=list, metadata={"help": "csv files, tar shards, or folders (also of `datasets`) to train on"}
    )
    block_degrees: float = field(default=4.0, metadata={"help": "height of the blocks of the Earth that are held out"})
    holdout_fraction: float = field(default=0.1, metadata={"help": "share of blocks held out; 0 trains on everything"})
    holdout_seed: int = field(default=0, metadata={"help": "which blocks are held out"})
    holdout_margin_km: float = field(default=0.0, metadata={"help": "images nearer to a held-out block are left out"})
    save_dtype: str = field(default="float32", metadata={"help": "dtype of the final weights: bfloat16 or float32"})
    max_seconds: float | None = field(default=None, metadata={"help": "stop, and save, after so many seconds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})

    output_dir: str | None = field(default=None, metadata={"help": "folder for checkpoints, log and final model"})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "images per device and step"})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "images per device in evaluation"})
    eval_strategy: str = field(default="steps", metadata={"help": "no or steps; a run is one long epoch to the Trainer"})
    eval_steps: float | None = field(default=0.1, metadata={"help": "steps between evaluations, or a share of the run"})
    save_steps: float = field(default=0.1, metadata={"help": "steps between checkpoints, or a share of the run"})
    logging_steps: float = field(default=10, metadata={"help": "steps between log entries"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay off: batches come ready"})

    def holdout(self) -> BlockHoldout:
        return BlockHoldout(self.block_degrees, self.holdout_fraction, self.holdout_seed, self.holdout_margin_km)

    @property
    def images_per_step(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


class OrderedTrainer(Trainer):
    """Trainer that reads rows in the order of their numbers: the data set itself shuffles, the same way after a resumption."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return None if isinstance(dataset, IterableDataset) else SequentialSampler(dataset)  # type: ignore[arg-type]


class CurveClock(RunClock):
    """Keeps the learning curve on disk up to date as well."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            write_curve(state.log_history, Path(args.output_dir, CURVE_FILE))  # type: ignore[arg-type]


def skipped_images(arguments: GeolocationArguments) -> SkippedImages:
    """The report of unreadable images in the output folder: a resumed run goes on with it, a new one begins it."""
    path = Path(arguments.output_dir, REPORT_FILE)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.resume and arguments.process_index == 0:
        path.unlink(missing_ok=True)
    return SkippedImages(path)


def training_data(
    arguments: GeolocationArguments,
    preprocess: GpuImagePreprocessor | None,
    skipped: SkippedImages,
    *,
    source: GeolocationSource | None,
    split: Split | None,
    stream: RecordStream | None,
) -> tuple[GeolocationRows | StreamedRows, GeolocationRows | StreamedRows | None]:
    """Data sets to train and evaluate on, of a source that is split or of a stream; `preprocess` None: rows without pixels.

    The evaluation's is None where nothing is held out, and `arguments.eval_strategy` becomes "no". `arguments.max_steps`
    becomes the number of steps.

    Raises:
        ValueError: as `check_steps`.
    """
    arguments.max_steps = check_steps(arguments, None if split is None else len(split.training))
    training: GeolocationRows | StreamedRows
    evaluation: GeolocationRows | StreamedRows | None = None
    if source is not None and split is not None:
        size = arguments.max_steps * arguments.images_per_step
        training = GeolocationRows(source, split.training, preprocess, size=size, seed=arguments.seed, skipped=skipped)
        if len(split.evaluation):
            evaluation = GeolocationRows(source, split.evaluation, preprocess, skipped=skipped)
    else:
        assert stream is not None and preprocess is not None
        holdout = arguments.holdout()
        order: dict[str, Any] = {"shuffle_buffer": SHUFFLE_BUFFER, "seed": arguments.seed, "epochs": None}
        training = StreamedRows(stream, preprocess, holdout, held_out=False, skipped=skipped, **order)
        if arguments.holdout_fraction:
            evaluation = StreamedRows(stream, preprocess, holdout, held_out=True, skipped=skipped)
    if evaluation is None:
        arguments.eval_strategy = "no"
    return training, evaluation


def training_log(
    arguments: GeolocationArguments,
    model: nn.Module,
    state: TrainerState,
    clock: RunClock,
    split: Split | None,
    skipped: SkippedImages,
    **own: Any,
) -> dict[str, Any]:
    """Content of `training_log.json`; `own` is what one kind of training adds."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state.global_step,
        "images_per_step": arguments.images_per_step,
        "stopped_early": clock.stopped_early,
        "seconds": round(clock.seconds, 3),
        "seed": arguments.seed,
        "split": None if split is None else split.facts,
        "skipped_images": skipped.all(),
        **own,
        "losses": [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
        "history": state.log_history,
        "arguments": arguments.to_dict(),
        "versions": versions(),
    }


def write_curve(history: list[dict[str, Any]], path: str | Path) -> None:
    """Learning curve as csv: a row per step, a column per measured number, written whole or not at all."""
    path = Path(path)
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        rows.setdefault(entry["step"], {}).update(entry)
    # an epoch of the Trainer is the whole run, and times belong to the log
    left_out = ("step", "epoch", "runtime", "_per_second", "total_flos", "train_loss")
    names = sorted({name for row in rows.values() for name in row if not name.endswith(left_out)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["step", *names], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))


def plot_curve(history: list[dict[str, Any]], path: str | Path) -> bool:
    """Learning curves as png, a panel per unit; False, with a warning, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("no learning curve: matplotlib is not installed (pip install geobased[train])", stacklevel=2)
        return False
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in history:
        for key, value in entry.items():
            if (panel := _panel(key)) is not None:
                curve = panels.setdefault(panel, {}).setdefault(_label(key), [])
                curve.append((entry["step"], value))
    shown = [panel for panel in _PANELS if panel in panels]
    figure = Figure(figsize=(7, 3.2 * max(len(shown), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, number + 1)
        for name, points in panels[panel].items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="" if name == "training" else ".")
        axes.set(xlabel="step", ylabel=panel)
        if panel == "kilometres":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return True


def _panel(key: str) -> str | None:
    if key == "loss" or (key.startswith("eval_") and key.endswith("loss")):
        return "loss"
    if not key.startswith("eval_"):
        return None
    if key.endswith("geoscore"):
        return "GeoScore"
    if key.endswith("_km") and "within" not in key:
        return "kilometres"
    return "accuracy, %" if "within" in key or "accuracy" in key else None


def _label(key: str) -> str:
    return "training" if key == "loss" else key.removeprefix("eval_").replace("_", " ").replace("loss", "held out").strip()


def check_steps(arguments: GeolocationArguments, images: int | None) -> int:
    """Optimizer steps of the run: `max_steps`, or `num_train_epochs` times the number of images.

    Raises:
        ValueError: neither is known (a stream without max_steps), or values that are not positive.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    if images is None:
        raise ValueError("a stream has no known length: give --max_steps")
    steps = int(arguments.num_train_epochs * images / arguments.images_per_step)
    if arguments.num_train_epochs <= 0 or images < 1:
        raise ValueError(f"num_train_epochs={arguments.num_train_epochs} must be positive, or give --max_steps")
    return max(steps, 1)


__all__ = [
    "CURVE_FILE",
    "LOG_FILE",
    "PLOT_FILE",
    "CurveClock",
    "GeolocationArguments",
    "OrderedTrainer",
    "check_steps",
    "plot_curve",
    "skipped_images",
    "training_data",
    "training_log",
    "write_curve",
]
