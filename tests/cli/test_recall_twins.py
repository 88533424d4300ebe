"""`geobased recall twins` in small."""

import json
from dataclasses import replace

import pytest

from geobased.recall import twins


@pytest.fixture
def tiny_preset(monkeypatch) -> None:
    tiny = replace(
        twins.PRESETS["smoke"],
        hidden_size=32,
        intermediate_size=64,
        tokens=2_000,
        tokens_per_step=256,
        phases=(twins.PhaseSettings(128, 1.0, num_documents=8, max_words=40, max_records=2, num_validation=2),),
        lengths=(128,),
        num_examples=2,
        num_held_out_documents=1,
    )
    monkeypatch.setitem(twins.PRESETS, "smoke", tiny)


def test_twins_are_trained_compared_and_drawn(geobased, tiny_preset, tmp_path):
    arguments = ("recall", "twins", "--preset", "smoke", "--output-dir", tmp_path, "--model", "based", "--no-throughput")
    result = geobased(*arguments, "--device", "cpu", "--num-workers", 1, "--tokens", 1_000)
    assert result.exit_code == 0, result.output
    assert "based                128" in result.stdout and str(tmp_path / "twins.png") in result.stdout
    assert "based, seed 0, rate 0.002: 0.0 M tokens" in result.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["complete"] and results["settings"]["tokens"] == 1_000
    again = geobased(*arguments, "--device", "cpu", "--tokens", 1_000, "--json")
    assert json.loads(again.stdout)["runs"] == results["runs"]
    (tmp_path / "twins.png").unlink()
    assert geobased("recall", "twins", "--plot-only", "--output-dir", tmp_path).stdout == f"{tmp_path / 'twins.png'}\n"


def test_errors_name_the_value(fails, tiny_preset, tmp_path):
    assert "--preset 'large' is not one of smoke, standard, long" in fails(
        "recall", "twins", "--preset", "large", "--output-dir", tmp_path
    )
    assert "there is no twin 'mamba'" in fails("recall", "twins", "--output-dir", tmp_path, "--model", "mamba")
    assert "no such text file" in fails("recall", "twins", "--output-dir", tmp_path, "--text", tmp_path / "missing.txt")
    assert "train the twins first" in fails("recall", "twins", "--plot-only", "--output-dir", tmp_path)
