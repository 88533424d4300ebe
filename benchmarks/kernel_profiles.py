"""Profiles single kernels with Nsight Compute and keeps what bounds them beside the timings.

    python benchmarks/kernel_profiles.py [--only NAME ...] [--output FOLDER]

Runs itself once per case under `ncu`, which replays every kernel of the case while it reads the counters, and writes
`benchmarks/results/<gpu>/kernel_profiles.json`: for every kernel its time, bytes and rates, occupancy, and what ncu says of the
stalls. The times are of single launches at whatever clocks the GPU has; attention_kernels.py has the times to quote.
Needs `ncu` on the PATH and the right to read hardware counters; without them it says so and exits with code 1.
"""

import argparse
import csv
import functools
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from results_file import write_report
from timing import forward_and_backward, random_inputs

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
KEPT = (
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "L1/TEX Cache Throughput",
    "L2 Cache Throughput",
    "L2 Hit Rate",
    "Mem Busy",
    "Mem Pipes Busy",
    "SM Busy",
    "Executed Ipc Active",
    "Issue Slots Busy",
    "Warp Cycles Per Issued Instruction",
    "Registers Per Thread",
    "Dynamic Shared Memory Per Block",
    "Grid Size",
    "Block Size",
    "Waves Per SM",
    "Theoretical Occupancy",
    "Achieved Occupancy",
)
WINDOW = 129


def taylor(batch: int, seq_len: int, head_dim: int, backward: bool = False) -> Callable[[], Any]:
    from geobased.kernels.taylor_linear_attention import taylor_linear_attention

    inputs = random_inputs(*[(batch, seq_len, 16, n) for n in (16, 16, head_dim)])
    call: Callable[..., Any] = functools.partial(taylor_linear_attention, backend="triton")
    if backward:
        return forward_and_backward(call, inputs, torch.randn_like(inputs[2]))
    return functools.partial(call, *inputs)


def window(head_dim: int) -> Callable[[], Any]:
    from geobased.kernels.sliding_window_attention import sliding_window_attention

    inputs = random_inputs(*[(16, 4096, 16, head_dim)] * 3)
    call = functools.partial(sliding_window_attention, window=WINDOW, backend="triton")
    return forward_and_backward(call, inputs, torch.randn_like(inputs[2]))


CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "taylor_forward_65536": functools.partial(taylor, 1, 65536, 64),
    "taylor_forward_2048": functools.partial(taylor, 32, 2048, 64),
    "taylor_backward_2048": functools.partial(taylor, 32, 2048, 64, backward=True),
    "window_backward_64": functools.partial(window, 64),
    "window_backward_112": functools.partial(window, 112),
}


def run_case(name: str) -> None:
    """What ncu watches: one call, after one that compiles."""
    call = CASES[name]()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def kernels_of(table: str) -> list[dict[str, Any]]:
    """The kernels in ncu's CSV of details, in the order they ran: name, metrics with units, and what ncu remarks."""
    lines = [line for line in table.splitlines() if line.startswith('"')]  # what the program itself prints stands between
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines))):
        found = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"], "metrics": {}, "remarks": []})
        if line["Metric Name"] in KEPT:
            unit = f" {line['Metric Unit']}" if line["Metric Unit"] else ""
            found["metrics"][line["Metric Name"]] = line["Metric Value"] + unit
        remark = line.get("Rule Description")
        if remark and line.get("Rule Type") != "INF":
            found["remarks"].append(f"{line['Rule Name']}: {remark}")
    return list(kernels.values())


def profile(name: str) -> list[dict[str, Any]]:
    """Raises RuntimeError with ncu's words where it cannot read the counters."""
    sections = [option for section in SECTIONS for option in ("--section", section)]
    command = ["ncu", "--csv", "--page", "details", "--profile-from-start", "off", "--clock-control", "none", *sections]
    result = subprocess.run(
        [*command, sys.executable, __file__, "--case", name], capture_output=True, text=True, check=False, timeout=300
    )
    kernels = kernels_of(result.stdout)
    if result.returncode or not kernels:
        raise RuntimeError(f"ncu gave no profile of {name}: {(result.stdout + result.stderr)[-600:]}")
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some cases")
    parser.add_argument("--output", help="folder for kernel_profiles.json (default: benchmarks/results/<gpu>)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # what ncu starts
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("profiling needs a CUDA GPU")
    if arguments.case:
        run_case(arguments.case)
        return
    if shutil.which("ncu") is None:
        sys.exit("ncu is not on the PATH: it comes with CUDA's toolkit (Nsight Compute)")
    profiles: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.only:
        try:
            profiles[name] = profile(name)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            sys.exit(str(error))
        for kernel in profiles[name]:
            metrics = kernel["metrics"]
            shown = ", ".join(
                f"{label} {metrics.get(label, '-')}"
                for label in ("Duration", "DRAM Throughput", "Compute (SM) Throughput", "Achieved Occupancy")
            )
            print(f"{name:22s} {kernel['kernel'][:40]:40s} {shown}", flush=True)
        path = write_report("kernel_profiles", arguments.output, profiles=profiles)
    print("written to", path)


if __name__ == "__main__":
    main()
