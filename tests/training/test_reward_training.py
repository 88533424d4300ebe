import json
import shutil

import pytest
from transformers import AutoTokenizer

pytest.importorskip("trl")

from geobased.training import reward_training
from geobased.training.preference_rules import PreferenceArguments, write_preferences
from geobased.training.reward_models import RewardModelScorer, evaluate_preferences, read_preferences
from geobased.training.reward_training import RewardArguments, train


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    sizes = {"num_pairs": 48, "num_held_out_pairs": 24, "num_prompts": 4, "num_held_out_prompts": 4, "max_words": 40}
    write_preferences(PreferenceArguments(str(folder), max_records=2, **sizes))
    return folder


def arguments(corpus, pairs, output_dir, **changes):
    options = {
        "config": str(corpus / "config.json"),
        "tokenizer": str(corpus / "tokenizer"),
        "preferences": [str(pairs / "first_half.jsonl")],
        "validation_preferences": [str(pairs / "held_out.jsonl")],
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "max_length": 512,
        "max_steps": 24,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 12,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return RewardArguments(**(options | changes))


@pytest.fixture(scope="module")
def straight(corpus, preferences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, train(arguments(corpus, preferences, folder))


def losses(log):
    return [entry["loss"] for entry in log["history"] if "loss" in entry]


def test_run_leaves_a_reward_model_with_card_and_log(straight, preferences):
    folder, log = straight
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["README.md", "loss.png", "training_log.json"]
    assert json.loads((folder / "training_log.json").read_text())["evaluation"] == log["evaluation"]
    assert log["steps"] == 24 and log["pairs"] == 48 and log["pairs_left_out"] == 0
    assert sum(losses(log)[-6:]) < 0.9 * sum(losses(log)[:6])
    pairs = read_preferences([preferences / "held_out.jsonl"])
    found = evaluate_preferences(RewardModelScorer(folder / "final", device="cpu"), pairs)
    assert found.accuracy == log["evaluation"]["accuracy"] and found.num_pairs == 24
    card = (folder / "final" / "README.md").read_text()
    assert (folder / "README.md").read_text() == card
    assert 'RewardModelScorer("straight")' in card and "48 preference pairs, 24 steps" in card
    assert f"scores higher in {100 * found.accuracy:.1f} %" in card and "random weights" in card


def test_resumed_run_repeats_the_losses(corpus, preferences, straight, tmp_path):
    folder, log = straight
    shutil.copytree(folder / "checkpoint-12", tmp_path / "run" / "checkpoint-12")
    resumed = train(arguments(corpus, preferences, tmp_path / "run", resume=True))
    assert losses(resumed) == pytest.approx(losses(log), abs=1e-5)
    assert resumed["evaluation"]["margin"] == pytest.approx(log["evaluation"]["margin"], abs=1e-5)


@pytest.mark.parametrize("conversations", [False, True])
def test_based_language_model_becomes_a_reward_model(conversations, tiny_model_dir, preferences, corpus, tmp_path):
    changes = {"config": None, "tokenizer": None, "model": str(tiny_model_dir), "max_length": 2048, "max_steps": 1}
    if conversations:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        for name in ("first_half.jsonl", "held_out.jsonl"):
            rows = [
                {key: [{"role": roles[key], "content": pair[key]}] for key in roles}
                for pair in read_preferences([preferences / name])
            ]
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        preferences, changes["tokenizer"] = tmp_path, str(tmp_path / "tokenizer")
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    log = train(arguments(corpus, preferences, tmp_path / "based", **changes, **evaluated))
    assert log["config"]["model_type"] == "based" and log["config"]["architectures"] == ["BasedForSequenceClassification"]
    # the scorer reads the texts as TRL does
    (found,) = [entry for entry in log["history"] if "eval_accuracy" in entry]
    assert found["eval_accuracy"] == pytest.approx(log["evaluation"]["accuracy"])
    assert found["eval_margin"] == pytest.approx(log["evaluation"]["margin"], abs=1e-4)
    assert f"started from {tiny_model_dir}" in (tmp_path / "based" / "final" / "README.md").read_text()


def test_wrong_arguments_are_named(corpus, preferences, straight, tmp_path):
    for changes, error, message in (
        ({"model": "based-mini"}, ValueError, "either a model"),
        ({"tokenizer": None}, ValueError, "needs a tokenizer"),
        ({"preferences": []}, ValueError, "--preferences is required"),
        ({"max_length": 4}, ValueError, "longer than max_length=4"),
        ({"resume": True}, FileNotFoundError, "nothing to resume"),
        ({"output_dir": str(straight[0])}, FileExistsError, "holds an earlier run"),
    ):
        folder = changes.pop("output_dir", str(tmp_path / "wrong"))
        with pytest.raises(error, match=message):
            train(arguments(corpus, preferences, folder, **changes))


def test_a_tokenizer_without_padding_pads_with_its_end(corpus, tmp_path):
    tokenizer = reward_training.load_tokenizer(str(corpus / "tokenizer"))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = reward_training.load_tokenizer(str(tmp_path))
    assert loaded.pad_token == loaded.eos_token
