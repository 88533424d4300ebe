"""Reports of the same question laid beside each other: other levels of access, or other models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import read_report
from .runner import paired_tests


def compare(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Levels of all reports, and McNemar's tests of each pair of them.

    Returns:
        {"question", "levels": [{"name", "access", "model", "techniques", "rate", "low", "high", "finding", …}], "tests"}.

    Raises `ValueError` for fewer than two levels, and for reports of different questions.
    """
    reports = [(Path(folder), read_report(folder).content) for folder in folders]
    if not reports:
        raise ValueError("give reports to compare")
    first_folder, first = reports[0]
    for folder, content in reports[1:]:
        if content["question_sha256"] != first["question_sha256"]:
            raise ValueError(f"{folder} asks another question than {first_folder}: items, budget and success must be the same")
    levels: list[dict[str, Any]] = []
    for folder, content in reports:
        for level in content["results"]["levels"]:
            if level["techniques"]:
                # the folder tells two reports of one model at one level apart
                name = f"{folder.name}: {level['access']}" if len(reports) > 1 else level["access"]
                levels.append({**level, "model": content["model"]["name"], "name": name})
    if len(levels) < 2:
        raise ValueError("there is one level of access in all: give a further report of the question")
    if len({level["access"] for level in levels}) < len(levels):
        levels = [{**level, "access": level["name"]} for level in levels]
    pairs = [(one, other) for place, one in enumerate(levels) for other in levels[place + 1 :]]
    tests = paired_tests([(one["name"], one["items"], other["name"], other["items"]) for one, other in pairs])
    return {"question": first["question"], "levels": levels, "tests": tests}


__all__ = ["compare"]
