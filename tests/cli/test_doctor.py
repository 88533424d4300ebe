"""`geobased doctor`: what it looks at, and that it fails with the fix where something must be mended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import geobased as package
from geobased.cli import doctor


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which all is well, however this one is; checkpoints are not loaded."""
    monkeypatch.setattr(doctor, "unmet", lambda requirement: None)
    monkeypatch.setattr(doctor, "_torchvision", lambda: {"installed": False, "imports": None, "error": None})
    facts = {"bytes": 1, "sha256": "0" * 64, "parameters": 1, "error": None}
    monkeypatch.setattr(doctor, "_checkpoint", lambda folder: facts | {"folder": str(folder)})
    monkeypatch.setattr(doctor, "shipped_checkpoints", lambda: ["based-mini", "earthclip-mini"])


def test_report(geobased):
    result = geobased("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == (1 if report["problems"] else 0)
    assert report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    backend = "triton" if torch.cuda.is_available() and report["versions"]["triton"] else "torch"
    assert {"taylor_linear_attention", "cross_entropy", "flash_attention"} <= set(report["kernels"])
    assert {kernel["backend"] for kernel in report["kernels"].values()} == {backend}
    if not torch.cuda.is_available():
        assert all("no CUDA device" in kernel["reason"] for kernel in report["kernels"].values())
    assert report["kernel_check"]["ok"] is True
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert {"triton", "demo", "geo", "train", "audit", "dev"} <= set(report["extras"])
    assert report["extras"]["geo"]["install"] == 'pip install "geobased[geo]"'
    assert report["hub"]["offline"] is True and report["hub"]["cache"]["free_bytes"] > 0
    for name in package.shipped_checkpoints():
        facts = report["checkpoints"][name]
        assert facts["error"] is None and facts["parameters"] > 1_000_000 and len(facts["sha256"]) == 64
        assert facts["bytes"] == Path(package.checkpoint_path(name), "model.safetensors").stat().st_size
    assert any("HF_HUB_OFFLINE" in note["fix"] for note in report["notes"])


def test_table(geobased, healthy):
    result = geobased("doctor")
    assert result.exit_code == 0
    for word in ("versions", "GPU", "kernels", "extra geo", "JPEG decoder", "torchvision", "cache", "no problems"):
        assert word in result.stdout


def test_interpreter_is_told(geobased, healthy, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = json.loads(geobased("doctor", "--json").stdout)
    if report["versions"]["triton"]:
        assert "TRITON_INTERPRET=1" in report["kernels"]["silu_mul"]["reason"]


@pytest.mark.parametrize(
    ("attribute", "value", "what", "fix"),
    [
        ("unmet", lambda requirement: f"{requirement.name} is not installed", "torch is not installed", 'pip install "torch'),
        (
            "_torchvision",
            lambda: {"installed": True, "imports": False, "error": "operator torchvision::nms does not exist"},
            "torchvision cannot be imported",
            "pip uninstall torchvision",
        ),
        (
            "_kernel_check",
            lambda: {"op": "silu_mul", "device": "cuda", "ok": False, "error": "no compiler"},
            "silu_mul fails on cuda: no compiler",
            "gcc",
        ),
        ("shipped_checkpoints", lambda: ["earthclip-mini"], "checkpoint based-mini is missing", "pip install"),
        (
            "_checkpoint",
            lambda folder: {"folder": "x", "bytes": 1, "sha256": "0" * 64, "parameters": None, "error": "damaged"},
            "does not load: damaged",
            "pip install",
        ),
        ("_import_error", lambda: "no module", "geobased cannot be imported: no module", "import geobased"),
    ],
)
def test_what_must_be_mended_fails_with_the_fix(geobased, healthy, monkeypatch, attribute, value, what, fix):
    monkeypatch.setattr(doctor, attribute, value)
    result = geobased("doctor", "--json")
    problems = json.loads(result.stdout)["problems"]
    assert result.exit_code == 1
    assert any(what in problem["what"] and fix in problem["fix"] for problem in problems), problems
    text = geobased("doctor")
    assert text.exit_code == 1 and what in text.stdout and "fix: " in text.stdout


def test_cache_that_cannot_be_written(geobased, healthy, monkeypatch):
    def folder(path):
        return {"path": str(path), "exists": True, "writable": False, "free_bytes": 10}

    monkeypatch.setattr(doctor, "_folder", folder)
    report = json.loads(geobased("doctor", "--json").stdout)
    # offline nothing is downloaded: a note, not a problem
    assert report["problems"] == [] and any("cannot be written" in note["what"] for note in report["notes"])
    assert any("10 bytes are free" in note["what"] for note in report["notes"])


def test_gpus_are_shown_and_a_driver_that_torch_cannot_use_is_noted(geobased, healthy, monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(doctor, "_built_for", lambda: "CPU")
    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    result = geobased("doctor")
    assert "none (driver 570.1; PyTorch built for CPU)" in result.stdout and "install a CUDA build of torch" in result.stdout
    gpu = {"name": "H200", "memory_bytes": 150e9, "free_bytes": 140e9, "capability": "9.0"}
    monkeypatch.setattr(doctor, "_gpus", lambda: [gpu])
    result = geobased("doctor")
    assert result.exit_code == 0 and "H200, 150.0 GB, 140.0 GB free, capability 9.0 (driver 570.1" in result.stdout


def test_truncated_checkpoint_is_told(tiny_copy):
    weights = tiny_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert doctor._checkpoint(tiny_copy)["error"]
    weights.unlink()
    assert "model.safetensors" in doctor._checkpoint(tiny_copy)["error"]


def test_torchvision_of_another_build_is_told(tmp_path):
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    info = tmp_path / "torchvision-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "geobased_command", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    report = json.loads(result.stdout)
    assert result.returncode == 1 and report["versions"]["torchvision"] == "0.1"
    assert any("torchvision" in problem["what"] and "pip uninstall" in problem["fix"] for problem in report["problems"])
