"""Settings of SuperHF training, in the form of TRL's other trainers."""

import re
from dataclasses import dataclass, field
from typing import Any, Self

from trl import RLOOConfig

KL_DIRECTIONS = ("forward", "reverse")
KL_REDUCTIONS = ("mean", "sum")
COMPLETION_FILTERS = ("top_k", "threshold")
# where a completion of the published code ends: the next speaker of the conversation
MUKOBI_STOP_REGEX = r"\n\n[^:]+:|Human|Assistant"


@dataclass
class SuperHFConfig(RLOOConfig):
    """Configuration of a `SuperHFTrainer` (Mukobi et al. 2023, arXiv 2310.16763).

    What `RLOOConfig` has keeps its meaning, batch sizes included: they count completions, so a process samples for
    `per_device_train_batch_size * steps_per_generation / num_generations` prompts at a time and trains on `top_k_completions`
    of each. `epsilon`, `epsilon_high` and `normalize_advantages` have nothing to act on. Other defaults than `RLOOConfig`:
    `per_device_train_batch_size` and `per_device_eval_batch_size` 16, `num_generations` 16, `top_p` 0.95,
    `max_completion_length` 64, `beta` 0.35, `learning_rate` 2e-5 with a cosine schedule and 32 warm-up steps.

    `beta` weighs the KL divergence, in nats per token, between the trained model and the reference, over the full vocabulary,
    at the positions that predict the kept completions. The published code instead adds up the mean divergences of the texts of
    a minibatch (`kl_reduction="sum"`): there 0.35 with two texts acts like 0.7 here.

    Raises:
        ValueError: a value out of range, or a process whose batch does not hold whole groups of `num_generations`.
    """

    per_device_train_batch_size: int = field(default=16, metadata={"help": "Completions a process trains on at a time."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Completions a process evaluates at a time."})
    num_generations: int = field(default=16, metadata={"help": "Completions sampled for each prompt (the superbatch)."})
    max_completion_length: int | None = field(default=64, metadata={"help": "Maximum length of a completion, in tokens."})
    top_p: float = field(default=0.95, metadata={"help": "Probability mass of the tokens that are sampled from."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=32, metadata={"help": "Optimizer steps of linear warm-up, or a share below 1."})
    beta: float = field(
        default=0.35,
        metadata={"help": "Weight of the KL divergence from the reference. 0: no reference is kept, no divergence measured."},
    )

    completion_filter: str = field(
        default="top_k",
        metadata={
            "help": "Which completions of a prompt are trained on: 'top_k', 'threshold' (the `top_k_completions` best of those "
            "that reach `reward_threshold`), or in Python a function of scores [prompts, num_generations] (NaN: excluded) that "
            "returns a boolean tensor of that shape."
        },
    )
    top_k_completions: int = field(default=1, metadata={"help": "Completions kept of each prompt, at most."})
    reward_threshold: float | None = field(
        default=None, metadata={"help": "Least score of a kept completion, for the filter 'threshold'."}
    )
    length_penalty: float = field(
        default=0.0,
        metadata={"help": "Subtracted from a completion's score before filtering, times the log of its length in characters."},
    )
    stop_regex: str | None = field(
        default=None,
        metadata={"help": "Completions end before the first match of this expression, and are tokenized anew."},
    )
    append_eos: bool = field(
        default=True,
        metadata={
            "help": "Kept completions without an end-of-sequence token get one, those cut off at `max_completion_length` "
            "included; `mask_truncated_completions` keeps the latter out of the selection."
        },
    )

    kl_direction: str = field(
        default="forward", metadata={"help": "'forward': KL(reference || policy), as published; 'reverse': KL(policy || ref)."}
    )
    kl_reduction: str = field(
        default="mean",
        metadata={
            "help": "'mean': cross entropy and divergence per token, over all tokens of an optimizer step and all processes; "
            "'sum': as published, the mean cross entropy of a minibatch plus the sum of its texts' mean divergences."
        },
    )
    kl_chunked: bool = field(
        default=True, metadata={"help": "Compute the loss in chunks of the vocabulary, without holding all logits."}
    )
    inverse_loss_penalty: float = field(
        default=0.0, metadata={"help": "Weight of 1 / cross entropy in the loss, which holds off overfitting."}
    )
    reproduce_defects: bool = field(
        default=False,
        metadata={
            "help": "As the published code: pad at the left and count the prompt's length from there, so that prompt tokens "
            "are trained on, and measure the divergence one position late. Only to compare with its results."
        },
    )
    meteor_every: int = field(
        default=10,
        metadata={
            "help": "Measure the METEOR similarity of the kept completions at every so many generations of completions; 0: never."
        },
    )

    def __post_init__(self) -> None:
        self._check_values()
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO needs two completions for its baseline; this check is its last
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        self._check_groups()

    def _check_values(self) -> None:
        if self.num_generations < 1:
            raise ValueError(f"num_generations must be 1 or more, got {self.num_generations}")
        if not 1 <= self.top_k_completions <= self.num_generations:
            raise ValueError(
                f"top_k_completions must be from 1 to num_generations={self.num_generations}, got {self.top_k_completions}"
            )
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be 1 or more tokens, got {self.max_completion_length}")
        for name in ("beta", "inverse_loss_penalty", "meteor_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, known in (("kl_direction", KL_DIRECTIONS), ("kl_reduction", KL_REDUCTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not callable(self.completion_filter):
            if self.completion_filter not in COMPLETION_FILTERS:
                raise ValueError(
                    f"completion_filter must be one of {', '.join(COMPLETION_FILTERS)}, or a function, "
                    f"got {self.completion_filter!r}"
                )
            if (self.completion_filter == "threshold") != (self.reward_threshold is not None):
                raise ValueError(
                    f"reward_threshold belongs to completion_filter='threshold': got reward_threshold={self.reward_threshold} "
                    f"with completion_filter={self.completion_filter!r}"
                )
        if self.stop_regex is not None:
            try:
                re.compile(self.stop_regex)
            except re.error as error:
                raise ValueError(f"stop_regex {self.stop_regex!r} is no regular expression: {error}") from error

    def _check_groups(self) -> None:
        """Every process filters whole groups on its own, so that all of them train on equally many rows."""
        steps = self.steps_per_generation or 1
        completions = self.per_device_train_batch_size * steps
        if completions % self.num_generations:
            raise ValueError(
                f"a process samples per_device_train_batch_size * steps_per_generation = {self.per_device_train_batch_size} * "
                f"{steps} = {completions} completions at a time, which num_generations={self.num_generations} does not divide: "
                f"set per_device_train_batch_size to a multiple of {self.num_generations}, or gradient_accumulation_steps so "
                "that the product is one"
            )
        eval_generations = self.num_generations_eval or self.num_generations
        if self.eval_strategy != "no" and self.per_device_eval_batch_size % eval_generations:
            raise ValueError(
                f"per_device_eval_batch_size={self.per_device_eval_batch_size} is no multiple of the {eval_generations} "
                "completions of a prompt: change it or num_generations_eval"
            )

    @classmethod
    def mukobi2023(cls, output_dir: str | None = None, **overrides: Any) -> Self:
        """Settings and loss of the published code, its defects included (see `reproduce_defects`), to compare with it.

        16 completions of each of 2 prompts per step, the best of each trained on, 0.35 times the summed forward divergences,
        no end-of-sequence token, completions cut where another speaker begins. Its adapter was LoRA with r=4, alpha=32 and
        dropout 0.05 on the query and value projections, over 10000 prompts.
        """
        published: dict[str, Any] = {
            "per_device_train_batch_size": 32,
            "num_generations": 16,
            "top_k_completions": 1,
            "temperature": 1.0,
            "top_p": 0.95,
            "max_completion_length": 64,
            "stop_regex": MUKOBI_STOP_REGEX,
            "append_eos": False,
            "beta": 0.35,
            "kl_direction": "forward",
            "kl_reduction": "sum",
            "reproduce_defects": True,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 32,
            "weight_decay": 0.01,
            "max_grad_norm": 0.0,
            "num_train_epochs": 1,
            "seed": 66,
            "meteor_every": 1,
        }
        return cls(output_dir=output_dir, **{**published, **overrides})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "completion_filter": self._filter_name()}

    def __getstate__(self) -> dict[str, Any]:
        # a checkpoint stores these settings; a function may be local, and is passed again when training goes on
        return {**self.__dict__, "completion_filter": self._filter_name()}

    def _filter_name(self) -> str:
        chosen: Any = self.completion_filter
        return getattr(chosen, "__name__", type(chosen).__name__) if callable(chosen) else chosen


__all__ = ["MUKOBI_STOP_REGEX", "SuperHFConfig"]
