"""The report of an audit: a folder of files whose digests a signed statement holds."""

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from geobased._version import __version__
from geobased.whole_file import whole_file

from .access import access_name, capability_names
from .canonical import canonical_json, folder_sha256, read_json, sha256
from .configuration import AuditConfiguration, run_configuration
from .ledger import ledger_bytes, read_ledger, used_capabilities
from .report_card import eval_results_yaml, model_card_block
from .report_page import report_page
from .report_pictures import picture_png
from .statement import fingerprint, public_pem, sign, statement, throwaway_key
from .target import CLAIMS
from .technique import Picture

FORMAT = "geobased-audit-1"
REPORT, LEDGER, STATEMENT, PUBLIC_KEY = "report.json", "ledger.jsonl.xz", "audit.intoto.json", "public_key.pem"
PAGE, CARD, EVAL_RESULTS = "report.html", "model_card.md", ".eval_results/audit.yaml"
# what the statement cannot hold the digests of
UNLISTED = {STATEMENT, PUBLIC_KEY}


@dataclass
class AuditReport:
    """What an audit found, with its record.

    Attributes:
        content: what report.json holds.
        rows: the ledger's.
        pictures: PNG files by their path in the report.
    """

    content: dict[str, Any]
    rows: list[dict[str, Any]]
    pictures: dict[str, bytes] = field(default_factory=dict)

    def statement(self, files: Mapping[str, str]) -> dict[str, Any]:
        """The in-toto statement: about the model's files and report.json, and on what was asked, granted, used and found."""
        subjects = {**self.content["model"]["files"], REPORT: files[REPORT]}
        return statement(subjects, {"files": dict(files), **summary(self.content)})

    def save(self, folder: str | Path, *, private_key: Any = None, overwrite: bool = False) -> dict[str, str]:
        """Writes all files, the signed statement last, and returns the statement's path and the key's fingerprint.

        Args:
            private_key: an Ed25519 key of `read_private_key`; by default one that nobody keeps, whose signature shows later
                changes but not who signed.
            overwrite: replace an earlier report in the folder.

        Raises `ValueError` if the folder holds anything, unless that is a report which may be replaced.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            if not overwrite or not (folder / REPORT).is_file():
                raise ValueError(f"{folder} is not empty: choose another folder, or replace an earlier report with --overwrite")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            REPORT: canonical_json(self.content) + b"\n",
            LEDGER: ledger_bytes(self.rows),
            **self.pictures,
            PAGE: report_page(self.content, self.pictures).encode(),
            CARD: model_card_block(self.content).encode(),
        }
        if (results := eval_results_yaml(self.content)) is not None:
            files[EVAL_RESULTS] = results.encode()
        for name, data in files.items():
            _write(folder / name, data)
        key = private_key or throwaway_key()
        _write(folder / PUBLIC_KEY, public_pem(key.public_key()))
        listed = {name: sha256(data) for name, data in files.items()}
        _write(folder / STATEMENT, sign(self.statement(listed), key))
        return {"statement": str(folder / STATEMENT), "fingerprint": fingerprint(key.public_key())}


def summary(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the statement says of a report."""
    levels = content["results"]["levels"]
    return {
        "question": {"name": content["question"]["name"], "sha256": content["question_sha256"]},
        "model": content["model"]["name"],
        "mode": content["mode"],
        "claim": content["claim"],
        "granted": content["granted"],
        "used": content["used"],
        "ledger": content["ledger"],
        "environment": content["environment"],
        "findings": [{"access": level["access"], "finding": level.get("finding", "nothing tried")} for level in levels],
    }


def run_audit(configuration: AuditConfiguration, report: Callable[[str], None] | None = None) -> AuditReport:
    """Runs an audit. See `run_configuration` for what it raises."""
    findings, rows, mode = run_configuration(configuration, report)
    pictures: dict[str, bytes] = {}
    shown = []
    for number, (technique, item, picture) in enumerate(_kept(findings.pictures, configuration.pictures)):
        name = f"pictures/{number:04d}.png"
        pictures[name] = picture_png(picture)
        shown.append({"file": name, "technique": technique, "item": item, "caption": picture.caption})
    content = {
        "format": FORMAT,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "configuration": configuration.to_dict(),
        "question": configuration.question.to_dict(),
        "question_sha256": configuration.question.sha256(),
        "model": rows[0]["details"]["model"],
        "mode": mode,
        "claim": CLAIMS[mode],
        "access": access_name(configuration.grant),
        "granted": capability_names(configuration.grant),
        "used": capability_names(used_capabilities(rows)),
        "ledger": {"root": rows[-1]["hash"], "rows": len(rows)},
        "results": findings.results,
        "pictures": shown,
        "environment": environment(),
    }
    # what JSON cannot tell apart must not differ between the report in memory and the one on disk
    return AuditReport(read_json(canonical_json(content)), rows, pictures)


def _kept(pictures: list[tuple[str, str, Picture]], most: int | None) -> list[tuple[str, str, Picture]]:
    """Those of the first `most` items that each technique has pictures of."""
    items: dict[str, list[str]] = {}
    for technique, item, _ in pictures:
        seen = items.setdefault(technique, [])
        if item not in seen:
            seen.append(item)
    return [row for row in pictures if row[1] in items[row[0]][:most]]


def read_report(folder: str | Path) -> AuditReport:
    """A saved report, without a look at its signature. Raises `FileNotFoundError` or `ValueError` if it is none."""
    folder = Path(folder)
    if not (folder / REPORT).is_file():
        raise FileNotFoundError(f"{folder} holds no report: there is no {REPORT}")
    content = read_json((folder / REPORT).read_bytes())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{folder / REPORT} is no report of the form {FORMAT}")
    rows, _ = read_ledger((folder / LEDGER).read_bytes())
    pictures = {shown["file"]: (folder / shown["file"]).read_bytes() for shown in content["pictures"]}
    return AuditReport(content, rows, pictures)


def environment() -> dict[str, str]:
    """What results may depend on beyond the configuration."""
    return {
        "geobased": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def listed_files(folder: str | Path) -> dict[str, str]:
    """Digests of the files that a statement lists."""
    return {name: digest for name, digest in folder_sha256(folder).items() if name not in UNLISTED}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as written:
        written.write_bytes(data)


__all__ = [
    "LEDGER",
    "PUBLIC_KEY",
    "REPORT",
    "STATEMENT",
    "AuditReport",
    "environment",
    "listed_files",
    "read_report",
    "run_audit",
    "summary",
]
