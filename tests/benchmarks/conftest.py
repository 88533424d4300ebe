"""Scripts of benchmarks/ and scripts/, as Python would run them."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def load(monkeypatch):
    """Loads a script of benchmarks/ or scripts/ as Python would run it: with its own folder on the path."""

    def load_script(folder: str, name: str):
        monkeypatch.syspath_prepend(ROOT / folder)
        for sibling in (ROOT / folder).glob("*.py"):
            monkeypatch.delitem(sys.modules, sibling.stem, raising=False)
        spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_script
