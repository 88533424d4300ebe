"""Starts the `geobased` command without torch and transformers until a command needs them.

Importing any module of geobased runs `geobased/__init__.py`, which registers the models with transformers and takes seconds.
Help, wrong usage and shell completion need none of that. So the script starts here, outside the package, and puts one in place
whose `__init__` runs when a command does.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _PackageOnDemand(ModuleType):
    """The package geobased; its submodules can be imported, and its `__init__` runs when one of its own names is looked up."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        try:
            self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        except BaseException:
            self.__class__ = _PackageOnDemand
            raise
        return getattr(self, name)


def main() -> None:
    """Entry point of the `geobased` script."""
    if "geobased" not in sys.modules:
        spec = importlib.util.find_spec("geobased")
        if spec is None:
            raise ModuleNotFoundError("the package geobased is not installed", name="geobased")
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _PackageOnDemand
        sys.modules["geobased"] = package
    from geobased.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
