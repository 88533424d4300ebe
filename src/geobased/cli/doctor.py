"""`geobased doctor`: what is installed, what will run here, and how to mend what will not."""

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from geobased.checkpoints import checkpoint_path, shipped_checkpoints

from .errors import FAILURE, one_line
from .generate import format_bytes
from .options import Debug, Json
from .requirements import extras, installed_version, requirements, unmet
from .sources import DEFAULT_GEOLOCALIZER, DEFAULT_MODEL, cache_folder, quiet_transformers

if TYPE_CHECKING:
    import torch

EXAMPLES = ("geobased doctor", "geobased doctor --json > report.json")
PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "huggingface_hub", "safetensors", "tokenizers", "numpy", "pillow"),
    *("simplejpeg", "torchvision", "kernels", "peft", "gradio"),
)
LITTLE_SPACE = 5_000_000_000  # bytes; StreetCLIP's weights take 1.7 GB
DRIVER_SECONDS = 10


def doctor(json_output: Json = False, debug: Debug = False) -> None:
    """Tell what is installed, what will run here, and how to mend what will not.

    Versions, GPUs, the backend of each kernel and why, extras, the cache, and whether the shipped checkpoints load. Exits with 1
    if something that must work does not; notes are about what may be missing.
    """
    report = examine()
    if json_output:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)
    if report["problems"]:
        raise typer.Exit(FAILURE)


def examine() -> dict[str, Any]:
    """Everything that `geobased doctor` prints; import_error tells why what needs the models could not be looked at, or is None.

    problems and notes are lists of {"what", "fix"}.
    """
    from geobased._version import __version__

    report: dict[str, Any] = {
        "versions": {
            "geobased": __version__,
            "python": platform.python_version(),
            **{package: installed_version(package) for package in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpu_driver": _driver(),
        "extras": {extra: _extra(extra) for extra in extras()},
        "image_decoding": _image_decoding(),
        "torchvision": _torchvision(),
        "hub": _hub(),
        "import_error": _import_error(),
        **{"cpu_threads": None, "torch_built_for": None, "gpus": [], "kernels": {}, "kernel_check": None, "checkpoints": {}},
    }
    if report["import_error"] is None:
        report |= _examine_models()
    return report | {"problems": _problems(report), "notes": _notes(report)}


def _import_error() -> str | None:
    """Why torch, transformers or geobased cannot be imported."""
    try:
        import geobased

        _ = geobased.__version__  # runs the package's __init__ if the script has put that off
    except Exception as error:  # what does not fit together fails in many ways
        return one_line(error)
    return None


def _examine_models() -> dict[str, Any]:
    import torch

    return {
        "cpu_threads": torch.get_num_threads(),
        "torch_built_for": _built_for(),
        "gpus": _gpus(),
        "kernels": _kernels(),
        "kernel_check": _kernel_check(),
        "checkpoints": {name: _checkpoint(Path(checkpoint_path(name))) for name in shipped_checkpoints()},
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


def _driver() -> str | None:
    """Version of NVIDIA's driver, which may be there although PyTorch cannot use it."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def _built_for() -> str:
    import torch

    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def _best_device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _kernels() -> dict[str, dict[str, str]]:
    """Op -> the backend that `backend="auto"` takes on this machine's best device, and why."""
    import torch

    import geobased.kernels
    from geobased.kernels.backend import resolve_backend

    folder = Path(geobased.kernels.__file__).parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is in the reason
        backend = resolve_backend("auto", torch.empty(0, device=_best_device()))
    answer = {"backend": backend, "reason": _reason(backend)}
    # an op has a plain form and one in Triton
    return {name: answer for name in geobased.kernels.__all__ if any(folder.glob(f"{name}_*triton.py"))}


def _reason(backend: str) -> str:
    import torch

    from geobased.kernels.backend import triton_interpreter_is_on, triton_is_installed

    if backend == "triton":
        return "CUDA device and Triton (float64 and tensors on the CPU: plain PyTorch)"
    if triton_interpreter_is_on() and triton_is_installed():
        why = "CUDA device" if torch.cuda.is_available() else "no CUDA device"
        return f"{why}; TRITON_INTERPRET=1: Triton's interpreter runs where backend='triton' asks for it"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "CUDA device without Triton" if not triton_is_installed() else "plain PyTorch is set as the default"


def _kernel_check() -> dict[str, Any]:
    """One op, run and compared with PyTorch: on a GPU Triton has to find a compiler for it."""
    import torch

    from geobased.kernels.silu_mul import silu_mul

    device = _best_device()
    gate, up = torch.linspace(-4, 4, 64, device=device).view(2, 32), torch.linspace(1, 2, 64, device=device).view(2, 32)
    try:
        difference = (silu_mul(gate, up) - torch.nn.functional.silu(gate) * up).abs().max().item()
    except Exception as error:  # compilers and drivers raise all kinds
        return {"op": "silu_mul", "device": device.type, "ok": False, "error": one_line(error)}
    ok = difference < 1e-4
    return {
        "op": "silu_mul",
        "device": device.type,
        "ok": ok,
        "error": None if ok else f"differs from PyTorch by {difference:.2g}",
    }


def _extra(extra: str) -> dict[str, Any]:
    missing = [gap for requirement in requirements(extra) if (gap := unmet(requirement))]
    return {"complete": not missing, "missing": missing, "install": f'pip install "geobased[{extra}]"'}


def _image_decoding() -> dict[str, Any]:
    version = installed_version("simplejpeg")
    return {"jpeg": "simplejpeg" if version else "pillow", "simplejpeg": version}


def _torchvision() -> dict[str, Any]:
    """Whether it can be imported: transformers takes it for CLIP where it is installed, working or not."""
    if importlib.util.find_spec("torchvision") is None:
        return {"installed": False, "imports": None, "error": None}
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another PyTorch fails in many ways
        return {"installed": True, "imports": False, "error": one_line(error)}
    return {"installed": True, "imports": True, "error": None}


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token, is_offline_mode

    return {
        "endpoint": constants.ENDPOINT,
        "offline": is_offline_mode(),
        "logged_in": get_token() is not None,
        "cache": _folder(Path(cache_folder())),
        "geobased_cache": _folder(Path(constants.HF_HOME, "geobased")),
    }


def _folder(path: Path) -> dict[str, Any]:
    """Of a cache folder, which need not exist yet."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            writable = True
    except OSError:
        writable = False
    return {
        "path": str(path),
        "exists": path.is_dir(),
        "writable": writable,
        "free_bytes": shutil.disk_usage(existing).free,
    }


def _checkpoint(folder: Path) -> dict[str, Any]:
    """Size, hash, and whether it loads with all its weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    weights = folder / "model.safetensors"
    facts: dict[str, Any] = {"folder": str(folder), "bytes": None, "sha256": None, "parameters": None, "error": None}
    try:
        with weights.open("rb") as file:
            facts |= {"bytes": weights.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        with quiet_transformers():
            kind = AutoModelForCausalLM if AutoConfig.from_pretrained(folder).model_type == "based" else AutoModel
            pair: Any = kind.from_pretrained(folder, output_loading_info=True)
            model, loading = pair
    except Exception as error:  # readers of JSON and safetensors raise their own types
        return facts | {"error": one_line(error)}
    if missing := sorted(loading["missing_keys"]):
        return facts | {"error": f"lacks {len(missing)} weights, among them {missing[0]}"}
    return facts | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _problems(report: dict[str, Any]) -> list[dict[str, str]]:
    """What must work and does not."""
    found = []

    def add(what: str, fix: str) -> None:
        found.append({"what": what, "fix": fix})

    for requirement in requirements():
        if gap := unmet(requirement):
            add(gap, f'pip install "{requirement.name}{requirement.specifier}"')
    torchvision, check, hub = report["torchvision"], report["kernel_check"], report["hub"]
    if torchvision["imports"] is False:
        add(
            f"torchvision cannot be imported, and CLIP fails with it ({torchvision['error']})",
            "pip uninstall torchvision (geobased needs none), or install the build that belongs to this torch",
        )
    if report["import_error"]:
        add(
            f"geobased cannot be imported: {report['import_error']}",
            "mend what is named above; `python -c 'import geobased'` tells more",
        )
        return found
    if not check["ok"]:
        compiler = "Triton needs a C compiler and Python's headers (apt install gcc python3-dev); "
        fix = "use CPU tensors or `geobased.kernels.backend.use_backend('torch')` until it is mended"
        add(f"the kernel {check['op']} fails on {check['device']}: {check['error']}", compiler + fix)
    reinstall = "install geobased again: pip install --force-reinstall --no-deps geobased"
    for name in sorted({DEFAULT_MODEL, DEFAULT_GEOLOCALIZER} - set(report["checkpoints"])):
        add(f"the shipped checkpoint {name} is missing", reinstall)
    for name, facts in report["checkpoints"].items():
        if facts["error"]:
            add(f"the shipped checkpoint {name} does not load: {facts['error']}", reinstall)
    for name in ("cache", "geobased_cache"):
        if not hub[name]["writable"] and not hub["offline"]:
            add(
                f"{hub[name]['path']} cannot be written", "set HF_HOME to a folder that you may write to, or mend its permissions"
            )
    return found


def _notes(report: dict[str, Any]) -> list[dict[str, str]]:
    """What works without, but slower or less."""
    found = []

    def add(what: str, fix: str) -> None:
        found.append({"what": what, "fix": fix})

    hub, versions = report["hub"], report["versions"]
    if report["gpu_driver"] and not report["gpus"]:
        add(
            f"there is an NVIDIA driver ({report['gpu_driver']}), but this PyTorch is built for {report['torch_built_for']}",
            "install a CUDA build of torch: https://pytorch.org/get-started/locally",
        )
    if report["gpus"] and versions["triton"] is None:
        add("there is a GPU but no Triton: kernels run in slower plain PyTorch", 'pip install "geobased[triton]"')
    if versions["simplejpeg"] is None:
        add("JPEG files are decoded by Pillow, which is slower", 'pip install "geobased[geo]"')
    if hub["offline"]:
        add("the Hub is offline (HF_HUB_OFFLINE): nothing is downloaded or pushed", "unset HF_HUB_OFFLINE")
    for name in ("cache", "geobased_cache"):
        if not hub[name]["writable"] and hub["offline"]:
            add(f"{hub[name]['path']} cannot be written", "set HF_HOME to a folder that you may write to")
    if hub["cache"]["free_bytes"] < LITTLE_SPACE:
        add(f"{format_bytes(hub['cache']['free_bytes'])} are free for the cache", "set HF_HOME to a folder on a larger disk")
    return found


def _show(report: dict[str, Any]) -> None:
    """The report as a table; colour only on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(report):
        table.add_row(name, Text(value))
    console.print(table)
    for heading, style in (("notes", "yellow"), ("problems", "red")):
        if not report[heading]:
            continue
        console.print(Text(f"\n{heading}", style=f"bold {style}"))
        for entry in report[heading]:
            console.print(Text(f"  {entry['what']}"), soft_wrap=True)
            console.print(Text(f"    fix: {entry['fix']}"), soft_wrap=True)
    if not report["problems"]:
        console.print(Text("\nno problems", style="bold green"))


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    hub, check = report["hub"], report["kernel_check"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    absent = [name for name, version in report["versions"].items() if not version]
    gpus = [
        f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}, {format_bytes(gpu['free_bytes'])} free,"
        f" capability {gpu['capability']}"
        for gpu in report["gpus"]
    ]
    built = f"; PyTorch built for {report['torch_built_for']}" if report["torch_built_for"] else ""
    driver = f"driver {report['gpu_driver']}" if report["gpu_driver"] else "no NVIDIA driver"
    rows = [
        ("versions", versions + (f"; not installed: {', '.join(absent)}" if absent else "")),
        ("platform", report["platform"]),
        ("CPU threads", f"{report['cpu_threads'] or '?'} of {report['cpu_count']}"),
        ("GPU", f"{'; '.join(gpus) or 'none'} ({driver}{built})"),
    ]
    by_answer: dict[str, list[str]] = {}
    for op, answer in report["kernels"].items():
        by_answer.setdefault(f"{answer['backend']}: {answer['reason']}", []).append(op)
    rows += [("kernels", f"{answer}\n{', '.join(ops)}") for answer, ops in by_answer.items()]
    if check is not None:
        ran = "gives what PyTorch gives" if check["ok"] else f"fails: {check['error']}"
        rows.append(("kernel check", f"{check['op']} on {check['device']} {ran}"))
    for extra, facts in report["extras"].items():
        rows.append((f"extra {extra}", "complete" if facts["complete"] else f"{', '.join(facts['missing'])}: {facts['install']}"))
    torchvision = report["torchvision"]
    state = {None: "not installed (none is needed)", True: "works", False: "cannot be imported"}[torchvision["imports"]]
    rows += [("JPEG decoder", report["image_decoding"]["jpeg"]), ("torchvision", state)]
    for name, facts in report["checkpoints"].items():
        told = facts["error"] or (
            f"{facts['parameters']:,} parameters, {format_bytes(facts['bytes'])}, sha256 {facts['sha256'][:16]}…, loads"
        )
        rows.append((name, told))
    access = "offline (HF_HUB_OFFLINE)" if hub["offline"] else "online"
    rows.append(("Hub", f"{hub['endpoint']}, {access}, {'logged in' if hub['logged_in'] else 'not logged in'}"))
    for name, key in (("cache", "cache"), ("own cache", "geobased_cache")):
        folder = hub[key]
        can = "writable" if folder["writable"] else "not writable"
        there = "" if folder["exists"] else ", not made yet"
        rows.append((name, f"{folder['path']} ({can}{there}, {format_bytes(folder['free_bytes'])} free)"))
    return rows
