"""How a technique is written.

A technique is a frozen dataclass: its fields are its settings, which configurations and reports name. It declares what it needs
and tries one item at a time:

    @dataclass(frozen=True)
    class Repetition(Technique):
        \"\"\"Repeats the prompt.\"\"\"

        name: ClassVar[str] = "repetition"
        kind: ClassVar[str] = "text"
        needs: ClassVar[Capability] = Capability.QUERY
        most: int = 4

        def attempt(self, target, question, item, progress, seed):
            for times in range(1, self.most + 1):
                prompt = " ".join([item["prompt"]] * times)
                answer = target.generate([prompt], max_new_tokens=question.max_new_tokens, stop=question.stop)[0][0]
                if progress.tried(answer, candidate=prompt, perturbation=times):
                    return

`target` is a `TextTarget` or `ImageTarget` with the declared capabilities alone and the question's budget; once that is spent,
the next use raises `BudgetExhaustedError`, which the runner takes for the end of the attempt, so a technique may simply go on
until then. Success is judged by the question, from answers that the target gave. A technique is named in a configuration by its
name if it comes with geobased (`TECHNIQUES`), or as "module:Class".
"""

import hashlib
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np

from .access import Capability
from .questions import AuditQuestion, Item

# short names in configurations -> where they are
TECHNIQUES = {
    "template_sensitivity": "geobased.auditing.text_black_box:TemplateSensitivity",
    "best_of_n": "geobased.auditing.text_black_box:BestOfN",
    "random_search": "geobased.auditing.text_suffix_search:RandomSearch",
    "coordinate_search": "geobased.auditing.text_suffix_search:CoordinateSearch",
    "gcg": "geobased.auditing.text_suffix_search:GCG",
    "universal_random_search": "geobased.auditing.text_suffix_search:UniversalRandomSearch",
    "universal_gcg": "geobased.auditing.text_suffix_search:UniversalGCG",
    "membership_inference": "geobased.auditing.text_privacy:MembershipInference",
    "canary_extraction": "geobased.auditing.text_privacy:CanaryExtraction",
    "soft_prompt": "geobased.auditing.text_inner:SoftPrompt",
    "latent_attack": "geobased.auditing.text_inner:LatentAttack",
    "activation_patching": "geobased.auditing.text_inner:ActivationPatching",
    "logit_lens": "geobased.auditing.text_inner:LogitLens",
    "linear_probe": "geobased.auditing.text_inner:LinearProbe",
    "lora_elicitation": "geobased.auditing.text_elicitation:LoraElicitation",
    "corruptions": "geobased.auditing.image_black_box:Corruptions",
    "signs": "geobased.auditing.image_black_box:Signs",
    "crops": "geobased.auditing.image_black_box:Crops",
    "hop_skip_jump": "geobased.auditing.image_search:HopSkipJump",
    "square_attack": "geobased.auditing.image_search:SquareAttack",
    "pgd": "geobased.auditing.image_gradient:PGD",
    "apgd": "geobased.auditing.image_gradient:APGD",
    "cloak": "geobased.auditing.image_gradient:Cloak",
    "patch_embedding_pgd": "geobased.auditing.image_gradient:PatchEmbeddingPGD",
    "occlusion": "geobased.auditing.image_attribution:OcclusionMap",
    "integrated_gradients": "geobased.auditing.image_attribution:IntegratedGradientsMap",
    "attention": "geobased.auditing.image_attribution:AttentionMap",
    "square_scan": "geobased.auditing.image_shortcuts:SquareScan",
    "square_search": "geobased.auditing.image_shortcuts:SquareSearch",
    "square_descent": "geobased.auditing.image_shortcuts:SquareDescent",
    "squares_of_data": "geobased.auditing.image_shortcuts:SquaresOfData",
    "lying_exif": "geobased.auditing.image_privacy:LyingExif",
}


@dataclass(frozen=True)
class Picture:
    """Pixels for the report, uint8 [height, width, 3]; with `heat` [height, width] float, drawn over them (red supports)."""

    caption: str
    pixels: np.ndarray
    heat: np.ndarray | None = None


@dataclass
class Progress:
    """What a technique found on an item. The best try is kept: a success before a failure, the smallest, the lowest loss.

    Attributes:
        success: whether an answer counted.
        spent_at_success: forward-equivalents up to the first that did.
        best_loss: the lowest.
        curve: (spent, lowest loss so far), where it fell.
        answer, candidate, perturbation: of the best try: the model's answer, the input, and the size of the change.
        measures: further numbers, such as how easily the change is seen.
        pictures: for the report.
    """

    question: AuditQuestion
    item: Item
    spent: Callable[[], float]
    success: bool = False
    spent_at_success: float | None = None
    best_loss: float | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)
    answer: Any = None
    candidate: Any = None
    perturbation: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    _rank: tuple[bool, float, float] | None = None

    def tried(
        self,
        answer: Any,
        *,
        loss: float | None = None,
        candidate: Any = None,
        perturbation: float | None = None,
        measures: Mapping[str, float] | None = None,
    ) -> bool:
        """Notes an answer, and tells whether it counts as a success.

        Args:
            answer: what the target answered: a text, or the dictionary of `ImageTarget.answer`.
            loss: of the objective from scores, if the technique has them; by default that of the answer.
            candidate: the input that it answers, as JSON values, for the report.
            perturbation: size of the change, in the technique's `perturbation_unit`.
            measures: further numbers.
        """
        success = self.question.success(self.item.values, answer)
        loss = self.question.objective.loss(self.item.values, answer) if loss is None else float(loss)
        self.measured(loss)
        if success and self.spent_at_success is None:
            self.spent_at_success = self.spent()
        rank = (not success, perturbation if success and perturbation is not None else math.inf, loss)
        if self._rank is None or rank < self._rank:
            self._rank = rank
            self.success, self.answer, self.candidate, self.perturbation = success, answer, candidate, perturbation
            self.measures = {name: float(value) for name, value in (measures or {}).items()}
        return success

    def measured(self, loss: float) -> None:
        """Notes a loss on the way, without an answer."""
        if not math.isfinite(loss):
            raise ValueError(f"the loss of item {self.item.id!r} is {loss}")
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss = loss
            self.curve.append((self.spent(), loss))

    def show(self, caption: str, pixels: np.ndarray, heat: np.ndarray | None = None) -> None:
        """Keeps a picture for the report."""
        self.pictures.append(Picture(caption, np.asarray(pixels, dtype=np.uint8), heat))


class Technique(ABC):
    """See the module's text. Subclasses are frozen dataclasses.

    Attributes:
        name: in configurations and reports.
        kind: "text" or "image".
        needs: capabilities that it uses.
        reachable: whether a user of the model could do the same; what changes inner values is an upper bound, and is left out of
            the best of a level.
        perturbation_unit: of the sizes that it reports, "" if it has none.
        whole_set: whether it takes all items at once (`attempt_all`) with the sum of their budgets; see `WholeSetTechnique`.
        by_default: whether configurations that name no techniques have it; not where items need fields of its own.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    needs: ClassVar[Capability]
    reachable: ClassVar[bool] = True
    perturbation_unit: ClassVar[str] = ""
    whole_set: ClassVar[bool] = False
    by_default: ClassVar[bool] = True

    @abstractmethod
    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        """Tries to find a success on an item, and notes what it sees in `progress`."""

    def attempt_all(self, target: Any, question: AuditQuestion, progress: Sequence[Progress], seed: int) -> None:
        """For techniques that need all items at once; `progress` is in the order of the items."""
        raise NotImplementedError(f"{self.name} takes one item at a time")

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, from which `make_technique` makes it again."""
        place = f"{type(self).__module__}:{type(self).__qualname__}"
        return {"name": self.name if TECHNIQUES.get(self.name) == place else place, **asdict(self)}  # type: ignore[call-overload]


class WholeSetTechnique(Technique):
    """A technique that takes all items at once, with the sum of their budgets."""

    whole_set: ClassVar[bool] = True

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        raise NotImplementedError(f"{self.name} takes all items at once")

    @abstractmethod
    def attempt_all(self, target: Any, question: AuditQuestion, progress: Sequence[Progress], seed: int) -> None:
        """Tries to find successes; `progress` is in the order of the items."""


def make_technique(settings: str | Mapping[str, Any]) -> Technique:
    """A technique from its name, or from {"name": …} with settings.

    Raises `ValueError` for a name or setting that is unknown; the message lists those there are.
    """
    given = {"name": settings} if isinstance(settings, str) else dict(settings)
    name = given.pop("name", None)
    place = TECHNIQUES.get(str(name), str(name))
    module, _, attribute = place.partition(":")
    if not attribute:
        raise ValueError(f"technique {name!r} is unknown; there are: {', '.join(TECHNIQUES)}, or module:Class")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"technique {name!r} cannot be found: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Technique)):
        raise ValueError(f"technique {name!r} is no Technique")
    known = [setting.name for setting in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"technique {name!r} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    # lists of configurations stand for tuples
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def derived_seed(*parts: Any) -> int:
    """A seed that depends on all parts, the same everywhere."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def smallest_perturbation(
    succeeds: Callable[[float], bool], low: float, high: float, *, steps: int = 8, integral: bool = False
) -> float | None:
    """The smallest size at which `succeeds` still held, by bisection between `low` (excluded) and `high`; None if not at `high`.

    Success need not grow with the size; then it is a size that succeeds, while the half of it that was tried last did not.
    """
    if not succeeds(high):
        return None
    for _ in range(steps):
        middle = float((low + high) // 2) if integral else (low + high) / 2
        if not low < middle < high:
            break
        if succeeds(middle):
            high = middle
        else:
            low = middle
    return high


__all__ = [
    "TECHNIQUES",
    "Picture",
    "Progress",
    "Technique",
    "WholeSetTechnique",
    "derived_seed",
    "make_technique",
    "smallest_perturbation",
]
