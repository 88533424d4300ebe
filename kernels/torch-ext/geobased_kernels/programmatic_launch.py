"""Kernels that begin before the one ahead of them has ended (programmatic dependent launch, from compute capability 9 on).

A chain of short kernels spends much of its time on starting them and on filling the memory's pipeline again. A kernel that is
launched within `overlapping_launches` lets the next one start at once, and itself reads what no kernel just ahead of it writes
(weights, states of earlier steps) before it waits for their end.

Only for chains whose kernels all keep to that rule: what a kernel reads before it waits must not have been written by one of
the few kernels ahead of it.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_local = threading.local()


@contextlib.contextmanager
def overlapping_launches(device: torch.device) -> Iterator[None]:
    """Within it, kernels that know how to overlap the one ahead of them. Does nothing on devices that cannot."""
    previous = getattr(_local, "on", False)
    _local.on = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    try:
        yield
    finally:
        _local.on = previous


def overlap_options() -> dict[str, Any]:
    """Launch options of a kernel with the constant OVERLAP."""
    return {"OVERLAP": True, "launch_pdl": True} if getattr(_local, "on", False) else {"OVERLAP": False}
