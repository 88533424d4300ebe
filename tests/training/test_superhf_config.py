import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from transformers import HfArgumentParser, TrainerControl, TrainerState, get_scheduler

from geobased.training.superhf_callbacks import RewardHackingCallback
from geobased.training.superhf_config import SuperHFConfig

GOLDEN = json.loads((Path(__file__).resolve().parent.parent / "fixtures" / "superhf" / "golden.json").read_text())


def test_defaults_sample_one_prompt_per_process(tmp_path):
    args = SuperHFConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (args.num_generations, args.generation_batch_size, args.top_k_completions, args.beta) == (16, 16, 1, 0.35)
    assert (args.kl_direction, args.kl_reduction, args.append_eos, args.reproduce_defects) == ("forward", "mean", True, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k_completions": 17}, "top_k_completions must be from 1 to num_generations=16, got 17"),
        ({"top_k_completions": 0}, "got 0"),
        ({"num_generations": 0}, "num_generations must be 1 or more, got 0"),
        ({"num_generations": 3}, "16"),
        ({"per_device_train_batch_size": 24}, "generation_batch_size|num_generations=16 does not divide"),
        ({"num_generations": 1, "generation_batch_size": 17}, "must be divisible by the global batch size"),
        ({"beta": -1.0}, "beta must not be negative, got -1.0"),
        ({"kl_direction": "sideways"}, "kl_direction must be one of forward, reverse, got 'sideways'"),
        ({"kl_reduction": "max"}, "kl_reduction must be one of mean, sum, got 'max'"),
        ({"completion_filter": "best"}, "one of top_k, threshold, or a function, got 'best'"),
        ({"completion_filter": "threshold"}, "reward_threshold=None"),
        ({"reward_threshold": 1.0}, "reward_threshold belongs to completion_filter='threshold'"),
        ({"stop_regex": "("}, r"stop_regex '\(' is no regular expression"),
        ({"max_completion_length": 0}, "max_completion_length must be 1 or more tokens, got 0"),
        ({"eval_strategy": "steps", "per_device_eval_batch_size": 24}, "24|no multiple of the 16"),
    ],
)
def test_bad_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SuperHFConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_every_process_holds_whole_groups(tmp_path, monkeypatch):
    # 2 processes of 8 completions make one group of 16, but none of them has a whole one
    monkeypatch.setattr(SuperHFConfig, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"8 \* 1 = 8 completions at a time, which num_generations=16 does not divide"):
        SuperHFConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8)


def test_the_preset_has_the_published_schedule(tmp_path):
    args = SuperHFConfig.mukobi2023(str(tmp_path), use_cpu=True, bf16=False)
    assert args.generation_batch_size // args.num_generations == GOLDEN["counts_default_cfg"]["prompt_accumulation_steps"]
    assert (args.kl_reduction, args.append_eos, args.reproduce_defects, args.weight_decay) == ("sum", False, True, 0.01)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(5000), 5000)
    for step, expected in GOLDEN["lr_cosine_warm32_total5000_lr2e-5"]:
        assert args.learning_rate * schedule.lr_lambdas[0](step) == pytest.approx(expected, rel=1e-6, abs=1e-15)
    assert SuperHFConfig.mukobi2023(str(tmp_path), use_cpu=True, bf16=False, beta=0.2).beta == 0.2


def test_settings_are_command_line_options(tmp_path):
    parser = HfArgumentParser(SuperHFConfig)
    options = "--num_generations 8 --per_device_train_batch_size 8 --kl_direction reverse --no_append_eos --use_cpu --bf16 false"
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *options.split()])
    assert (args.num_generations, args.kl_direction, args.append_eos) == (8, "reverse", False)
    assert "--completion_filter" in parser.format_help()


def log(callback, **values):
    control = TrainerControl()
    logs = {"reward_filtered": 1.0, **values}
    callback.on_log(SimpleNamespace(meteor_every=1), TrainerState(global_step=3), control, logs=logs)
    return control.should_training_stop


@pytest.mark.parametrize(
    ("bound", "fine", "beyond"),
    [
        ({"max_similarity": 0.3}, {"similarity/meteor": 0.2}, {"similarity/meteor_exact_stem": 0.4}),
        ({"max_reward_gap": 1.0}, {"reward_gap": 0.5}, {"reward_gap": 1.5}),
        ({"max_gap_growth": 1.0}, {"reward_gap": 5.5}, {"reward_gap": 6.6}),
        ({"min_distinct_2": 0.5}, {"filtered/distinct_2": 0.9}, {"filtered/distinct_2": 0.1}),
        ({"max_mean_length": 50.0}, {"filtered/mean_length": 40.0}, {"filtered/mean_length": 60.0}),
    ],
)
def test_reward_hacking_stops_the_training(bound, fine, beyond):
    callback = RewardHackingCallback(**bound)
    assert not log(callback, **fine)
    assert log(callback, **beyond)
    assert callback.reasons[0].startswith("step 3: ") and next(iter(bound)) in callback.reasons[0]


def test_reward_hacking_waits_and_may_only_warn(caplog):
    callback = RewardHackingCallback(max_similarity=0.3, patience=1, action="warn")
    for value in (0.4, 0.2, 0.4):
        assert not log(callback, **{"similarity/meteor": value})
    assert not callback.reasons
    # METEOR is not measured in every log
    assert not log(callback)
    assert not log(callback, **{"similarity/meteor": 0.4})
    assert len(callback.reasons) == 1 and "may be being exploited" in caplog.text


def test_reward_hacking_needs_its_measures():
    with pytest.raises(ValueError, match="watches nothing: set one of max_similarity"):
        RewardHackingCallback()
    with pytest.raises(ValueError, match="action must be 'stop' or 'warn', got 'halt'"):
        RewardHackingCallback(max_similarity=0.3, action="halt")
    with pytest.raises(ValueError, match="set meteor_every=1 or more"):
        RewardHackingCallback(max_similarity=0.3).on_train_begin(
            SimpleNamespace(meteor_every=0), TrainerState(), TrainerControl()
        )
    with pytest.raises(ValueError, match="pass eval_reward_funcs"):
        log(RewardHackingCallback(max_reward_gap=1.0))
