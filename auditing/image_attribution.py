"""Which parts of an image an answer rests on, with captum, and whether such maps can be believed.

Maps are computed through an `ImageTarget`: integrated gradients (Sundararajan et al. 2017) with INPUT_GRAD, occlusion with
scores, attention with the activations of projections. `deletion_and_insertion` and `randomisation` test them: a map that says
nothing about the answer, or stays the same for a model without knowledge, explains nothing.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from .access import AuditError, Capability
from .canonical import audit_package
from .image_gradient import check_images
from .image_tries import ImageTries, as_levels
from .questions import AuditQuestion, Item
from .technique import Progress, Technique, derived_seed

GRADIENT_STEPS, IMAGES_AT_ONCE = 64, 16
# widths of CLIP's and ViT's attention heads
HEAD_WIDTH = 64


@dataclass(frozen=True)
class AttributionMap:
    """What was attributed to an image's values.

    Attributes:
        values: [3, height, width], or [1, height, width] of attention, which knows no colours.
        total: the score of the column for the image, less that for the baseline; NaN for attention.
        delta: sum of the values less `total`: integrated gradients are exact where it is 0; NaN for other methods.
    """

    values: torch.Tensor
    total: float
    delta: float

    @property
    def heat(self) -> np.ndarray:
        """float32 [height, width]: the sum over colours, of equal size for occlusion."""
        return self.values.sum(0).float().numpy()

    @property
    def relative_delta(self) -> float:
        """|delta| as a share of |total|, by which completeness is judged."""
        return abs(self.delta) / max(abs(self.total), 1e-12)


def integrated_gradients(
    target: Any, image: torch.Tensor, column: int, *, baseline: torch.Tensor | None = None, steps: int = GRADIENT_STEPS
) -> AttributionMap:
    """Attributes a logit to pixels, along the line from a baseline [1, 3, height, width] (black by default). LOGITS, INPUT_GRAD.

    Costs 3 forward-equivalents a step, and 2 for the ends.
    """
    check_images(image)
    captum = audit_package("captum.attr")
    start = torch.zeros_like(image) if baseline is None else baseline
    with torch.enable_grad():
        values = captum.IntegratedGradients(lambda images: target.forward(images).logits).attribute(
            image, baselines=start, target=column, n_steps=steps, internal_batch_size=IMAGES_AT_ONCE
        )
    with torch.no_grad():
        ends = target.forward(torch.cat([start, image])).logits[:, column].double()
    total = float(ends[1] - ends[0])
    return AttributionMap(values[0].detach().float(), total, float(values.double().sum()) - total)


def occlusion(
    target: Any, image: torch.Tensor, column: int, *, side: int, stride: int | None = None, colour: float = 0.0
) -> AttributionMap:
    """How much a logit falls when a square of one grey covers a pixel, on average over the squares that do. LOGITS.

    Args:
        side, stride: of the squares, pixels; they lie side by side by default.
        colour: of the squares, between 0 and 1.
    """
    check_images(image)
    captum = audit_package("captum.attr")
    step = stride or side
    channels = image.shape[1]
    with torch.no_grad():
        values = captum.Occlusion(lambda images: target.forward(images).logits).attribute(
            image,
            sliding_window_shapes=(channels, side, side),
            strides=(channels, step, step),
            baselines=colour,
            target=column,
            perturbations_per_eval=IMAGES_AT_ONCE,
        )
        ends = target.forward(torch.cat([torch.full_like(image, colour), image])).logits[:, column]
    return AttributionMap(values[0].float(), float(ends[1] - ends[0]), float("nan"))


def attention_rollout(target: Any, image: torch.Tensor, *, head_width: int = HEAD_WIDTH) -> AttributionMap:
    """Attention rollout (Abnar and Zuidema 2020): how much each patch is attended to, over all layers. ACT_READ.

    Attention is computed from the queries and keys that the model's projections give, as fused kernels keep none. It knows
    neither signs nor what was asked for. Patches are a square, with at most one token before them.

    Raises:
        AuditError: the model has no projections of queries and keys, or its tokens make no square.
    """
    names = [name for name in target.modules() if name.endswith("q_proj") and not name.startswith("text_model")]
    keys = [name.removesuffix("q_proj") + "k_proj" for name in names]
    if not names:
        raise AuditError("the model has no modules q_proj and k_proj to compute attention from")
    outputs = target.forward(image, read=(*names, *keys)).outputs
    rollout: torch.Tensor | None = None
    for query_name, key_name in zip(names, keys, strict=True):
        query, key = (_heads(outputs[name][0], head_width) for name in (query_name, key_name))
        attention = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1).mean(0)
        mixed = (attention + torch.eye(len(attention))) / 2
        rollout = mixed if rollout is None else mixed @ rollout
    assert rollout is not None
    tokens = len(rollout)
    rows = int(tokens**0.5)
    before = tokens - rows * rows
    if before > 1:
        raise AuditError(f"the model's {tokens} tokens are no square of patches with at most one token before them")
    # what patches are attended to by all: CLIP's embedding is of the first token, PIGEON's the mean of all
    shares = rollout.mean(0)[before:].view(1, 1, rows, rows)
    values = F.interpolate(shares, size=image.shape[2:], mode="nearest")[0]
    return AttributionMap(values.float(), float("nan"), float("nan"))


def _heads(values: torch.Tensor, width: int) -> torch.Tensor:
    """[tokens, heads * width] -> [heads, tokens, width]; all are one head where they are narrower."""
    size = width if values.shape[1] % width == 0 else values.shape[1]
    return values.view(len(values), -1, size).transpose(0, 1)


@dataclass(frozen=True)
class Faithfulness:
    """Mean probability of the answer while its pixels are taken away (deletion) and brought in (insertion), most important first,
    and the same in random order. A faithful map has less deletion and more insertion than chance.
    """

    deletion: float
    insertion: float
    random_deletion: float
    random_insertion: float


def deletion_and_insertion(
    target: Any,
    image: torch.Tensor,
    column: int,
    heat: np.ndarray,
    *,
    squares: int = 8,
    steps: int = 16,
    baseline: torch.Tensor | None = None,
    seed: int = 0,
) -> Faithfulness:
    """Petsiuk et al. 2018 (RISE), by squares of the image. LOGITS; costs 4 (steps + 1) forwards.

    Args:
        image: [1, 3, height, width].
        heat: [height, width].
        squares: along an edge.
        steps: in which the squares are changed.
        baseline: what takes the place of deleted pixels; the image's mean colour by default.
    """
    height, width = image.shape[2:]
    start = image.mean((2, 3), keepdim=True).expand_as(image) if baseline is None else baseline
    importance = F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(heat))[None, None].float(), squares)[0, 0].flatten()
    orders = (importance.argsort(descending=True), torch.randperm(squares**2, generator=torch.Generator().manual_seed(seed)))
    found = []
    for order in orders:
        rank = torch.empty(squares**2, dtype=torch.long)
        rank[order] = torch.arange(squares**2)
        ranks = F.interpolate(rank.view(1, 1, squares, squares).float(), size=(height, width), mode="nearest")
        changed = torch.cat([ranks < round(squares**2 * step / steps) for step in range(steps + 1)])
        for first, second in ((start, image), (image, start)):
            with torch.no_grad():
                logits = target.forward(torch.where(changed, first, second)).logits
            probabilities = logits.log_softmax(-1)[:, column].exp()
            found.append(float(torch.trapezoid(probabilities, dx=1 / steps)))
    return Faithfulness(*found)


def randomisation(heat: np.ndarray, other: np.ndarray, *, squares: int = 8) -> float:
    """Spearman's correlation of two maps by squares: near 0 where the second, of a model with random weights, is another map."""
    ranks = []
    for values in (heat, other):
        pooled = F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(values))[None, None].float(), squares).flatten()
        ranks.append(pooled.argsort().argsort().double())
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@dataclass(frozen=True)
class _Attribution(Technique):
    """Covers what a map says is important, in growing parts, until the answer counts."""

    kind: ClassVar[str] = "image"
    perturbation_unit: ClassVar[str] = "share of the image"
    squares: int = 8
    checks: bool = True

    def __post_init__(self) -> None:
        if self.squares < 2:
            raise ValueError(f"{self.name}: squares={self.squares} must be at least 2 along an edge")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        with ImageTries(target, question, item, progress) as tries:
            with torch.no_grad():
                column = int(target.forward(tries.image).logits[0].argmax())
            found = self.map(tries, column)
            progress.show(self.name, as_levels(tries.image[0]), found.heat)
            self._cover(tries, found.heat)
            # last, so that a small budget goes into tries
            progress.measures.update(self._measures(tries, column, found, seed))

    def _cover(self, tries: ImageTries, heat: np.ndarray) -> None:
        """Covers the most important squares, twice as many each time, until an answer counts."""
        pooled = F.adaptive_avg_pool2d(torch.from_numpy(heat)[None, None], self.squares).flatten()
        order = pooled.argsort(descending=True)
        covered = tries.image.mean((2, 3), keepdim=True)
        number = 1
        while True:
            hidden = torch.zeros(1, 1, self.squares, self.squares)
            hidden.view(-1)[order[:number]] = 1
            mask = F.interpolate(hidden, size=tries.image.shape[2:], mode="nearest").bool()
            share = number / len(order)
            image = torch.where(mask, covered, tries.image)
            if tries.tried(image, [share], f"{share:.0%} covered")[0] or number == len(order):
                return
            number = min(2 * number, len(order))

    @abstractmethod
    def map(self, tries: ImageTries, column: int) -> AttributionMap:
        """What supports the candidate of a column."""

    def _measures(self, tries: ImageTries, column: int, found: AttributionMap, seed: int) -> dict[str, float]:
        if not self.checks:
            return {}
        faithful = deletion_and_insertion(tries.target, tries.image, column, found.heat, squares=self.squares, seed=seed)
        return {
            "deletion": faithful.deletion,
            "deletion in random order": faithful.random_deletion,
            "insertion": faithful.insertion,
            "insertion in random order": faithful.random_insertion,
        }


@dataclass(frozen=True)
class OcclusionMap(_Attribution):
    """Finds by occlusion what the answer rests on, and covers the most important parts until the answer counts."""

    name: ClassVar[str] = "occlusion"
    needs: ClassVar[Capability] = Capability.QUERY | Capability.LOGITS

    def map(self, tries: ImageTries, column: int) -> AttributionMap:
        height, width = tries.image.shape[2:]
        return occlusion(tries.target, tries.image, column, side=max(1, min(height, width) // self.squares), colour=0.5)


@dataclass(frozen=True)
class IntegratedGradientsMap(_Attribution):
    """Finds by integrated gradients what the answer rests on, and covers the most important parts until the answer counts.

    Its measures name the completeness delta, deletion and insertion, and the correlation with the map of a model whose
    parameters were drawn anew (`randomise`, which needs FINETUNE).
    """

    name: ClassVar[str] = "integrated_gradients"
    needs: ClassVar[Capability] = Capability.QUERY | Capability.LOGITS | Capability.INPUT_GRAD | Capability.FINETUNE
    steps: int = 16
    randomised: tuple[str, ...] = ("*",)

    def map(self, tries: ImageTries, column: int) -> AttributionMap:
        return integrated_gradients(tries.target, tries.image, column, baseline=_grey(tries.image), steps=self.steps)

    def _measures(self, tries: ImageTries, column: int, found: AttributionMap, seed: int) -> dict[str, float]:
        measures = super()._measures(tries, column, found, seed)
        if self.checks:
            measures |= {"completeness delta": found.delta, "relative completeness delta": found.relative_delta}
            tries.target.randomise(*self.randomised, seed=derived_seed(seed, "randomise"))
            try:
                other = self.map(tries, column)
            finally:
                tries.target.restore()
            measures["correlation with a random model's map"] = randomisation(
                np.abs(found.heat), np.abs(other.heat), squares=self.squares
            )
        return measures


@dataclass(frozen=True)
class AttentionMap(_Attribution):
    """Finds by attention rollout where the model looks, and covers those parts until the answer counts."""

    name: ClassVar[str] = "attention"
    needs: ClassVar[Capability] = Capability.QUERY | Capability.LOGITS | Capability.ACT_READ
    head_width: int = HEAD_WIDTH

    def map(self, tries: ImageTries, column: int) -> AttributionMap:
        return attention_rollout(tries.target, tries.image, head_width=self.head_width)


def _grey(image: torch.Tensor) -> torch.Tensor:
    return torch.full_like(image, 0.5)


__all__ = [
    "AttentionMap",
    "AttributionMap",
    "Faithfulness",
    "IntegratedGradientsMap",
    "OcclusionMap",
    "attention_rollout",
    "deletion_and_insertion",
    "integrated_gradients",
    "occlusion",
    "randomisation",
]
