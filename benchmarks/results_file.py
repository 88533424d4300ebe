"""One format for all results: `benchmarks/results/<gpu>/<name>.json`.

rows = [row("generation", {"batch_size": 128}, "geobased", milliseconds=2.1, tokens=128)]
print_table(rows)
write_results("generation", rows)
"""

import datetime
import json
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

OURS = "geobased"  # the name of our implementation in all results
RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("flash-linear-attention", "fla-core", "flash-attn", "mamba-ssm", "xformers")
# words of a device's name that do not tell one kind of GPU from another
_NOISE = re.compile(r"nvidia|geforce|tesla|amd|instinct|radeon|\d+gb|hbm\w*|sxm\d*")


def versions() -> dict[str, str]:
    """Versions of everything that shapes a timing; a peer that is not installed is reported as absent."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "geobased", *PEERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    if found["geobased"] == "absent":  # run from a checkout that is on the path but not installed
        from geobased import __version__

        found["geobased"] = __version__
    return found


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def results_folder(device: str | None = None) -> Path:
    """The folder of one kind of GPU: "NVIDIA H200" -> results/h200, "NVIDIA H100 80GB HBM3" -> results/h100.

    A form with another memory or power limit keeps its word: "NVIDIA H100 PCIe" -> results/h100-pcie.
    """
    words = re.split(r"[^a-z0-9]+", (device or device_name()).lower())
    if words[0] == "cpu":
        return RESULTS / "cpu"
    return RESULTS / ("-".join(word for word in words if word and not _NOISE.fullmatch(word)) or "gpu")


def row(
    benchmark: str,
    case: dict[str, Any],
    implementation: str,
    *,
    milliseconds: float,
    tokens: int,
    floor_milliseconds: float | None = None,
    relative_error: float | None = None,
    peak_memory_bytes: int | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One measurement.

    Args:
        case: what was computed (batch_size, seq_len, num_heads, feature_dim, head_dim, dtype, model, …). Rows of one
            benchmark with equal cases are compared with each other.
        implementation: `geobased` for ours, otherwise the peer's name.
        milliseconds: median time of one call (generation: of one step).
        tokens: tokens (or images) that this time produced or processed.
        floor_milliseconds: the least time that the hardware's measured ceilings allow for this algorithm.
        relative_error: norm of the difference from the reference over the reference's norm.
        peak_memory_bytes: highest memory allocated during the call.
        extra: further keys of the row, for instance `per_step_milliseconds=2.1`.
    """
    result = {
        "benchmark": benchmark,
        "case": case,
        "implementation": implementation,
        "milliseconds": milliseconds,
        "tokens_per_second": tokens / milliseconds * 1e3,
        "floor_milliseconds": floor_milliseconds,
        "relative_error": relative_error,
    }
    if floor_milliseconds is not None:
        result["share_of_floor"] = floor_milliseconds / milliseconds
    if peak_memory_bytes is not None:
        result["peak_memory_bytes"] = peak_memory_bytes
    return result | extra


def write_results(name: str, rows: list[dict[str, Any]], folder: str | Path | None = None, **extra: Any) -> Path:
    """Writes the rows with device, versions and date to `<folder>/<name>.json`, and returns the path.

    Benchmarks call it after every case, so that a run that is cut short keeps what it has measured.

    Args:
        folder: default `benchmarks/results/<gpu>`.
        extra: further keys of the file, for instance `ceilings={…}` or `absent={"flash-attn": "not installed"}`.
    """
    return write_report(name, folder, **extra, rows=rows)


def write_report(name: str, folder: str | Path | None = None, **content: Any) -> Path:
    """Writes device, versions, date and `content` to `<folder>/<name>.json`, and returns the path; folder as above."""
    target = Path(folder) if folder else results_folder()
    target.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device_name(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **content,
    }
    path = target / f"{name}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per row; the ratio compares with this project's own time in the same case (2.00x: takes twice as long)."""
    ours = {(r["benchmark"], str(r["case"])): r["milliseconds"] for r in rows if r["implementation"] == OURS}
    for r in rows:
        own = ours.get((r["benchmark"], str(r["case"])))
        ratio = f"{r['milliseconds'] / own:6.2f}x" if own else "      -"
        error = f"{r['relative_error']:.1e}" if r["relative_error"] is not None else "-"
        floor = f"{100 * r['share_of_floor']:3.0f}% of floor" if "share_of_floor" in r else " " * 13
        memory = f" {r['peak_memory_bytes'] / 1e9:6.2f} GB" if "peak_memory_bytes" in r else ""
        case = " ".join(f"{k}={v}" for k, v in r["case"].items())
        print(
            f"{r['benchmark']:34s} {r['implementation']:22s} {r['milliseconds']:9.3f} ms {ratio} {floor} "
            f"err {error:8s}{memory} {case}"
        )
