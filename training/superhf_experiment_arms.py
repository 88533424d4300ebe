"""The arms of the comparison: SuperHF, RLOO, DPO and SFT from one policy, at equal numbers of sampled completions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from geobased.training.superhf_config import SuperHFConfig
from geobased.training.superhf_experiment_evaluation import Evaluator, decoded, plain_forward, sample
from geobased.training.superhf_experiment_settings import ExperimentSettings, Run
from geobased.training.superhf_trainer import SuperHFTrainer, copied_reference, overridden


@dataclass(frozen=True)
class TrainingData:
    """Rows that the arms draw from; none is about a held-out place."""

    prompts: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    preferences: list[dict[str, Any]]
    """Some of those that the training reward model has learnt from."""


class _Counted:
    """Counts what a trainer of TRL samples, and samples BASED by its fast path: the trainer's forward pass is put aside."""

    model: Any
    num_completions = 0
    num_tokens = 0

    def _generate_single_turn(self, *arguments: Any) -> Any:
        with plain_forward(self.model):
            ids = super()._generate_single_turn(*arguments)  # type: ignore[misc]
        self.num_completions += len(ids)
        self.num_tokens += sum(map(len, ids))
        return ids


class CountedSuperHF(_Counted, SuperHFTrainer):
    """SuperHF, whose samples are counted."""


class CountedRLOO(_Counted, RLOOTrainer):
    """RLOO, whose samples are counted.

    TRL loads the reference anew, which it can do for architectures of transformers alone: here it is a copy of the model.
    """

    def __init__(self, model: Any, args: RLOOConfig, **options: Any) -> None:
        reference = copied_reference(model, args.beta) if args.beta else None
        with overridden(args, beta=0.0):
            super().__init__(model=model, args=args, **options)
        self.beta = args.beta
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)


class PreparedDPO(DPOTrainer):
    """DPO on ids as they were sampled: TRL would end every completion, those cut off included, with the end-of-text token."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class Curve(TrainerCallback):
    """Evaluates at equal distances, without counting its time as training, and gives up at the deadline.

    Raises (while training):
        TimeoutError: the deadline, of `time.time`, passed.
        FloatingPointError: weights are no longer finite.
    """

    def __init__(self, evaluator: Evaluator, model: Any, deadline: float | None) -> None:
        self.evaluator, self.model, self.deadline = evaluator, model, deadline
        settings = evaluator.settings
        self.marks = {round(settings.steps * i / settings.num_evaluations) for i in range(1, settings.num_evaluations + 1)}
        self.points: list[dict[str, Any]] = []
        self.each: dict[str, list[float]] = {}
        self.seconds = 0.0
        """Of training alone."""
        self.resumed = 0.0

    def measure(self, step: int) -> None:
        measured, self.each = self.evaluator.measure(self.model)
        self.points.append({"step": step, **measured})

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.resumed = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # before the next completions are sampled, which no longer have probabilities then
        if not torch.nn.utils.get_total_norm(self.model.parameters()).isfinite():
            raise FloatingPointError(f"diverged at step {state.global_step}")
        if self.deadline is not None and time.time() > self.deadline:
            raise TimeoutError(f"step {state.global_step} of {state.max_steps}")
        if state.global_step in self.marks:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self.resumed
            self.measure(state.global_step)
            self.resumed = time.perf_counter()


def train_arm(
    run: Run, model: Any, data: TrainingData, evaluator: Evaluator, output_dir: str, deadline: float | None = None
) -> dict[str, Any]:
    """Train a policy by an arm and measure it before, in between and after.

    Args:
        run: of an arm that trains.
        model: loaded from a folder, which is the reference as well; it is trained.
        output_dir: TRL wants one; nothing is written there.
        deadline: of `time.time`.

    Returns:
        "curve", "each" (rewards of every test prompt), those of `VALIDATION`, "completions" and "tokens" that were sampled for
        training, and "training_seconds".

    Raises:
        TimeoutError: the deadline passed.
        FloatingPointError: the training diverged.
    """
    settings, options = evaluator.settings, dict(run.options)
    set_seed(run.seed)
    curve = Curve(evaluator, model, deadline)
    curve.measure(0)
    common = _common(settings, run, options["learning_rate"], output_dir, model.device.type == "cpu")
    started = time.perf_counter()
    counts = (0, 0)
    trainer: Any
    if run.arm in ("superhf", "kl_sweep", "rloo"):
        trainer = _sampling_trainer(run.arm, model, data, evaluator, common, options["beta"])
    elif run.arm == "dpo":
        pairs, counts = own_pairs(model, data.prompts, evaluator)
        config = DPOConfig(**common, beta=options["beta"], per_device_train_batch_size=settings.prompts_per_step)
        trainer = PreparedDPO(
            model,
            copied_reference(model, options["beta"]),
            args=config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=evaluator.tokenizer,
        )
    else:
        chosen = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in data.preferences]
        config = SFTConfig(**common, per_device_train_batch_size=settings.prompts_per_step)
        trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(chosen), processing_class=evaluator.tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(curve)
    preparation = time.perf_counter() - started
    trainer.train()
    if isinstance(trainer, _Counted):
        counts = trainer.num_completions, trainer.num_tokens
    return {
        "curve": curve.points,
        "each": curve.each,
        **evaluator.validation_rewards(model, [row["prompt"] for row in data.validation]),
        "completions": counts[0],
        "tokens": counts[1],
        # what DPO samples before it begins belongs to its cost
        "training_seconds": round(preparation + curve.seconds, 2),
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def _common(settings: ExperimentSettings, run: Run, learning_rate: float, output_dir: str, use_cpu: bool) -> dict[str, Any]:
    """What the configurations of all arms share. Weights are float32 without mixed precision: the models are small."""
    return {
        "output_dir": output_dir,
        "max_steps": settings.steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": max(settings.steps // 12, 1),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": use_cpu,
        "seed": run.seed,
    }


def _sampling_trainer(arm: str, model: Any, data: TrainingData, evaluator: Evaluator, common: dict[str, Any], beta: float) -> Any:
    settings, is_rloo = evaluator.settings, arm == "rloo"
    common = {
        **common,
        "beta": beta,
        "num_generations": settings.num_generations,
        "per_device_train_batch_size": settings.prompts_per_step * settings.num_generations,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        # RLOO's probabilities are those of the whole distribution, which TRL samples from by default
        "top_p": 1.0 if is_rloo else settings.top_p,
    }
    trainer_class: Any = CountedRLOO if is_rloo else CountedSuperHF
    return trainer_class(
        model=model,
        reward_funcs=evaluator.reward,
        args=RLOOConfig(**common) if is_rloo else SuperHFConfig(**common, meteor_every=0),
        train_dataset=Dataset.from_list(data.prompts),
        processing_class=evaluator.tokenizer,
    )


def own_pairs(
    model: Any, prompts: Sequence[dict[str, Any]], evaluator: Evaluator
) -> tuple[list[dict[str, list[int]]], tuple[int, int]]:
    """The best and the worst of each prompt's completions by the training reward, as ids, and how much was sampled.

    Prompts whose completions have one score are left out.

    Returns:
        pairs, (completions, tokens).

    Raises:
        ValueError: no prompt's completions differ.
    """
    number = evaluator.settings.num_generations
    groups = sample(model, evaluator.tokenizer, [row["prompt"] for row in prompts], number, evaluator.settings)
    texts = decoded(evaluator.tokenizer, [ids for group in groups for ids in group])
    scores = torch.tensor(evaluator.reward([row["prompt"] for row in prompts for _ in range(number)], texts)).view(-1, number)
    pairs = []
    for i, row in enumerate(prompts):
        best, worst = int(scores[i].argmax()), int(scores[i].argmin())
        if scores[i, best] > scores[i, worst]:
            prompt_ids = evaluator.tokenizer(row["prompt"])["input_ids"]
            pairs.append({"prompt_ids": prompt_ids, "chosen_ids": groups[i][best], "rejected_ids": groups[i][worst]})
    if not pairs:
        raise ValueError("the completions of no prompt differ in their reward: there is nothing to prefer")
    return pairs, (sum(map(len, groups)), sum(len(ids) for group in groups for ids in group))


__all__ = ["CountedRLOO", "CountedSuperHF", "Curve", "TrainingData", "own_pairs", "train_arm"]
