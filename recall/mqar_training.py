"""Training of the small models of multi-query associative recall, several at a time on one GPU.

A whole step (draw the batch, forward, backward, learning rate, AdamW) is one CUDA graph, so that the interpreter has nothing to
do between steps; the runs of a cohort (learning rates, seeds) replay theirs on streams of their own, side by side. On a CPU the
same step runs without a graph. As in zoology, the segments of the curriculum are served in order and examples are not shuffled.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geobased.whole_file import whole_file

from .modeling_mqar import MQARConfig, MQARForCausalLM
from .mqar import Examples

PRECISIONS = ("bf16", "tf32", "fp32")
EVALUATION_TOKENS = 1 << 16
STEPS_PER_LOOK = 32  # how often the clock is looked at


@dataclass(frozen=True)
class TrainingSettings:
    """How one model is trained.

    The learning rate falls from its highest value to zero along a cosine. `precision` is that of matrix products and mixers;
    weights, residual and norms are float32. A CPU always computes in float32. Training stops once the validation accuracy reaches
    `stop_accuracy`.
    """

    learning_rate: float
    epochs: int = 32
    batch_size: int = 256
    weight_decay: float = 0.1
    seed: int = 0
    stop_accuracy: float = 0.99
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise ValueError(f"epochs, batch_size and learning_rate must be positive: {self}")


@dataclass
class TrainedModel:
    """A model and what its training was like. `validation_accuracy` holds one value per epoch; `seconds` those of its cohort."""

    model: MQARForCausalLM
    settings: TrainingSettings
    validation_accuracy: list[float] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether the loss became infinite or no number."""
        return not all(map(math.isfinite, self.training_loss))


def on_device(examples: Examples, device: torch.device) -> Examples:
    """Compact copies: token ids and positions in 16 bits where they fit."""
    small = int(max(examples.inputs.max(), examples.targets.max())) < 2**15 and examples.inputs.shape[1] < 2**15
    dtype = torch.int16 if small else torch.int32
    parts = (examples.inputs, examples.query_positions, examples.targets)
    return Examples(*(part.to(dtype).to(device) for part in parts))


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda" and precision == "bf16")


@torch.no_grad()
def query_accuracy(model: MQARForCausalLM, examples: Examples, precision: str = "fp32") -> float:
    """Share of an example's queries answered right, averaged over the examples. Logits are float32, which leaves no ties."""
    device = model.device
    rows = max(1, EVALUATION_TOKENS // examples.inputs.shape[1])
    was_training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, len(examples.inputs), rows):
        batch = examples[first : first + rows].to(device)
        with _autocast(device, precision):
            hidden_states = model.hidden_states(batch.inputs.long(), batch.query_positions.long())
        predicted = model.lm_head(hidden_states.float()).argmax(-1)
        right += (predicted == batch.targets).double().mean(1).sum()
    model.train(was_training)
    return right.item() / len(examples.inputs)


class _Run:
    """One model in training: its step on each segment, as a CUDA graph where there is one."""

    def __init__(self, config: MQARConfig, settings: TrainingSettings, train: Sequence[Examples], device: torch.device):
        self.settings, self.train, self.device = settings, train, device
        torch.manual_seed(settings.seed)
        self.model = MQARForCausalLM(config).train()
        self.model.to(device)
        self.model.dropout_generator = torch.Generator(device).manual_seed(settings.seed)
        self.trained = TrainedModel(self.model, settings)
        self.steps_per_segment = [len(examples.inputs) // settings.batch_size for examples in train]
        self.total_steps = settings.epochs * sum(self.steps_per_segment)
        if not all(self.steps_per_segment):
            smallest = min(len(examples.inputs) for examples in train)
            raise ValueError(f"batch_size={settings.batch_size} is more than the {smallest} examples of a segment")
        self.peak = torch.tensor(settings.learning_rate, device=device)
        self.learning_rate = torch.zeros((), device=device)
        self.step, self.row = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.batch_rows = torch.arange(settings.batch_size, device=device)
        self.loss = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.learning_rate if cuda else settings.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=settings.weight_decay,
            fused=cuda,
            capturable=cuda,
        )
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.graphs = self._capture() if cuda else []

    def _train_step(self, segment: int) -> None:
        batch = self.train[segment][self.row + self.batch_rows]
        inputs, positions, targets = batch.inputs.long(), batch.query_positions.long(), batch.targets.long()
        with _autocast(self.device, self.settings.precision):
            loss = self.model(inputs, labels=targets, query_positions=positions).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.learning_rate.copy_(self.peak * 0.5 * (1 + torch.cos(math.pi * self.step / self.total_steps)))
        if self.device.type != "cuda":
            self.optimizer.param_groups[0]["lr"] = self.learning_rate.item()
        self.optimizer.step()
        self.step += 1
        self.row += self.settings.batch_size
        self.loss += loss.detach()

    def _capture(self) -> list[torch.cuda.CUDAGraph]:
        """One graph per segment, over memory that they share, since they run one after the other."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            # compiles kernels and creates the optimizer's state; at a learning rate of zero the weights stay what they are
            self.peak.zero_()
            for segment in range(len(self.train)):
                self.row.zero_()
                for _ in range(2):
                    self._train_step(segment)
            self.peak.fill_(self.settings.learning_rate)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self.optimizer.zero_grad(set_to_none=True)
            self.step.zero_()
            self.loss.zero_()
            self.model.dropout_generator.manual_seed(self.settings.seed)
        torch.cuda.synchronize()
        pool, graphs = torch.cuda.graph_pool_handle(), []
        for segment in range(len(self.train)):
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.model.dropout_generator)
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                self._train_step(segment)
            graphs.append(graph)
        return graphs

    def start_segment(self) -> None:
        if self.stream is None:
            self.row.zero_()
        else:
            with torch.cuda.stream(self.stream):
                self.row.zero_()

    def advance(self, segment: int) -> None:
        if self.stream is None:
            self._train_step(segment)
        else:
            with torch.cuda.stream(self.stream):
                self.graphs[segment].replay()

    def state(self) -> dict[str, Any]:
        """A copy of everything that the rest of the training depends on."""
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "step": self.step,
            "generator": self.model.dropout_generator.get_state(),
            "validation_accuracy": self.trained.validation_accuracy,
            "training_loss": self.trained.training_loss,
            "seconds": self.trained.seconds,
        }
        return copy.deepcopy(state)

    def load(self, path: Path) -> None:
        """Goes on from a saved `state`, unless it is of other settings.

        Raises:
            ValueError: it is of other settings.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(f"{path} is of other settings: remove it")
        self.model.load_state_dict(state["model"])
        for index, parameter in enumerate(self.model.parameters()):
            current = self.optimizer.state[parameter]
            for name, value in state["optimizer"].get(index, {}).items():
                # graphs know the tensors that there are
                if name in current:
                    current[name].copy_(value)
                else:
                    current[name] = value
        self.step.copy_(state["step"])
        self.model.dropout_generator.set_state(state["generator"].cpu())
        for name in ("validation_accuracy", "training_loss", "seconds"):
            setattr(self.trained, name, state[name])

    def end_epoch(self, validation: Sequence[Examples]) -> bool:
        """Evaluates; whether the training is over."""
        trained = self.trained
        trained.training_loss.append(self.loss.item() / sum(self.steps_per_segment))
        self.loss.zero_()
        accuracies = [query_accuracy(self.model, examples, self.settings.precision) for examples in validation]
        trained.validation_accuracy.append(sum(accuracies) / len(accuracies))
        done = len(trained.validation_accuracy) == self.settings.epochs
        return done or trained.validation_accuracy[-1] >= self.settings.stop_accuracy or trained.diverged


def _train_epoch(active: Sequence[_Run], device: torch.device, deadline: float | None) -> bool:
    """One epoch of each run, side by side; whether it ended before the deadline."""
    for segment, steps in enumerate(active[0].steps_per_segment):
        for run in active:
            run.start_segment()
        for step in range(steps):
            if step % STEPS_PER_LOOK == 0 and deadline is not None:
                # launches run far ahead of the GPU, and would go on after the deadline
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if time.monotonic() >= deadline:
                    return False
            for run in active:
                run.advance(segment)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return True


def train_cohort(
    runs: Sequence[tuple[MQARConfig, TrainingSettings]],
    train: Sequence[Examples],
    validation: Sequence[Examples],
    *,
    device: torch.device,
    deadline: float | None = None,
    checkpoints: Sequence[Path] | None = None,
) -> list[TrainedModel | None]:
    """Trains several models on the same examples, side by side.

    Args:
        runs: configuration and settings of each; their batch sizes must agree.
        train: segments of the curriculum, read in this order in every epoch; examples beyond the last full batch are left out.
        validation: segments whose mean accuracy ends a training early.
        deadline: time (of `time.monotonic`) at which all stops; models that are not done by then are `None`.
        checkpoints: one file a run, which is read if it exists, written at the deadline with what the last whole epoch left, and
            removed at the end of the training.

    Raises:
        ValueError: no runs, different batch sizes, or a batch larger than a segment.
    """
    if len({settings.batch_size for _, settings in runs}) != 1:
        raise ValueError("a cohort needs one or more runs of one batch size")
    started = time.monotonic()
    train = [on_device(examples, device) for examples in train]
    validation = [on_device(examples, device) for examples in validation]
    cohort = [_Run(config, settings, train, device) for config, settings in runs]
    paths = dict(zip(map(id, cohort), checkpoints, strict=True)) if checkpoints is not None else {}
    for run in cohort:
        if id(run) in paths and paths[id(run)].exists():
            run.load(paths[id(run)])
    earlier = {id(run): run.trained.seconds for run in cohort}
    active = list(cohort)
    finished: set[int] = set()
    # as they were at the end of the last whole epoch
    states = {id(run): run.state() for run in cohort if id(run) in paths}
    while active and _train_epoch(active, device, deadline):
        ended = []
        for run in active:
            done = run.end_epoch(validation)
            run.trained.seconds = earlier[id(run)] + time.monotonic() - started
            if done:
                ended.append(run)
                run.graphs.clear()  # their memory serves the others' evaluation
                states.pop(id(run), None)
                if id(run) in paths:
                    paths[id(run)].unlink(missing_ok=True)
            elif id(run) in paths:
                states[id(run)] = run.state()
        finished.update(map(id, ended))
        active = [run for run in active if id(run) not in finished]
    for key, state in states.items():
        with whole_file(paths[key]) as file:
            torch.save(state, file)
    for run in cohort:
        nn.Module.zero_grad(run.model, set_to_none=True)
    return [run.trained if id(run) in finished else None for run in cohort]


__all__ = ["PRECISIONS", "TrainedModel", "TrainingSettings", "on_device", "query_accuracy", "train_cohort"]
