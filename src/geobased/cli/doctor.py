"""`geobased doctor`: what is installed and what will run here."""

import json
import os
import platform
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import FAILURE
from .generate import format_bytes
from .options import Debug
from .requirements import extras, installed_version, requirements, unmet
from .sources import cache_folder, shipped_checkpoints

if TYPE_CHECKING:
    import torch

EXAMPLES = ("geobased doctor", "geobased doctor --json > report.json")
PACKAGES = ("torch", "transformers", "huggingface_hub", "accelerate", "safetensors", "tokenizers", "triton", "kernels", "peft")


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, GPUs, extras, the kernels that will run and the shipped checkpoints.

    Exits with 1 if a package that geobased needs is missing or of a version it does not support.
    """
    report = examine()
    print(json.dumps(report, ensure_ascii=False) if json_output else _text(report))
    if report["problems"]:
        raise typer.Exit(FAILURE)


def examine() -> dict[str, Any]:
    """Everything that `geobased doctor` prints."""
    import torch
    from huggingface_hub import is_offline_mode

    import geobased

    backend, reason = _kernel_backend()
    return {
        "versions": {
            "geobased": geobased.__version__,
            "python": platform.python_version(),
            **{package: installed_version(package) for package in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "kernel_backend": backend,
        "kernel_backend_reason": reason,
        "extras": {extra: [gap for r in requirements(extra) if (gap := unmet(r))] for extra in extras()},
        "checkpoints": shipped_checkpoints(),
        "hf_cache": cache_folder(),
        "offline": is_offline_mode(),
        "problems": [gap for requirement in requirements() if (gap := unmet(requirement))],
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "memory_bytes": total, "free_bytes": free, "capability": capability})
    return gpus


def _kernel_backend() -> tuple[str, str]:
    """The backend that `backend="auto"` resolves to on this machine's best device, and why."""
    import torch

    from geobased.kernels.backend import resolve_backend, triton_is_installed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = resolve_backend("auto", _empty_tensor())
    if backend == "triton":
        return backend, "there is a GPU and Triton is installed (float64 tensors and tensors on the CPU run in plain PyTorch)"
    if not torch.cuda.is_available():
        return backend, "there is no GPU that PyTorch can use: plain PyTorch runs on the CPU"
    if not triton_is_installed():
        return backend, 'there is a GPU but Triton is not installed: pip install "geobased[triton]"'
    return backend, "geobased prefers plain PyTorch on this GPU"


def _empty_tensor() -> "torch.Tensor":
    import torch

    return torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")


def _text(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in report["versions"].items())
    gpus = [
        f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}, {format_bytes(gpu['free_bytes'])} free" for gpu in report["gpus"]
    ]
    rows = {
        "versions": versions,
        "platform": report["platform"],
        "CPU threads": f"{report['cpu_threads']} of {os.cpu_count()}",
        "GPU": "; ".join(gpus) or "none",
        "kernels": f"{report['kernel_backend']}: {report['kernel_backend_reason']}",
        "extras": "; ".join(f"{name}: {', '.join(gaps) or 'complete'}" for name, gaps in report["extras"].items()),
        "checkpoints": ", ".join(report["checkpoints"]) or "none",
        "HF cache": report["hf_cache"],
        "offline": "yes: nothing is downloaded (HF_HUB_OFFLINE)" if report["offline"] else "no",
        "problems": "; ".join(report["problems"]) or "none",
    }
    return "\n".join(f"{name + ':':<13}{value}" for name, value in rows.items())
