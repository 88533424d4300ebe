"""One question, asked with every technique that each level of access permits, at the same budget."""

import statistics as numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .access import BudgetExhaustedError, Capability, access_name, capability_names
from .questions import AuditQuestion
from .statistics import area_under, budget_grid, holm, loss_curve, mcnemar, solved_curve, wilson_interval
from .target import AuditTarget
from .technique import Picture, Progress, Technique, derived_seed

Report = Callable[[str], None]


@dataclass
class Findings:
    """Results as JSON values, and the pictures that techniques kept: (technique, item, picture)."""

    results: dict[str, Any]
    pictures: list[tuple[str, str, Picture]] = field(default_factory=list)


def run_question(
    target: AuditTarget,
    question: AuditQuestion,
    techniques: Sequence[Technique],
    levels: Mapping[str, Capability],
    *,
    seed: int = 0,
    report: Report | None = None,
) -> Findings:
    """Runs each technique once, at the lowest level that permits it, on every item with the question's budget.

    A level's result is the best of all techniques that it permits, those of lower levels included, so it never falls as access
    grows. Techniques that no user could do the like of (`reachable` is false) are listed, but do not count there.

    Args:
        target: opened with a grant that holds all levels.
        levels: grants by name, in the order in which they are reported.
        seed: of everything random.
        report: gets a line for each technique that is done.

    Raises:
        ValueError: a question of another kind than the target; two techniques of the same name; no technique is permitted.
    """
    if question.kind != target.kind:
        raise ValueError(f"the question is about {question.kind}s, the model takes {target.kind}s")
    if len({technique.name for technique in techniques}) < len(techniques):
        raise ValueError("two techniques have the same name: ask them in audits of their own")
    findings = Findings({"techniques": [], "not_permitted": [], "levels": [], "comparisons": []})
    for technique in techniques:
        level = next((name for name, grant in levels.items() if not technique.needs & ~grant), None)
        if technique.kind != question.kind or level is None:
            why = f"it takes {technique.kind}s" if technique.kind != question.kind else _missing(technique, levels)
            findings.results["not_permitted"].append({"name": technique.name, "why": why})
            continue
        row = _run_technique(target, question, technique, level, levels[level], seed, findings)
        findings.results["techniques"].append(row)
        if report is not None:
            report(f"{technique.name} ({level}): {row['finding']}")
    if not findings.results["techniques"]:
        refused = "; ".join(f"{row['name']}: {row['why']}" for row in findings.results["not_permitted"])
        raise ValueError(f"no technique is permitted: {refused}")
    findings.results["budgets"] = budget_grid(question.budget)
    findings.results["levels"] = _levels(question, techniques, findings.results["techniques"], levels)
    findings.results["comparisons"] = _comparisons(findings.results["levels"])
    return findings


def _missing(technique: Technique, levels: Mapping[str, Capability]) -> str:
    lacking = [technique.needs & ~grant for grant in levels.values()]
    least = min(lacking, key=lambda capabilities: len(capability_names(capabilities)))
    return f"it needs {', '.join(capability_names(least))}"


def _run_technique(
    target: AuditTarget,
    question: AuditQuestion,
    technique: Technique,
    level: str,
    grant: Capability,
    seed: int,
    findings: Findings,
) -> dict[str, Any]:
    items = []
    if technique.whole_set:
        budget = question.budget * len(question.items)
        with target.scope(technique.name, technique.needs, budget=budget, item="*", grant=grant) as metered:
            progress = [Progress(question, item, lambda: metered.spent) for item in question.items]
            ended = _until_spent(lambda: technique.attempt_all(metered, question, progress, derived_seed(seed, technique.name)))
            # what all cost together is shared out evenly
            items = [_item(one, metered.spent / len(progress), ended, len(progress)) for one in progress]
    else:
        progress = []
        for item in question.items:
            scope = {"budget": question.budget, "item": item.id, "grant": grant}
            with target.scope(technique.name, technique.needs, **scope) as metered:  # type: ignore[arg-type]
                one = Progress(question, item, lambda metered=metered: metered.spent)  # type: ignore[misc]
                item_seed = derived_seed(seed, technique.name, item.id)
                ended = _until_spent(
                    lambda metered=metered, item=item, one=one, item_seed=item_seed: technique.attempt(  # type: ignore[misc]
                        metered, question, item, one, item_seed
                    )
                )
                items.append(_item(one, metered.spent, ended, 1))
            progress.append(one)
    for one in progress:
        findings.pictures += [(technique.name, one.item.id, picture) for picture in one.pictures]
    row = {
        "name": technique.name,
        "settings": technique.to_dict(),
        "what": " ".join((type(technique).__doc__ or "").split("\n\n")[0].split()),
        "needs": capability_names(technique.needs),
        "level": level,
        "reachable": technique.reachable,
        "perturbation_unit": technique.perturbation_unit,
        "spent": sum(item["spent"] for item in items),
        **_rate(items, question.budget),
        "loss_curve": loss_curve([item["curve"] for item in items], question.budget),
        "median_perturbation": _median([item["perturbation"] for item in items if item["success"]]),
        "items": items,
    }
    return {**row, "mean_loss_over_budget": area_under(row["loss_curve"])}


def _until_spent(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except BudgetExhaustedError:
        return "budget spent"
    return "finished"


def _item(progress: Progress, spent: float, ended: str, shared: int) -> dict[str, Any]:
    at_success = progress.spent_at_success
    return {
        "id": progress.item.id,
        "success": progress.success,
        "spent": spent,
        "ended": ended,
        "spent_at_success": None if at_success is None else at_success / shared,
        "best_loss": progress.best_loss,
        "curve": [[cost / shared, loss] for cost, loss in progress.curve],
        "answer": progress.answer,
        "candidate": progress.candidate,
        "perturbation": None if progress.perturbation is None else float(progress.perturbation),
        "measures": progress.measures,
    }


def _rate(items: Sequence[Mapping[str, Any]], budget: float) -> dict[str, Any]:
    """Success rate, its interval, its curve over the budget, and what may be said of it."""
    successes = sum(item["success"] for item in items)
    low, high = wilson_interval(successes, len(items))
    if successes:
        finding = f"found on {successes} of {len(items)} items within a budget of {budget:g}"
    else:
        # which finitely many tries cannot show to be absent
        finding = f"not found within a budget of {budget:g} on any of {len(items)} items"
    return {
        "successes": successes,
        "num_items": len(items),
        "rate": successes / len(items),
        "low": low,
        "high": high,
        "finding": finding,
        "solved_curve": solved_curve([item["spent_at_success"] for item in items], budget),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return numbers.median(known) if known else None


def _levels(
    question: AuditQuestion,
    techniques: Sequence[Technique],
    rows: Sequence[Mapping[str, Any]],
    levels: Mapping[str, Capability],
) -> list[dict[str, Any]]:
    needs = {technique.name: technique.needs for technique in techniques}
    found: list[dict[str, Any]] = []
    for name, grant in levels.items():
        permitted = [row for row in rows if row["reachable"] and not needs[row["name"]] & ~grant]
        if not permitted:
            found.append({"name": name, "access": access_name(grant), "techniques": []})
            continue
        best = [_best([row["items"][place] for row in permitted]) for place in range(len(question.items))]
        found.append(
            {
                "name": name,
                "access": access_name(grant),
                "techniques": [row["name"] for row in permitted],
                **_rate(best, question.budget),
                "items": best,
            }
        )
    return found


def _best(tries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What techniques of a level found on one item: any success, and the cheapest."""
    costs = [item["spent_at_success"] for item in tries if item["spent_at_success"] is not None]
    return {
        "id": tries[0]["id"],
        "success": any(item["success"] for item in tries),
        "spent_at_success": min(costs, default=None),
    }


def _comparisons(levels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Levels against each other on the same items."""
    measured = [level for level in levels if level["techniques"]]
    pairs = [(first, second) for place, first in enumerate(measured) for second in measured[place + 1 :]]
    return paired_tests([(a["name"], a["items"], b["name"], b["items"]) for a, b in pairs])


def paired_tests(
    pairs: Sequence[tuple[str, Sequence[Mapping[str, Any]], str, Sequence[Mapping[str, Any]]]],
) -> list[dict[str, Any]]:
    """McNemar's exact tests of (name, items, name, items), with p values adjusted for their number by Holm's method."""
    rows: list[dict[str, Any]] = []
    for first, first_items, second, second_items in pairs:
        only_first, only_second, p_value = mcnemar(
            [item["success"] for item in first_items], [item["success"] for item in second_items]
        )
        rows.append({"first": first, "second": second, "only_first": only_first, "only_second": only_second, "p_value": p_value})
    adjusted = holm([row["p_value"] for row in rows])
    return [{**row, "p_value_holm": p_value} for row, p_value in zip(rows, adjusted, strict=True)]


__all__ = ["Findings", "paired_tests", "run_question"]
