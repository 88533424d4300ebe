"""The installed command as users call it: a process of its own, without a network."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "geobased.cli.main")


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": ""} | changes


def run(*arguments: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(**changes), timeout=120)


def test_generate_writes_only_text_and_statistics(tiny_model_dir, tmp_path):
    result = run("generate", "the river", "--model", tiny_model_dir, "-n", 5, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("the river")
    assert [line.partition(" ")[0] for line in result.stderr.splitlines()] == ["5", "state:"]


def test_unreachable_hub_is_told_quickly(tmp_path):
    # nothing listens on port 9; the Hub client alone would retry for half a minute
    result = run(
        "generate", "hi", "--model", "acme/no-such-model", cwd=tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: the model acme/no-such-model is neither a folder nor in")
    assert "http://127.0.0.1:9 cannot be reached" in result.stderr
    assert "Retrying" not in result.stderr and "Traceback" not in result.stderr and result.stdout == ""


@pytest.mark.skipif(os.name == "nt", reason="SIGINT reaches a single process on POSIX only")
def test_ctrl_c_ends_with_the_statistics(tiny_copy, tmp_path):
    for path in (tiny_copy / "config.json", tiny_copy / "generation_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    command = [*COMMAND, "generate", "the river", "--model", str(tiny_copy), "--max-new-tokens", "1000000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.read(9) == "the river"
    process.stdout.read(20)  # arrives while the process still generates: the text streams
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "until interrupted" in stderr and "state: " in stderr and "Traceback" not in stderr


def test_debug_shows_the_traceback(tmp_path):
    result = run("generate", "hi", "--model", tmp_path, "--debug", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" in result.stderr and "has no config.json" in result.stderr.splitlines()[-1]
