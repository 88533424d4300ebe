"""Callbacks of SuperHF training."""

import logging
import math
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class RewardHackingCallback(TrainerCallback):
    """Stops training, or warns, when the logged metrics say that the policy exploits its reward model.

    A bound that is None is not watched. Values are those that are logged, every `logging_steps`.

    Args:
        max_similarity: METEOR similarity of the kept completions; the published runs stay below 0.1, collapsed ones reach 0.4
            to 0.7. Needs `meteor_every` above 0.
        max_reward_gap: training reward less held-out reward of the kept completions, in units of the rewards. Needs
            `eval_reward_funcs`, on the scale of `reward_funcs`.
        max_gap_growth: rise of that gap over the first logged one, for reward models on different scales.
        min_distinct_2: share of different pairs of words among all of the kept completions.
        max_mean_length: tokens of a kept completion.
        patience: how many logs in a row may lie beyond a bound before it counts.
        action: "stop" ends the training after saving a checkpoint if `save_strategy` allows; "warn" only says so.

    Raises:
        ValueError: no bound, another action, or a `patience` below 0; when training begins, a metric that is not measured.
    """

    def __init__(
        self,
        *,
        max_similarity: float | None = None,
        max_reward_gap: float | None = None,
        max_gap_growth: float | None = None,
        min_distinct_2: float | None = None,
        max_mean_length: float | None = None,
        patience: int = 0,
        action: Literal["stop", "warn"] = "stop",
    ) -> None:
        bounds = {
            "max_similarity": max_similarity,
            "max_reward_gap": max_reward_gap,
            "max_gap_growth": max_gap_growth,
            "min_distinct_2": min_distinct_2,
            "max_mean_length": max_mean_length,
        }
        self.bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        if not self.bounds:
            raise ValueError(f"RewardHackingCallback watches nothing: set one of {', '.join(bounds)}")
        if action not in ("stop", "warn"):
            raise ValueError(f"action must be 'stop' or 'warn', got {action!r}")
        if patience < 0:
            raise ValueError(f"patience must be 0 or more, got {patience}")
        self.patience, self.action = patience, action
        self.first_gap: float | None = None
        self.times_beyond = dict.fromkeys(self.bounds, 0)
        self.reasons: list[str] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if "max_similarity" in self.bounds and not getattr(args, "meteor_every", 0):
            raise ValueError("max_similarity needs the METEOR similarity: set meteor_every=1 or more in SuperHFConfig")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # evaluation has its own names, and the last log of a run no rewards
        if not logs or "reward_filtered" not in logs:
            return
        if {"max_reward_gap", "max_gap_growth"} & set(self.bounds) and "reward_gap" not in logs:
            raise ValueError("the reward gap is not measured: pass eval_reward_funcs to SuperHFTrainer")
        for name, value in self._values(logs).items():
            beyond = value < self.bounds[name] if name.startswith("min") else value > self.bounds[name]
            self.times_beyond[name] = self.times_beyond[name] + 1 if beyond else 0
            if self.times_beyond[name] > self.patience:
                self._act(f"step {state.global_step}: {value:.4g} is beyond {name}={self.bounds[name]:g}", control)

    def _values(self, logs: dict[str, Any]) -> dict[str, float]:
        """The watched values that this log has; METEOR is not measured every time."""
        gap = logs.get("reward_gap")
        if self.first_gap is None and gap is not None and math.isfinite(gap):
            self.first_gap = gap
        values = {
            "max_similarity": logs.get("similarity/meteor", logs.get("similarity/meteor_exact_stem")),
            "max_reward_gap": gap,
            "max_gap_growth": None if gap is None or self.first_gap is None else gap - self.first_gap,
            "min_distinct_2": logs.get("filtered/distinct_2"),
            "max_mean_length": logs.get("filtered/mean_length"),
        }
        return {name: value for name, value in values.items() if name in self.bounds and value is not None}

    def _act(self, reason: str, control: TrainerControl) -> None:
        self.reasons.append(reason)
        if self.action == "stop":
            control.should_training_stop = True
            logger.warning("training stops: the reward is being exploited (%s)", reason)
        else:
            logger.warning("the reward may be being exploited (%s)", reason)


__all__ = ["RewardHackingCallback"]
