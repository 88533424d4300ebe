"""Kernel tests run on the GPU where there is one, otherwise in Triton's interpreter on CPU tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _fill_with_nan(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and tensor.numel():
        tensor.fill_(float("nan"))
    return tensor


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin give NaN, so that an output which a kernel forgets to write shows."""
    for module, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(module, name)

        def poisoned(*args, _original=original, **kwargs):
            return _fill_with_nan(_original(*args, **kwargs))

        monkeypatch.setattr(module, name, poisoned)
