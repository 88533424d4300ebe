import json

import pytest

SMALL = ("--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--logging_steps", 1)
RULES = "geobased.training.preference_rules:rule_reward"


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    from geobased.training.preference_rules import PreferenceArguments, write_preferences

    folder = tmp_path_factory.mktemp("preferences")
    write_preferences(PreferenceArguments(str(folder), 8, 4, 4, 4, max_words=40, max_records=2))
    return folder


def test_preferences_are_written(geobased, preferences, tmp_path):
    numbers = ("--num_pairs", 8, "--num_held_out_pairs", 4, "--num_prompts", 4, "--num_held_out_prompts", 4)
    sizes = ("--max_words", 40, "--max_records", 2)
    result = geobased("train", "preferences", "--output", tmp_path / "out", *numbers, *sizes, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"]["first_half.jsonl"]["lines"] == 8
    for path in preferences.glob("*.jsonl"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_reward_model_filters_for_superhf_with_settings_of_a_file(geobased, preferences, tiny_model_dir, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("nltk")
    files = ("--preferences", preferences / "first_half.jsonl", "--validation_preferences", preferences / "held_out.jsonl")
    options = ("--model", tiny_model_dir, "--output_dir", tmp_path / "reward", "--max_steps", 1, *SMALL, "--json")
    result = geobased("train", "reward", *files, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["pairs"] == 8 and report["evaluation"]["num_pairs"] == 4

    settings = {
        "model": str(tiny_model_dir),
        "prompts": [str(preferences / "prompts.jsonl")],
        "gazetteer_validation_prompts": 2,
        "reward": [str(tmp_path / "reward" / "final")],
        "held_out_reward": [RULES],
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_completion_length": 4,
        "generation_kwargs": {"min_new_tokens": 2},
        "learning_rate": "1e-3",
        "lr_scheduler_kwargs": {},
        "bf16": False,
        "max_steps": 100,
        "reward_threshold": None,
        "output_dir": str(tmp_path / "superhf"),
    }
    (tmp_path / "superhf.yaml").write_text(json.dumps(settings))  # JSON is YAML
    result = geobased("train", "superhf", "--config", tmp_path / "superhf.yaml", "--max_steps", 1, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["steps"] == 1 and report["prompts"] == 4, "the command line overrides the file"
    assert {"rewards/reward/mean", "rewards_held_out/rule_reward/mean"} <= report["after"].keys()
    assert (tmp_path / "superhf" / "final" / "config.json").is_file()


def test_wrong_settings_are_named(fails, tmp_path):
    pytest.importorskip("trl")
    assert "--reward is required" in fails("train", "superhf", "--model", "based-mini", *SMALL)
    assert "there is no file" in fails("train", "superhf", "--config", tmp_path / "none.yaml")
    path = tmp_path / "wrong.yaml"
    for content, message in (("- a", "must hold names and values"), ("a: [", "is no YAML"), ("modle: x", "--modle")):
        path.write_text(content)
        assert message in fails("train", "superhf", f"--config={path}")
    assert "--model" in fails("train", "reward", "--preferences", path, "--output_dir", tmp_path / "out")
