"""How the benchmarks measure: ceilings of the GPU, medians, errors against float64, memory beyond the inputs."""

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from results_file import OURS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# a CPU is timed only to see that a benchmark runs
MATMUL_SIZE = 8192 if DEVICE == "cuda" else 128
COPY_BYTES = 2**31 if DEVICE == "cuda" else 2**22
CPU_CALLS = 3


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches, measured in the same run: bytes read plus bytes written, and a large bfloat16 product."""

    copy_tb_per_s: float
    matmul_tflop_per_s: float

    def floor_milliseconds(self, num_bytes: float, flop: float) -> float:
        """Least time for an algorithm that must move `num_bytes` and multiply-add `flop` operations."""
        return max(num_bytes / (self.copy_tb_per_s * 1e9), flop / (self.matmul_tflop_per_s * 1e9))

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


def milliseconds(function: Callable[[], Any], *, rep: int = 80) -> float:
    """Median time of one call; on a GPU the L2 cache is emptied before each."""
    if DEVICE == "cpu":
        seconds = []
        for _ in range(CPU_CALLS):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return 1e3 * statistics.median(seconds)
    import triton.testing

    return triton.testing.do_bench(function, warmup=20, rep=rep, return_mode="median")


def measure_ceilings() -> Ceilings:
    return Ceilings(_copy_bandwidth(), _matmul_rate())


def _copy_bandwidth() -> float:
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / milliseconds(lambda: target.copy_(source)) / 1e9


def _matmul_rate() -> float:
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=DEVICE, dtype=torch.bfloat16)
    return 2 * MATMUL_SIZE**3 / milliseconds(lambda: a @ b) / 1e9


def random_inputs(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Normal random tensors on the device: constant data would let a GPU run faster than it does on real data."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, device=DEVICE, generator=generator).to(dtype) for shape in shapes]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


class WrongResult(RuntimeError):
    """One of our own kernels is wrong: its times mean nothing."""


def checked(error: float | None, limit: float, implementation: str, benchmark: str, case: dict[str, Any]) -> float | None:
    """The error as it is. Raises WrongResult where ours exceeds the limit (or is NaN); a peer's error is only reported."""
    if implementation == OURS and error is not None and not error <= limit:
        raise WrongResult(f"{benchmark} {case}: relative error {error:.2e} exceeds {limit}")
    return error


def gradients(function: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of `function(*leaves)` with respect to every leaf."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(function(*leaves), leaves, grad))


def forward_and_backward(
    function: Callable[..., torch.Tensor],
    leaves: Sequence[torch.Tensor],
    grad: torch.Tensor,
    weights: Sequence[torch.Tensor] = (),
) -> Callable[[], None]:
    """A call that does what a training step pays for: the forward pass and the gradients of all leaves, and of `weights`, which
    `function` holds itself."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def run() -> None:
        torch.autograd.grad(function(*leaves), [*leaves, *weights], grad)

    return run


def working_memory_bytes(function: Callable[[], Any]) -> int | None:
    """Most memory that a call allocates beyond what was allocated before it, its result included; of a GPU alone."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Peers:
    """Peers that may be missing: `get` returns the function, or None after noting why."""

    def __init__(self) -> None:
        self.absent: dict[str, str] = {}

    def get(self, label: str, module: str, name: str) -> Callable[..., Any] | None:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            self.absent[label] = f"{type(error).__name__}: {error}"
        except Exception as error:  # a peer that fails to import must not take the others with it
            self.absent[label] = f"fails to import: {type(error).__name__}: {error}"
        return None

    def report(self) -> None:
        for label, reason in self.absent.items():
            print(f"absent: {label} ({reason})")
