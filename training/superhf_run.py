"""A SuperHF run from files: prompts, reward models or functions, an optional adapter, and what it leaves behind."""

import copy
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM, set_seed

from geobased.checkpoints import checkpoint_or_name
from geobased.model_cards import card_from_template
from geobased.training.artifacts import plot_losses, save_model_folder, versions, write_json
from geobased.training.bootstrap import mean_interval
from geobased.training.preference_rules import HALVES, gazetteer_prompts, preference_places
from geobased.training.reward_models import RewardModelScorer
from geobased.training.reward_training import LOG_FILE, load_tokenizer, replace_card, without_telemetry
from geobased.training.run_control import FINAL_FOLDER, RunClock, check_run_arguments, checkpoint_to_resume
from geobased.training.text_files import numbered_lines

if TYPE_CHECKING:
    from geobased.training.superhf_callbacks import RewardHackingCallback
    from geobased.training.superhf_config import SuperHFConfig

RewardFunction = Callable[..., Any]


@dataclass
class SuperHFRunArguments:
    """Arguments of `train` beside the settings of SuperHF: what to train, on which prompts, for which rewards."""

    model: str | None = field(
        default=None, metadata={"help": "language model to train: a folder, a shipped checkpoint or a Hub name"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "folder or Hub name of the tokenizer; the model's by default"})
    prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "prompts to train on: JSON lines with a field prompt, or text files with a prompt in each line"},
    )
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "prompts to evaluate on before and after training, in the same forms"}
    )
    gazetteer_prompts: int = field(default=0, metadata={"help": "make so many prompts from documents of training places"})
    gazetteer_validation_prompts: int = field(default=0, metadata={"help": "make so many from documents of held-out places"})
    reward: list[str] = field(
        default_factory=list,
        metadata={"help": "what completions are chosen by: folders or Hub names of reward models, or module:function"},
    )
    held_out_reward: list[str] = field(
        default_factory=list, metadata={"help": "rewards that are measured and have no say in what is trained on"}
    )
    reward_dtype: str = field(default="float32", metadata={"help": "of reward models: float32, bfloat16 or float16"})
    reward_batch_size: int = field(default=16, metadata={"help": "texts that a reward model scores at a time"})
    reward_max_length: int = field(default=1024, metadata={"help": "tokens; reward models read the last ones of longer texts"})
    lora_rank: int = field(default=0, metadata={"help": "rank of a LoRA adapter; 0 trains all weights"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter is scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapter"})
    lora_target_modules: list[str] = field(
        default_factory=list, metadata={"help": "names of the layers with an adapter; all linear ones but the head by default"}
    )
    max_similarity: float | None = field(
        default=None, metadata={"help": "stop once kept completions are so alike (METEOR, 0 to 1), as collapsed policies' are"}
    )
    max_gap_growth: float | None = field(
        default=None, metadata={"help": "stop once the reward has risen by so much more than the held-out reward"}
    )
    save_dtype: str = field(default="float32", metadata={"help": "dtype of the final weights: bfloat16 or float32"})
    max_seconds: float | None = field(default=None, metadata={"help": "stop, and save, after so many seconds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})


def train(config: "SuperHFConfig", run: SuperHFRunArguments) -> dict[str, Any]:
    """Train, and leave `final/` (model, tokenizer, card), `training_log.json` and `loss.png` in the output folder.

    With an adapter, `final/` holds the model with the adapter merged into it. The rewards on validation prompts are measured
    before and after, with intervals.

    Returns:
        the content of `training_log.json`.

    Raises:
        FileNotFoundError: prompts, a model's folder, or the checkpoint to resume from is missing.
        FileExistsError: the output folder holds an earlier run and `resume` is off.
        ModuleNotFoundError: TRL, datasets or PEFT is not installed.
        ValueError: arguments that do not fit each other, malformed prompts, a reward that cannot be had, or one that needs
            columns which the prompts lack.

    Example:
        >>> run = SuperHFRunArguments("based-mini", gazetteer_prompts=2000, reward=["runs/reward/final"])
        >>> train(SuperHFConfig("runs/superhf", num_generations=16), run)  # doctest: +SKIP
    """
    check_run_arguments(run, ["model", "reward"])
    without_telemetry()
    from datasets import Dataset

    from geobased.training.superhf_trainer import SuperHFTrainer

    checkpoint = checkpoint_to_resume(config.output_dir, run.resume)
    prompts = _prompts(run.prompts, run.gazetteer_prompts, HALVES, config.seed)
    if not prompts:
        raise ValueError("no prompts to train on: give --prompts or --gazetteer_prompts")
    validation = _prompts(run.validation_prompts, run.gazetteer_validation_prompts, ("held_out",), config.seed)
    if config.eval_strategy != "no" and not validation:
        raise ValueError(f"eval_strategy={config.eval_strategy!r} needs --validation_prompts or --gazetteer_validation_prompts")
    rewards: list[Any] = [reward_function(name, run) for name in run.reward]
    held_out: list[Any] = [reward_function(name, run) for name in run.held_out_reward]
    for function in (*rewards, *held_out):
        for part in filter(None, (prompts, validation)):
            check_columns(function, part)
    tokenizer = load_tokenizer(run.tokenizer or run.model)  # type: ignore[arg-type]
    set_seed(config.seed)
    clock = RunClock(run.max_seconds)
    watch = _watch(run)
    trainer = SuperHFTrainer(
        model=_policy(run.model),  # type: ignore[arg-type]
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(validation) if validation else None,
        processing_class=tokenizer,
        peft_config=_adapter(run),
        eval_reward_funcs=held_out or None,
        callbacks=[clock, *watch],
    )
    before, before_intervals = _evaluation(trainer) if validation else (None, None)
    trainer.train(resume_from_checkpoint=checkpoint)
    history = list(trainer.state.log_history)
    after, after_intervals = _evaluation(trainer) if validation else (None, None)

    final = trainer.accelerator.unwrap_model(trainer.model)
    log = {
        "steps": trainer.state.global_step,
        "stopped_early": clock.stopped_early or any(callback.reasons for callback in watch),
        "stopped_because": [reason for callback in watch for reason in callback.reasons],
        "seconds": round(clock.seconds, 3),
        "prompts": len(prompts),
        "validation_prompts": len(validation),
        "seed": config.seed,
        "before": before,
        "after": after,
        "intervals": {"before": before_intervals, "after": after_intervals},
        "history": history,
        "run": vars(run).copy(),
        "arguments": config.to_dict(),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        folder = Path(config.output_dir)
        whole = copy.deepcopy(final).merge_and_unload() if run.lora_rank else final
        log |= {"parameters": sum(p.numel() for p in whole.parameters()), "config": whole.config.to_dict()}
        card = superhf_card(folder.name, log)
        save_model_folder(whole, [tokenizer], folder / FINAL_FOLDER, run.save_dtype, card=card)
        replace_card(folder, card)
        write_json(folder / LOG_FILE, log)
        plot_losses(history, folder / "loss.png")
    return log


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Rows with a "prompt", a text or a conversation, and whatever else the file says, for reward functions.

    A file that ends in .jsonl or .json holds a JSON object in each line, any other a prompt in each line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file or a malformed line.
    """
    numbered = numbered_lines(path, "prompts")
    if Path(path).suffix not in (".jsonl", ".json"):
        return [{"prompt": line} for _, line in numbered]
    rows = []
    for where, line in numbered:
        try:
            row = json.loads(line)
            valid = bool(row["prompt"]) and isinstance(row["prompt"], str | list)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{where}: expected {{"prompt": …}}: {error!r}') from error
        if not valid:
            raise ValueError(f"{where}: the prompt must be a text or a list of messages, not {row['prompt']!r}")
        rows.append(row)
    return rows


def _prompts(paths: Sequence[str], number: int, parts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    rows = [row for path in paths for row in read_prompts(path)]
    if number:
        places = [place for part in parts for place in preference_places(part)]
        # the counterfactual half, as in the files of `write_preferences`, is what makes reading the record worth while
        made = gazetteer_prompts(places, number, f"{seed}/{parts[0]}", counterfactual=0.5)
        rows += [{"prompt": item.prompt, "answer": item.answer} for item in made]
    columns = [set(row) for row in rows]
    if columns and any(names != columns[0] for names in columns):
        raise ValueError("the prompts' rows have different fields: every row needs the same ones")
    return rows


def reward_function(name: str, run: SuperHFRunArguments) -> RewardFunction:
    """A reward in TRL's form from a reward model's folder or Hub name, or from "module:function".

    Modules are looked for in the current folder too.

    Raises:
        ValueError: a module or function that is not there, or that cannot be called.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or Path(name).exists():
        return RewardModelScorer(name, dtype=run.reward_dtype, batch_size=run.reward_batch_size, max_length=run.reward_max_length)
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the reward {name} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise ValueError(f"the reward {name} is no function but a {type(function).__name__}")
    return function


def check_columns(function: RewardFunction, rows: Sequence[dict[str, Any]]) -> None:
    """Raises `ValueError` where a reward function has a parameter without default that no field of the prompts fills."""
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", *rows[0]} - {"prompt"}
    parameters = inspect.signature(function).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty and p.name not in given]
    if missing:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"the reward {name} needs the fields {', '.join(missing)}, which the prompts lack")


def _policy(model: str) -> Any:
    # mixed precision keeps float32 weights
    return AutoModelForCausalLM.from_pretrained(checkpoint_or_name(model), dtype=torch.float32)


def _watch(run: SuperHFRunArguments) -> list["RewardHackingCallback"]:
    from geobased.training.superhf_callbacks import RewardHackingCallback

    if run.max_gap_growth is not None and not run.held_out_reward:
        raise ValueError("--max_gap_growth compares with a held-out reward: give --held_out_reward")
    if run.max_similarity is None and run.max_gap_growth is None:
        return []
    return [RewardHackingCallback(max_similarity=run.max_similarity, max_gap_growth=run.max_gap_growth)]


def _adapter(run: SuperHFRunArguments) -> Any:
    if run.lora_rank < 0:
        raise ValueError(f"lora_rank={run.lora_rank} must be 0 (no adapter) or more")
    if not run.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=run.lora_rank,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        target_modules=run.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def _evaluation(trainer: Any) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metrics on the validation prompts, and 95 % bootstrap intervals over prompts of those that are rewards.

    TRL adds the metrics of the rewards when it logs.
    """
    trainer.evaluate()
    entry = trainer.state.log_history[-1]
    scored = {name: values[~values.isnan()] for name, values in trainer.prompt_rewards.items()}
    intervals = {name: mean_interval(values) for name, values in scored.items() if len(values)}
    return {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}, intervals


def superhf_card(name: str, log: dict[str, Any]) -> str:
    """The card of a model trained by SuperHF as Markdown, from what the run's log says."""
    card = card_from_template(
        "superhf",
        ModelCardData(library_name="geobased", pipeline_tag="text-generation", tags=["superhf", "trl"]),
        model_name=name,
        repo_id=name,
        config=log["config"],
        parameters=log["parameters"],
        origin=log["run"]["model"],
        training=log,
    )
    return str(card)


__all__ = [
    "SuperHFRunArguments",
    "check_columns",
    "read_prompts",
    "reward_function",
    "superhf_card",
    "train",
]
