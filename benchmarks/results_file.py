"""One format for all results: `benchmarks/results/<gpu>/<name>.json`."""

import datetime
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PEERS = ("flash-linear-attention", "flash-attn", "mamba-ssm", "xformers")


def versions() -> dict[str, str]:
    """Versions of everything that shapes a timing; a peer that is not installed is reported as absent."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "geobased", *PEERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def row(
    benchmark: str,
    case: dict[str, Any],
    implementation: str,
    *,
    milliseconds: float,
    tokens: int,
    floor_milliseconds: float | None = None,
    relative_error: float | None = None,
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "case": case,
        "implementation": implementation,
        "milliseconds": milliseconds,
        "tokens_per_second": tokens / milliseconds * 1e3,
        "floor_milliseconds": floor_milliseconds,
        "relative_error": relative_error,
    }


def write_results(name: str, rows: list[dict[str, Any]], folder: str | Path | None = None) -> Path:
    """Writes the rows with device, versions and date, and returns the path."""
    target = Path(folder) if folder else RESULTS / device_name().lower().replace(" ", "-")
    target.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device_name(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": rows,
    }
    path = target / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per row; the ratio compares with this project's own time in the same case."""
    ours = {(r["benchmark"], str(r["case"])): r["milliseconds"] for r in rows if r["implementation"] == "geobased"}
    for r in rows:
        own = ours.get((r["benchmark"], str(r["case"])))
        ratio = f"{r['milliseconds'] / own:6.2f}x" if own else "      -"
        error = f"{r['relative_error']:.1e}" if r["relative_error"] is not None else "-"
        case = " ".join(f"{k}={v}" for k, v in r["case"].items())
        print(f"{r['benchmark']:38s} {r['implementation']:18s} {r['milliseconds']:9.3f} ms {ratio}  err {error:8s} {case}")
