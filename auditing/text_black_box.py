"""Techniques for texts that need nothing but the model's answers."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .access import Capability
from .questions import AuditQuestion, Item
from .technique import Progress, Technique, derived_seed

TEMPLATES = (
    "{prompt}",
    " {prompt}",
    "\n{prompt}",
    "{prompt} ",
    "{prompt}\n",
    "Please answer. {prompt}",
    "Question: {prompt}",
    "{prompt} Answer briefly:",
)


@dataclass(frozen=True)
class TemplateSensitivity(Technique):
    """Puts the prompt into templates that ask for the same thing, and takes the greedy answer to each.

    The perturbation is the number of characters that a template adds.
    """

    name: ClassVar[str] = "template_sensitivity"
    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = Capability.QUERY
    perturbation_unit: ClassVar[str] = "characters"
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        if wrong := [template for template in self.templates if template.count("{prompt}") != 1]:
            raise ValueError(f"template {wrong[0]!r} must say once where the {{prompt}} stands")
        if not self.templates:
            raise ValueError("template_sensitivity needs templates")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        answers: list[str] = []
        for template in sorted(self.templates, key=len):
            prompt = template.replace("{prompt}", item["prompt"])
            answer = target.generate([prompt], max_new_tokens=question.max_new_tokens, stop=question.stop)[0][0].strip()
            progress.tried(answer, candidate=prompt, perturbation=len(prompt) - len(item["prompt"]))
            answers.append(answer)
            others = sum(other != answers[0] for other in answers[1:])
            progress.measures["other answers than to the shortest template"] = float(others)


@dataclass(frozen=True)
class BestOfN(Technique):
    """Samples answers to the unchanged prompt until one counts or the budget is spent (best-of-n sampling)."""

    name: ClassVar[str] = "best_of_n"
    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = Capability.QUERY
    temperature: float = 1.0
    top_p: float = 1.0
    most: int = 64

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.most < 1:
            raise ValueError("best_of_n needs a temperature above 0 and at least one sample")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        for number in range(self.most):
            sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": derived_seed(seed, number)}
            answer = target.generate([item["prompt"]], max_new_tokens=question.max_new_tokens, stop=question.stop, **sampling)[0][
                0
            ]
            if progress.tried(answer, candidate=item["prompt"], measures={"samples": number + 1}):
                return


__all__ = ["BestOfN", "TemplateSensitivity"]
