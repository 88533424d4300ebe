"""A sweep over MQAR beside the figure of state size against recall in the paper on BASED (Arora et al. 2024, figure 2).

The paper prints no numbers for that figure: those here were read off the picture, so that they hold to about 0.02 of accuracy
and a tenth of a power of two. What is said about a sweep is computed from its entries.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .pareto import BASED_FAMILIES, Entry, by_family, family_name, pareto_frontier, readable_bytes

# how far an accuracy may be from a value that was read off before it counts as different
READING_ERROR = 0.02
# a configuration stands beside a point of the figure if their state sizes differ by at most this power of two
SIZE_TOLERANCE = 0.5
# tokens/pairs of its examples; a sweep over others is something else
FIGURE2_TESTS = ("64/4", "64/8", "64/16", "128/32", "256/64", "512/128", "1024/256")
CLAIMED_SIZE, CLAIMED_ACCURACY = 16.3, 0.97
# beside BASED along the frontiers
RIVALS = ("mamba2", "gated_deltanet", "sliding_window")


@dataclass(frozen=True, slots=True)
class FigurePoint:
    """A point of the figure: log2 of the state's bytes (None: anywhere), accuracy, and which of ours it is laid beside."""

    model: str
    log2_bytes: float | None
    accuracy: float
    family: str | None
    bound: Literal["about", "at least", "at most"] = "about"

    @property
    def size(self) -> str:
        """As "2^16.3"."""
        return "any" if self.log2_bytes is None else f"2^{self.log2_bytes:g}"

    @property
    def reading(self) -> str:
        """As "0.97" or "≥ 0.99"."""
        return {"about": "", "at least": "≥ ", "at most": "≤ "}[self.bound] + f"{self.accuracy:.2f}"


FIGURE2 = (
    FigurePoint("BASED", 12.5, 0.54, "based"),
    FigurePoint("BASED", 13.5, 0.71, "based"),
    FigurePoint("BASED", 14.5, 0.82, "based"),
    FigurePoint("BASED", 15.3, 0.89, "based"),
    FigurePoint("BASED", 16.3, 0.97, "based"),
    FigurePoint("BASED", 17.3, 0.99, "based", "at least"),
    # the figure has Mamba, the sweep Mamba-2
    FigurePoint("Mamba", 16.0, 0.80, "mamba2"),
    FigurePoint("Mamba", 18.0, 0.91, "mamba2"),
    FigurePoint("sliding window", 16.0, 0.51, "sliding_window"),
    FigurePoint("sliding window", 18.0, 0.80, "sliding_window"),
    FigurePoint("sliding window", 20.0, 1.00, "sliding_window"),
    FigurePoint("H3", None, 0.36, None, "at most"),
)


@dataclass(frozen=True, slots=True)
class FigureLine:
    """A point of the figure beside the configuration of ours with the nearest state size, and the verdict."""

    point: FigurePoint
    entry: Entry | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement of the paper, whether it holds in the sweep (None: cannot be told), and what that rests on."""

    claim: str
    holds: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        return "not measured" if self.holds is None else "holds" if self.holds else "does not hold"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What of the paper's figure a sweep reproduces; `not_compared` says why nothing was compared."""

    lines: list[FigureLine]
    statements: list[Statement]
    not_compared: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "lines": [
                {**asdict(line.point), "ours": asdict(line.entry) if line.entry else None, "verdict": line.verdict}
                for line in self.lines
            ],
            "statements": [{**asdict(statement), "verdict": statement.verdict} for statement in self.statements],
            "not_compared": self.not_compared,
        }


def compare_with_figure(entries: Sequence[Entry]) -> Comparison:
    """Lays entries beside the points of the figure and checks its statements.

    Nothing is compared if the entries were tested on other segments than the figure's.
    """
    other = sorted({test for entry in entries for test in entry.accuracy_by_test} ^ set(FIGURE2_TESTS))
    if entries and other:
        return Comparison([], [], f"the test segments are not those of the paper's figure ({', '.join(other)})")
    return Comparison(
        lines=[_line(point, entries) for point in FIGURE2],
        statements=[_claimed_accuracy(entries), *(_above(rival, entries) for rival in RIVALS), _frontier(entries)],
    )


def _line(point: FigurePoint, entries: Sequence[Entry]) -> FigureLine:
    if point.family is None or point.log2_bytes is None:
        return FigureLine(point, None, f"not measured: the sweep has no {point.model}")
    size = point.log2_bytes
    own = [entry for entry in entries if entry.family == point.family]
    near = [entry for entry in own if abs(entry.log2_bytes - size) <= SIZE_TOLERANCE]
    if not near:
        return FigureLine(point, None, "not measured: no configuration of that size" if own else "not measured")
    entry = min(near, key=lambda e: (abs(e.log2_bytes - size), -e.accuracy.mean))
    return FigureLine(point, entry, _verdict(point, entry.accuracy.mean))


def _verdict(point: FigurePoint, accuracy: float) -> str:
    difference = accuracy - point.accuracy
    if point.bound == "at least":
        return "reproduced" if difference >= 0 else f"lower by {-difference:.3f}"
    if abs(difference) <= READING_ERROR + 1e-9:
        return "reproduced"
    return f"higher by {difference:.3f}" if difference > 0 else f"lower by {-difference:.3f}"


def _claimed_accuracy(entries: Sequence[Entry]) -> Statement:
    claim = f"BASED reaches {CLAIMED_ACCURACY} with a state of 2^{CLAIMED_SIZE} bytes"
    small = [entry for entry in entries if entry.family == "based" and entry.log2_bytes <= CLAIMED_SIZE]
    if not small:
        return Statement(claim, None, "the sweep has no BASED of that size")
    best = pareto_frontier(small)[-1]
    low = CLAIMED_SIZE - SIZE_TOLERANCE
    if best.accuracy.mean < CLAIMED_ACCURACY and max(entry.log2_bytes for entry in small) < low:
        return Statement(claim, None, f"the sweep has no BASED from 2^{low:g} to 2^{CLAIMED_SIZE} bytes")
    size = f"{readable_bytes(best.state_bytes)} (2^{best.log2_bytes:.1f})"
    evidence = f"{best.label}: {best.accuracy.mean:.4f} with {size}, compared to the claim's two decimals"
    # a value read off a figure has no third decimal
    return Statement(claim, round(best.accuracy.mean, 2) >= CLAIMED_ACCURACY, evidence)


def interpolated_accuracy(entries: Sequence[Entry], log2_bytes: float) -> float:
    """Accuracy of one family at a state size: linear in log2 of the bytes between the two neighbours on its frontier.

    Beyond the frontier's last point, up to the family's largest state, it stays level: more state was measured to bring nothing.

    Raises:
        ValueError: the size is outside of what was measured.
    """
    sizes = [entry.log2_bytes for entry in entries]
    if not sizes or not min(sizes) <= log2_bytes <= max(sizes):
        raise ValueError(f"no accuracy at 2^{log2_bytes:.2f} bytes: nothing was measured there")
    frontier = pareto_frontier(entries)
    after = next((i for i, entry in enumerate(frontier) if entry.log2_bytes >= log2_bytes), None)
    if after is None:
        return frontier[-1].accuracy.mean
    if after == 0:
        return frontier[0].accuracy.mean
    low, high = frontier[after - 1], frontier[after]
    share = (log2_bytes - low.log2_bytes) / (high.log2_bytes - low.log2_bytes)
    return low.accuracy.mean + share * (high.accuracy.mean - low.accuracy.mean)


def _above(rival: str, entries: Sequence[Entry]) -> Statement:
    """Compares two families at every state size of either's frontier that lies within what was measured of both."""
    claim = f"BASED is above {family_name(rival)} at every state size that both have"
    based, other = (by_family(entries).get(family, []) for family in ("based", rival))
    if not based or not other:
        return Statement(claim, None, f"the sweep has no {family_name(rival if based else 'based')}")
    low = max(min(entry.log2_bytes for entry in family) for family in (based, other))
    high = min(max(entry.log2_bytes for entry in family) for family in (based, other))
    if low > high:
        return Statement(claim, None, "their state sizes do not overlap")
    points = {entry.log2_bytes for family in (based, other) for entry in pareto_frontier(family)}
    sizes = sorted({low, high} | {size for size in points if low <= size <= high})
    margins = {size: interpolated_accuracy(based, size) - interpolated_accuracy(other, size) for size in sizes}
    below = [size for size, margin in margins.items() if margin <= 0]
    least = min(margins, key=lambda size: margins[size])
    evidence = (
        f"above at {len(sizes) - len(below)} of {len(sizes)} sizes from 2^{low:.1f} to 2^{high:.1f} bytes; "
        f"smallest margin {margins[least]:+.3f} at 2^{least:.1f}"
    )
    return Statement(claim, not below, evidence)


def _frontier(entries: Sequence[Entry]) -> Statement:
    claim = "Configurations of BASED make up the frontier of state size against recall, up to its largest state"
    based = [entry for entry in entries if entry.family in BASED_FAMILIES and math.isfinite(entry.log2_bytes)]
    if not based or len(based) == len(entries):
        return Statement(claim, None, "the sweep has nothing beside BASED" if based else "the sweep has no BASED")
    smallest, largest = min(entry.state_bytes for entry in based), max(entry.state_bytes for entry in based)
    # below BASED's smallest state the frontier belongs to whatever is that small
    frontier = [entry for entry in pareto_frontier(entries) if smallest <= entry.state_bytes <= largest]
    others = [entry.label for entry in frontier if entry.family not in BASED_FAMILIES]
    shares = f"{len(frontier) - len(others)} of {len(frontier)} points"
    evidence = f"{shares} from {readable_bytes(smallest)} to {readable_bytes(largest)}"
    return Statement(claim, not others, evidence + (f"; the others: {', '.join(others)}" if others else ""))


def verdict_table(comparison: Comparison) -> str:
    """Markdown: the figure's points beside ours, then the statements; or why there is nothing to compare."""
    if comparison.not_compared:
        return f"Not compared: {comparison.not_compared}."
    lines = ["| in the figure | state | accuracy, read off | ours | state | accuracy | verdict |"]
    lines.append("|---|---:|---:|---|---:|---:|---|")
    for line in comparison.lines:
        point, entry = line.point, line.entry
        ours = (entry.label, f"2^{entry.log2_bytes:.1f}", str(entry.accuracy)) if entry else ("", "", "")
        lines.append("| " + " | ".join([point.model, point.size, point.reading, *ours, line.verdict]) + " |")
    lines += ["", "| statement | verdict | evidence |", "|---|---|---|"]
    lines += [f"| {s.claim} | **{s.verdict}** | {s.evidence} |" for s in comparison.statements]
    return "\n".join(lines)


__all__ = [
    "FIGURE2",
    "FIGURE2_TESTS",
    "READING_ERROR",
    "SIZE_TOLERANCE",
    "Comparison",
    "FigureLine",
    "FigurePoint",
    "Statement",
    "compare_with_figure",
    "interpolated_accuracy",
    "verdict_table",
]
