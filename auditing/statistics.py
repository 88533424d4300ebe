"""Intervals, paired tests and curves of what was found."""

import math
from collections.abc import Sequence
from statistics import NormalDist

CURVE_POINTS = 41


def wilson_interval(successes: int, trials: int, coverage: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate. Raises `ValueError` for no trials, or more successes than trials."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials make no rate")
    z = NormalDist().inv_cdf(0.5 + coverage / 2)
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # at the ends rounding must not leave the rate outside
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test of paired successes: those of the first alone, of the second alone, and the two-sided p value."""
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, count) for count in range(min(only_first, only_second) + 1)) / 2**discordant
    return only_first, only_second, min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's method, in the same order."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def budget_grid(budget: float) -> list[float]:
    """Budgets from nothing to all, evenly spaced."""
    return [budget * step / (CURVE_POINTS - 1) for step in range(CURVE_POINTS)]


def solved_curve(spent_at_success: Sequence[float | None], budget: float) -> list[float]:
    """Share of items with a success within each budget of `budget_grid`."""
    found = [spent for spent in spent_at_success if spent is not None]
    return [sum(spent <= limit + 1e-9 for spent in found) / len(spent_at_success) for limit in budget_grid(budget)]


def loss_curve(curves: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[float | None]:
    """Mean over items of the lowest loss within each budget of `budget_grid`; None where some item has no loss yet."""
    values: list[float | None] = []
    for limit in budget_grid(budget):
        reached = [[loss for spent, loss in curve if spent <= limit + 1e-9] for curve in curves]
        values.append(sum(losses[-1] for losses in reached) / len(reached) if all(reached) else None)
    return values


def area_under(values: Sequence[float | None]) -> float | None:
    """Mean of a curve over the budgets where it is known; None if it is nowhere."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


__all__ = [
    "area_under",
    "budget_grid",
    "holm",
    "loss_curve",
    "mcnemar",
    "solved_curve",
    "wilson_interval",
]
