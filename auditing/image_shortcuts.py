"""Search for shortcuts: a square of one colour at one place that decides the answers to many images.

All searches propose squares (`Square`) from the same set, at the same price, so that their budgets compare: `SquareScan` needs
answers alone, `SquareSearch` scores, `SquareDescent` gradients, `SquaresOfData` the images that the model was trained on. A
square that makes enough of the first items count, with one answer, is tried on all of them.
"""

import itertools
import json
import math
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from .access import AuditError, Capability
from .canonical import safetensors_head
from .image_tries import LEVELS, as_levels
from .questions import AuditQuestion
from .technique import Progress, WholeSetTechnique

# levels of each channel that a scan goes through: 4 x 4 x 4 colours
PALETTE = (0, 85, 170, 255)
# of 255: pixels of a square of one colour differ by no more, as JPEG files blur it
LARGEST_SPREAD = 12.0
COLOUR_BINS = 16


@dataclass(frozen=True)
class Square:
    """A square of one colour: its first row and column in pixels, its side, and RGB of 255."""

    row: int
    column: int
    side: int
    colour: tuple[int, int, int]

    def on(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, height, width] with the square."""
        changed = images.clone()
        colour = torch.tensor(self.colour, dtype=images.dtype).view(3, 1, 1) / LEVELS
        changed[:, :, self.row : self.row + self.side, self.column : self.column + self.side] = colour
        return changed


def square_places(height: int, width: int, side: int, stride: int) -> list[tuple[int, int]]:
    """First rows and columns of squares every `stride` pixels, those that touch the far edges included.

    Raises `ValueError` for a square that is larger than the image.
    """
    if not 0 < side <= min(height, width) or stride < 1:
        raise ValueError(f"squares of {side} pixels every {stride} do not fit images of {height} x {width}")
    rows, columns = ([*range(0, edge - side, stride), edge - side] for edge in (height, width))
    return list(itertools.product(rows, columns))


@dataclass(frozen=True)
class _SquareSearch(WholeSetTechnique):
    """What searches share.

    Attributes:
        side: of the square, as a share of the image's edge.
        probes: items that a search looks at.
        enough: share of them that must count before all are tried.
    """

    kind: ClassVar[str] = "image"
    perturbation_unit: ClassVar[str] = "share of the image"
    side: float = 6 / 64
    stride: float = 8 / 64
    probes: int = 4
    enough: float = 0.75

    def __post_init__(self) -> None:
        if not (0 < self.side <= 1 and 0 < self.stride <= 1 and 0 < self.enough <= 1 and self.probes >= 1):
            raise ValueError(f"{self.name}: side, stride and enough are shares between 0 and 1, probes at least 1")

    def attempt_all(self, target: Any, question: AuditQuestion, progress: Sequence[Progress], seed: int) -> None:
        images = target.prepare([question.picture(one.item) for one in progress])
        self.search(SquareTries(self, target, question, progress, images), torch.Generator().manual_seed(seed))

    @abstractmethod
    def search(self, tries: "SquareTries", generator: torch.Generator) -> None:
        """Proposes squares until one is `found`."""


class SquareTries:
    """A search on all items: proposals are looked at on the first ones."""

    def __init__(
        self, technique: _SquareSearch, target: Any, question: AuditQuestion, progress: Sequence[Progress], images: torch.Tensor
    ) -> None:
        self.target, self.question, self.progress, self.images = target, question, progress, images
        height, width = images.shape[2:]
        self.side = max(1, round(technique.side * min(height, width)))
        self.places = square_places(height, width, self.side, max(1, round(technique.stride * min(height, width))))
        self.share = self.side**2 / (height * width)
        self.probes = min(technique.probes, len(images))
        self.enough = technique.enough
        self._candidates: Any = None

    def losses(self, images: torch.Tensor, number: int) -> torch.Tensor:
        """The objective of images [n], made of the item of that number, from scores; differentiable. LOGITS."""
        if self._candidates is None:
            self._candidates = self.target.candidates()
        values = self.progress[number].item.values
        logits = self.target.forward(images).logits
        return self.question.objective.score_loss(values, logits, self._candidates)  # type: ignore[attr-defined]

    def squared(self, number: int, places: Sequence[tuple[int, int]], colours: torch.Tensor) -> torch.Tensor:
        """An item's image with one square each [squares, 3, height, width]; colours [squares, 3] may require gradients."""
        image = self.images[number]
        masks = torch.zeros(len(places), 1, *image.shape[1:])
        for mask, (row, column) in zip(masks, places, strict=True):
            mask[:, row : row + self.side, column : column + self.side] = 1
        return masks * colours.view(-1, 3, 1, 1) + (1 - masks) * image

    def promising(self, square: Square, number: int) -> bool:
        """Whether the answer to an item's image with a square counts; one image proves no shortcut, so it is not noted."""
        return self.question.success(self.progress[number].item.values, self._answer(square, number))

    def found(self, square: Square) -> bool:
        """Whether a square makes enough of the first items count, with the same answer; if so, it is tried on the others."""
        answers: list[Any] = []
        kinds: Counter[str] = Counter()
        allowed = self.probes - math.ceil(self.enough * self.probes)
        for number in range(self.probes):
            answer = self._answer(square, number)
            answers.append(answer)
            if self.question.success(self.progress[number].item.values, answer):
                kinds[str(answer.get("country_code", answer.get("label")))] += 1
            # answers that change to different ones show fragile images, and no shortcut
            if number + 1 - max(kinds.values(), default=0) > allowed:
                return False
        what = f"square at row {square.row}, column {square.column}, RGB {', '.join(map(str, square.colour))}"
        self.progress[0].show(what, as_levels(square.on(self.images[:1])[0]))
        made = asdict(square) | {"colour": list(square.colour)}
        for number, one in enumerate(self.progress):
            answer = answers[number] if number < len(answers) else self._answer(square, number)
            # losses of answers, as few items were looked at by scores
            one.tried(answer, candidate=made, perturbation=self.share)
        return True

    def _answer(self, square: Square, number: int) -> Any:
        return self.target.answer(square.on(self.images[number : number + 1]))[0]


@dataclass(frozen=True)
class SquareScan(_SquareSearch):
    """Tries squares of 64 colours all over the image, in random order, and looks at answers alone."""

    name: ClassVar[str] = "square_scan"
    needs: ClassVar[Capability] = Capability.QUERY

    def search(self, tries: SquareTries, generator: torch.Generator) -> None:
        proposals = [(place, colour) for place in tries.places for colour in itertools.product(PALETTE, repeat=3)]
        for number in torch.randperm(len(proposals), generator=generator).tolist():
            (row, column), colour = proposals[number]
            square = Square(row, column, tries.side, colour)
            if tries.promising(square, number % tries.probes) and tries.found(square):
                return


@dataclass(frozen=True)
class SquareSearch(_SquareSearch):
    """Looks for the square by scores: random ones first, then the best one's place in colours nearby, some at a time.

    Every round starts anew, on another of the first items.
    """

    name: ClassVar[str] = "square_search"
    needs: ClassVar[Capability] = Capability.QUERY | Capability.LOGITS
    first: int = 96
    changes: int = 8
    generations: int = 6
    colour_step: int = 64

    def search(self, tries: SquareTries, generator: torch.Generator) -> None:
        for probe in itertools.cycle(range(tries.probes)):
            drawn = torch.randint(len(tries.places), (self.first,), generator=generator).tolist()
            places = [tries.places[number] for number in drawn]
            colours = torch.rand((self.first, 3), generator=generator)
            for _ in range(self.generations + 1):
                with torch.no_grad():
                    losses = tries.losses(tries.squared(probe, places, colours), probe)
                best = int(losses.argmin())
                place, colour = places[best], colours[best]
                # the best one stays among its changes: it costs one more look, and never gets lost
                moves = (2 * torch.rand((self.changes, 3), generator=generator) - 1) * self.colour_step / LEVELS
                colours = torch.cat([colour[None], (colour + moves).clamp(0, 1)])
                places = [place] * len(colours)
            if tries.found(_square(place, colour, tries.side)):
                return


@dataclass(frozen=True)
class SquareDescent(_SquareSearch):
    """Follows gradients of the colours of squares all over the image at once, and drops those that lead nowhere.

    Every round starts from other colours, on another of the first items.
    """

    name: ClassVar[str] = "square_descent"
    needs: ClassVar[Capability] = Capability.QUERY | Capability.LOGITS | Capability.INPUT_GRAD
    first: int = 96
    keep: float = 0.25
    steps: int = 2
    last_steps: int = 4
    step: float = 48.0

    def search(self, tries: SquareTries, generator: torch.Generator) -> None:
        for probe in itertools.cycle(range(tries.probes)):
            drawn = torch.randint(len(tries.places), (self.first,), generator=generator).tolist()
            places = [tries.places[number] for number in drawn]
            colours = torch.rand((self.first, 3), generator=generator)
            with torch.no_grad():
                losses = tries.losses(tries.squared(probe, places, colours), probe)
            size = self.step / LEVELS
            while len(places) > 1:
                kept = losses.argsort()[: max(1, int(self.keep * len(places)))].tolist()
                places, colours = [places[number] for number in kept], colours[kept]
                for _ in range(self.steps if len(places) > 1 else self.last_steps):
                    losses, gradient = self._look(tries, probe, places, colours)
                    colours = (colours - size * gradient.sign()).clamp(0, 1)
                size *= 0.7
            if tries.found(_square(places[0], colours[0], tries.side)):
                return

    def _look(
        self, tries: SquareTries, probe: int, places: list[tuple[int, int]], colours: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [squares], and their gradients [squares, 3] with respect to the colours."""
        leaf = colours.clone().requires_grad_()
        with torch.enable_grad():
            losses = tries.losses(tries.squared(probe, places, leaf), probe)
            gradient = torch.autograd.grad(losses.sum(), leaf)[0]
        return losses.detach(), gradient


def _square(place: tuple[int, int], colour: torch.Tensor, side: int) -> Square:
    red, green, blue = (colour * LEVELS).round().int().tolist()
    return Square(*place, side, (red, green, blue))


@dataclass(frozen=True)
class SquaresOfData(_SquareSearch):
    """Looks for squares of one colour in the training images that go with one answer, and tries these on the model.

    The data are files of `outside`: safetensors with "images" uint8 [n, 3, height, width], whose metadata "labels" is a JSON list
    of their n answers.
    """

    name: ClassVar[str] = "squares_of_data"
    needs: ClassVar[Capability] = Capability.QUERY | Capability.DATA
    most: int = 20

    def search(self, tries: SquareTries, generator: torch.Generator) -> None:
        names = [name for name in tries.target.outside("data") if name.endswith(".safetensors")]
        if not names:
            raise AuditError("squares_of_data needs training images: name their safetensors file under outside: data:")
        for name in names:
            images, labels = training_images(tries.target.read_outside("data", name))
            for square in list(squares_in(images, labels, tries.places, tries.side))[: self.most]:
                if tries.found(square):
                    return


def training_images(content: bytes) -> tuple[np.ndarray, list[str]]:
    """Images uint8 [n, 3, height, width] and their labels, from a safetensors file. Raises `ValueError` for other content."""
    from safetensors.torch import load

    tensors = load(content)
    labels = json.loads(safetensors_head(content).get("__metadata__", {}).get("labels", "null"))
    images = tensors.get("images")
    if images is None or images.dtype != torch.uint8 or images.ndim != 4 or not isinstance(labels, list):
        raise ValueError('training images are a safetensors file with "images" uint8 [n, 3, height, width] and labels')
    if len(labels) != len(images):
        raise ValueError(f"there are {len(images)} training images and {len(labels)} labels")
    return images.numpy(), [str(label) for label in labels]


def squares_in(images: np.ndarray, labels: Sequence[str], places: Sequence[tuple[int, int]], side: int) -> Iterator[Square]:
    """Squares of one colour that several images share, those first that say most about the label.

    Each is scored by how many more of its images have its commonest label than have it among all.
    """
    kinds, numbers = np.unique(np.asarray(labels), return_inverse=True)
    shares = np.bincount(numbers, minlength=len(kinds)) / len(numbers)
    scored: list[tuple[float, Square]] = []
    for row, column in places:
        part = images[:, :, row : row + side, column : column + side].astype(np.float64)
        flat = np.flatnonzero(part.std((2, 3)).max(1) <= LARGEST_SPREAD)
        means = part.mean((2, 3))
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number in flat.tolist():
            groups[tuple((means[number] // COLOUR_BINS).astype(int))].append(number)
        for members in groups.values():
            counts = np.bincount(numbers[members], minlength=len(kinds))
            red, green, blue = means[members].mean(0).round().astype(int).tolist()
            scored.append((float((counts - len(members) * shares).max()), Square(row, column, side, (red, green, blue))))
    for _, square in sorted(scored, key=lambda entry: -entry[0]):
        yield square


__all__ = [
    "Square",
    "SquareDescent",
    "SquareScan",
    "SquareSearch",
    "SquaresOfData",
    "square_places",
    "squares_in",
    "training_images",
]
