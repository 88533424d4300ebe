import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")
pytest.importorskip("nltk")

from geobased.training.preference_rules import rule_reward
from geobased.training.reward_models import RewardModelScorer, load_reward_model
from geobased.training.superhf_config import SuperHFConfig
from geobased.training.superhf_run import SuperHFRunArguments, check_columns, read_prompts, reward_function, train

RULES = "geobased.training.preference_rules:rule_reward"


@pytest.fixture(scope="module")
def reward_dir(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards") / "rewarder" / "final"
    torch.manual_seed(0)  # of the head
    load_reward_model(str(tiny_model_dir)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"the river runs past the {word}", "answer": "town"} for word in ("town", "river", "looks", "the")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(output_dir, **changes):
    options = {
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_completion_length": 4,
        # a random model may write nothing
        "generation_kwargs": {"min_new_tokens": 2},
        "max_steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return SuperHFConfig(output_dir=str(output_dir), **(options | changes))


@pytest.fixture(scope="module")
def straight(tiny_model_dir, reward_dir, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run = SuperHFRunArguments(
        model=str(tiny_model_dir),
        prompts=[str(prompts)],
        validation_prompts=[str(prompts)],
        reward=[str(reward_dir)],
        held_out_reward=[RULES],
    )
    return folder, run, train(settings(folder), run)


def test_run_leaves_a_model_with_card_and_log(straight, tiny_model_dir):
    folder, _, log = straight
    assert log["steps"] == 4 and log["prompts"] == log["validation_prompts"] == 4
    for part in (log["before"], log["after"]):
        assert {"rewards/rewarder/mean", "rewards_held_out/rule_reward/mean", "rules/ends_the_line"} <= part.keys()
    assert json.loads((folder / "training_log.json").read_text())["after"] == log["after"]
    trained, start = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "final", tiny_model_dir))
    assert any(not one.equal(other) for one, other in zip(trained.parameters(), start.parameters(), strict=True))
    card = (folder / "final" / "README.md").read_text()
    assert (folder / "README.md").read_text() == card
    assert "4 steps on 4 prompts" in card and f"| held-out reward | {RULES} |" in card
    for when in ("before", "after"):
        for name in ("reward", "rewards/rewarder/mean", "rewards_held_out/rule_reward/mean"):
            low, high = log["intervals"][when][name]
            assert low <= log[when][name] <= high and (low < high or "rule" in name)
            assert f"{log[when][name]:.4g} ({low:.4g} to {high:.4g}) |" in card


def test_resumed_run_repeats_the_losses(straight, tmp_path):
    folder, run, log = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    resumed = train(settings(tmp_path / "run"), SuperHFRunArguments(**(vars(run) | {"resume": True})))
    losses = [[entry["loss"] for entry in part["history"] if "loss" in entry] for part in (log, resumed)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_adapter_is_merged_into_the_final_model(tiny_model_dir, prompts, tmp_path):
    run = SuperHFRunArguments(model=str(tiny_model_dir), prompts=[str(prompts)], reward=[RULES], lora_rank=2, lora_dropout=0.0)
    log = train(settings(tmp_path / "run", max_steps=2), run)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert log["parameters"] == start.num_parameters() and log["before"] is None
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_config.json").is_file()
    changed = [name for name, value in final.state_dict().items() if not value.equal(start.state_dict()[name])]
    assert changed and all(name.endswith("weight") and "embed" not in name for name in changed)
    assert "LoRA, rank 2, merged" in (tmp_path / "run" / "final" / "README.md").read_text()


def test_gazetteer_prompts_ask_for_held_out_places_in_validation_only(tiny_model_dir, tmp_path):
    run = SuperHFRunArguments(
        str(tiny_model_dir), reward=[RULES], gazetteer_prompts=3, gazetteer_validation_prompts=2, save_dtype="bfloat16"
    )
    log = train(settings(tmp_path / "run", max_steps=1, save_strategy="no", beta=0.0), run)
    assert log["prompts"] == 3 and log["validation_prompts"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").dtype.itemsize == 2


def test_a_policy_whose_completions_are_too_alike_is_stopped(tiny_model_dir, prompts, tmp_path):
    run = SuperHFRunArguments(str(tiny_model_dir), prompts=[str(prompts)], reward=[RULES], max_similarity=-1.0)
    changes = {"per_device_train_batch_size": 4, "save_strategy": "no", "beta": 0.0, "meteor_every": 1}
    log = train(settings(tmp_path / "run", **changes), run)
    assert log["steps"] == 1 and log["stopped_early"] and "similarity" in log["stopped_because"][0]


def test_rewards_are_models_or_functions(reward_dir, tmp_path, monkeypatch):
    run = SuperHFRunArguments(reward_batch_size=3, reward_max_length=50)
    scorer = reward_function(str(reward_dir), run)
    assert isinstance(scorer, RewardModelScorer) and (scorer.batch_size, scorer.max_length) == (3, 50)
    assert reward_function(RULES, run) is rule_reward
    (tmp_path / "my_rewards_of_this_folder.py").write_text(
        "def length(completions, **_):\n    return [len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert reward_function("my_rewards_of_this_folder:length", run)(completions=["ab"]) == [2]
    for name, message in (("geobased.nothing:f", "cannot be imported"), ("json:nothing", "cannot be imported")):
        with pytest.raises(ValueError, match=message):
            reward_function(name, run)
    with pytest.raises(ValueError, match="is no function but a str"):
        reward_function("json:__name__", run)
    check_columns(rule_reward, [{"prompt": "a", "answer": "b"}])
    check_columns(scorer, [{"prompt": "a"}])
    with pytest.raises(ValueError, match="rule_reward needs the fields answer"):
        check_columns(rule_reward, [{"prompt": "a"}])


def test_prompts_are_read_from_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "a.txt") == [{"prompt": "one"}, {"prompt": "two"}]
    for content, message in (("", "is empty"), ('{"text": 1}', ":1: expected"), ('{"prompt": 3}', "must be a text or a list")):
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / "b.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file of prompts"):
        read_prompts(tmp_path / "none.txt")


def test_wrong_arguments_are_named(straight, prompts, tiny_model_dir, tmp_path):
    base = {"model": str(tiny_model_dir), "prompts": [str(prompts)], "reward": [RULES]}
    (tmp_path / "plain.txt").write_text("the river\n")
    for changes, config, error, message in (
        ({"model": None}, {}, ValueError, "--model is required"),
        ({"reward": []}, {}, ValueError, "--reward is required"),
        ({"prompts": []}, {}, ValueError, "no prompts to train on"),
        ({"max_gap_growth": 0.1}, {}, ValueError, "give --held_out_reward"),
        ({"lora_rank": -1}, {}, ValueError, "lora_rank=-1"),
        ({"save_dtype": "int8"}, {}, ValueError, "save_dtype must be one of"),
        ({"prompts": [str(tmp_path / "plain.txt")]}, {}, ValueError, "needs the fields answer"),
        ({"prompts": [str(prompts), str(tmp_path / "plain.txt")]}, {}, ValueError, "different fields"),
        ({}, {"eval_strategy": "steps", "eval_steps": 1}, ValueError, "needs --validation_prompts"),
        ({"resume": True}, {}, FileNotFoundError, "nothing to resume"),
    ):
        with pytest.raises(error, match=message):
            train(settings(tmp_path / "wrong", **config), SuperHFRunArguments(**(base | changes)))
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        train(settings(straight[0]), SuperHFRunArguments(**base))
