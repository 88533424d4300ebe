"""What the comparison of SuperHF needs before its first run: data, two reward models, and a Llama like based-mini."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from geobased.checkpoints import checkpoint_path, shipped_checkpoints
from geobased.recall.gazetteer_documents import WriteDocumentsArguments, write_documents
from geobased.training import language_modeling, reward_training
from geobased.training.preference_rules import (
    FILES,
    HALVES,
    PreferenceArguments,
    gazetteer_prompts,
    preference_places,
    write_preferences,
)
from geobased.training.reward_models import RewardModelScorer, read_preferences
from geobased.training.run_control import FINAL_FOLDER
from geobased.training.superhf_experiment_evaluation import StandardizedReward
from geobased.training.superhf_experiment_settings import BASED, LLAMA, ExperimentSettings, LlamaTwin
from geobased.whole_file import whole_file

REWARD, HELD_OUT_REWARD = "reward", "held_out_reward"
VALIDATION_FILE = "validation_prompts.jsonl"
# the shares that based-mini was trained with: short and long documents, with and without plain text
MIXTURES = {
    True: ([0.1, 0.6, 0.3], [0.12, 0.1, 0.78]),
    False: ([0.67, 0.33], [0.11, 0.89]),
}


@dataclass(frozen=True)
class Job:
    """What a process needs to know to do any part of the experiment."""

    settings: ExperimentSettings
    folder: str
    device: str
    based: str = BASED
    """Folder, shipped checkpoint or Hub name of the first policy; the reward models start from it, all use its tokenizer."""
    text: tuple[str, ...] = ()
    """Files that the Llama is trained on beside documents."""
    held_out_text: tuple[str, ...] = ()
    num_workers: int = 1
    """Processes that write and tokenise the Llama's documents."""
    deadline: float | None = None
    """Of `time.time`."""

    @property
    def data(self) -> Path:
        return Path(self.folder, "data")

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def model_folder(self, name: str) -> Path:
        """Of a policy or a reward model."""
        if name == BASED:
            return Path(checkpoint_path(self.based) if self.based in shipped_checkpoints() else self.based)
        return Path(self.folder, "models", name, FINAL_FOLDER)

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else max(self.deadline - time.time(), 0.0)


def prepare_data(job: Job) -> None:
    """Writes preferences and prompts into the folder, unless they are there."""
    if (job.data / VALIDATION_FILE).exists():
        return
    settings = job.settings
    sizes = PreferenceArguments(
        output=str(job.data),
        num_pairs=settings.num_pairs,
        num_held_out_pairs=settings.num_held_out_pairs,
        num_prompts=settings.steps * settings.prompts_per_step,
        num_held_out_prompts=settings.num_test_prompts,
    )
    write_preferences(sizes)
    places = [place for half in HALVES for place in preference_places(half)]
    items = gazetteer_prompts(
        places,
        settings.num_validation_prompts,
        "validation",
        max_words=sizes.max_words,
        max_records=sizes.max_records,
        counterfactual=sizes.counterfactual,
    )
    with whole_file(job.data / VALIDATION_FILE) as path:
        path.write_text("".join(json.dumps({"prompt": item.prompt, "answer": item.answer}) + "\n" for item in items))


def train_reward_model(job: Job, name: str) -> dict[str, Any]:
    """Trains the reward model that filters on the first half of the preferences, its held-out twin on the second.

    Returns:
        accuracy on held-out pairs with its interval and by corruption, and what `StandardizedReward` needs.

    Raises:
        TimeoutError: the deadline passed.
    """
    folder, held_out = job.model_folder(name).parent, job.data / FILES["held_out"]
    arguments = reward_training.RewardArguments(
        model=str(job.model_folder(BASED)),
        preferences=[str(job.data / FILES[HALVES[name == HELD_OUT_REWARD]])],
        validation_preferences=[str(held_out)],
        learning_rate=job.settings.reward_learning_rate,
        per_device_train_batch_size=job.settings.reward_batch_size,
        **_output(job, folder),
    )
    log = reward_training.train(arguments)
    pairs = read_preferences([held_out])
    scorer = reward_scorer(job, name)
    scores = torch.tensor(
        scorer([pair["prompt"] for pair in pairs] * 2, [pair[k] for k in ("chosen", "rejected") for pair in pairs])
    )
    facts = {key: log["evaluation"][key] for key in ("accuracy", "low", "high", "num_pairs", "by_corruption")}
    facts |= {"mean": scores.mean().item(), "deviation": scores.std().item()}
    return _finished(log, **facts)


def train_llama(job: Job) -> dict[str, Any]:
    """Trains the Llama on documents of training places as based-mini was, and on text if there is any.

    Returns:
        the number of parameters, tokens, and the last training loss.

    Raises:
        TimeoutError: the deadline passed.
    """
    twin, folder = job.settings.llama, job.model_folder(LLAMA).parent
    tokenizer = str(job.model_folder(BASED))
    documents = []
    for name, number, words, records, seed in (("short", twin.num_short, 160, 6, 1), ("long", twin.num_long, 400, 24, 2)):
        documents.append(str(job.data / f"documents_{name}.jsonl"))
        if not Path(documents[-1]).exists():
            sizes: dict[str, Any] = {"num_documents": number, "max_words": words, "max_records": records, "seed": seed}
            write_documents(WriteDocumentsArguments(documents[-1], counterfactual=0.9, num_workers=job.num_workers, **sizes))
    start, final = MIXTURES[bool(job.text)]
    arguments = language_modeling.LanguageModelingArguments(
        config=json.dumps(llama_config(twin, reward_training.load_tokenizer(tokenizer))),
        tokenizer=tokenizer,
        text=list(job.text),
        documents=documents,
        mixture_weights=start,
        final_mixture_weights=final,
        mixture_transition=0.4,
        answer_weight=4.0,
        context_length=twin.context_length,
        cache_dir=str(job.data / "tokens"),
        num_workers=job.num_workers,
        max_steps=twin.steps,
        per_device_train_batch_size=twin.batch_size,
        warmup_steps=0.05,
        bf16=not job.on_cpu,
        **_output(job, folder),
    )
    log = language_modeling.train(arguments)
    return _finished(
        log, parameters=log["parameters"], tokens=log["tokens"], loss=log["losses"][-1][1] if log["losses"] else None
    )


def llama_config(twin: LlamaTwin, tokenizer: Any) -> dict[str, Any]:
    """Configuration of a Llama whose MLPs are as wide as the number of parameters asks for."""
    width, layers, vocabulary = twin.hidden_size, twin.num_hidden_layers, len(tokenizer)
    # embeddings are tied; two norms a layer and one at the end
    left = twin.num_parameters - vocabulary * width - width - layers * (4 * width**2 + 2 * width)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=max(round(left / (3 * width * layers) / 8), 1) * 8,
        num_hidden_layers=layers,
        num_attention_heads=twin.num_attention_heads,
        max_position_embeddings=twin.context_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config.to_dict()


def _output(job: Job, folder: Path) -> dict[str, Any]:
    # what an interrupted call has left
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "output_dir": str(folder),
        "max_seconds": job.seconds_left(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job.on_cpu,
    }


def _finished(log: dict[str, Any], **facts: Any) -> dict[str, Any]:
    if log["stopped_early"]:
        raise TimeoutError(f"step {log['steps']} of {log['arguments']['max_steps']}")
    return {"steps": log["steps"], "training_seconds": log["seconds"], **facts}


def reward_scorer(job: Job, name: str) -> RewardModelScorer:
    """A trained reward model of the experiment."""
    return RewardModelScorer(job.model_folder(name), device=job.device, batch_size=16 if job.on_cpu else 128)


def standardized_reward(job: Job, name: str, facts: dict[str, Any]) -> StandardizedReward:
    """A trained reward model of the experiment on the scale of what `train_reward_model` has returned."""
    return StandardizedReward(reward_scorer(job, name), facts["mean"], facts["deviation"], name)


def stages(job: Job, policies: Sequence[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What has to be trained before the runs of these policies, the longest first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {LLAMA: lambda: train_llama(job)} if LLAMA in policies else {}
    return found | {name: lambda name=name: train_reward_model(job, name) for name in (REWARD, HELD_OUT_REWARD)}


__all__ = [
    "HELD_OUT_REWARD",
    "REWARD",
    "VALIDATION_FILE",
    "Job",
    "llama_config",
    "prepare_data",
    "stages",
    "standardized_reward",
    "train_llama",
    "train_reward_model",
]
