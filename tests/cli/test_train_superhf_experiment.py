"""`geobased train superhf-experiment`: what it passes on and prints; the work itself is tested in tests/training."""

import json
import types

import pytest


@pytest.fixture
def calls(monkeypatch):
    pytest.importorskip("trl")
    pytest.importorskip("nltk")
    from geobased.training import superhf_experiment

    found = []

    def run(settings, output_dir, **options):
        found.append(types.SimpleNamespace(settings=settings, output_dir=output_dir, **options))
        return {"rows": [], "verdicts": [], "complete": False}

    monkeypatch.setattr(superhf_experiment, "run_experiment", run)
    return found


def test_options_reach_the_experiment(geobased, calls, tmp_path):
    options = ("--preset", "smoke", "--seeds", 2, "--arms", "base, superhf", "--policies", "based-mini", "--workers", 3)
    arguments = (
        "train",
        "superhf-experiment",
        "--output-dir",
        tmp_path,
        *options,
        "--max-seconds",
        9,
        "--device",
        "cpu",
        "--json",
    )
    result = geobased(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["complete"] is False
    (call,) = calls
    assert (call.settings.num_seeds, call.settings.steps, call.workers, call.max_seconds) == (2, 2, 3, 9)
    assert (call.arms, call.policies, call.device.type) == (("base", "superhf"), ("based-mini",), "cpu")
    assert call.based.endswith("based-mini")


def test_wrong_input_is_named(fails, tmp_path):
    pytest.importorskip("trl")
    command = ("train", "superhf-experiment", "--output-dir")
    assert "--preset 'large' is not one of smoke, standard" in fails(*command, tmp_path, "--preset", "large")
    assert "arms: ppo is none of base" in fails(*command, tmp_path / "new", "--arms", "ppo")
    assert "run the experiment first" in fails(*command, tmp_path, "--plot-only")
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(*command, tmp_path / "file")
