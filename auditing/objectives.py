"""When an answer counts as a success, and losses that lead there, from answers (any access) or from scores (grey and above)."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from geobased.geography.coordinates import haversine_km

Values = Mapping[str, Any]


class _Named:
    """What objectives and successes share: a name in configurations, and fields of items that they read."""

    type: ClassVar[str]
    kind: ClassVar[str]

    def fields(self) -> tuple[str, ...]:
        """Fields of items that are read."""
        return (self.field,) if hasattr(self, "field") else ()

    def check(self, values: Values, item: str) -> None:
        """Raises `ValueError` if an item lacks a field."""
        for name in self.fields():
            if name not in values:
                raise ValueError(f"item {item!r} has no field {name!r}, which {self.type} needs")

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **asdict(self)}  # type: ignore[call-overload]


class Success(_Named):
    """Tells of an answer whether it counts."""

    def __call__(self, values: Values, answer: Any) -> bool:
        """`answer` is a text, or what an `ImageTarget` answers."""
        raise NotImplementedError


class Objective(_Named):
    """A loss, lower being nearer to success."""

    unit: ClassVar[str]
    score_unit: ClassVar[str] = "nats"

    def loss(self, values: Values, answer: Any) -> float:
        """From an answer alone."""
        raise NotImplementedError


@dataclass(frozen=True)
class Contains(Success):
    """The text holds that of the item's field."""

    type: ClassVar[str] = "contains"
    kind: ClassVar[str] = "text"
    field: str = "target"

    def __call__(self, values: Values, answer: Any) -> bool:
        return str(values[self.field]) in answer


@dataclass(frozen=True)
class Lacks(Success):
    """The text does not hold that of the item's field."""

    type: ClassVar[str] = "lacks"
    kind: ClassVar[str] = "text"
    field: str = "reference"

    def __call__(self, values: Values, answer: Any) -> bool:
        return str(values[self.field]) not in answer


@dataclass(frozen=True)
class Matches(Success):
    """The text matches a regular expression somewhere."""

    type: ClassVar[str] = "matches"
    kind: ClassVar[str] = "text"
    pattern: str = "."

    def __call__(self, values: Values, answer: Any) -> bool:
        return re.search(self.pattern, answer) is not None


@dataclass(frozen=True)
class Displaced(Success):
    """The place lies farther than `km` from the item's latitude and longitude (degrees)."""

    type: ClassVar[str] = "displaced"
    kind: ClassVar[str] = "image"
    km: float = 1000.0

    def fields(self) -> tuple[str, ...]:
        return ("latitude", "longitude")

    def __call__(self, values: Values, answer: Any) -> bool:
        return distance_km(values, answer) > self.km


@dataclass(frozen=True)
class Is(Success):
    """A field of the answer, such as country_code or label, has the value of the item's field."""

    type: ClassVar[str] = "is"
    kind: ClassVar[str] = "image"
    answer: str = "country_code"
    field: str = "target"

    def __call__(self, values: Values, answer: Any) -> bool:
        return answer.get(self.answer) == values[self.field]


@dataclass(frozen=True)
class IsNot(Success):
    """A field of the answer, such as country_code or label, has another value than the item's field."""

    type: ClassVar[str] = "is_not"
    kind: ClassVar[str] = "image"
    answer: str = "country_code"
    field: str = "reference"

    def __call__(self, values: Values, answer: Any) -> bool:
        return answer.get(self.answer) != values[self.field]


@dataclass(frozen=True)
class TextObjective(Objective):
    """Text that the model is to write, or not to write, after the prompt."""

    kind: ClassVar[str] = "text"
    unit: ClassVar[str] = "share of the text"
    sign: ClassVar[float]
    field: str = "target"

    def loss(self, values: Values, answer: Any) -> float:
        """1 less the share of the text that the answer holds in one piece; that share itself where it is to be avoided."""
        text = str(values[self.field])
        match = difflib.SequenceMatcher(None, text, answer, autojunk=False).find_longest_match()
        share = match.size / max(1, len(text))
        return 1 - share if self.sign > 0 else share

    def score_loss(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """From log probabilities [..., tokens] of the text after the prompt: minus their mean, or their mean. Differentiable."""
        return -self.sign * log_probabilities.mean(-1)


@dataclass(frozen=True)
class Elicit(TextObjective):
    """The model is to write the text of the item's field."""

    type: ClassVar[str] = "elicit"
    sign: ClassVar[float] = 1.0


@dataclass(frozen=True)
class Suppress(TextObjective):
    """The model is not to write the text of the item's field."""

    type: ClassVar[str] = "suppress"
    sign: ClassVar[float] = -1.0
    field: str = "reference"


class ImageObjective(Objective):
    """Answers that a model is led to, or away from."""

    kind: ClassVar[str] = "image"

    def columns(self, values: Values, candidates: Mapping[str, Any]) -> torch.Tensor:
        """bool [candidates]: those whose probability the loss is about; `candidates` as `ImageTarget.candidates` gives them."""
        raise NotImplementedError

    def score_loss(self, values: Values, log_probabilities: torch.Tensor, candidates: Mapping[str, Any]) -> torch.Tensor:
        """From log probabilities [images, candidates]: the loss of each image. Differentiable.

        Raises `ValueError` if no candidate is meant.
        """
        chosen = self.columns(values, candidates)
        if not bool(chosen.any()):
            raise ValueError(f"{self.type}: the model has no candidate that is meant")
        mass = log_probabilities[:, chosen.to(log_probabilities.device)].logsumexp(-1)
        return mass if self.avoids else -mass

    avoids: ClassVar[bool]


@dataclass(frozen=True)
class Displace(ImageObjective):
    """The place is to be far from the item's latitude and longitude: probability is to leave the disc of `km` around them."""

    type: ClassVar[str] = "displace"
    unit: ClassVar[str] = "-km"
    avoids: ClassVar[bool] = True
    km: float = 1000.0

    def fields(self) -> tuple[str, ...]:
        return ("latitude", "longitude")

    def loss(self, values: Values, answer: Any) -> float:
        return -distance_km(values, answer)

    def columns(self, values: Values, candidates: Mapping[str, Any]) -> torch.Tensor:
        latitudes, longitudes = candidates["coordinates"].numpy().T
        distances = haversine_km(latitudes, longitudes, float(values["latitude"]), float(values["longitude"]))
        near = distances <= self.km
        if not near.any():
            # the truth lies in a gap between candidates: its nearest one is meant
            near[np.argmin(distances)] = True
        return torch.from_numpy(near)


@dataclass(frozen=True)
class _Answer(ImageObjective):
    """A field of the answer (country_code or label) and its value in the item."""

    unit: ClassVar[str] = "wrong answers"
    answer: str = "country_code"
    field: str = "target"

    def loss(self, values: Values, answer: Any) -> float:
        return float((answer.get(self.answer) == values[self.field]) == self.avoids)

    def columns(self, values: Values, candidates: Mapping[str, Any]) -> torch.Tensor:
        names = {"country_code": "country_codes", "label": "labels"}
        if self.answer not in names or names[self.answer] not in candidates:
            raise ValueError(f"{self.type}: this model's candidates have no {self.answer}")
        return torch.tensor([value == values[self.field] for value in candidates[names[self.answer]]])


@dataclass(frozen=True)
class LeadTo(_Answer):
    """The answer is to have the value of the item's field."""

    type: ClassVar[str] = "lead_to"
    avoids: ClassVar[bool] = False


@dataclass(frozen=True)
class LeadAway(_Answer):
    """The answer is to have another value than that of the item's field."""

    type: ClassVar[str] = "lead_away"
    avoids: ClassVar[bool] = True
    field: str = "reference"


def distance_km(values: Values, answer: Mapping[str, Any]) -> float:
    """From an item's place to that of an answer. Raises `ValueError` if the answer is no place."""
    if "latitude" not in answer:
        raise ValueError("the model answers with labels, not with places: distances cannot be had")
    places = values["latitude"], values["longitude"], answer["latitude"], answer["longitude"]
    return float(haversine_km(*map(float, places)))


OBJECTIVES: dict[str, type[Objective]] = {kind.type: kind for kind in (Elicit, Suppress, Displace, LeadTo, LeadAway)}
SUCCESSES: dict[str, type[Success]] = {kind.type: kind for kind in (Contains, Lacks, Matches, Displaced, Is, IsNot)}

__all__ = ["OBJECTIVES", "SUCCESSES", "ImageObjective", "Objective", "Success", "TextObjective", "distance_km"]
