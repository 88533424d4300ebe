"""The record of every use of a model: rows chained by their hashes, so that a changed, added or missing row shows.

A row holds digests of what went in and came out, never the thing itself, and no times, so that the same audit on the same machine
leaves the same ledger.
"""

import lzma
from collections.abc import Sequence
from typing import Any

from .access import NOTHING, Capability, capability_names, parse_access
from .canonical import canonical_json, read_json, sha256

START = "0" * 64
SERVED, REFUSED, FAILED = "served", "refused", "failed"
OPEN, OPEN_SCOPE, CLOSE_SCOPE = "open", "open_scope", "close_scope"
CONTROL = (OPEN, OPEN_SCOPE, CLOSE_SCOPE)
FIELDS = {
    *("seq", "scope", "verb", "capabilities", "outcome", "input_sha256", "output_sha256", "forward", "backward", "details"),
    *("previous", "hash"),
}
# sums of floats in another order
ROUNDING = 1e-6


class Ledger:
    """Rows of one audited model, oldest first."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @property
    def root(self) -> str:
        """Hash of the last row, which stands for all."""
        return self.rows[-1]["hash"] if self.rows else START

    def append(
        self,
        verb: str,
        *,
        scope: int = 0,
        capabilities: Capability = NOTHING,
        outcome: str = SERVED,
        input_sha256: str = "",
        output_sha256: str = "",
        forward: float = 0.0,
        backward: float = 0.0,
        details: dict[str, Any] | None = None,
    ) -> None:
        row = {
            "seq": len(self.rows),
            "scope": scope,
            "verb": verb,
            "capabilities": capability_names(capabilities),
            "outcome": outcome,
            "input_sha256": input_sha256,
            "output_sha256": output_sha256,
            "forward": forward,
            "backward": backward,
            "details": details or {},
            "previous": self.root,
        }
        self.rows.append({**row, "hash": sha256(canonical_json(row))})


def ledger_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """A row of canonical JSON in each line."""
    return b"".join(canonical_json(row) + b"\n" for row in rows)


def ledger_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """The file: the lines, compressed, as each row repeats much of the one before."""
    return lzma.compress(ledger_lines(rows))


def read_ledger(data: bytes) -> tuple[list[dict[str, Any]], bytes]:
    """Rows and lines of a ledger's file. Raises `ValueError` for other content."""
    try:
        lines = lzma.decompress(data)
    except lzma.LZMAError as error:
        raise ValueError(f"the ledger is no xz file: {error}") from error
    return [read_json(line) for line in lines.splitlines()], lines


def used_capabilities(rows: Sequence[dict[str, Any]]) -> Capability:
    """All that was served."""
    used = NOTHING
    for row in rows:
        if row["outcome"] != REFUSED and row["capabilities"]:
            used |= parse_access(row["capabilities"])
    return used


def ledger_problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with a ledger, in words; nothing if the chain holds and all that was used had been granted.

    A use must lie in a scope (a technique at work on an item), within what the technique declared, which must lie within its
    level's grant, which must lie within what was granted for the model; and a scope must not spend more than its budget.
    """
    try:
        return _chain_problems(rows) or _grant_problems(rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"the ledger has a malformed row: {error}"]


def _chain_problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    previous = START
    for number, row in enumerate(rows):
        if set(row) != FIELDS:
            return [f"ledger row {number} does not have the fields of a ledger"]
        content = {name: value for name, value in row.items() if name != "hash"}
        if row["seq"] != number or row["previous"] != previous or row["hash"] != sha256(canonical_json(content)):
            return [f"the ledger's chain breaks at row {number}"]
        previous = row["hash"]
    return []


def _grant_problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows or rows[0]["verb"] != OPEN:
        return ["the ledger does not begin with what was granted"]
    granted = parse_access(rows[0]["details"]["granted"])
    scopes: dict[int, tuple[Capability, float]] = {}
    problems = []
    for row in rows[1:]:
        number, details = row["seq"], row["details"]
        if row["verb"] == OPEN_SCOPE and row["outcome"] == SERVED:
            declared, level = parse_access(details["capabilities"]), parse_access(details["granted"])
            if declared & ~level or level & ~granted:
                problems.append(f"ledger row {number} opens a scope beyond its grant")
            scopes[row["scope"]] = (declared, details["budget"])
            continue
        if row["verb"] in CONTROL or row["outcome"] == REFUSED:
            continue
        if row["scope"] not in scopes:
            problems.append(f"ledger row {number} uses the model ({row['verb']}) outside any technique")
            continue
        allowed, budget = scopes[row["scope"]]
        if row["capabilities"] and (beyond := parse_access(row["capabilities"]) & ~allowed):
            problems.append(f"ledger row {number} uses {', '.join(capability_names(beyond))}, which was not granted")
        left = budget - row["forward"] - row["backward"]
        if left < -ROUNDING:
            problems.append(f"ledger row {number} spends more than its scope's budget")
        scopes[row["scope"]] = (allowed, left)
    return problems


__all__ = [
    "CLOSE_SCOPE",
    "FAILED",
    "OPEN",
    "OPEN_SCOPE",
    "REFUSED",
    "SERVED",
    "Ledger",
    "ledger_bytes",
    "ledger_lines",
    "ledger_problems",
    "read_ledger",
    "used_capabilities",
]
