import json

import pytest

from geobased.cli.recall_benchmark import harness_differences


def test_calibration_of_two_models_is_measured_and_written(geobased, tiny_model_dir, tmp_path):
    pytest.importorskip("matplotlib")
    questions = tmp_path / "questions.jsonl"
    assert "12 questions" in geobased("recall", "calibration", "--write-questions", questions, "--num-questions", 12).stdout
    shared = ("--model", tiny_model_dir, "--output", tmp_path / "out.json", "--plot", tmp_path / "plot.png")
    result = geobased("recall", "calibration", questions, *shared, "--before", "based-mini", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report["calibration"]) == ["based-mini", str(tiny_model_dir)]
    before, after = report["calibration"].values()
    assert before["accuracy"]["value"] > after["accuracy"]["value"] and before["num_questions"] == 12
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    text = geobased("recall", "calibration", questions, "--model", tiny_model_dir, "--device", "cpu").stdout
    assert "calibration error" in text and "12 questions" in text


def test_wrong_arguments_are_named(fails, tmp_path):
    assert "--normalization 'word' is not one of none" in fails("recall", "calibration", "--normalization", "word")
    assert "there is no folder" in fails("recall", "calibration", "--plot", tmp_path / "no" / "x.png")
    assert "no such file of questions" in fails("recall", "calibration", tmp_path / "none.jsonl")


def test_differences_of_the_harness_come_with_their_error():
    def report(value, error):
        row = {"alias": "t", "sample_len": 3, "acc,none": value, "acc_stderr,none": error, "mean,none": value}
        return {"results": {"t": row, "u": {}}}

    found = harness_differences(report(0.5, 0.03), report(0.75, 0.04))
    assert found["t"]["acc,none"] == {"before": 0.5, "after": 0.75, "difference": 0.25, "standard_error": pytest.approx(0.05)}
    assert found["t"]["mean,none"]["standard_error"] is None and set(found) == {"t"}
    assert set(found["t"]) == {"acc,none", "mean,none"}
