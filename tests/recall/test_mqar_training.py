import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from geobased.recall import mqar_sweep
from geobased.recall.modeling_mqar import MQARConfig
from geobased.recall.mqar import Examples, Segment, accuracy, generate_examples
from geobased.recall.mqar_presets import ABSENT, PRESETS, Configuration
from geobased.recall.mqar_training import TrainingSettings, query_accuracy, train_cohort
from geobased.recall.pareto import FAMILIES
from geobased.recall.state_size import state_bytes

CPU = torch.device("cpu")
ATTENTION = MQARConfig(vocab_size=64, hidden_size=32, mixers=["conv", "attention"])


@pytest.fixture(scope="module")
def examples() -> tuple[list[Examples], list[Examples]]:
    train, validation = (
        generate_examples([Segment(16, 2, count)], [seed], 64, progress=False) for count, seed in ((2048, 1), (128, 2))
    )
    return train, validation


def settings(**changes) -> TrainingSettings:
    return replace(TrainingSettings(learning_rate=1e-2, epochs=12, batch_size=64), **changes)


def test_attention_learns_to_recall_and_stops_when_it_can(examples):
    (trained,) = train_cohort([(ATTENTION, settings())], *examples, device=CPU)
    assert trained is not None and not trained.diverged
    assert trained.validation_accuracy[0] < 0.5
    assert trained.validation_accuracy[-1] > 0.97
    assert trained.training_loss[-1] < 0.3 * trained.training_loss[0]
    early = train_cohort([(ATTENTION, settings(stop_accuracy=0.5))], *examples, device=CPU)[0]
    assert len(early.validation_accuracy) < 12 and early.validation_accuracy[-1] >= 0.5
    assert all(value < 0.5 for value in early.validation_accuracy[:-1])


def test_a_run_does_not_depend_on_its_cohort(examples):
    short = settings(epochs=1)
    alone = train_cohort([(ATTENTION, short)], *examples, device=CPU)[0]
    beside = train_cohort([(ATTENTION, replace(short, learning_rate=1e-3)), (ATTENTION, short)], *examples, device=CPU)
    assert alone.training_loss == beside[1].training_loss
    assert beside[0].training_loss != beside[1].training_loss
    other_seed = train_cohort([(ATTENTION, replace(short, seed=1))], *examples, device=CPU)[0]
    assert other_seed.training_loss != alone.training_loss


def test_accuracy_of_a_model_is_that_of_its_answers(examples):
    trained = train_cohort([(ATTENTION, settings(epochs=2))], *examples, device=CPU)[0]
    held_out = examples[1][0]
    logits = trained.model.eval()(held_out.inputs, query_positions=held_out.query_positions).logits
    assert query_accuracy(trained.model, held_out) == pytest.approx(accuracy(logits.argmax(-1), held_out.targets))


def test_nothing_is_returned_of_what_a_deadline_cut_off(examples):
    assert train_cohort([(ATTENTION, settings())], *examples, device=CPU, deadline=time.monotonic()) == [None]


def test_a_training_that_a_deadline_cut_off_goes_on_to_the_same_end(examples, tmp_path, monkeypatch):
    short, paths = settings(epochs=3), [tmp_path / "a.pt", tmp_path / "b.pt"]
    runs = [(ATTENTION, short), (ATTENTION, replace(short, learning_rate=1e-3))]
    whole = train_cohort(runs, *examples, device=CPU)
    clock = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr("geobased.recall.mqar_training.time.monotonic", lambda: next(clock))
        assert train_cohort(runs, *examples, device=CPU, deadline=3, checkpoints=paths) == [None, None]
    assert all(path.exists() for path in paths)
    resumed = train_cohort(runs, *examples, device=CPU, checkpoints=paths)
    assert [run.training_loss for run in resumed] == [run.training_loss for run in whole]
    assert [run.validation_accuracy for run in resumed] == [run.validation_accuracy for run in whole]
    assert not any(path.exists() for path in paths)


def test_an_unfinished_training_of_other_settings_is_refused(examples, tmp_path):
    path = tmp_path / "a.pt"
    run = [(ATTENTION, settings())]
    train_cohort(run, *examples, device=CPU, deadline=time.monotonic(), checkpoints=[path])
    with pytest.raises(ValueError, match="other settings"):
        train_cohort([(ATTENTION, settings(seed=1))], *examples, device=CPU, checkpoints=[path])


def test_cohorts_and_settings_that_cannot_be_are_named(examples):
    with pytest.raises(ValueError, match="one batch size"):
        train_cohort([(ATTENTION, settings()), (ATTENTION, settings(batch_size=32))], *examples, device=CPU)
    with pytest.raises(ValueError, match="batch_size=4096 is more than the 2048 examples"):
        train_cohort([(ATTENTION, settings(batch_size=4096))], *examples, device=CPU)
    with pytest.raises(ValueError, match="precision='fp8'"):
        settings(precision="fp8")
    with pytest.raises(ValueError, match="must be positive"):
        settings(learning_rate=0.0)


def test_the_presets_hold_each_configuration_once_and_can_count_its_state():
    for preset in PRESETS.values():
        labels = [configuration.label for configuration in preset.configurations]
        assert len(set(labels)) == len(labels)
        assert {configuration.family for configuration in preset.configurations} <= set(FAMILIES) - set(ABSENT)
        for configuration in preset.configurations:
            assert state_bytes(configuration.model_config(preset.vocab_size), 1024) > 0
    figure = {configuration.label: configuration for configuration in PRESETS["figure2"].configurations}
    # the published figure's point at 2^16.3 bytes
    assert state_bytes(figure["based d128 f16"].model_config(8192), 1024) == 80_484
    # 2 heads, 16 x 64 numbers each, and four inputs of their convolutions, after a convolution of width 128
    deltanet = figure["gated_deltanet d128 n16 after conv"].model_config(8192)
    assert state_bytes(deltanet, 1024) == 4 * (2 * (16 * 64 + 4 * (2 * 16 + 64)) + 3 * 128)


def test_families_are_chosen_by_name():
    preset = PRESETS["smoke"]
    assert [configuration.family for configuration in preset.select(["attention"])] == ["attention"]
    with pytest.raises(ValueError, match=r"no family 'mamba2'; it has based, attention"):
        preset.select(["mamba2"])
    for family, reason in ABSENT.items():
        with pytest.raises(ValueError, match=reason):
            preset.select([family])
    with pytest.raises(ValueError, match="preset 'figure3' is none of figure2"):
        mqar_sweep.load_preset("figure3")


def test_the_best_learning_rate_is_that_of_the_best_validation():
    rows = [
        {"learning_rate": rate, "validation_accuracy": accuracy, "epochs": epochs}
        for rate, accuracy, epochs in ((0.001, 0.9, 8), (0.003, 0.95, 8), (0.01, 0.95, 6), (0.03, 0.95, 6))
    ]
    assert mqar_sweep.best_learning_rate(rows) == 0.01


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_stopped(tmp_path):
    results = mqar_sweep.run_sweep("smoke", tmp_path, device=CPU, workers=2)
    rows = results["rows"]
    # two learning rates with the first seed, the better one with the second
    assert len(rows) == mqar_sweep.expected_runs(PRESETS["smoke"], PRESETS["smoke"].configurations) == 6
    for label in ("based d32 f8", "attention d32"):
        own = [row for row in rows if row["label"] == label]
        assert [row["seed"] for row in own] == [0, 0, 1]
        best = max(own[:2], key=lambda row: row["validation_accuracy"])
        assert own[2]["learning_rate"] == best["learning_rate"]
        assert [row["chosen_learning_rate"] for row in own] == [row["learning_rate"] == best["learning_rate"] for row in own]
    for row in rows:
        assert row["accuracy"] == pytest.approx(sum(row["accuracy_by_test"].values()) / 2)
        assert set(row["accuracy_by_test"]) == {"32/2", "64/4"}
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    lost = tmp_path / "runs" / f"{mqar_sweep.run_name(Configuration('attention', ('conv', 'attention'), 32), 1e-2, 0)}.json"
    again = json.loads(lost.read_text())
    lost.unlink()
    repeated = mqar_sweep.run_sweep("smoke", tmp_path, device=CPU, workers=1, families=["attention"])["rows"]
    assert {path: path.stat().st_mtime_ns for path in files if path != lost} == {k: v for k, v in files.items() if k != lost}
    assert json.loads(lost.read_text())["accuracy"] == again["accuracy"]
    assert len(repeated) == 6

    # the results of another machine are enough to go on from
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "results.json").write_text((tmp_path / "results.json").read_text())
    assert mqar_sweep.run_sweep("smoke", elsewhere, device=CPU, workers=1)["rows"] == repeated
    for folder in (tmp_path, elsewhere):
        with pytest.raises(ValueError, match="holds runs of preset 'smoke'"):
            mqar_sweep.prepare_folder(PRESETS["figure2"], folder)


def test_no_time_leaves_no_runs_and_says_so_in_the_results(tmp_path: Path):
    results = mqar_sweep.run_sweep("smoke", tmp_path, device=CPU, workers=1, families=["attention"], max_seconds=0.001)
    assert results["rows"] == []
    with pytest.raises(ValueError, match="seeds=0"):
        mqar_sweep.run_sweep("smoke", tmp_path, seeds=0)
