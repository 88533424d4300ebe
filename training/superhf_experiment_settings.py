"""What the comparison of SuperHF with its alternatives consists of: settings, presets, and the order of its runs."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BASED, LLAMA = "based-mini", "llama"
POLICIES = (BASED, LLAMA)
NAMES = {
    "base": "no training",
    "best_of_n": "best of n",
    "superhf": "SuperHF",
    "rloo": "RLOO",
    "dpo": "DPO",
    "sft": "SFT",
    "kl_sweep": "SuperHF, other KL weights",
}
ARMS = tuple(NAMES)
# of the second policy, which is there to see whether the architecture matters
LLAMA_ARMS = ("base", "best_of_n", "superhf", "rloo")
UNTRAINED = ("base", "best_of_n")
# what a row tells about the validation prompts, and by which of it settings are chosen
VALIDATION = {"reward": "validation_reward", "held_out_reward": "validation_held_out_reward"}
CHOSEN_BY = VALIDATION["held_out_reward"]

Options = Mapping[str, float]


@dataclass(frozen=True)
class LlamaTwin:
    """A Llama with about as many parameters as based-mini, trained on documents like its own."""

    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_parameters: int = 6_700_288
    """The width of the MLPs makes up for what the attention takes."""
    steps: int = 1500
    batch_size: int = 64
    context_length: int = 1024
    num_short: int = 30_000
    num_long: int = 36_000
    """Documents of at most 160 and at most 400 words."""


@dataclass(frozen=True)
class ExperimentSettings:
    """Everything that the results depend on, except the text files and the policies' weights."""

    steps: int = 60
    """Optimizer steps of a run; SuperHF and RLOO sample anew for each."""
    prompts_per_step: int = 8
    num_generations: int = 16
    """Completions of a prompt, in training and for the best of n."""
    max_new_tokens: int = 24
    temperature: float = 1.0
    top_p: float = 0.95
    warmup: float = 0.1
    """Share of the steps."""
    num_seeds: int = 3
    kl_weight: float = 0.35
    """SuperHF's `beta`, as published."""
    kl_sweep: tuple[float, ...] = (0.0, 0.05, 0.2, 1.0)
    superhf_learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3)
    rloo_learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    rloo_kl_weights: tuple[float, ...] = (0.0, 0.05)
    dpo_learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    dpo_beta: float = 0.1
    sft_learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    num_pairs: int = 4000
    """Of each half of the training places."""
    num_held_out_pairs: int = 500
    reward_batch_size: int = 32
    reward_learning_rate: float = 3e-4
    num_validation_prompts: int = 128
    """Of training places, other documents than those trained on: what learning rates are chosen on."""
    num_test_prompts: int = 256
    """Of held-out places."""
    num_evaluations: int = 4
    """In the course of a run, at equal distances; one more before it."""
    num_perplexity_documents: int = 60
    num_perplexity_windows: int = 128
    """Of held-out text, if there is any."""
    llama: LlamaTwin = field(default_factory=LlamaTwin)

    @property
    def num_completions(self) -> int:
        """That every arm which samples gets to see."""
        return self.steps * self.prompts_per_step * self.num_generations


PRESETS = {
    # does everything run?
    "smoke": ExperimentSettings(
        steps=2,
        prompts_per_step=2,
        num_generations=4,
        max_new_tokens=8,
        num_seeds=1,
        kl_sweep=(0.0,),
        superhf_learning_rates=(1e-4,),
        rloo_learning_rates=(1e-4,),
        rloo_kl_weights=(0.05,),
        dpo_learning_rates=(1e-4,),
        sft_learning_rates=(1e-4,),
        num_pairs=32,
        num_held_out_pairs=16,
        reward_batch_size=8,
        num_validation_prompts=4,
        num_test_prompts=8,
        num_evaluations=1,
        num_perplexity_documents=2,
        num_perplexity_windows=2,
        llama=LlamaTwin(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_parameters=200_000, steps=2, batch_size=2
        ),
    ),
    # for one or two large GPUs
    "standard": ExperimentSettings(),
}


@dataclass(frozen=True)
class Run:
    """One training with its evaluation."""

    policy: str
    arm: str
    """"kl_sweep" is SuperHF under another weight."""
    seed: int
    options: tuple[tuple[str, float], ...] = ()
    """`learning_rate` and `beta`, where the arm has them."""

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join([self.policy, self.arm, *(f"{key}={value:g}" for key, value in self.options), f"seed={self.seed}"])


def candidates(settings: ExperimentSettings, arm: str) -> list[dict[str, float]]:
    """The settings that the first seed tries, of which the others get the best."""
    if arm in UNTRAINED:
        return [{}]
    if arm == "superhf":
        return [{"learning_rate": rate, "beta": settings.kl_weight} for rate in settings.superhf_learning_rates]
    if arm == "rloo":
        grid = itertools.product(settings.rloo_learning_rates, settings.rloo_kl_weights)
        return [{"learning_rate": rate, "beta": weight} for rate, weight in grid]
    if arm == "dpo":
        return [{"learning_rate": rate, "beta": settings.dpo_beta} for rate in settings.dpo_learning_rates]
    return [{"learning_rate": rate} for rate in settings.sft_learning_rates]


def check_choice(names: Sequence[str], known: Sequence[str], option: str) -> None:
    """Raises `ValueError` where a name is not known, or there is none."""
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"{option}: {', '.join(unknown) or 'nothing'} is none of {', '.join(known)}")


def chosen_options(settings: ExperimentSettings, rows: Sequence[Mapping[str, Any]], policy: str, arm: str) -> Options | None:
    """The candidate whose first seed has the highest held-out reward on the validation prompts; None until all were tried.

    By the training reward, settings under which the reward model is exploited would be chosen.
    """
    tried = [row for row in rows if (row["policy"], row["arm"], row["seed"]) == (policy, arm, 0)]
    wanted = candidates(settings, arm)
    found = [row for options in wanted for row in tried if row["options"] == options]
    if len(found) < len(wanted):
        return None
    rewards = [-math.inf if row[CHOSEN_BY] is None else row[CHOSEN_BY] for row in found]  # None: it diverged
    return found[rewards.index(max(rewards))]["options"]


def planned_runs(
    settings: ExperimentSettings,
    rows: Sequence[Mapping[str, Any]],
    arms: Sequence[str] = ARMS,
    policies: Sequence[str] = POLICIES,
) -> list[Run]:
    """What can begin now, in the order of its importance: `rows` are finished, and what waits for a choice is left out.

    Raises:
        ValueError: an unknown arm or policy, or the sweep without the arm whose learning rate it takes.
    """
    check_choice(arms, ARMS, "arms")
    check_choice(policies, POLICIES, "policies")
    if "kl_sweep" in arms and "superhf" not in arms:
        raise ValueError("arms: kl_sweep takes the learning rate of superhf: add superhf")
    done = {Run(row["policy"], row["arm"], row["seed"], tuple(row["options"].items())) for row in rows}
    order = (run for policy in policies for run in _of_policy(settings, rows, policy, arms))
    return [run for run in order if run not in done]


def _of_policy(
    settings: ExperimentSettings, rows: Sequence[Mapping[str, Any]], policy: str, arms: Sequence[str]
) -> Iterator[Run]:
    own = [arm for arm in ARMS if arm in arms and (policy == BASED or arm in LLAMA_ARMS)]
    compared = [arm for arm in own if arm != "kl_sweep"]
    for arm in sorted(compared, key=lambda arm: arm in UNTRAINED):  # what takes longest first
        for options in candidates(settings, arm):
            yield Run(policy, arm, 0, tuple(options.items()))
    for seed in range(1, settings.num_seeds):
        for arm in compared:
            best = chosen_options(settings, rows, policy, arm)
            if best is not None:
                yield Run(policy, arm, seed, tuple(best.items()))
    best = chosen_options(settings, rows, policy, "superhf") if "kl_sweep" in own else None
    if best is not None:
        for seed in range(settings.num_seeds):
            for weight in settings.kl_sweep:
                yield Run(policy, "kl_sweep", seed, tuple({**best, "beta": weight}.items()))


def num_runs(settings: ExperimentSettings, arms: Sequence[str] = ARMS, policies: Sequence[str] = POLICIES) -> int:
    """How many runs there are in all."""
    total = 0
    for policy in policies:
        for arm in arms:
            if policy == BASED or arm in LLAMA_ARMS:
                sweep = len(settings.kl_sweep) * settings.num_seeds
                total += sweep if arm == "kl_sweep" else len(candidates(settings, arm)) + settings.num_seeds - 1
    return total


__all__ = [
    "ARMS",
    "BASED",
    "CHOSEN_BY",
    "LLAMA",
    "LLAMA_ARMS",
    "NAMES",
    "POLICIES",
    "PRESETS",
    "UNTRAINED",
    "VALIDATION",
    "ExperimentSettings",
    "LlamaTwin",
    "Run",
    "candidates",
    "check_choice",
    "chosen_options",
    "num_runs",
    "planned_runs",
]
