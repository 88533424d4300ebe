"""Training of many small models of one architecture at once: targets, learning rates and seeds side by side in one tensor.

The parameters of all models are the rows of one matrix, and their forward pass is one `vmap`. On a GPU a whole step (forward,
backward, Adam) is one CUDA graph, and so is the drawing of fresh random sets and their targets for the next steps. A model's
learning rate is constant until its validation error stands still, or the limit is reached, and then falls to zero linearly.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .sumformer_experiment_models import Architecture
from .sumformer_experiment_targets import random_sets, standardised

VALIDATION_SEED, TEST_SEED = 1_000_001, 2_000_003  # of no training
DRAWN_STEPS = 25  # sets and targets of so many steps are made at once, in far fewer launches
EVALUATED_POINTS = 1 << 18  # at a time, over all models of a cohort
BETAS, EPS = (0.9, 0.99), 1e-8
LARGEST_GRADIENT = 1.0
NEVER = 1 << 40


@dataclass(frozen=True)
class TrainingSettings:
    """How models are trained and evaluated. Sizes in points are divided by n to get numbers of sets."""

    max_steps: int = 5000
    """At the full learning rate; `cooldown_steps` follow."""
    min_steps: int = 2000
    cooldown_steps: int = 1250
    warmup_steps: int = 100
    check_steps: int = 250
    """Validation happens every so many steps."""
    plateau: float = 0.02
    """Training is on a plateau when the last quarter of it has lowered the validation error by less than this share."""
    points_per_step: int = 1024
    validation_points: int = 4096
    test_points: int = 16384

    def __post_init__(self) -> None:
        if self.max_steps % self.check_steps or self.cooldown_steps % self.check_steps or self.min_steps > self.max_steps:
            raise ValueError(
                f"max_steps={self.max_steps} and cooldown_steps={self.cooldown_steps} must be multiples of"
                f" check_steps={self.check_steps}, and min_steps={self.min_steps} at most max_steps"
            )


@dataclass(frozen=True)
class Run:
    """One model of a cohort."""

    target: str
    learning_rate: float
    seed: int


@dataclass
class TrainedRun:
    """What became of a run. Errors are of the standardised target: normalised by its variance or deviation."""

    run: Run
    num_parameters: int
    steps: int = 0
    plateau: bool = False
    """Whether the validation error stood still before the limit of steps."""
    validation: list[float] = field(default_factory=list)
    """Normalised mean squared error at each check; the last one is after the learning rate has fallen."""
    nmse: float = math.nan
    sup_error: float = math.nan
    equivariance_error: float = math.nan
    """Largest difference, in standard deviations, between the outputs for a permuted set and the permuted outputs."""
    nmse_by_length: dict[int, float] = field(default_factory=dict)
    """For sets of other sizes, relative to the target's variance there."""


def on_plateau(errors: Sequence[float], tolerance: float) -> bool:
    """Whether the last quarter of the errors has lowered their minimum by less than `tolerance`, as a share."""
    quarter = math.ceil(len(errors) / 4)
    if len(errors) <= quarter:
        return False
    before, recent = min(errors[:-quarter]), min(errors[-quarter:])
    return not recent <= (1 - tolerance) * before


class Cohort:
    """Models of one architecture in training.

    Raises `ValueError` for no runs.
    """

    def __init__(self, architecture: Architecture, runs: Sequence[Run], settings: TrainingSettings, device: torch.device):
        if not runs:
            raise ValueError("a cohort needs one or more runs")
        # those of a target stand side by side, since targets are computed one after the other
        self.runs = sorted(runs, key=lambda run: run.target)
        self.architecture, self.settings, self.device = architecture, settings, device
        models = [architecture.build(run.seed) for run in self.runs]
        parameters, self.buffers = stack_module_state(models)
        self.model = models[0].to("meta")
        self.buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}
        self.shapes = {name: parameter.shape[1:] for name, parameter in parameters.items()}
        stacked = torch.cat([parameter.detach().flatten(1) for parameter in parameters.values()], dim=1)
        self.parameters = stacked.to(device).requires_grad_()
        self.moments = [torch.zeros_like(stacked, device=device) for _ in BETAS]
        self.peak = torch.tensor([run.learning_rate for run in self.runs], device=device)
        self.end = torch.full((len(runs),), NEVER, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.generator = torch.Generator(device).manual_seed(min(run.seed for run in self.runs))
        self.drawn_steps = math.gcd(DRAWN_STEPS, settings.check_steps)
        n, d = architecture.size
        sets = max(1, settings.points_per_step // n)
        self.drawn_sets = torch.zeros(len(runs), self.drawn_steps, sets, n, d, device=device)
        self.drawn_targets = torch.zeros(self.drawn_sets.shape[:-1], device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.validation_sets = self._sets(settings.validation_points, VALIDATION_SEED)
        self.validation_targets = self._targets(self.validation_sets)
        self.validation_errors = torch.zeros(len(runs), device=device)
        self.trained = [TrainedRun(run, stacked.shape[1]) for run in self.runs]

    def _sets(self, num_points: int, seed: int, num_elements: int | None = None) -> torch.Tensor:
        """The same random sets for all models, [1, sets, n, d]."""
        n, d = num_elements or self.architecture.num_elements, self.architecture.num_coordinates
        return random_sets(max(1, num_points // n), n, d, seed).unsqueeze(0).to(self.device)

    def _targets(self, x: torch.Tensor) -> torch.Tensor:
        """x [models or 1, sets, n, d] -> each model's target [models, sets, n]."""
        parts = []
        names = [run.target for run in self.runs]
        for name in dict.fromkeys(names):
            first, count = names.index(name), names.count(name)
            own = x if x.shape[0] == 1 else x[first : first + count]
            parts.append(standardised(name, own, self.architecture.size).expand(count, -1, -1))
        return torch.cat(parts)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """x [models or 1, sets, n, d], sets of each model or the same for all, -> [models, sets, n]."""
        pieces = self.parameters.split([shape.numel() for shape in self.shapes.values()], dim=1)
        named = {
            name: piece.unflatten(1, shape) if shape else piece[:, 0]
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

        def forward(own: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], sets: torch.Tensor) -> torch.Tensor:
            return functional_call(self.model, (own, buffers), (sets,))

        shared = x.shape[0] == 1
        # the fused kernels of attention cannot be vmapped
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(forward, in_dims=(0, 0, None if shared else 0))(named, self.buffers, x[0] if shared else x)

    def draw(self) -> None:
        """Fresh sets and their targets for the next `drawn_steps` steps."""
        self.drawn_sets.uniform_(generator=self.generator)
        self.drawn_targets.copy_(self._targets(self.drawn_sets.flatten(1, 2)).view_as(self.drawn_targets))
        self.position.zero_()

    def train_step(self) -> None:
        """One step of all models, on sets that no step has seen."""
        x, targets = (drawn.index_select(1, self.position).squeeze(1) for drawn in (self.drawn_sets, self.drawn_targets))
        self.position += 1
        errors = (self.predict(x) - targets).square().mean((1, 2))
        (gradient,) = torch.autograd.grad(errors.sum(), self.parameters)
        with torch.no_grad():
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (LARGEST_GRADIENT / norm.clamp(min=LARGEST_GRADIENT))
            self.step += 1
            warm, cool = self.step / self.settings.warmup_steps, (self.end - self.step) / self.settings.cooldown_steps
            rate = self.peak * torch.minimum(warm, cool).clamp(0, 1)
            mean, square = self.moments
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square(), 1 - BETAS[1])
            # 1 - beta^step
            started, squares_started = (-torch.expm1(self.step * math.log(beta)) for beta in BETAS)
            update = mean / started / ((square / squares_started).sqrt() + EPS)
            # a model that has finished, or was lost, stays as it is and disturbs no other: rows are independent
            self.parameters -= rate.unsqueeze(1) * update

    @torch.no_grad()
    def validate(self) -> None:
        """Writes each model's normalised mean squared error to `validation_errors`."""
        errors = self.predict(self.validation_sets) - self.validation_targets
        self.validation_errors.copy_(errors.square().mean((1, 2)))

    def train(self, deadline: float | None = None) -> bool:
        """Trains to the end, or until the deadline (of `time.monotonic`): whether the end was reached."""
        draw, step, validate = self.captured()
        settings, active = self.settings, set(range(len(self.runs)))
        done = 0
        while active:
            for i in range(settings.check_steps):
                if i % self.drawn_steps == 0:
                    draw()
                step()
            done += settings.check_steps
            validate()
            errors, ends = self.validation_errors.tolist(), self.end.tolist()
            for i in sorted(active):
                trained = self.trained[i]
                trained.validation.append(errors[i])
                if ends[i] == NEVER and done >= settings.min_steps:
                    trained.plateau = on_plateau(trained.validation, settings.plateau)
                    if trained.plateau or done >= settings.max_steps or not math.isfinite(errors[i]):
                        ends[i] = done + settings.cooldown_steps
                if done >= ends[i]:
                    trained.steps = done
                    active.remove(i)
            self.end.copy_(torch.tensor(ends))
            if deadline is not None and time.monotonic() >= deadline:
                return not active
        return True

    def captured(self) -> tuple[Callable[[], None], ...]:
        """`draw`, `train_step` and `validate`, on a GPU as CUDA graphs; a warning says where that fails."""
        functions = (self.draw, self.train_step, self.validate)
        if self.device.type != "cuda":
            return functions
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        initial = self.parameters.detach().clone()
        with torch.cuda.stream(stream):
            for function in functions:
                function()
        torch.cuda.synchronize(self.device)
        with torch.no_grad():
            self.parameters.copy_(initial)
            for tensor in (*self.moments, self.step, self.position):
                tensor.zero_()
        self.generator.manual_seed(min(run.seed for run in self.runs))
        graphs: list[Callable[[], None]] = []
        try:
            for function in functions:
                graph = torch.cuda.CUDAGraph()
                graph.register_generator_state(self.generator)
                with torch.cuda.graph(graph):
                    function()
                graphs.append(graph.replay)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of {self.architecture.label}, which is slower: {error}", stacklevel=2)
            return functions
        return tuple(graphs)

    @torch.no_grad()
    def evaluate(self, lengths: Sequence[int] = ()) -> list[TrainedRun]:
        """Errors on the test sets, which are the same for all models of a size, and on sets of other lengths."""
        for trained, nmse, sup in zip(self.trained, *self._test_errors(self.architecture.num_elements), strict=True):
            trained.nmse, trained.sup_error = nmse, sup
        for trained, difference in zip(self.trained, self._equivariance_errors(), strict=True):
            trained.equivariance_error = difference
        largest = self.architecture.largest_input
        for length in lengths:
            if length != self.architecture.num_elements and (largest is None or length <= largest):
                for trained, nmse in zip(self.trained, self._test_errors(length)[0], strict=True):
                    trained.nmse_by_length[length] = nmse
        return self.trained

    def _chunks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        return iter(x.split(max(1, EVALUATED_POINTS // (len(self.runs) * x.shape[2])), dim=1))

    def _test_errors(self, length: int) -> tuple[list[float], list[float]]:
        """Normalised mean squared and largest error of each model."""
        sets = self._sets(self.settings.test_points, TEST_SEED, length)
        squares, largest, targets = [], [], []
        for x in self._chunks(sets):
            targets.append(self._targets(x))
            errors = self.predict(x) - targets[-1]
            squares.append(errors.square().sum((1, 2), dtype=torch.float64))
            largest.append(errors.abs().amax((1, 2)))
        variance = torch.cat(targets, dim=1).flatten(1).double().var(1)
        nmse = torch.stack(squares).sum(0) / sets[..., 0].numel() / variance
        # in deviations of the target at this length
        sup = torch.stack(largest).amax(0) / variance.sqrt()
        return nmse.tolist(), sup.tolist()

    def _equivariance_errors(self) -> list[float]:
        x = next(self._chunks(self._sets(self.settings.validation_points, TEST_SEED)))
        order = torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(0)).to(self.device)
        if x.shape[2] > 1:
            order = order.roll(int((order == torch.arange(x.shape[2], device=self.device)).all()))
        difference = self.predict(x[:, :, order]) - self.predict(x)[:, :, order]
        return difference.abs().amax((1, 2)).tolist()


__all__ = ["Cohort", "Run", "TrainedRun", "TrainingSettings", "on_plateau"]
