"""Attacks on images that follow gradients: PGD and APGD within a ball of L-infinity, and PGD on the embeddings of patches.

Balls are in the units of pixels between 0 and 1, before the model's normalisation; settings give them in levels of 255, so that
an image of 8 bits stays one. Where the objective leads decides whether an attack is untargeted (`displace`, `lead_away`) or
targeted (`lead_to`).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .access import AuditError, Capability
from .held_target import Intervention
from .image_tries import L_INF_UNIT, LEVELS, ImageTries
from .questions import AuditQuestion, Item
from .technique import Progress, Technique, smallest_perturbation

# a loss of each image [n] that is to be lowered, from images [n, 3, height, width] that may require gradients
Loss = Callable[[torch.Tensor], torch.Tensor]
# Croce and Hein 2020, section 3
APGD_FIRST, APGD_LEAST, APGD_SHRINK, APGD_RHO, APGD_MOMENTUM = 0.22, 0.06, 0.03, 0.75, 0.75


def in_ball(images: torch.Tensor, around: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The nearest images that lie within `epsilon` of others, and between 0 and 1."""
    return torch.minimum(torch.maximum(images, around - epsilon), around + epsilon).clamp(0, 1)


def check_images(images: torch.Tensor) -> None:
    """Raises `ValueError` for images that are normalised already, and for those of whole levels."""
    if not images.is_floating_point() or float(images.min()) < 0 or float(images.max()) > 1:
        raise ValueError("images must be floats between 0 and 1: RGB before the model's normalisation")


def random_start(images: torch.Tensor, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """Images drawn evenly from the ball."""
    return in_ball(images + epsilon * (2 * torch.rand(images.shape, generator=generator) - 1), images, epsilon)


def pgd_steps(
    loss: Loss, images: torch.Tensor, epsilon: float, step_size: float, *, start: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Projected gradient descent (Madry et al. 2018) of `loss` without end: steps of sign gradients. FGSM is the first of size
    `epsilon`.

    Args:
        images: [n, 3, height, width] between 0 and 1.
        epsilon, step_size: in units of those.
        start: by default the images themselves.

    Yields:
        The images after each step.

    Raises:
        ValueError: images that are not between 0 and 1.
    """
    check_images(images)
    changed = images if start is None else start
    while True:
        gradient = _gradient(loss, changed)[1]
        changed = in_ball(changed - step_size * gradient.sign(), images, epsilon)
        yield changed


def apgd_steps(
    loss: Loss, images: torch.Tensor, epsilon: float, steps: int, *, start: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Auto-PGD (Croce and Hein 2020, "Reliable evaluation of adversarial robustness"): momentum, and steps that are halved, from
    the best images so far, where they have stopped to help. Yields as `pgd_steps`, `steps` times.
    """
    check_images(images)
    checkpoints, share, width = [0], APGD_FIRST, APGD_FIRST
    while share < 1:
        checkpoints.append(math.ceil(share * steps))
        width = max(width - APGD_SHRINK, APGD_LEAST)
        share += width
    shape = (len(images), 1, 1, 1)
    size = torch.full(shape, 2 * epsilon)
    before = current = images if start is None else start
    value, gradient = _gradient(loss, current)
    best, best_value, best_gradient = current, value, gradient
    successes = torch.zeros(len(images))
    last_size, last_best, since = size.clone(), best_value.clone(), 0
    for step in range(1, steps + 1):
        ahead = in_ball(current - size * gradient.sign(), images, epsilon)
        share = 1.0 if step == 1 else APGD_MOMENTUM
        after = in_ball(current + share * (ahead - current) + (1 - share) * (current - before), images, epsilon)
        before, current = current, after
        yield current
        if step == steps:
            return
        previous = value
        value, gradient = _gradient(loss, current)
        successes += value < previous
        improved = (value < best_value).view(shape)
        best = torch.where(improved, current, best)
        best_gradient = torch.where(improved, gradient, best_gradient)
        best_value = torch.minimum(value, best_value)
        if step in checkpoints:
            length = step - since
            stalled = (successes < APGD_RHO * length) | ((last_size.flatten() == size.flatten()) & (last_best == best_value))
            last_size, last_best, since = size.clone(), best_value.clone(), step
            successes.zero_()
            again = stalled.view(shape)
            size = torch.where(again, size / 2, size)
            current, gradient = torch.where(again, best, current), torch.where(again, best_gradient, gradient)
            value = torch.where(stalled, best_value, value)


def _gradient(loss: Loss, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = images.detach().clone().requires_grad_()
    values = loss(leaf)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


@dataclass(frozen=True)
class _GradientAttack(Technique):
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.QUERY | Capability.LOGITS | Capability.INPUT_GRAD
    perturbation_unit: ClassVar[str] = L_INF_UNIT
    epsilon: float = 8.0
    steps: int = 20
    restarts: int = 1
    bisections: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= LEVELS:
            raise ValueError(f"{self.name}: epsilon={self.epsilon} must be above 0 and at most 255 levels")
        if min(self.steps, self.restarts) < 1 or self.bisections < 0:
            raise ValueError(f"{self.name}: steps and restarts must be at least 1, bisections at least 0")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with ImageTries(target, question, item, progress) as tries:

            def succeeds(levels: float) -> bool:
                return any(self._run(tries, levels / LEVELS, restart, generator) for restart in range(self.restarts))

            smallest_perturbation(succeeds, 0.0, self.epsilon, steps=self.bisections)

    def _run(self, tries: ImageTries, epsilon: float, restart: int, generator: torch.Generator) -> bool:
        """One descent within a ball; true at once when an answer counts."""
        last: dict[str, torch.Tensor] = {}

        def loss(images: torch.Tensor) -> torch.Tensor:
            logits = tries.target.forward(images).logits
            losses = tries.losses(logits)
            tries.progress.measured(float(losses.detach().min()))
            last.update(images=images.detach(), logits=logits.detach(), losses=losses.detach())
            return losses

        def counts() -> bool:
            """Of the images that were looked at last."""
            levels = tries.distance(last["images"])
            return any(tries.tried(last["images"], levels, self.name, losses=last["losses"].tolist()))

        start = random_start(tries.image, epsilon, generator) if restart else None
        for step, changed in enumerate(self._steps(loss, tries.image, epsilon, start), 1):
            # the descent has looked at the images before this step's, whose scores are known by now
            if tries.promising(last["logits"][0]) and counts():
                return True
            if step == self.steps:
                with torch.no_grad():
                    loss(changed)
                return counts()
        return False

    @abstractmethod
    def _steps(self, loss: Loss, images: torch.Tensor, epsilon: float, start: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """Changed images, step by step."""


@dataclass(frozen=True)
class PGD(_GradientAttack):
    """Projected gradient descent (Madry et al. 2018) on the pixels, within a ball of L-infinity.

    With `bisections` the smallest ball is sought in which it succeeds. One step of the ball's size is FGSM.
    """

    name: ClassVar[str] = "pgd"
    step_size: float = 2.0

    def _steps(self, loss: Loss, images: torch.Tensor, epsilon: float, start: torch.Tensor | None) -> Iterator[torch.Tensor]:
        return pgd_steps(loss, images, epsilon, min(self.step_size / LEVELS, epsilon), start=start)


@dataclass(frozen=True)
class APGD(_GradientAttack):
    """Auto-PGD (Croce and Hein 2020) on the pixels, within a ball of L-infinity: no step size is to be chosen.

    With `bisections` the smallest ball is sought in which it succeeds.
    """

    name: ClassVar[str] = "apgd"
    steps: int = 40

    def _steps(self, loss: Loss, images: torch.Tensor, epsilon: float, start: torch.Tensor | None) -> Iterator[torch.Tensor]:
        return apgd_steps(loss, images, epsilon, self.steps, start=start)


@dataclass(frozen=True)
class Cloak(APGD):
    """The smallest change of pixels found that hides a place: APGD within balls of L-infinity, whose size is bisected.

    With the success `displaced` it tells how strong a cloak must be; a cloak against one model may not hide from another.
    """

    name: ClassVar[str] = "cloak"
    by_default: ClassVar[bool] = False
    epsilon: float = 16.0
    steps: int = 20
    bisections: int = 6


@dataclass(frozen=True)
class PatchEmbeddingPGD(Technique):
    """Gradient descent on the embeddings of patches, which no image need have: an upper bound of what changed pixels could do.

    The change of each patch is at most `epsilon` times the norm of its embedding. What would be answered is read off the scores.
    """

    name: ClassVar[str] = "patch_embedding_pgd"
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.LOGITS | Capability.ACT_READ | Capability.ACT_WRITE | Capability.INPUT_GRAD
    reachable: ClassVar[bool] = False
    perturbation_unit: ClassVar[str] = "share of the patches' norms"
    epsilon: float = 0.5
    steps: int = 20
    bisections: int = 0
    module: str = ""

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or self.steps < 1 or self.bisections < 0:
            raise ValueError("patch_embedding_pgd needs an epsilon above 0, at least 1 step and at least 0 bisections")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        with ImageTries(target, question, item, progress) as tries:
            module = self.module or patch_embedding(target.modules())
            value = target.forward(tries.image, read=(module,)).outputs[module]
            smallest_perturbation(
                lambda epsilon: self._run(tries, module, epsilon, value), 0.0, self.epsilon, steps=self.bisections
            )

    def _run(self, tries: ImageTries, module: str, epsilon: float, value: torch.Tensor) -> bool:
        # a convolution gives [1, width, rows, columns], a linear layer [1, patches, width]
        axis = 1 if value.ndim == 4 else -1
        norms = value.norm(dim=axis, keepdim=True)
        limit, change = epsilon * norms, torch.zeros_like(value)
        for step in range(self.steps + 1):
            leaf = change.clone().requires_grad_(step < self.steps)
            logits = tries.target.forward(tries.image, interventions=(Intervention(module, leaf),)).logits
            loss = tries.losses(logits)[0]
            answer = tries.guessed_answer(logits[0].detach())
            size = float((change.norm(dim=axis, keepdim=True) / norms.clamp_min(1e-12)).max())
            if tries.progress.tried(answer, loss=float(loss.detach()), perturbation=size):
                return True
            if step < self.steps:
                gradient = torch.autograd.grad(loss, leaf)[0]
                direction = gradient / gradient.norm(dim=axis, keepdim=True).clamp_min(1e-12)
                change = change - 2.5 / self.steps * limit * direction
                change = change * (limit / change.norm(dim=axis, keepdim=True).clamp_min(1e-12)).clamp(max=1)
        return False


def patch_embedding(modules: dict[str, str]) -> str:
    """The module that embeds patches: the first convolution. Raises `AuditError` if there is none."""
    for name, kind in modules.items():
        if kind == "Conv2d":
            return name
    raise AuditError("the model has no convolution that embeds patches: name the module in the setting module")


__all__ = ["APGD", "PGD", "Cloak", "PatchEmbeddingPGD", "apgd_steps", "check_images", "in_ball", "pgd_steps", "random_start"]
