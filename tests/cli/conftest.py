"""Running the command in this process, and folders to spoil."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from geobased.cli.main import app


@pytest.fixture
def geobased() -> Callable[..., object]:
    """Runs `geobased` with arguments; the result has exit_code, stdout and stderr."""

    def run(*arguments: object, stdin: str | bytes | None = None):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def fails(geobased) -> Callable[..., str]:
    """Runs `geobased`, asserts that it fails with one sentence and this exit code, and returns the sentence."""

    def run(*arguments: object, code: int = 2, stdin: str | bytes | None = None) -> str:
        result = geobased(*arguments, stdin=stdin)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        return lines[0]

    return run


@pytest.fixture
def tiny_copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to be spoilt."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
