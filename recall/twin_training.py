"""A lean training loop for small language models: data on the device, and the whole step as one CUDA graph.

Small models leave a GPU idle while Python launches their kernels. Here a step (rows, forward, backward, clipping, AdamW, learning
rate) is captured once per row length and replayed; the host does nothing in between. On a CPU, or where `captured` is off, the
same step runs op by op, with the same results.

Weights are kept twice: float32 for the optimizer, and in the dtype of the computation (bfloat16 on a GPU) for the model, all of
them as views of few flat buffers, so that clipping, rounding and AdamW are one kernel each.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from geobased.kernels.cross_entropy import cross_entropy

# offsets in the flat buffers: 128 bytes of bfloat16, what the kernels of matrix products like
ALIGNMENT = 64
# steps between two looks at the clock: a GPU waits for a moment then
CHECKED_STEPS = 25
# steps that run op by op before the capture: Triton compiles, cuBLAS takes its workspace, AdamW makes its state
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Rows:
    """Training rows of one length.

    tokens: (num_rows, length) int32; answers: the same shape, bool, tokens of an answer; the first `num_documents` rows hold
    documents, the others plain text.
    """

    tokens: torch.Tensor
    answers: torch.Tensor
    num_documents: int

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.tokens.to(device), self.answers.to(device), self.num_documents)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule: linear warm-up, a constant rate, and a linear decay to zero; fractions of all steps."""

    learning_rate: float
    warmup: float = 0.05
    decay: float = 0.4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    answer_weight: float = 4.0


@dataclass(frozen=True)
class TrainingRun:
    """losses: (steps,) of every step, in nats per token with answers weighted.

    seconds, tokens_per_second: without warm-up steps and captures; the speed is None where no step is left. wall_seconds: with
    them.
    """

    losses: list[float]
    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float | None
    wall_seconds: float
    captured: bool
    peak_memory_bytes: int | None


def row_order(rows: Rows, steps: int, batch_size: int, text_share: float, seed: int) -> torch.Tensor:
    """Indices of rows (steps, batch_size): documents and text each in their own order, every row once before any comes again."""
    generator = np.random.default_rng(seed)
    count, num_text = steps * batch_size, len(rows.tokens) - rows.num_documents
    is_text = generator.random(count) < (text_share if num_text else 0.0)
    order = np.empty(count, np.int64)
    for chosen, first, size in ((~is_text, 0, rows.num_documents), (is_text, rows.num_documents, num_text)):
        needed = int(chosen.sum())
        if needed:
            epochs = [generator.permutation(size) for _ in range(-(-needed // size))]
            order[chosen] = first + np.concatenate(epochs)[:needed]
    return torch.from_numpy(order.reshape(steps, batch_size))


def learning_rates(settings: OptimizerSettings, steps: int) -> torch.Tensor:
    """The schedule, float32 (steps,)."""
    step = torch.arange(steps, dtype=torch.float64)
    warmup, decay = max(settings.warmup * steps, 1.0), max(settings.decay * steps, 1.0)
    share = torch.minimum((step + 1) / warmup, (steps - step) / decay).clamp(max=1.0)
    return (settings.learning_rate * share).float()


class _FlatWeights:
    """A model's parameters as views of flat buffers: `master` float32 with its gradient, `working` in the model's dtype."""

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        offsets, total = [], 0
        for parameter in parameters:
            offsets.append(total)
            total += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        device = parameters[0].device
        self.parameters = list(parameters)
        self.master = nn.Parameter(torch.zeros(total, device=device))
        self.master.grad = torch.zeros_like(self.master)
        self.working = torch.zeros(total, dtype=dtype, device=device)
        self.gradients = []
        with torch.no_grad():
            for parameter, offset in zip(parameters, offsets, strict=True):
                where = slice(offset, offset + parameter.numel())
                self.master[where] = parameter.flatten()
                self.gradients.append(self.master.grad[where].view_as(parameter))
                parameter.data = self.working[where].view(parameter.shape)
            self.round()

    def round(self) -> None:
        """The optimizer's weights become the model's."""
        self.working.copy_(self.master.detach())


def _decayed(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay (matrices that belong to no embedding) and without."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    return decayed, plain


class Trainer:
    """Trains a causal language model whose forward synchronises with nothing.

    Args:
        model: in float32, on the device to train on. Afterwards its weights are in `dtype`.
        phases: (rows, order (steps, batch_size)), one after the other. Rows are on the model's device.
        pad_token_id: its tokens are neither predicted nor counted; no document holds it.
        dtype: of the computation; the optimizer keeps float32 weights.
        captured: whether steps are CUDA graphs; ignored on other devices.

    Example:
        >>> run = Trainer(model, [(rows, row_order(rows, 100, 32, 0.0, seed=0))], OptimizerSettings(2e-3), pad_token_id=1).run()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        phases: Sequence[tuple[Rows, torch.Tensor]],
        settings: OptimizerSettings,
        *,
        pad_token_id: int,
        dtype: torch.dtype = torch.float32,
        captured: bool = True,
    ) -> None:
        self.model, self.settings, self.pad_token_id = model, settings, pad_token_id
        self.device = next(model.parameters()).device
        self.captured = captured and self.device.type == "cuda"
        self.phases = [(rows, order.to(self.device)) for rows, order in phases]
        self.weights = [_FlatWeights(group, dtype) for group in _decayed(model)]
        if dtype != torch.float32:
            model.config.dtype = dtype
        steps = sum(len(order) for _, order in phases)
        self.schedule = learning_rates(settings, steps).to(self.device)
        self.losses = torch.zeros(steps, device=self.device)
        self.step = torch.zeros(1, dtype=torch.long, device=self.device)  # of all phases together
        self.rate = self.schedule[0].clone()
        self.deadline: float | None = None
        self.tokens_left = 0
        decays = (settings.weight_decay, 0.0)
        self.optimizer = torch.optim.AdamW(
            [{"params": [w.master], "weight_decay": decay} for w, decay in zip(self.weights, decays, strict=True)],
            lr=self.rate,
            betas=(settings.beta1, settings.beta2),
            fused=True,
            capturable=self.device.type == "cuda",
        )

    def run(self, deadline: float | None = None) -> TrainingRun:
        """Train from the first step to the last.

        Args:
            deadline: of `time.perf_counter`. A training that would not be done by then, as fast as it is, stops.

        Raises:
            TimeoutError: the training would not be done by the deadline.
            FloatingPointError: a loss is not finite.
        """
        started, self.deadline = time.perf_counter(), deadline
        self.tokens_left = sum(order.numel() * rows.tokens.shape[1] for rows, order in self.phases)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        was_training, first_step, tokens, timed_tokens, seconds = self.model.training, 0, 0, 0, 0.0
        self.model.train()
        try:
            for rows, order in self.phases:
                per_step, took = order.shape[1] * rows.tokens.shape[1], self._run_phase(rows, order, first_step)
                first_step, tokens = first_step + len(order), tokens + len(order) * per_step
                if took is not None:
                    timed_tokens, seconds = timed_tokens + took[0] * per_step, seconds + took[1]
        finally:
            self.model.train(was_training)
        losses = self.losses.tolist()
        if not np.isfinite(losses).all():
            step = int(np.argmin(np.isfinite(losses)))
            raise FloatingPointError(f"the training loss is {losses[step]} at step {step}: choose a smaller learning rate")
        return TrainingRun(
            losses=losses,
            tokens=tokens,
            steps=first_step,
            seconds=seconds,
            tokens_per_second=timed_tokens / seconds if seconds else None,
            wall_seconds=time.perf_counter() - started,
            captured=self.captured,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        )

    def release(self) -> None:
        """Frees the memory of the optimizer, whoever may still refer to it: captured steps leave references."""
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        for tensor in (*states, *(t for weights in self.weights for t in (weights.master, weights.master.grad))):
            tensor.untyped_storage().resize_(0)

    def _run_phase(self, rows: Rows, order: torch.Tensor, first_step: int) -> tuple[int, float] | None:
        """-> steps that were timed, and their seconds."""

        def step() -> None:
            self._step(rows, order, first_step)

        eager = min(WARMUP_STEPS if self.captured else 1, len(order))
        replay, graph = step, None
        if self.captured:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(eager):
                    step()
            torch.cuda.current_stream(self.device).wait_stream(side)
            if len(order) > eager:
                graph = self._capture(step)
                replay = step if graph is None else graph.replay
        else:
            for _ in range(eager):
                step()
        self._synchronize()
        start = time.perf_counter()
        per_step = order.shape[1] * rows.tokens.shape[1]
        self.tokens_left -= eager * per_step
        for done in range(1, len(order) - eager + 1):
            replay()
            self.tokens_left -= per_step
            if self.deadline is not None and done % CHECKED_STEPS == 0:
                self._check_deadline(start, done * per_step)
        self._synchronize()
        seconds = time.perf_counter() - start
        if graph is not None:
            del replay, graph  # its memory is of no use for rows of another length
            torch.cuda.empty_cache()
        return (len(order) - eager, seconds) if len(order) > eager else None

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            warnings.warn(f"the training step could not be captured and runs op by op, more slowly: {error}", stacklevel=2)
            self.captured = False
            torch.cuda.synchronize(self.device)
            return None
        return graph

    def _check_deadline(self, start: float, tokens: int) -> None:
        """tokens: trained on since `start`."""
        assert self.deadline is not None
        self._synchronize()
        now = time.perf_counter()
        late = now + self.tokens_left * (now - start) / tokens - self.deadline
        if late > 0:
            raise TimeoutError(f"the training would be done {late:.0f} s after its deadline")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _step(self, rows: Rows, order: torch.Tensor, first_step: int) -> None:
        chosen = order.index_select(0, self.step - first_step).flatten()
        ids, answers = rows.tokens.index_select(0, chosen).long(), rows.answers.index_select(0, chosen)
        loss = weighted_loss(self.model, ids, answers, self.pad_token_id, self.settings.answer_weight)
        gradients = torch.autograd.grad(loss, [p for weights in self.weights for p in weights.parameters])
        with torch.no_grad():
            torch._foreach_copy_([g for weights in self.weights for g in weights.gradients], list(gradients))
            flat = [weights.master.grad for weights in self.weights]
            norm = torch.stack([torch.linalg.vector_norm(g) for g in flat]).norm()
            scale = (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in flat:
                gradient.mul_(scale)  # type: ignore[union-attr]
            self.rate.copy_(self.schedule.index_select(0, self.step)[0])
            self.optimizer.step()
            for weights in self.weights:
                weights.round()
            self.losses.index_copy_(0, self.step, loss.detach().view(1))
            self.step.add_(1)


def token_losses(model: PreTrainedModel, ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Loss of each token of ids (batch, length) given those before it, float32, (batch, length - 1); 0 on padding."""
    labels = F.pad(ids[:, 1:].masked_fill(ids[:, 1:] == pad_token_id, -100), (0, 1), value=-100)
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten()).view(ids.shape)[:, :-1]


def weighted_loss(
    model: PreTrainedModel, ids: torch.Tensor, answers: torch.Tensor, pad_token_id: int, answer_weight: float
) -> torch.Tensor:
    """Mean loss over the tokens that are no padding; those of `answers` (bool, like ids) count `answer_weight` times."""
    losses = token_losses(model, ids, pad_token_id)
    weights = (1.0 + (answer_weight - 1.0) * answers[:, 1:]) * (ids[:, 1:] != pad_token_id)
    return (losses * weights).sum() / weights.sum()


@torch.inference_mode()
def validation_losses(model: PreTrainedModel, rows: Rows, pad_token_id: int, max_tokens: int = 65_536) -> dict[str, float]:
    """Mean losses of rows in nats per token: of all tokens that are no padding, and of the answers' alone."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, 2, dtype=torch.float64)
    size = max(1, max_tokens // rows.tokens.shape[1])
    try:
        for first in range(0, len(rows.tokens), size):
            ids = rows.tokens[first : first + size].to(model.device).long()
            answers = rows.answers[first : first + size].to(model.device)[:, 1:]
            losses, real = token_losses(model, ids, pad_token_id), ids[:, 1:] != pad_token_id
            for i, counted in enumerate((real, real & answers)):
                sums[i] += torch.stack([losses[counted].double().sum(), counted.sum().double()]).cpu()
    finally:
        model.train(was_training)
    return {name: (sums[i, 0] / sums[i, 1]).item() for i, name in enumerate(("documents", "answers"))}


__all__ = [
    "OptimizerSettings",
    "Rows",
    "Trainer",
    "TrainingRun",
    "learning_rates",
    "row_order",
    "token_losses",
    "validation_losses",
    "weighted_loss",
]
