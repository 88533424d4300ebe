"""What image techniques share: an item's image, losses from scores, answers to changed images, and pictures for the report.

All changes happen to images between 0 and 1, before the model's normalisation, which the target does itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .questions import AuditQuestion, Item
from .technique import Progress

LEVELS = 255
L_INF_UNIT = "levels of 255"


class ImageTries:
    """One technique on one item; as a context, it leaves the best changed image in the report at its end.

    Attributes:
        image: [1, 3, height, width], between 0 and 1.
    """

    def __init__(self, target: Any, question: AuditQuestion, item: Item, progress: Progress) -> None:
        self.target, self.question, self.item, self.progress = target, question, item, progress
        self.image: torch.Tensor = target.prepare([question.picture(item)])
        self._candidates: Mapping[str, Any] | None = None
        self._shown: tuple[tuple[bool, float], torch.Tensor, str] | None = None

    def __enter__(self) -> "ImageTries":
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown is not None:
            (failed, _), image, what = self._shown
            self.progress.show("unchanged", as_levels(self.image[0]))
            self.progress.show(f"{what}: {'does not count' if failed else 'counts'}", as_levels(image))

    @property
    def candidates(self) -> Mapping[str, Any]:
        """What the columns of logits stand for. TOPK."""
        if self._candidates is None:
            self._candidates = self.target.candidates()
        return self._candidates

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """The objective of each row of logits [images, candidates]; differentiable."""
        return self.question.objective.score_loss(self.item.values, logits, self.candidates)  # type: ignore[attr-defined]

    def guessed_answer(self, logits: torch.Tensor) -> dict[str, Any]:
        """The candidate of the greatest logit [candidates] in the form of an answer."""
        return candidate_answer(self.candidates, int(logits.argmax()))

    def promising(self, logits: torch.Tensor) -> bool:
        """Whether the best candidate would count, so that asking for the answer is worth its price."""
        return self.question.success(self.item.values, self.guessed_answer(logits))

    def counts(self, images: torch.Tensor) -> list[bool]:
        """Whether the answers to images count, without noting them: for images that no report should be about."""
        return [self.question.success(self.item.values, answer) for answer in self.target.answer(images)]

    def tried(
        self,
        images: torch.Tensor,
        perturbations: Sequence[float],
        what: str | Sequence[str],
        *,
        losses: Sequence[float] | None = None,
        candidates: Sequence[Any] | None = None,
        measures: Sequence[Mapping[str, float]] | None = None,
    ) -> list[bool]:
        """Asks for the answers to images [n, 3, height, width], and notes them; whether each counts."""
        found = []
        for number, answer in enumerate(self.target.answer(images)):
            counts = self.progress.tried(
                answer,
                loss=None if losses is None else losses[number],
                candidate=None if candidates is None else candidates[number],
                perturbation=perturbations[number],
                measures=None if measures is None else measures[number],
            )
            rank = (not counts, perturbations[number] if counts else 0.0)
            if self._shown is None or rank < self._shown[0]:
                self._shown = rank, images[number].detach(), what if isinstance(what, str) else what[number]
            found.append(counts)
        return found

    def distance(self, images: torch.Tensor) -> list[float]:
        """Largest change of any value, in levels of 255, of images that `answer` rounds."""
        return [LEVELS * value for value in (rounded(images) - rounded(self.image)).abs().flatten(1).amax(1).tolist()]


def candidate_answer(candidates: Mapping[str, Any], column: int) -> dict[str, Any]:
    """A candidate as the target would answer with it: a label, or a place."""
    if "labels" in candidates:
        return {"label": candidates["labels"][column]}
    latitude, longitude = candidates["coordinates"][column].tolist()
    return {"latitude": latitude, "longitude": longitude, "country_code": candidates["country_codes"][column]}


def rounded(images: torch.Tensor) -> torch.Tensor:
    """To 8 bits, as files are."""
    return (images.clamp(0, 1) * LEVELS).round() / LEVELS


def as_levels(image: torch.Tensor) -> np.ndarray:
    """[3, height, width] -> uint8 [height, width, 3]."""
    return (image.detach().clamp(0, 1) * LEVELS).round().byte().permute(1, 2, 0).cpu().numpy()


__all__ = ["LEVELS", "L_INF_UNIT", "ImageTries", "as_levels", "candidate_answer", "rounded"]
