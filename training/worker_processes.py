"""Processes that work side by side, each with a device of its own."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

import torch

_device = torch.device("cpu")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_names(device: torch.device) -> list[str]:
    """ "cuda" stands for all visible GPUs; any other device for itself."""
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(device)]


def default_workers(device: torch.device, per_gpu: int) -> int:
    """So many for each GPU, or one for each two CPU cores."""
    return per_gpu * len(device_names(device)) if device.type == "cuda" else max(1, num_cores() // 2)


def worker_device() -> torch.device:
    """That of the worker process which asks, or of `ThisProcess`; the CPU where there is neither."""
    return _device


class ThisProcess(Executor):
    """Does what it is given at once, here, on the first of `device_names(device)`."""

    def __init__(self, device: torch.device) -> None:
        global _device
        _device = torch.device(device_names(device)[0])

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def device_pool(device: torch.device, workers: int, prepare: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """Processes that are spread over `device_names(device)` and share the cores.

    Args:
        prepare: called in every process when it starts, before it has touched its device.
    """
    context, names = multiprocessing.get_context("spawn"), device_names(device)
    devices = context.Queue()
    for number in range(workers):
        devices.put(names[number % len(names)])
    return ProcessPoolExecutor(workers, context, _start_worker, (devices, max(1, num_cores() // workers), prepare))


def _start_worker(devices: Any, threads: int, prepare: Callable[[], None] | None) -> None:
    global _device
    _device = torch.device(devices.get())
    if prepare is not None:
        prepare()
    torch.set_num_threads(threads)
    if _device.type == "cuda":
        torch.cuda.set_device(_device)


__all__ = ["ThisProcess", "default_workers", "device_names", "device_pool", "num_cores", "worker_device"]
