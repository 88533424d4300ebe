"""`geobased train sumformer-experiment`: what it passes on, prints and refuses; the work itself is tested in tests/training."""

import json
from dataclasses import asdict

import pytest
import torch

from geobased.training.sumformer_experiment_models import Architecture


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the trainings; the calls are returned."""
    from geobased.training import sumformer_experiment

    found = []

    def run(preset, output_dir, *, report, **options):
        found.append((preset, options))
        report("half of it is done")
        entries = [
            asdict(Architecture(family, 4, 2))
            | {"target": "rank", "nmse": [nmse, nmse], "equivariance_error": [0.0, 0.0], "plateau": [True, True]}
            | {"nmse_by_length": {}, "seeds": [0, 1]}
            for family, nmse in (("sumformer", 0.25), ("linformer", 0.5))
        ]
        results = {"preset": preset, "device": "cpu", "times": [], "entries": entries, "complete": False}
        output_dir.mkdir(exist_ok=True)
        (output_dir / "results.json").write_text(json.dumps(results))
        return results

    monkeypatch.setattr(sumformer_experiment, "run_experiment", run)
    return found


def test_options_reach_the_experiment_and_results_are_shown(geobased, calls, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--preset", "smoke", "--seeds", 2, "--workers", 3, "--max-seconds", 9, "--device", "cpu")
    command = ("train", "sumformer-experiment", "--output-dir", tmp_path / "new")
    result = geobased(*command, *options)
    assert result.exit_code == 0, result.output
    assert calls == [("smoke", {"seeds": 2, "device": torch.device("cpu"), "workers": 3, "max_seconds": 9.0})]
    assert "2.50e-01" in result.stdout and "models.png" in result.stdout.replace("\n", "")
    assert "half of it is done" in result.stderr and "the same command goes on" in result.stderr
    (tmp_path / "new" / "models.png").unlink()
    drawn = json.loads(geobased(*command, "--plot-only", "--json").stdout)
    assert len(calls) == 1 and (tmp_path / "new" / "models.png").is_file() and len(drawn["files"]) == 1


def test_wrong_input_is_named(fails, tmp_path):
    command = ("train", "sumformer-experiment", "--output-dir")
    assert "preset 'large' is none of standard, smoke" in fails(*command, tmp_path, "--preset", "large")
    assert "run the experiment first" in fails(*command, tmp_path, "--plot-only")
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(*command, tmp_path / "file")
