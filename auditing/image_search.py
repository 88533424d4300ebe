"""Attacks on images without gradients: Square attack from scores, HopSkipJump from answers alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .access import Capability
from .image_gradient import in_ball
from .image_tries import L_INF_UNIT, LEVELS, ImageTries
from .questions import AuditQuestion, Item
from .technique import Progress, Technique

# iterations after which the squares' share of the image is halved, of 10,000 (Andriushchenko et al. 2020, section 3.1)
SHRINKING = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class SquareAttack(Technique):
    """Square attack (Andriushchenko et al. 2020): random squares of the ball's corners are kept where the scores get nearer.

    It asks for scores until they promise success, then for the answer.
    """

    name: ClassVar[str] = "square_attack"
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.QUERY | Capability.LOGITS
    perturbation_unit: ClassVar[str] = L_INF_UNIT
    epsilon: float = 8.0
    steps: int = 1000
    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= LEVELS or self.steps < 1 or not 0 < self.share <= 1:
            raise ValueError("square_attack needs an epsilon of 0 to 255 levels, at least 1 step, and a share up to 1")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        generator, epsilon = torch.Generator().manual_seed(seed), self.epsilon / LEVELS
        with ImageTries(target, question, item, progress) as tries:
            image = tries.image
            channels, height, width = image.shape[1:]

            def look(images: torch.Tensor) -> tuple[float, bool]:
                """The loss, and whether an answer counts."""
                logits = target.forward(images).logits
                loss = float(tries.losses(logits)[0])
                progress.measured(loss)
                levels = tries.distance(images)
                return loss, tries.promising(logits[0]) and tries.tried(images, levels, self.name, losses=[loss])[0]

            stripes = _signs((1, channels, 1, width), generator)
            current = in_ball(image + epsilon * stripes, image, epsilon)
            best, done = look(current)
            for step in range(self.steps):
                if done:
                    return
                edge = square_edge(step, self.steps, self.share, height, width)
                row = int(torch.randint(height - edge + 1, (), generator=generator))
                column = int(torch.randint(width - edge + 1, (), generator=generator))
                proposed = current.clone()
                part = (..., slice(row, row + edge), slice(column, column + edge))
                proposed[part] = image[part] + epsilon * _signs((1, channels, 1, 1), generator)
                proposed = in_ball(proposed, image, epsilon)
                loss, done = look(proposed)
                if loss < best:
                    best, current = loss, proposed


def square_edge(step: int, steps: int, share: float, height: int, width: int) -> int:
    """Edge of the squares: the share of the image is halved along the schedule, which is stretched to `steps`."""
    halved = sum(step * 10_000 / steps > limit for limit in SHRINKING)
    return min(max(1, round(math.sqrt(share / 2**halved * height * width))), height, width)


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=generator) - 1


@dataclass(frozen=True)
class HopSkipJump(Technique):
    """HopSkipJump (Chen et al. 2020) in L-infinity: walks along the boundary between answers, towards the image.

    It starts from pictures of other items, or noise, whose answers count already, and notes a try once it lies within `epsilon`.
    """

    name: ClassVar[str] = "hop_skip_jump"
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.QUERY
    perturbation_unit: ClassVar[str] = L_INF_UNIT
    epsilon: float = 16.0
    directions: int = 20
    noise_starts: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= LEVELS or self.directions < 2 or self.noise_starts < 0:
            raise ValueError("hop_skip_jump needs an epsilon of 0 to 255 levels, and at least 2 directions")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with ImageTries(target, question, item, progress) as tries:
            if tries.tried(tries.image, [0.0], "unchanged")[0]:
                return

            def counts(images: torch.Tensor) -> torch.Tensor:
                """Whether each answer counts; those within the ball are noted."""
                levels = tries.distance(images)
                within = torch.tensor([level <= self.epsilon + 1e-3 for level in levels])
                found = torch.zeros(len(images), dtype=torch.bool)
                if within.any():
                    near = [level for level in levels if level <= self.epsilon + 1e-3]
                    found[within] = torch.tensor(tries.tried(images[within], near, self.name))
                if not within.all():
                    found[~within] = torch.tensor(tries.counts(images[~within]))
                return found

            start = self._start(tries, counts, generator)
            if start is not None:
                self._walk(tries.image, start, counts, generator)

    def _start(
        self, tries: ImageTries, counts: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor | None:
        """An image, however far off, whose answer counts."""
        for other in tries.question.items:
            if other.id != tries.item.id:
                image = tries.target.prepare([tries.question.picture(other)])
                if counts(image)[0]:
                    return image
        for _ in range(self.noise_starts):
            image = torch.rand(tries.image.shape, generator=generator)
            if counts(image)[0]:
                return image
        return None

    def _walk(
        self,
        image: torch.Tensor,
        start: torch.Tensor,
        counts: Callable[[torch.Tensor], torch.Tensor],
        generator: torch.Generator,
    ) -> None:
        values = image[0].numel()
        tolerance = 0.5 / LEVELS
        current = _to_boundary(image, start, counts, tolerance)
        step = 1
        while True:
            distance = float((current - image).abs().max())
            if distance <= tolerance:
                return
            # the width of the differences, as in the paper for L-infinity; no finer than answers can see
            delta = max(distance if step > 1 else 0.1, 1.0 / LEVELS)
            number = int(self.directions * math.sqrt(step))
            drawn = 2 * torch.rand((number, *image.shape[1:]), generator=generator) - 1
            around = (current + delta * drawn).clamp(0, 1)
            drawn = (around - current) / delta
            signs = 2.0 * counts(around).float() - 1
            weights = signs - signs.mean() if float(signs.abs().sum()) > abs(float(signs.sum())) else signs
            direction = (weights.view(-1, 1, 1, 1) * drawn).mean(0, keepdim=True).sign()
            length = distance / math.sqrt(step)
            while length > tolerance and not counts((current + length * direction).clamp(0, 1))[0]:
                length /= 2
            if length > tolerance:
                current = _to_boundary(image, (current + length * direction).clamp(0, 1), counts, tolerance)
            step += 1
            if step > values:
                return


def _to_boundary(
    image: torch.Tensor, outside: torch.Tensor, counts: Callable[[torch.Tensor], torch.Tensor], tolerance: float
) -> torch.Tensor:
    """The nearest image found, by bisection of the ball's size, whose answer still counts."""
    low, high = 0.0, float((outside - image).abs().max())
    best = outside
    while high - low > tolerance:
        middle = (low + high) / 2
        proposed = in_ball(outside, image, middle)
        if counts(proposed)[0]:
            best, high = proposed, middle
        else:
            low = middle
    return best


__all__ = ["HopSkipJump", "SquareAttack", "square_edge"]
