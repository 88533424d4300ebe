"""Fine-tuning that asks what a language model can do but does not show."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .access import Capability
from .questions import AuditQuestion
from .technique import Progress, WholeSetTechnique, derived_seed


@dataclass(frozen=True)
class LoraElicitation(WholeSetTechnique):
    """Trains low-rank adapters on one half of the items, and asks the other half after more and more steps; and the reverse.

    No item is asked of a model that was trained on it. What comes back within few steps was there before: learning it anew takes
    longer, which a control shows that asks for something the model cannot know. Each stage adds its adapters to the weights, and
    the next one trains new ones. The perturbation of an item is the number of steps after which it was first answered.

    Attributes:
        stages: numbers of steps, rising, after which the other half is asked.
        rank: of the adapters.
        parameters: patterns of the names of weights that get adapters, all linear layers by default.
    """

    name: ClassVar[str] = "lora_elicitation"
    kind: ClassVar[str] = "text"
    by_default: ClassVar[bool] = False
    needs: ClassVar[Capability] = Capability.QUERY | Capability.FINETUNE
    perturbation_unit: ClassVar[str] = "steps of fine-tuning"
    stages: tuple[int, ...] = (5, 10, 20, 40)
    rank: int = 4
    batch_size: int = 8
    learning_rate: float = 1e-3
    parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages or any(b <= a for a, b in zip((0, *self.stages), self.stages, strict=False)):
            raise ValueError(f"lora_elicitation: stages={self.stages} must rise")
        if min(self.rank, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ValueError("lora_elicitation: rank, batch_size and learning_rate must be positive")

    def attempt_all(self, target: Any, question: AuditQuestion, progress: Sequence[Progress], seed: int) -> None:
        if len(progress) < 2:
            raise ValueError("lora_elicitation needs at least two items")
        folds = [list(progress[0::2]), list(progress[1::2])]
        for number, (trained, asked) in enumerate([(folds[0], folds[1]), (folds[1], folds[0])]):
            target.restore()
            wanted = [str(one.item[question.objective.field]) for one in trained]  # type: ignore[attr-defined]
            done = 0
            for stage in self.stages:
                target.fine_tune(
                    [one.item["prompt"] for one in trained],
                    wanted,
                    steps=stage - done,
                    learning_rate=self.learning_rate,
                    batch_size=self.batch_size,
                    parameters=self.parameters,
                    rank=self.rank,
                    seed=derived_seed(seed, number, stage),
                )
                done = stage
                asked = [one for one in asked if not self._answers(target, question, one, stage)]
                if not asked:
                    break

    def _answers(self, target: Any, question: AuditQuestion, one: Progress, steps: int) -> bool:
        prompt = one.item["prompt"]
        answer = target.generate([prompt], max_new_tokens=question.max_new_tokens, stop=question.stop)[0][0]
        return one.tried(answer, candidate=prompt, perturbation=steps)


__all__ = ["LoraElicitation"]
