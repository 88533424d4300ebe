"""What all training runs share: where they go on from, and when they stop."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from geobased.training.artifacts import DTYPES

FINAL_FOLDER = "final"


class RunClock(TrainerCallback):
    """Measures the training time and ends the run when its time is over."""

    def __init__(self, max_seconds: float | None) -> None:
        self.max_seconds = max_seconds
        self.started = self.seconds = 0.0
        self.stopped_early = False

    def elapsed(self) -> float:
        """Seconds since the beginning, the device's work included."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - self.started

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        late = self.max_seconds is not None and time.perf_counter() - self.started > self.max_seconds
        if late and state.global_step < state.max_steps:
            self.stopped_early = control.should_training_stop = control.should_save = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds = self.elapsed()


def check_run_arguments(arguments: Any, required: Sequence[str]) -> None:
    """Checks what every training needs: the `required` arguments, and a `save_dtype` that weights can be saved in.

    Raises:
        ValueError: a required argument without a value, or another `save_dtype`.
    """
    for name in required:
        if not getattr(arguments, name):
            raise ValueError(f"--{name} is required")
    if arguments.save_dtype not in DTYPES:
        raise ValueError(f"save_dtype must be one of {', '.join(DTYPES)}, not {arguments.save_dtype!r}")


def checkpoint_to_resume(output_dir: str | Path, resume: bool) -> str | None:
    """Checkpoint to go on from, after checking that the output folder fits `resume`.

    Raises:
        FileNotFoundError: `resume` without a checkpoint.
        FileExistsError: an earlier run without `resume`.
    """
    folder = Path(output_dir)
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume:
        if checkpoint is None:
            raise FileNotFoundError(f"nothing to resume: {folder} holds no checkpoint")
        return checkpoint
    if checkpoint is not None or (folder / FINAL_FOLDER).exists():
        raise FileExistsError(f"{folder} holds an earlier run: choose another folder, or pass --resume to go on with it")
    return None
