"""What the approximation experiment's results say: tables of errors, and claims with their verdicts.

Two models are told apart on a target where all seeds of the one err less than all seeds of the other: with five seeds each,
chance alone does that once in 126 times.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .sumformer_experiment import entry_key
from .sumformer_experiment_models import FAMILIES
from .sumformer_experiment_settings import PRESETS, Preset
from .superhf_experiment_verdicts import FAILS, HOLDS, OPEN

IN_PART = "holds on some targets"
EQUIVARIANT = 1e-3
"""Largest difference, in standard deviations of the target, that rounding in float32 explains."""
# who is said to err less than whom
CLAIMS = (
    ("transformer_2", "sumformer"),
    ("sumformer_stacked", "sumformer"),
    ("sumformer_bilinear", "sumformer"),
    ("sumformer_fourier_bilinear", "sumformer"),
    ("sumformer_polynomial", "sumformer"),
    ("sumformer_stacked", "transformer_2"),
    ("sumformer_fourier_bilinear", "transformer_2"),
    ("sumformer", "deep_sets"),
    ("sumformer_stacked", "set_transformer"),
    ("transformer_2", "transformer_1"),
    ("transformer_2", "linformer"),
    ("transformer_2", "performer_64"),
    ("performer_256", "performer_16"),
)
FASTER = ("sumformer", "set_transformer", "linformer", "performer_64")
"""Linear in n; whether they take less time than two Transformer layers."""

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A claim, whether it holds, and the numbers that say so."""

    claim: str
    verdict: str
    evidence: str


def title(target: str) -> str:
    """A target's or ladder's name in running text."""
    return target.replace("_", " ")


def ladder_entries(results: Mapping[str, Any], ladder: str) -> list[Entry]:
    """Entries of a ladder that have a seed, in the ladder's order."""
    own = preset_of(results).ladders.get(ladder)
    if own is None:
        return []
    place = {architecture: i for i, architecture in enumerate(own.architectures)}
    found = [(place[key], entry) for entry in results["entries"] if (key := entry_key(entry)[0]) in place and measured(entry)]
    found = [(i, entry) for i, entry in found if entry["target"] in own.targets]
    return [entry for _, entry in sorted(found, key=lambda pair: (own.targets.index(pair[1]["target"]), pair[0]))]


def preset_of(results: Mapping[str, Any]) -> Preset:
    """The preset that the results are of.

    Raises `ValueError` where there is none of this name.
    """
    if results["preset"] not in PRESETS:
        raise ValueError(f"the results are of preset {results['preset']!r}, which is none of {', '.join(PRESETS)}")
    return PRESETS[results["preset"]]


def measured(entry: Entry, measure: str = "nmse") -> list[float]:
    """The values of all seeds whose training did not diverge."""
    return [value for value in entry[measure] if value is not None]


def by_family(entries: Iterable[Entry], target: str) -> dict[str, Entry]:
    """Family -> its entry of this target."""
    return {entry["family"]: entry for entry in entries if entry["target"] == target}


def targets_of(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry["target"] for entry in entries))


def errs_less(a: Entry, b: Entry) -> bool | None:
    """Whether all seeds of a err less than all seeds of b; `None` where neither does, or one has a single seed."""
    x, y = measured(a), measured(b)
    if min(len(x), len(y)) < 2:
        return None
    return True if max(x) < min(y) else False if min(x) > max(y) else None


def findings(results: Mapping[str, Any]) -> list[Finding]:
    """Every claim for which there are entries."""
    entries = ladder_entries(results, "models")
    found = [claim for pair in CLAIMS if (claim := _comparison(entries, *pair)) is not None]
    found += _equivariance(entries)
    for ladder in ("latent, equal parameters", "latent, equal psi"):
        found += _latent(ladder_entries(results, ladder), ladder.removeprefix("latent, "))
    found += _bound(ladder_entries(results, "latent, numbers"))
    found += _lengths(entries)
    found += [claim for family in FASTER if (claim := _times(results.get("times", []), family, "transformer_2")) is not None]
    return found + _plateau(results["entries"])


def _comparison(entries: Sequence[Entry], better: str, worse: str) -> Finding | None:
    sides: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for target in targets_of(entries):
        own = by_family(entries, target)
        if better in own and worse in own:
            a, b = own[better], own[worse]
            ratio = median(measured(b)) / median(measured(a))
            sides[errs_less(a, b)].append(f"{title(target)} ({ratio:{'.2g' if ratio < 100 else ',.0f'}})")
    if not any(sides.values()):
        return None
    words = {True: "less", False: "more", None: "not told apart"}
    evidence = "; ".join(f"{word}: {', '.join(sides[side])}" for side, word in words.items() if sides[side])
    verdict = OPEN if not (sides[True] or sides[False]) else FAILS if not sides[True] else IN_PART
    if sides[True] and not (sides[False] or sides[None]):
        verdict = HOLDS
    claim = f"{FAMILIES[better].title} errs less than {FAMILIES[worse].title} (in brackets: how many times)"
    return Finding(claim, verdict, evidence)


def _equivariance(entries: Sequence[Entry]) -> list[Finding]:
    errors: dict[str, float] = {}
    for entry in entries:
        errors[entry["family"]] = max(errors.get(entry["family"], 0.0), *measured(entry, "equivariance_error"), 0.0)
    if "linformer" not in errors or len(errors) == 1:
        return []
    linformer = errors.pop("linformer")
    holds = linformer > EQUIVARIANT >= max(errors.values())
    evidence = f"largest difference, in deviations: Linformer {linformer:.2g}, all others {max(errors.values()):.1e}"
    return [Finding("All models but Linformer are permutation equivariant", HOLDS if holds else FAILS, evidence)]


def _latent(entries: Sequence[Entry], kind: str) -> list[Finding]:
    """Whether the error falls with d' all the way."""
    best, falling = [], []
    for target in targets_of(entries):
        own = [(entry["latent_size"], median(measured(entry))) for entry in entries if entry["target"] == target]
        if len(own) < 2:
            continue
        size, error = min(own, key=lambda pair: pair[1])
        best.append(f"{title(target)} {size} ({error:.2g}; d' = 1: {own[0][1]:.2g})")
        falling.append(size == own[-1][0])
    if not best:
        return []
    verdict = HOLDS if all(falling) else IN_PART if any(falling) else FAILS
    return [Finding(f"The widest sum errs least ({kind})", verdict, f"the best d': {', '.join(best)}")]


def _bound(entries: Sequence[Entry]) -> list[Finding]:
    """On sets of numbers: what the step over d' = n - 1 brings, beside the step after it."""
    lines, verdicts = [], []
    for target in targets_of(entries):
        own = {entry["latent_size"]: entry for entry in entries if entry["target"] == target}
        bound = next(iter(own.values()))["num_elements"] - 1
        below, above = [size for size in own if size < bound], sorted(size for size in own if size >= bound)
        if below and above:
            a, b = own[max(below)], own[above[0]]
            verdicts.append(errs_less(b, a))
            lines.append(
                f"{title(target)} {median(measured(a)):.2g} to {median(measured(b)):.2g} (d' {max(below)} to {above[0]})"
            )
    if not lines:
        return []
    verdict = HOLDS if all(verdicts) else FAILS if False in verdicts or not any(verdicts) else IN_PART
    return [Finding("On sets of numbers the error falls where d' passes n - 1", verdict, "; ".join(lines))]


def _lengths(entries: Sequence[Entry]) -> list[Finding]:
    """How much larger the error is on the longest sets than on those of the training."""
    growth: dict[str, list[float]] = {}
    longest = max((int(length) for entry in entries for length in entry["nmse_by_length"]), default=0)
    for entry in entries:
        values = [value for value in entry["nmse_by_length"].get(str(longest), []) if value is not None]
        if values:
            growth.setdefault(entry["family"], []).append(median(values) / median(measured(entry)))
    if not growth:
        return []
    ordered = sorted((median(values), family) for family, values in growth.items())
    evidence = ", ".join(f"{FAMILIES[family].title} {times:.2g}" for times, family in ordered)
    claim = f"Errors on sets of {longest} points are at most twice those at the size of the training (median of the targets)"
    verdict = HOLDS if ordered[-1][0] <= 2 else IN_PART.replace("targets", "models") if ordered[0][0] <= 2 else FAILS
    return [Finding(claim, verdict, f"times as large: {evidence}")]


def _times(times: Sequence[Mapping[str, Any]], fast: str, slow: str) -> Finding | None:
    """Whether a pass of one family is shorter than one of another, by n."""
    own = {(row["family"], row["num_elements"]): row["milliseconds"] for row in times}
    ratios = {n: own[slow, n] / own[fast, n] for family, n in own if family == fast and (slow, n) in own}
    if not ratios:
        return None
    faster = [ratio > 1 for ratio in ratios.values()]
    verdict = HOLDS if all(faster) else FAILS if not any(faster) else IN_PART.replace("targets", "sizes")
    evidence = "times as long: " + ", ".join(f"n = {n:,} {ratio:.2g}" for n, ratio in ratios.items())
    return Finding(f"{FAMILIES[fast].title} takes less time than {FAMILIES[slow].title}", verdict, evidence)


def _plateau(entries: Sequence[Entry]) -> list[Finding]:
    reached = [value for entry in entries for value in entry["plateau"]]
    if not reached:
        return []
    share = sum(reached) / len(reached)
    verdict = HOLDS if share == 1 else FAILS
    evidence = f"{sum(reached):,} of {len(reached):,} ({100 * share:.0f} %) before the limit of steps"
    return [Finding("All trainings reached a plateau", verdict, evidence)]


__all__ = [
    "CLAIMS",
    "IN_PART",
    "Finding",
    "by_family",
    "errs_less",
    "findings",
    "ladder_entries",
    "measured",
    "preset_of",
    "targets_of",
    "title",
]
