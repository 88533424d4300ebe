"""Train a reward model on preference pairs with TRL's RewardTrainer.

Any architecture that `AutoModelForSequenceClassification` knows, BASED among them, from a language model, another reward model,
or a configuration. The loss is that of Bradley and Terry, -log sigmoid(score of chosen - score of rejected).
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, constants
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers import TrainingArguments as TransformersArguments

from geobased.checkpoints import checkpoint_or_name
from geobased.model_cards import card_from_template
from geobased.training.artifacts import plot_losses, save_model_folder, versions, write_json
from geobased.training.language_modeling import load_config
from geobased.training.reward_models import RewardModelScorer, evaluate_preferences, load_reward_model, read_preferences
from geobased.training.run_control import FINAL_FOLDER, RunClock, check_run_arguments, checkpoint_to_resume
from geobased.whole_file import whole_file

LOG_FILE = "training_log.json"


@dataclass
class RewardArguments(TransformersArguments):
    """Arguments of `train`: transformers' TrainingArguments with other defaults, and what to train on."""

    model: str | None = field(
        default=None,
        metadata={"help": "language model or reward model to start from: a folder, a shipped checkpoint or a Hub name"},
    )
    config: str | None = field(
        default=None,
        metadata={"help": "instead of a model, a configuration: JSON file, folder, or JSON string with a model_type"},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "folder or Hub name of the tokenizer; the model's by default"})
    preferences: list[str] = field(
        default_factory=list, metadata={"help": "JSON-lines files of pairs to train on: prompt, chosen, rejected"}
    )
    validation_preferences: list[str] = field(default_factory=list, metadata={"help": "JSON-lines files of held-out pairs"})
    max_length: int = field(default=1024, metadata={"help": "pairs with a longer text, in tokens, are left out"})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "weight of a loss that keeps the mean reward at 0 (arXiv:2312.09244); 0.01 is usual"}
    )
    save_dtype: str = field(default="float32", metadata={"help": "dtype of the final weights: bfloat16 or float32"})
    max_seconds: float | None = field(default=None, metadata={"help": "stop, and save, after so many seconds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})

    output_dir: str | None = field(default=None, metadata={"help": "folder for checkpoints, log and final model"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "times to go through the pairs; more overfit soon"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "pairs per device and step"})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "pairs per device in evaluation"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps, or a fraction below 1, of linear warm-up"})
    weight_decay: float = field(default=1e-3, metadata={"help": "of AdamW"})
    logging_steps: float = field(default=10, metadata={"help": "steps between log entries"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})


def train(arguments: RewardArguments) -> dict[str, Any]:
    """Train, and leave `final/` (model, tokenizer, card), `training_log.json` and `loss.png` in the output folder.

    Returns:
        the content of `training_log.json`; "evaluation" is `PreferenceAccuracy` of the final model on the held-out pairs.

    Raises:
        FileNotFoundError: a file of preferences, the configuration, or the checkpoint to resume from is missing.
        FileExistsError: the output folder holds an earlier run and `resume` is off.
        ModuleNotFoundError: TRL or datasets is not installed.
        ValueError: arguments that do not fit each other, malformed or no pairs, all pairs longer than `max_length`.

    Example:
        >>> pairs, held_out = ["preferences/first_half.jsonl"], ["preferences/held_out.jsonl"]
        >>> train(RewardArguments(model="based-mini", preferences=pairs, validation_preferences=held_out,
        ...                       output_dir="runs/reward"))  # doctest: +SKIP
    """
    check_run_arguments(arguments, ["preferences", "output_dir"])
    if bool(arguments.model) == bool(arguments.config):
        raise ValueError("give either a model to start from (--model) or a configuration (--config)")
    if arguments.config and not arguments.tokenizer:
        raise ValueError("a configuration needs a tokenizer as well (--tokenizer)")
    without_telemetry()
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    checkpoint = checkpoint_to_resume(arguments.output_dir, arguments.resume)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)  # type: ignore[arg-type]
    pairs = read_preferences(arguments.preferences)
    held_out = read_preferences(arguments.validation_preferences) if arguments.validation_preferences else []
    set_seed(arguments.seed)
    model = _initial_model(arguments, tokenizer)
    columns = ("prompt", "chosen", "rejected")
    datasets = [Dataset.from_list([{key: pair[key] for key in columns} for pair in part]) for part in (pairs, held_out) if part]
    own = {field.name for field in dataclasses.fields(RewardConfig) if field.init} & set(vars(arguments))
    clock = RunClock(arguments.max_seconds)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**{name: getattr(arguments, name) for name in own}),
        train_dataset=datasets[0],
        eval_dataset=datasets[1] if held_out else None,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    if not len(trainer.train_dataset):
        raise ValueError(f"every pair is longer than max_length={arguments.max_length} tokens")
    trainer.train(resume_from_checkpoint=checkpoint)

    final = trainer.accelerator.unwrap_model(trainer.model)
    evaluation = None
    if held_out:
        scorer = RewardModelScorer(
            final, tokenizer, max_length=arguments.max_length, batch_size=arguments.per_device_eval_batch_size
        )
        evaluation = evaluate_preferences(scorer, held_out).to_dict()
    log = {
        "parameters": sum(p.numel() for p in final.parameters()),
        "steps": trainer.state.global_step,
        "stopped_early": clock.stopped_early,
        "seconds": round(clock.seconds, 3),
        "pairs": len(trainer.train_dataset),
        "pairs_left_out": len(pairs) - len(trainer.train_dataset),
        "seed": arguments.seed,
        "evaluation": evaluation,
        "history": trainer.state.log_history,
        "config": final.config.to_dict(),
        "arguments": arguments.to_dict(),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir)  # type: ignore[arg-type]
        card = reward_card(folder.name, log)
        save_model_folder(final, [tokenizer], folder / FINAL_FOLDER, arguments.save_dtype, card=card)
        replace_card(folder, card)
        write_json(folder / LOG_FILE, log)
        plot_losses(trainer.state.log_history, folder / "loss.png")
    return log


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a shipped checkpoint or a Hub name; without a padding token, the end-of-text token pads.

    Raises:
        ValueError: no end-of-text token.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_or_name(source))
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {source} has no end-of-text token to end a text with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _initial_model(arguments: RewardArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if arguments.model:
        # mixed precision keeps float32 weights
        return load_reward_model(arguments.model, dtype=torch.float32)
    config = load_config(arguments.config, tokenizer, arguments.max_length)  # type: ignore[arg-type]
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def without_telemetry() -> None:
    """Keeps TRL from reporting each trainer to the Hub, unless the environment sets HF_HUB_DISABLE_TELEMETRY itself."""
    # the variable is read when huggingface_hub is imported, which is long past
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        constants.HF_HUB_DISABLE_TELEMETRY = True


def replace_card(folder: Path, card: str) -> None:
    """Puts our card in the place of the one that TRL leaves beside its checkpoints, if it has."""
    if (folder / "README.md").exists():
        with whole_file(folder / "README.md") as temporary:
            temporary.write_text(card, encoding="utf-8")


def reward_card(name: str, log: dict[str, Any]) -> str:
    """The card of a reward model as Markdown, from what the run's log says."""
    arguments = log["arguments"]
    card = card_from_template(
        "reward",
        ModelCardData(library_name="geobased", pipeline_tag="text-classification", tags=["reward-model", "trl"]),
        model_name=name,
        repo_id=name,
        config=log["config"],
        parameters=log["parameters"],
        training=log,
        origin=arguments["model"],
        evaluation=log["evaluation"],
    )
    return str(card)


__all__ = ["LOG_FILE", "RewardArguments", "load_tokenizer", "replace_card", "reward_card", "train", "without_telemetry"]
