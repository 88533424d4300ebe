"""`geobased train preferences`, `reward` and `superhf`: each hands its arguments to a training module; and the comparison."""

from typing import Any

import typer

from .train import add_training, app, run_training
from .train_sumformer_experiment import add_sumformer_experiment
from .train_superhf_experiment import add_experiment

PREFERENCES_EXAMPLES = (
    "geobased train preferences --output preferences",
    "geobased train preferences --output preferences --num_pairs 20000 --counterfactual 0.9 --seed 1",
)
REWARD_EXAMPLES = (
    "geobased train reward --model based-mini --preferences preferences/first_half.jsonl"
    " --validation_preferences preferences/held_out.jsonl --output_dir runs/reward",
    "geobased train reward --config config.json --tokenizer ./tokenizer --preferences pairs.jsonl --output_dir runs/new",
    "geobased train reward --model based-mini --preferences pairs.jsonl --output_dir runs/reward --resume",
)
SUPERHF_EXAMPLES = (
    "geobased train superhf --config superhf.yaml",
    "geobased train superhf --model based-mini --gazetteer_prompts 2000 --gazetteer_validation_prompts 64"
    " --reward runs/reward/final --held_out_reward runs/twin/final --lora_rank 4 --output_dir runs/superhf",
    "geobased train superhf --model based-mini --prompts preferences/prompts.jsonl"
    " --reward geobased.training.preference_rules:rule_reward --output_dir runs/rules",
    "geobased train superhf --config superhf.yaml --resume",
)
SUPERHF_SUMMARY = ("parameters", "prompts", "steps", "stopped_early", "stopped_because", "seconds", "before", "after")
SUMMARY = ("parameters", "pairs", "steps", "stopped_early", "seconds", "evaluation")


def preferences(context: typer.Context) -> None:
    """Write preference pairs and prompts made from gazetteer documents by explicit rules, in halves that share no place."""
    from geobased.training import preference_rules as module

    run_training(context, module.PreferenceArguments, module.write_preferences, PREFERENCES_EXAMPLES)


def reward(context: typer.Context) -> None:
    """Train a reward model on preference pairs (JSON lines: prompt, chosen, rejected), with TRL's RewardTrainer."""
    from geobased.training import reward_training as module

    def work(arguments: Any) -> dict[str, Any]:
        log = module.train(arguments)
        return {key: value for key, value in log.items() if key in SUMMARY}

    run_training(context, module.RewardArguments, work, REWARD_EXAMPLES)


def superhf(context: typer.Context) -> None:
    """Train a language model by SuperHF: sample completions, keep the best by a reward, train on them with a KL prior."""
    import torch

    from geobased.training import superhf_run as module
    from geobased.training.superhf_config import SuperHFConfig

    def work(config: Any, run: Any) -> dict[str, Any]:
        log = module.train(config, run)
        return {key: value for key, value in log.items() if key in SUPERHF_SUMMARY}

    classes = (SuperHFConfig, module.SuperHFRunArguments)
    # TRL's default is bfloat16, which it refuses without an accelerator
    precision = () if torch.accelerator.is_available() else ("--bf16", "false")
    run_training(context, classes, work, SUPERHF_EXAMPLES, settings_file=True, defaults=precision)


def register() -> None:
    """Adds the commands to `geobased train`."""
    add_training("preferences", preferences, PREFERENCES_EXAMPLES)
    add_training("reward", reward, REWARD_EXAMPLES)
    add_training("superhf", superhf, SUPERHF_EXAMPLES)
    add_experiment(app)
    add_sumformer_experiment(app)
