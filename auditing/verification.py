"""Whether a report is what was signed, and whether the audit comes out the same again."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .access import parse_access
from .canonical import canonical_json
from .configuration import AuditConfiguration
from .ledger import OPEN_SCOPE, SERVED, ledger_lines, ledger_problems, read_ledger, used_capabilities
from .model_loading import ModelSource, model_sha256
from .report import LEDGER, PUBLIC_KEY, REPORT, STATEMENT, AuditReport, listed_files, read_report, run_audit
from .statement import SignatureError, fingerprint, open_envelope, read_public_key

RELATIVE, ABSOLUTE = 1e-3, 1e-6
MOST_DIFFERENCES = 20


@dataclass(frozen=True)
class Check:
    """One thing that was checked; `passed` is None where it could not be."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of a report."""

    checks: tuple[Check, ...]

    @property
    def verified(self) -> bool:
        """Whether no check failed; those that could not be made are listed with the others."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"verified": self.verified, "checks": [asdict(check) for check in self.checks]}


def verify(folder: str | Path, *, public_key: str | Path | None = None, model: str | Path | None = None) -> Verification:
    """Checks a report: signature, files, the model's files, the ledger, and that the report says what the ledger does.

    Args:
        folder: of the report.
        public_key: PEM file from whom the report should be; by default the report's own, which anybody could have put there.
        model: folder of the audited model; by default where the configuration says.

    Raises `FileNotFoundError` if the folder holds no statement.
    """
    folder = Path(folder)
    if not (folder / STATEMENT).is_file():
        raise FileNotFoundError(f"{folder} holds no signed report: there is no {STATEMENT}")
    try:
        own = (folder / PUBLIC_KEY).read_bytes()
        key = read_public_key(own if public_key is None else Path(public_key).read_bytes())
        if public_key is not None and own != Path(public_key).read_bytes():
            raise SignatureError("the report's own public key is another than the one given")
        content = open_envelope((folder / STATEMENT).read_bytes(), key)
    except (OSError, SignatureError) as error:
        return Verification((Check("signature", False, str(error)),))
    whose = "the key given" if public_key is not None else "the key in the report; give --public-key to know whose it is"
    checks = [Check("signature", True, f"by {fingerprint(key)}, {whose}")]
    checks.append(_check_files(content["predicate"]["files"], listed_files(folder)))
    if not checks[-1].passed:
        return Verification(tuple(checks))
    report = read_report(folder)
    checks.append(_check_statement(content, report))
    checks.append(_check_model(content, report, model))
    checks += _check_ledger(report, (folder / LEDGER).read_bytes())
    return Verification(tuple(checks))


def _check_files(listed: Mapping[str, str], found: Mapping[str, str]) -> Check:
    wrong = [f"{name} was changed" for name in listed if name in found and found[name] != listed[name]]
    wrong += [f"{name} is missing" for name in listed if name not in found]
    wrong += [f"{name} is not part of the report" for name in found if name not in listed]
    return Check("files", not wrong, "; ".join(wrong) or f"{len(listed)} files as signed")


def _check_statement(content: Mapping[str, Any], report: AuditReport) -> Check:
    expected = report.statement(content["predicate"]["files"])
    same = canonical_json(expected) == canonical_json(content)
    return Check("statement", same, "says what the report says" if same else f"does not say what {REPORT} says")


def _check_model(content: Mapping[str, Any], report: AuditReport, model: str | Path | None) -> Check:
    subjects = {entry["name"]: entry["digest"]["sha256"] for entry in content["subject"] if entry["name"] != REPORT}
    if not subjects or "state_dict" in subjects:
        why = "it was in memory" if subjects else "it answered from an address"
        return Check("model", None, f"the model's files are not known: {why}")
    settings = report.content["configuration"]["model"]
    try:
        place = Path(model) if model is not None else ModelSource(**settings).folder(download=False)
        found = model_sha256(place, download=False)
    except (OSError, ValueError) as error:
        return Check("model", None, f"the model's files are not here: {error}")
    wrong = [
        f"{name} is missing" if name not in found else f"{name} is another"
        for name in subjects
        if found.get(name) != subjects[name]
    ]
    return Check("model", not wrong, "; ".join(wrong) or f"{len(subjects)} files as audited")


def _check_ledger(report: AuditReport, data: bytes) -> list[Check]:
    content, rows = report.content, report.rows
    problems = ledger_problems(rows)
    if ledger_lines(rows) != read_ledger(data)[1]:
        problems.append("the ledger is not in its canonical form")
    if content["ledger"] != {"root": rows[-1]["hash"] if rows else None, "rows": len(rows)}:
        problems.append("the ledger is not the one that the report names")
    if problems:
        return [Check("ledger", False, "; ".join(problems))]
    used, granted = used_capabilities(rows), parse_access(content["granted"])
    told = content["used"]
    agrees = (
        not used & ~granted and rows[0]["details"]["granted"] == content["granted"] and parse_access(told or ["query"]) == used
    )
    return [
        Check("ledger", True, f"{len(rows)} rows, the chain holds"),
        Check("access", agrees, f"used {', '.join(told) or 'nothing'}; granted {', '.join(content['granted'])}"),
        _check_costs(report),
    ]


def _check_costs(report: AuditReport) -> Check:
    """What each attempt spent, in the report and in the ledger."""
    scopes: dict[int, tuple[str, str]] = {}
    spent: dict[tuple[str, str], float] = {}
    for row in report.rows:
        if row["verb"] == OPEN_SCOPE and row["outcome"] == SERVED:
            scopes[row["scope"]] = (row["details"]["technique"], row["details"]["item"])
            spent[scopes[row["scope"]]] = 0.0
        elif row["scope"] in scopes:
            spent[scopes[row["scope"]]] += row["forward"] + row["backward"]
    told: dict[tuple[str, str], float] = {}
    for technique in report.content["results"]["techniques"]:
        whole = (technique["name"], "*") in spent
        for item in technique["items"]:
            place = (technique["name"], "*" if whole else item["id"])
            told[place] = told.get(place, 0.0) + item["spent"]
    same = told.keys() == spent.keys() and all(math.isclose(told[place], spent[place], abs_tol=1e-6) for place in told)
    return Check("costs", same, "as in the ledger" if same else "the report's costs are not those of the ledger")


@dataclass(frozen=True)
class Reproduction:
    """An audit that was run again.

    Attributes:
        differences: where results differ by more than the tolerance, in words.
        same_ledger: whether every input and output was the same, to the last bit.
        report: the new one.
    """

    differences: tuple[str, ...]
    same_ledger: bool
    report: AuditReport

    def to_dict(self) -> dict[str, Any]:
        return {
            "reproduced": not self.differences,
            "same_ledger": self.same_ledger,
            "differences": list(self.differences),
            "environment": self.report.content["environment"],
        }


def reproduce(
    folder: str | Path, *, model: str | None = None, data: str | Path = ".", report: Callable[[str], None] | None = None
) -> Reproduction:
    """Runs an audit again from the configuration in its report, and compares.

    Args:
        folder: of the report.
        model: where the audited model is now; by default where the configuration says.
        data: what paths of images are relative to.

    Raises what running an audit raises, and `ValueError` for another model where one was named.
    """
    first = read_report(folder)
    configuration = AuditConfiguration.from_dict(first.content["configuration"], Path(data))
    if model is not None:
        if not isinstance(configuration.model, ModelSource):
            raise ValueError("the audit was of an endpoint, not of a model in a folder")
        configuration = replace(configuration, model=replace(configuration.model, name=model))
    second = run_audit(configuration, report)
    found: list[str] = []
    if second.content["model"]["files"] != first.content["model"]["files"]:
        found.append("the model's files are others than those that were audited")
    _differences("results", first.content["results"], second.content["results"], found)
    same = second.content["ledger"]["root"] == first.content["ledger"]["root"]
    return Reproduction(tuple(found[:MOST_DIFFERENCES]), same, second)


def _differences(place: str, first: Any, second: Any, found: list[str]) -> None:
    number = int | float
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for name in first:
            _differences(f"{place}.{name}", first[name], second[name], found)
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for position, (one, other) in enumerate(zip(first, second, strict=True)):
            _differences(f"{place}[{position}]", one, other, found)
    elif isinstance(first, number) and isinstance(second, number) and not isinstance(first, bool):
        if not math.isclose(first, second, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            found.append(f"{place}: {first:g} before, {second:g} now")
    elif first != second:
        found.append(f"{place}: {json.dumps(first)[:60]} before, {json.dumps(second)[:60]} now")


__all__ = ["Check", "Reproduction", "Verification", "reproduce", "verify"]
