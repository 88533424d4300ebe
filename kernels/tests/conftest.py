"""No network, Triton's interpreter without a GPU, and Hugging Face's package `kernels` under its own name."""

import os
import sys

# read when huggingface_hub and triton are imported
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest calls the modules of this folder `kernels.tests.…` and makes a module `kernels` for it: transformers, which imports
# the package of that name where it is installed, would find an empty one
made_by_pytest = sys.modules.pop("kernels", None)
try:
    import kernels  # noqa: F401
except ImportError:
    if made_by_pytest is not None:
        sys.modules["kernels"] = made_by_pytest
