"""`geobased recall mqar`: what it hands to the sweep, what it writes and prints, and what it refuses."""

import json
import sys
import types

import pytest
import torch

from geobased.recall.pareto_paper import FIGURE2_TESTS


def row(family, state_bytes, accuracy, **changes):
    return {
        "family": family,
        "label": f"{family} {state_bytes}",
        "mixers": ["conv", family],
        "hidden_size": 32,
        "feature_dim": 8,
        "sliding_window": None,
        "state_size": None,
        "learning_rate": 1e-2,
        "seed": 0,
        "num_parameters": 10_000,
        "state_bytes": state_bytes,
        "validation_accuracy": accuracy,
        "accuracy": accuracy,
        "accuracy_by_test": dict.fromkeys(FIGURE2_TESTS, accuracy),
        "epochs": 2,
        "seconds": 1.0,
        "chosen_learning_rate": True,
    } | changes


def results(rows, preset="smoke"):
    return {
        "preset": preset,
        "device": "cpu",
        "versions": {},
        "date": "2026-01-01",
        "seconds": 2.0,
        "settings": {"epochs": 2},
        "absent": {"performer": "no such mixer"},
        "rows": rows,
    }


@pytest.fixture
def sweeps(monkeypatch):
    """Stands in for the training: each call adds a run to the folder's results.json; the calls are returned."""
    calls = []

    def run_sweep(preset, output_dir, *, families, seeds, device, workers, max_seconds):
        if preset == "figure9":
            raise ValueError("preset 'figure9' is none of figure2, smoke")
        calls.append((preset, families, seeds, device, workers, max_seconds))
        output_dir.mkdir(exist_ok=True)
        path = output_dir / "results.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else [row("attention", 70_000, 0.9)]
        rows.append(row("based", 9_000 * 2 ** len(rows), 0.4 + 0.1 * len(rows)))
        path.write_text(json.dumps(results(rows, preset)))
        return results(rows, preset)

    module = types.ModuleType("geobased.recall.mqar_sweep")
    module.run_sweep = run_sweep
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_the_sweep_is_run_reported_and_gone_on_with(geobased, sweeps, tmp_path):
    folder = tmp_path / "sweep"
    arguments = ("--output-dir", folder, "--preset", "smoke", "--families", "based, attention", "--seeds", 2)
    result = geobased("recall", "mqar", *arguments, "--workers", 3, "--max-seconds", 60, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert sweeps == [("smoke", ["based", "attention"], 2, torch.device("cpu"), 3, 60.0)]
    assert "done already" not in result.stderr
    assert "*  based 18000" in result.stdout and "absent: performer: no such mixer" in result.stdout
    assert "BASED reaches 0.97 with a state of 2^16.3 bytes" in result.stdout.replace("\n", " ")
    for name in ("results.json", "results.csv", "pareto.png", "pareto_by_length.png"):
        assert (folder / name).stat().st_size and str(folder / name) in result.stdout.replace("\n", "")

    again = geobased("recall", "mqar", "--output-dir", folder, "--device", "cpu", "--json", "--plot", tmp_path / "p.png")
    assert "2 runs are done already" in again.stderr and sweeps[1] == ("smoke", None, None, torch.device("cpu"), None, None)
    report = json.loads(again.stdout)
    assert report["num_runs"] == 3 and report["frontier"] == ["based 18000", "based 36000", "attention 70000"]
    assert report["configurations"][0]["accuracy"] == {"mean": 0.5, "std": None, "n": 1}
    assert report["comparison"]["statements"][0]["verdict"] == "not measured"
    assert report["comparison"]["lines"][2]["verdict"] == "lower by 0.320"
    assert report["files"]["pareto"] == str(tmp_path / "p.png") and (tmp_path / "p_by_length.png").is_file()


def test_report_only_trains_nothing_and_merges_parts(geobased, sweeps, tmp_path):
    for name, rows in (("a", [row("based", 9_000, 0.5)]), ("b", [row("mamba2", 9_000, 0.4), row("based", 18_000, 0.6)])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results(rows)))
    report = json.loads(geobased("recall", "mqar", "--report-only", "--output-dir", tmp_path / "a", "--json").stdout)
    assert report["num_runs"] == 1 and (tmp_path / "a" / "pareto.png").is_file()
    both = ("--merge", tmp_path / "a", "--merge", tmp_path / "b" / "results.json")
    report = json.loads(geobased("recall", "mqar", "--report-only", "--output-dir", tmp_path / "c", *both, "--json").stdout)
    assert report["num_runs"] == 3 and len(json.loads((tmp_path / "c" / "results.json").read_text())["rows"]) == 3
    assert report["comparison"]["statements"][1]["holds"] is True
    assert sweeps == []


def test_a_sweep_over_other_examples_is_not_laid_beside_the_figure(geobased, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results([row("based", 9_000, 0.5, accuracy_by_test={"32/2": 0.5})])))
    result = geobased("recall", "mqar", "--report-only", "--output-dir", tmp_path)
    assert "not laid beside the paper's figure" in result.stdout and "BASED reaches" not in result.stdout


def test_what_is_not_finished_is_said(geobased, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results([row("based", 9_000, 0.5, chosen_learning_rate=False)])))
    result = geobased("recall", "mqar", "--report-only", "--output-dir", tmp_path)
    assert result.exit_code == 0 and "not finished: based 9000" in result.stdout
    assert not (tmp_path / "pareto.png").exists() and (tmp_path / "results.csv").is_file()


def test_without_matplotlib_the_training_is_kept_and_the_figure_asked_for_is_refused_at_once(
    geobased, fails, sweeps, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("geobased.cli.recall_mqar.find_spec", lambda name: None)
    result = geobased("recall", "mqar", "--output-dir", tmp_path / "a", "--device", "cpu")
    assert result.exit_code == 0 and "matplotlib is not installed" in result.stderr
    assert (tmp_path / "a" / "results.csv").is_file()
    fails("recall", "mqar", "--output-dir", tmp_path / "b", "--plot", tmp_path / "p.png", code=1)
    assert len(sweeps) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "figure9"), "preset 'figure9' is none of"),
        (("--families", " , "), "names no family"),
        (("--merge", "x"), "--merge goes with --report-only"),
        (("--report-only",), "there are no results"),
        (("--plot", "no/such/folder/p.png"), "there is no folder"),
        (("--device", "cuda:77"), "is not available here"),
    ],
)
def test_wrong_input_ends_in_a_sentence(fails, sweeps, tmp_path, arguments, message):
    assert message in fails("recall", "mqar", "--output-dir", tmp_path / "new", *arguments)


def test_a_folder_of_another_preset_is_left_alone(fails, sweeps, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results([], preset="figure2")))
    for extra in ((), ("--report-only",)):
        sentence = fails("recall", "mqar", "--output-dir", tmp_path, "--preset", "smoke", *extra)
        assert "holds a sweep of 'figure2', not of 'smoke'" in sentence
    assert sweeps == []
