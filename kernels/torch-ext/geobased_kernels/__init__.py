"""Kernels of geobased: one op, one file, its plain PyTorch twin beside it.

Also a Hub kernel project (Triton, so one build serves every PyTorch): imports in this folder are relative and it depends on
torch and triton alone. Ops are modules, loaded on first use; Triton is imported only where a Triton form runs:

    y = kernel.taylor_linear_attention.taylor_linear_attention(q, k, v)

`layers` holds what the package `kernels` puts in place of a model's own functions.
"""

import importlib
from pathlib import Path
from types import ModuleType

_PRIVATE_SUFFIXES = ("_triton", "_launch", "_configs")
__all__ = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if not path.stem.endswith(_PRIVATE_SUFFIXES))


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
