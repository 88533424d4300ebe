"""Runs the tests marked `gpu` and keeps what passed, on which GPU and with which versions, beside the timings.

    python benchmarks/gpu_tests.py              # every gpu test, one process
    python benchmarks/gpu_tests.py -n 8 -k taylor   # further arguments go to pytest

Writes `benchmarks/results/<gpu>/gpu_tests.json` after a run of all tests; a run of a part only prints.
Exits with pytest's code.
"""

import os
import sys
import time
from pathlib import Path

import pytest
from results_file import write_report

ROOT = Path(__file__).resolve().parent.parent
# where GPU tests are; the others would only be collected, which needs packages that a GPU machine may lack
TESTS = (
    "tests/kernels",
    "tests/modeling_based/test_gpu.py",
    "tests/modeling_based/test_fast_generation.py",
    "tests/modeling_streetclip/test_image_processing_gpu.py",
    "tests/pipelines/test_image_geolocalization_gpu.py",
)


class Outcomes:
    """Pytest plugin: names of the tests by outcome; failures are printed at once, as a long run may be cut short."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.passed: list[str] = []
        self.skipped: list[str] = []
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            reasons = [line for line in str(report.longrepr).splitlines() if line.startswith("E")]
            self.failed[report.nodeid] = " | ".join(reasons)[:600]
            print(f"\nFAILED {report.nodeid} ({report.when}): {self.failed[report.nodeid]}", flush=True)
        elif report.skipped:
            self.skipped.append(report.nodeid)
        elif report.when == "call":
            self.passed.append(report.nodeid)


def main(arguments: list[str]) -> int:
    os.chdir(ROOT)
    outcomes = Outcomes()
    options = ["-m", "gpu", "-q", "--no-header", "--tb=short", *arguments]
    start = time.perf_counter()
    code = pytest.main([*options, *TESTS], plugins=[outcomes])
    seconds = time.perf_counter() - start
    for name, duration in sorted(outcomes.seconds.items(), key=lambda item: -item[1])[:10]:
        print(f"{duration:6.1f} s  {name}")
    print(f"{len(outcomes.passed)} passed, {len(outcomes.failed)} failed, {len(outcomes.skipped)} skipped, {seconds:.0f} s")
    if any(option in arguments for option in ("-k", "--deselect", "--lf", "-x")):
        return int(code)
    write_report(
        "gpu_tests",
        command=" ".join(["python -m pytest -m gpu", *arguments, *TESTS]),
        passed=len(outcomes.passed),
        failed=outcomes.failed,
        skipped=sorted(outcomes.skipped),
        seconds=round(seconds, 1),
        tests=sorted(outcomes.passed),
    )
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
