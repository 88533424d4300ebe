"""Which form of an op runs: the Triton kernel or its plain PyTorch twin."""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator

import torch

BACKENDS = ("auto", "triton", "torch")
_default_backend = "auto"


# looked up once, here: torch.compile cannot trace the search
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_is_installed() -> bool:
    return _TRITON_IS_INSTALLED


def triton_interpreter_is_on() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within this context every op called with `backend="auto"` uses `backend`."""
    global _default_backend
    _check_name(backend)
    previous, _default_backend = _default_backend, backend
    try:
        yield
    finally:
        _default_backend = previous


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")


def resolve_backend(backend: str, tensor: torch.Tensor) -> str:
    """ "auto" -> "triton" for half, bfloat16 and float32 tensors on a GPU, otherwise "torch".

    Raises RuntimeError if "triton" is asked for where it cannot run. On the CPU Triton runs only in its interpreter
    (TRITON_INTERPRET=1), which is a debugging aid, so "auto" never picks it there.
    """
    _check_name(backend)
    if backend == "auto":
        backend = _default_backend
    if backend == "torch":
        return "torch"
    if backend == "triton":
        if not triton_is_installed():
            raise RuntimeError('backend="triton" needs Triton: pip install "geobased[triton]"')
        if not tensor.is_cuda and not triton_interpreter_is_on():
            raise RuntimeError(
                f'backend="triton" cannot run on device {tensor.device}: move the tensors to a GPU, or set TRITON_INTERPRET=1'
                " before Python starts to run the kernels in Triton's interpreter"
            )
        if tensor.dtype == torch.float64:
            raise RuntimeError('backend="triton" does not take float64; use backend="torch"')
        return "triton"
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return "torch"
    if not triton_is_installed():
        _warn_once('Triton is not installed: geobased uses its slower plain PyTorch kernels. pip install "geobased[triton]"')
        return "torch"
    return "triton"


def without_triton(op: str, backend: str, limit: str) -> str:
    """ "torch", with one warning, where the Triton form of `op` does not take the shapes; `limit` says which it takes.

    Raises ValueError if the caller asked for `backend="triton"`.
    """
    if backend == "triton":
        raise ValueError(f'{limit}; use backend="torch"')
    _warn_once(f"{op}: {limit}; using the slower plain PyTorch form")
    return "torch"
