import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

SCRIPT = Path(__file__).with_name("superhf_processes.py")
# with --cpu the launcher wants MPI; --multi_gpu starts torchrun, and the script asks for the CPU
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
LAUNCH += ("--num_cpu_threads_per_process=1", "--main_process_port=0")
TIMINGS = {"step_time"}


@pytest.mark.slow
def test_two_processes_select_and_learn_like_one(mini_tokenizer, tmp_path):
    results = []
    for processes in (1, 2):
        output = str(tmp_path / f"{processes}.json")
        launch = LAUNCH if processes == 2 else ()
        command = [sys.executable, *launch, str(SCRIPT), mini_tokenizer.name_or_path, str(8 // processes), output]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CI": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(json.loads(Path(output).read_text()))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["kept"] == two["kept"]
    assert [len(kept) for kept in one["kept"]] == [2, 4, 2]
    assert one["weights"] == pytest.approx(two["weights"], rel=1e-5)
    for log, other in zip(one["logs"], two["logs"], strict=True):
        assert set(log) == set(other)
        for name in set(log) - TIMINGS:
            assert log[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
