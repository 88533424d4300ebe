"""What an audit asks: items, what counts as success, what is to be lowered on the way there, and a budget.

Success is a failure of the model that was found: the answer lacks what it should hold, or holds what it should not. It is judged
on answers alone, at every level of access.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from .canonical import canonical_json, file_sha256, sha256
from .objectives import OBJECTIVES, SUCCESSES, Objective, Success


@dataclass(frozen=True)
class Item:
    """One case of a question.

    Attributes:
        id: short and unique within the question.
        values: its fields: "prompt" for texts, "image" (path of a file) for images, and those that objective and success read.
    """

    id: str
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"item {self.id!r} has no field {name!r}; it has {', '.join(self.values)}")
        return self.values[name]


@dataclass(frozen=True)
class AuditQuestion:
    """A question that is asked at one or several levels of access.

    Attributes:
        objective: what techniques lower.
        success: when an answer counts.
        items: the cases.
        budget: forward-equivalents that each technique may spend on each item.
        name, text: short, and in words.
        max_new_tokens, stop: of answers to prompts.
        folder: what paths of images are relative to.
    """

    objective: Objective
    success: Success
    items: tuple[Item, ...]
    budget: float
    name: str = "question"
    text: str = ""
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    folder: Path = field(default=Path("."), compare=False)
    required: ClassVar[dict[str, str]] = {"text": "prompt", "image": "image"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(self.items))
        if not self.items:
            raise ValueError("a question needs items")
        if not (self.budget > 0 and math.isfinite(self.budget)):
            raise ValueError(f"budget={self.budget} must be a positive number of forward-equivalents")
        if self.objective.kind != self.success.kind:
            raise ValueError(f"the objective is for {self.objective.kind}s, the success for {self.success.kind}s")
        if len({item.id for item in self.items}) < len(self.items):
            raise ValueError("two items have the same id")
        for item in self.items:
            _ = item[self.required[self.kind]]
            self.objective.check(item.values, item.id)
            self.success.check(item.values, item.id)
            if self.kind == "image" and not (self.folder / item["image"]).is_file():
                raise FileNotFoundError(f"item {item.id!r}: there is no image at {self.folder / item['image']}")

    @property
    def kind(self) -> str:
        """ "text" or "image"."""
        return self.objective.kind

    def picture(self, item: Item) -> Image.Image:
        """The image of an item, without its metadata. Raises `FileNotFoundError` where it is missing."""
        with Image.open(self.folder / item["image"]) as opened:
            return opened.convert("RGB")

    def to_dict(self) -> dict[str, Any]:
        """What the report holds, with digests of images in place of pixels."""
        items: list[dict[str, Any]] = [{"id": item.id, **item.values} for item in self.items]
        if self.kind == "image":
            items = [{**item, "image_sha256": file_sha256(self.folder / item["image"])} for item in items]
        return {
            "name": self.name,
            "text": self.text,
            "kind": self.kind,
            "objective": self.objective.to_dict(),
            "success": self.success.to_dict(),
            "budget": self.budget,
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.stop),
            "items": items,
        }

    def sha256(self) -> str:
        """Digest by which reports of the same question know each other."""
        return sha256(canonical_json(self.to_dict()))

    @staticmethod
    def from_dict(content: Mapping[str, Any], folder: Path = Path(".")) -> "AuditQuestion":
        """The reverse of `to_dict`; `items` may also be the path of a file of JSON lines, relative to `folder`.

        Raises `ValueError` that names what is wrong or missing.
        """
        known = {"name", "text", "kind", "objective", "success", "budget", "max_new_tokens", "stop", "items"}
        if unknown := sorted(set(content) - known):
            raise ValueError(f"question: {unknown[0]!r} is unknown; there are: {', '.join(sorted(known))}")
        if missing := [name for name in ("objective", "success", "budget", "items") if name not in content]:
            raise ValueError(f"question: {missing[0]} is missing")
        items = content["items"]
        if isinstance(items, str):
            items = _lines(folder / items)
        if not isinstance(items, Sequence) or not all(isinstance(item, Mapping) for item in items):
            raise ValueError("question: items must be a list of fields and values, or a file of JSON lines")
        objective, success = _chosen(OBJECTIVES, "objective", content), _chosen(SUCCESSES, "success", content)
        rest = {name: content[name] for name in ("name", "text", "max_new_tokens") if name in content}
        digests = [(item, item.get("image_sha256")) for item in items]
        for item, digest in digests:
            if digest is not None and file_sha256(folder / item["image"]) != digest:
                raise ValueError(f"question: {item['image']} is another image than that of the report")
        found = tuple(
            Item(
                str(item.get("id", number)),
                {name: value for name, value in item.items() if name not in ("id", "image_sha256")},
            )
            for number, item in enumerate(items)
        )
        stop = tuple(content.get("stop", ()))
        return AuditQuestion(objective, success, found, float(content["budget"]), stop=stop, folder=folder, **rest)


def _lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds a line that is no JSON: {error}") from error


def _chosen(known: Mapping[str, Any], what: str, content: Mapping[str, Any]) -> Any:
    settings = dict(content[what]) if isinstance(content[what], Mapping) else {"type": content[what]}
    name = settings.pop("type", None)
    if name not in known:
        raise ValueError(f"question: {what} {name!r} is unknown; there are: {', '.join(known)}")
    try:
        return known[name](**settings)
    except TypeError as error:
        raise ValueError(f"question: {what} {name}: {error}; it has {', '.join(asdict(known[name]()))}") from error


__all__ = ["AuditQuestion", "Item"]
