"""One part of the comparison of SuperHF in a process of its own: a reward model, the Llama, or a run."""

import functools
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from geobased.recall.gazetteer_documents import generate_documents
from geobased.recall.places import load_places
from geobased.training.artifacts import write_json
from geobased.training.perplexity import perplexity_windows
from geobased.training.preference_rules import FILES
from geobased.training.reward_models import read_preferences
from geobased.training.reward_training import load_tokenizer, without_telemetry
from geobased.training.superhf_experiment_settings import BASED, POLICIES, UNTRAINED, VALIDATION, Run
from geobased.training.superhf_experiment_stages import (
    HELD_OUT_REWARD,
    REWARD,
    VALIDATION_FILE,
    Job,
    stages,
    standardized_reward,
)
from geobased.training.superhf_run import read_prompts
from geobased.training.text_files import read_text

NOT_VALIDATED: dict[str, None] = dict.fromkeys(VALIDATION.values())
# of the documents for perplexity, which are of held-out places; and the windows in which it is taken
PERPLEXITY_SEED, PERPLEXITY_CONTEXT = 104, 512


def prepare_process(threads: int) -> None:
    """Settings of a process that only does parts of the experiment."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    disable_progress_bar()
    logging.captureWarnings(True)  # the same deprecations in every process, which nobody here can act on


def result_path(folder: str | Path, part: "Run | str") -> Path:
    """File of a finished stage or run."""
    return Path(folder, "runs", f"{part.name}.json") if isinstance(part, Run) else Path(folder, "stages", f"{part}.json")


def do_part(job: Job, part: "Run | str") -> float:
    """Does a stage, by its name, or a run, and writes its result into the folder.

    Returns:
        the seconds it took.

    Raises:
        TimeoutError: the deadline passed; nothing is written.
    """
    without_telemetry()
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    result = do_run(job, part) if isinstance(part, Run) else stages(job, POLICIES)[part]()
    seconds = round(time.perf_counter() - started, 2)
    write_json(result_path(job.folder, part), {**result, "seconds": seconds})
    return seconds


def do_run(job: Job, run: Run) -> dict[str, Any]:
    """A run's row for the results, with "each", the rewards of every test prompt."""
    from geobased.training.superhf_experiment_arms import TrainingData, train_arm

    evaluator = _evaluator(job, run.policy)
    row: dict[str, Any] = {"policy": run.policy, "arm": run.arm, "seed": run.seed, "options": dict(run.options)}
    if run.arm in UNTRAINED:
        torch.manual_seed(run.seed)
        number = job.settings.num_generations if run.arm == "best_of_n" else 1
        measured, each = evaluator.measure(evaluator.base, number)
        facts = {"completions": 0, "tokens": 0, "training_seconds": 0.0, **NOT_VALIDATED}
        return {**row, **facts, "completions_per_answer": number, "curve": [{"step": 0, **measured}], "each": each}
    # as many as the arms that sample have prompts
    preferences = read_preferences([job.data / FILES["first"]])[: job.settings.steps * job.settings.prompts_per_step]
    data = TrainingData(read_prompts(job.data / FILES["prompts"]), read_prompts(job.data / VALIDATION_FILE), preferences)
    row["completions_per_answer"] = 1
    try:
        with tempfile.TemporaryDirectory() as unused:
            result = train_arm(run, _model(job, run.policy), data, evaluator, unused, job.deadline)
    except FloatingPointError as error:
        return {**row, "diverged": str(error), **NOT_VALIDATED}
    return row | result


def _model(job: Job, policy: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(job.model_folder(policy), dtype=torch.float32)
    return model.to(job.device)


@functools.lru_cache(maxsize=2)
def _rewards(job: Job) -> dict[str, Any]:
    stored = {name: json.loads(result_path(job.folder, name).read_text(encoding="utf-8")) for name in (REWARD, HELD_OUT_REWARD)}
    return {name: standardized_reward(job, name, facts) for name, facts in stored.items()}


@functools.lru_cache(maxsize=2)
def _evaluator(job: Job, policy: str) -> Any:
    from geobased.training.superhf_experiment_evaluation import Evaluator

    settings, tokenizer = job.settings, load_tokenizer(str(job.model_folder(BASED)))
    documents = generate_documents(load_places("held_out"), settings.num_perplexity_documents, PERPLEXITY_SEED)
    texts: Mapping[str, list[str]] = {"held_out_documents": [document.text for document in documents]}
    if job.held_out_text:
        texts = {**texts, "held_out_text": [read_text(path) for path in job.held_out_text]}
    windows = {name: perplexity_windows(tokenizer, items, PERPLEXITY_CONTEXT) for name, items in texts.items()}
    rewards = _rewards(job)
    return Evaluator(
        settings=settings,
        tokenizer=tokenizer,
        reward=rewards[REWARD],
        held_out_reward=rewards[HELD_OUT_REWARD],
        base=_model(job, policy).eval(),
        test=read_prompts(job.data / FILES["held_out_prompts"]),
        windows={name: found[: settings.num_perplexity_windows] for name, found in windows.items()},
    )


__all__ = ["do_part", "do_run", "prepare_process", "result_path"]
