"""What the comparison of SuperHF says about its claims: differences between arms, with intervals, and verdicts from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from geobased.training.bootstrap import difference_interval
from geobased.training.superhf_experiment_settings import ARMS, NAMES, POLICIES, ExperimentSettings, chosen_options

Row = Mapping[str, Any]
REWARDS = ("reward", "held_out_reward", "rule_reward", "answers_from_record")
MEASURES = {
    "reward": "training reward",
    "held_out_reward": "held-out reward",
    "rule_reward": "reward of the rules",
    "answers_from_record": "answers from the record",
    "gap": "training reward less held-out reward",
    "similarity": "METEOR similarity",
}
WITHOUT_PRIOR = "superhf_without_prior"
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"


@dataclass(frozen=True)
class Comparison:
    """Mean of `first` less mean of `second` over seeds and test prompts, with a 95 % interval over both."""

    policy: str
    first: str
    second: str
    measure: str
    difference: float
    low: float
    high: float
    seeds: list[int]
    """Runs of each that count; with one of either, the interval is about prompts alone for it."""


@dataclass(frozen=True)
class Claim:
    """A claim as a comparison whose difference should be above 0."""

    text: str
    first: str
    second: str
    measure: str


CLAIMS = (
    Claim("SuperHF raises the training reward", "superhf", "base", "reward"),
    Claim("SuperHF raises the held-out reward", "superhf", "base", "held_out_reward"),
    Claim("SuperHF improves by the rules, which no arm sees", "superhf", "base", "rule_reward"),
    Claim("SuperHF makes answers right, not only well-formed", "superhf", "base", "answers_from_record"),
    Claim("SuperHF reaches a higher training reward than RLOO", "superhf", "rloo", "reward"),
    Claim("SuperHF reaches a higher held-out reward than RLOO", "superhf", "rloo", "held_out_reward"),
    Claim("SuperHF is better than RLOO by the rules", "superhf", "rloo", "rule_reward"),
    Claim("SuperHF is better than the best of n by the rules", "superhf", "best_of_n", "rule_reward"),
    Claim("SuperHF is better than DPO by the rules", "superhf", "dpo", "rule_reward"),
    Claim("SuperHF is better than SFT by the rules", "superhf", "sft", "rule_reward"),
    Claim("The prior narrows the gap to the held-out reward", WITHOUT_PRIOR, "superhf", "gap"),
    Claim("The prior keeps completions varied", WITHOUT_PRIOR, "superhf", "similarity"),
    Claim("The prior helps by the rules", "superhf", WITHOUT_PRIOR, "rule_reward"),
)


def marked_rows(settings: ExperimentSettings, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows in the experiment's order, each with "chosen": whether its settings are those that the first seed found best.

    The sweep's rows are chosen if they have the learning rate that SuperHF was given.
    """

    def is_chosen(row: Row) -> bool:
        swept = row["arm"] == "kl_sweep"
        best = chosen_options(settings, rows, row["policy"], "superhf" if swept else row["arm"])
        if best is None:
            return False
        return row["options"]["learning_rate"] == best["learning_rate"] if swept else row["options"] == best

    def place(row: Row) -> tuple[Any, ...]:
        return POLICIES.index(row["policy"]), ARMS.index(row["arm"]), row["seed"], *row["options"].values()

    return [{**row, "chosen": is_chosen(row)} for row in sorted(rows, key=place)]


def runs_of(rows: Sequence[Row], policy: str, arm: str) -> list[Row]:
    """Finished runs of an arm with its chosen settings; `WITHOUT_PRIOR` is the sweep's weight 0."""
    name, weight = ("kl_sweep", 0.0) if arm == WITHOUT_PRIOR else (arm, None)
    own = [row for row in rows if (row["policy"], row["arm"], row["chosen"]) == (policy, name, True) and not row.get("diverged")]
    return [row for row in own if weight is None or row["options"]["beta"] == weight]


def _values(rows: Sequence[Row], measure: str) -> torch.Tensor:
    """[runs, prompts] after training; of the similarity, which is of all completions together, [runs, 1]."""
    if measure == "similarity":
        return torch.tensor([[row["curve"][-1]["similarity"]] for row in rows])
    if measure == "gap":
        return _values(rows, "reward") - _values(rows, "held_out_reward")
    return torch.tensor([row["each"][measure] for row in rows])


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Differences between SuperHF and each other arm, and those that `CLAIMS` are about, as far as both were run.

    Args:
        rows: of `marked_rows`, with "each".
    """
    pairs = [("superhf", arm, measure) for arm in ARMS if arm not in ("superhf", "kl_sweep") for measure in REWARDS]
    pairs += [key for claim in CLAIMS if (key := (claim.first, claim.second, claim.measure)) not in pairs]
    found = []
    for policy in POLICIES:
        for first, second, measure in pairs:
            own, other = runs_of(rows, policy, first), runs_of(rows, policy, second)
            # a similarity is one number a run: it takes several
            if own and other and (measure != "similarity" or min(len(own), len(other)) > 1):
                difference, low, high = difference_interval(_values(own, measure), _values(other, measure))
                entry = Comparison(
                    policy=policy,
                    first=first,
                    second=second,
                    measure=measure,
                    difference=round(difference, 5),
                    low=round(low, 5),
                    high=round(high, 5),
                    seeds=[len(own), len(other)],
                )
                found.append(asdict(entry))
    return found


def verdicts(found: Sequence[Row]) -> list[dict[str, Any]]:
    """For each policy and claim whether it holds: yes or no where the interval excludes 0, else not decided.

    Args:
        found: of `comparisons`.
    """
    judged = []
    for policy in POLICIES:
        for claim in CLAIMS:
            key = (policy, claim.first, claim.second, claim.measure)
            for entry in found:
                if (entry["policy"], entry["first"], entry["second"], entry["measure"]) == key:
                    verdict = HOLDS if entry["low"] > 0 else FAILS if entry["high"] < 0 else OPEN
                    evidence = {name: entry[name] for name in ("difference", "low", "high", "seeds")}
                    judged.append(
                        {"policy": policy, "claim": claim.text, "verdict": verdict, "measure": claim.measure, **evidence}
                    )
    return judged


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """An entry for each policy and arm, the sweep's weights apart: "rows" of the chosen settings, and "means" after training.

    The means are those of the last point of the curves; perplexities stand under "perplexity/…".
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["chosen"] and not row.get("diverged"):
            found.setdefault((row["policy"], arm_name(row)), []).append(row)
    return [
        {
            "policy": policy,
            "name": name,
            "arm": own[0]["arm"],
            "seeds": len(own),
            "rows": own,
            "means": {key: mean_of([measures(row)[key] for row in own]) for key in measures(own[0])},
        }
        for (policy, name), own in found.items()
    ]


def measures(row: Row) -> dict[str, float | None]:
    """What was measured after training, and its cost."""
    last = dict(row["curve"][-1])
    perplexity = last.pop("perplexity")
    cost = {name: row[name] for name in ("completions", "tokens", "training_seconds")}
    return {**last, **{f"perplexity/{name}": value for name, value in perplexity.items()}, **cost}


def mean_of(values: Sequence[float | None]) -> float | None:
    """None where a value is missing."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if len(there) == len(values) else None


def arm_name(row: Row) -> str:
    """For readers; the sweep's with its weight."""
    return f"SuperHF, β = {row['options']['beta']:g}" if row["arm"] == "kl_sweep" else NAMES[row["arm"]]


__all__ = [
    "CLAIMS",
    "FAILS",
    "HOLDS",
    "MEASURES",
    "OPEN",
    "WITHOUT_PRIOR",
    "Claim",
    "Comparison",
    "arm_name",
    "comparisons",
    "marked_rows",
    "mean_of",
    "measures",
    "runs_of",
    "summary",
    "verdicts",
]
