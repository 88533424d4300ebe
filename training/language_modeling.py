"""Train a causal language model on text files and generated documents with transformers' Trainer.

- Any configuration that `AutoModelForCausalLM` knows, given as a file, a folder or a JSON string.
- Data are tokenised once into arrays on disk (`packing.py`); a batch is a slice of them.
- Every row is a function of (seed, index): a resumed run repeats the uninterrupted one loss by loss.
- Weight decay spares norms, biases and embeddings; answers of documents can weigh more in the loss.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from geobased.training.artifacts import plot_losses, save_model_folder, versions, write_json
from geobased.training.packing import (
    DocumentBlocks,
    MixtureDataset,
    MixtureSchedule,
    TextTokens,
    identity_collator,
    pack_documents,
    pack_text,
)
from geobased.training.run_control import FINAL_FOLDER, RunClock, check_run_arguments, checkpoint_to_resume

LOG_FILE = "training_log.json"
_SUMMARY = ("parameters", "steps", "stopped_early", "seconds", "tokens_per_second", "sources")


@dataclass
class LanguageModelingArguments(TrainingArguments):
    """Arguments of `train`: transformers' TrainingArguments with other defaults, and what to train on.

    The sources of the mixture are the text files together, if any, then each file of documents, in that order.
    """

    config: str | None = field(
        default=None, metadata={"help": "configuration: a JSON file, a folder, or a JSON string with a model_type"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "folder or Hub name of the tokenizer"})
    text: list[str] = field(default_factory=list, metadata={"help": "text files to train on"})
    documents: list[str] = field(
        default_factory=list, metadata={"help": "JSON-lines files of documents to train on; each is one source"}
    )
    validation_text: list[str] = field(default_factory=list, metadata={"help": "text files for the validation loss"})
    validation_documents: list[str] = field(
        default_factory=list, metadata={"help": "JSON-lines files for the validation losses, overall and on answers"}
    )
    context_length: int = field(default=1024, metadata={"help": "tokens in a row"})
    mixture_weights: list[float] = field(
        default_factory=list, metadata={"help": "share of each source at the start; equal shares by default"}
    )
    final_mixture_weights: list[float] = field(
        default_factory=list, metadata={"help": "share of each source after the transition; as at the start by default"}
    )
    mixture_transition: float = field(
        default=0.3, metadata={"help": "fraction of training over which the shares move from start to final"}
    )
    answer_weight: float = field(default=1.0, metadata={"help": "weight of answer tokens in the training loss"})
    pure_bf16: bool = field(default=False, metadata={"help": "keep weights and optimizer in bfloat16 (else use --bf16)"})
    save_dtype: str = field(default="bfloat16", metadata={"help": "dtype of the final weights: bfloat16 or float32"})
    max_seconds: float | None = field(default=None, metadata={"help": "stop, and save, after so many seconds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})
    prepare_only: bool = field(default=False, metadata={"help": "tokenise into the cache and stop"})
    cache_dir: str | None = field(default=None, metadata={"help": "token cache; <output_dir>/tokens by default"})
    num_workers: int = field(default=1, metadata={"help": "processes that tokenise documents"})

    output_dir: str | None = field(default=None, metadata={"help": "folder for checkpoints, log and final model"})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "rows per device and step"})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "rows per device in evaluation"})
    learning_rate: float = field(default=3e-3, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine, warmup_stable_decay, …"})
    warmup_steps: float = field(default=100, metadata={"help": "steps, or a fraction below 1, of linear warm-up"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta"})
    weight_decay: float = field(default=0.1, metadata={"help": "on matrices; norms, biases and embeddings have none"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "optimizer"})
    logging_steps: float = field(default=10, metadata={"help": "steps between log entries"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay off: batches come ready"})
    prediction_loss_only: bool = field(default=True, metadata={"help": "must stay on: logits are not gathered"})


class ValidationRows(Dataset):
    """Rows in order, each once; labels on every token or, with `answers_only`, on answer tokens."""

    def __init__(self, source: TextTokens | DocumentBlocks, context_length: int, answers_only: bool = False) -> None:
        self.source, self.context_length, self.answers_only = source, context_length, answers_only
        self.blocks = source.num_tokens // context_length if isinstance(source, TextTokens) else len(source.tokens)
        if self.blocks == 0:
            raise ValueError(f"context_length={context_length} is longer than the validation text ({source.num_tokens})")

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows, length = np.asarray(indices), self.context_length
        if isinstance(self.source, TextTokens):
            ids = self.source.tokens[(rows * length)[:, None] + np.arange(length)].astype(np.int64)
            labelled = np.ones(ids.shape, bool)
        else:
            ids = self.source.tokens[rows].astype(np.int64)
            labelled = np.arange(length) < self.source.lengths[rows, None]
            if self.answers_only:
                labelled &= self.source.answers[rows].astype(bool)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(np.where(labelled, ids, -100))}


class LanguageModelingTrainer(Trainer):
    """Trainer that reads rows in their own order, weighs answer tokens and decays matrices only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # each micro-batch's loss is a mean of its own, so the Trainer has to divide by the accumulation steps
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay: matrices that belong to no embedding."""
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        return [name for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in embeddings]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss, or the weighted mean over tokens where the batch has `loss_weights`."""
        if "loss_weights" not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        labels, weights = inputs["labels"][:, 1:].flatten(), inputs["loss_weights"][:, 1:].flatten()
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        weights = weights * (labels != -100)
        loss = (losses * weights).sum() / weights.sum().clamp_min(1.0)
        return (loss, outputs) if return_outputs else loss


class _Clock(RunClock):
    """Measures the speed as well."""

    warmup_steps = 10

    def __init__(self, max_seconds: float | None) -> None:
        super().__init__(max_seconds)
        self.first_step = self.warm_step = 0
        self.warm_seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        self.first_step = self.warm_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.first_step + self.warmup_steps:
            self.warm_step, self.warm_seconds = state.global_step, self.elapsed()
        super().on_step_end(args, state, control)

    def steps_per_second(self, last_step: int) -> float:
        """Speed without the first steps, which compile kernels, if there are later ones; evaluations included."""
        if last_step > self.warm_step > self.first_step:
            return (last_step - self.warm_step) / (self.seconds - self.warm_seconds)
        return (last_step - self.first_step) / self.seconds


def load_config(source: str, tokenizer: PreTrainedTokenizerBase, context_length: int) -> PreTrainedConfig:
    """Configuration from a JSON file, a folder or a JSON string; vocabulary and special ids default to the tokenizer's.

    Raises:
        FileNotFoundError: neither JSON nor an existing file or folder.
        ValueError: no model_type, a vocabulary smaller than the tokenizer's, or too few positions.
    """
    if source.lstrip().startswith("{"):
        fields = json.loads(source)
    elif Path(source).is_file():
        fields = json.loads(Path(source).read_text(encoding="utf-8"))
    elif Path(source, "config.json").is_file():
        fields = json.loads(Path(source, "config.json").read_text(encoding="utf-8"))
    else:
        raise FileNotFoundError(f"the configuration is neither a JSON object nor an existing file or folder: {source}")
    if "model_type" not in fields:
        raise ValueError('the configuration names no "model_type"')
    for key, value in {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }.items():
        if fields.get(key) is None:
            fields[key] = value
    if fields["vocab_size"] < len(tokenizer):
        raise ValueError(f"vocab_size={fields['vocab_size']} is smaller than the tokenizer's {len(tokenizer)} ids")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    positions = config.to_dict().get("max_position_embeddings")
    if positions is not None and positions < context_length:
        raise ValueError(f"context_length={context_length} exceeds the model's max_position_embeddings={positions}")
    return config


def load_sources(
    arguments: LanguageModelingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TextTokens | DocumentBlocks], dict[str, ValidationRows]]:
    """Training sources in the mixture's order, and validation sets by name."""
    if not arguments.text and not arguments.documents:
        raise ValueError("nothing to train on: give text files (--text) or documents (--documents)")
    cache, length = arguments.cache_dir or Path(arguments.output_dir, "tokens"), arguments.context_length  # type: ignore[arg-type]

    def documents(path: str) -> DocumentBlocks:
        return pack_documents(path, tokenizer, length, cache, arguments.num_workers)

    sources: list[TextTokens | DocumentBlocks] = []
    if arguments.text:
        sources.append(pack_text(arguments.text, tokenizer, cache))
    sources += [documents(path) for path in arguments.documents]
    validation: dict[str, ValidationRows] = {}
    if arguments.validation_text:
        validation["text"] = ValidationRows(pack_text(arguments.validation_text, tokenizer, cache), length)
    for number, path in enumerate(arguments.validation_documents):
        suffix = f"_{number + 1}" if number else ""
        validation[f"documents{suffix}"] = ValidationRows(documents(path), length)
        validation[f"answers{suffix}"] = ValidationRows(documents(path), length, answers_only=True)
    return sources, validation


def _schedule(arguments: LanguageModelingArguments, num_sources: int) -> MixtureSchedule:
    start = arguments.mixture_weights or [1.0] * num_sources
    return MixtureSchedule(tuple(start), tuple(arguments.final_mixture_weights or start), arguments.mixture_transition)


def _source_facts(sources: Sequence[TextTokens | DocumentBlocks]) -> list[dict[str, Any]]:
    return [
        {"kind": "text", "tokens": source.num_tokens}
        if isinstance(source, TextTokens)
        else {
            "kind": "documents",
            "tokens": source.num_tokens,
            "answer_tokens": int(source.answers.sum(dtype=np.int64)),
            "documents": source.num_documents,
            "rows": len(source.tokens),
            "dropped": source.dropped,
        }
        for source in sources
    ]


def train(arguments: LanguageModelingArguments) -> dict[str, Any]:
    """Train, and leave `final/` (model and tokenizer), `training_log.json` and `loss.png` in the output folder.

    Returns:
        the content of `training_log.json`: loss by step, tokens per second, seeds, arguments, versions.

    Raises:
        FileNotFoundError: a data file, the configuration, or the checkpoint to resume from is missing.
        FileExistsError: the output folder holds an earlier run and `resume` is off.
        ValueError: arguments that do not fit each other, empty data, a context longer than the data, or a vocabulary
            smaller than the tokenizer's.

    Example:
        >>> train(LanguageModelingArguments(
        ...     output_dir="runs/mini", tokenizer="runs/tokenizer", text=["tinyshakespeare.txt"], max_steps=200,
        ...     config='{"model_type": "based", "hidden_size": 128, "num_hidden_layers": 4}'))  # doctest: +SKIP
    """
    check_run_arguments(arguments, ["config", "tokenizer", "output_dir"])
    if arguments.max_steps <= 0:
        raise ValueError("max_steps must be positive: the data are an endless mixture without epochs")
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    config = load_config(arguments.config, tokenizer, arguments.context_length)  # type: ignore[arg-type]
    checkpoint = None
    if not arguments.prepare_only:
        checkpoint = checkpoint_to_resume(arguments.output_dir, arguments.resume)  # type: ignore[arg-type]
    sources, validation = load_sources(arguments, tokenizer)
    if arguments.prepare_only:
        return {"sources": _source_facts(sources)}

    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    dataset = MixtureDataset(
        sources,
        _schedule(arguments, len(sources)),
        size=arguments.max_steps * rows_per_step,
        context_length=arguments.context_length,
        seed=arguments.seed,
        answer_weight=arguments.answer_weight,
    )
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_config(config)
    if arguments.pure_bf16:
        model = model.to(torch.bfloat16)
    clock = _Clock(arguments.max_seconds)
    trainer = LanguageModelingTrainer(
        model=model,
        args=arguments,
        data_collator=identity_collator,
        train_dataset=dataset,
        eval_dataset=validation or None,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if validation and arguments.eval_strategy == "no":
        trainer.evaluate()

    tokens_per_step = rows_per_step * arguments.context_length
    log = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.state.global_step,
        "stopped_early": clock.stopped_early,
        "seconds": round(clock.seconds, 3),
        "tokens": trainer.state.global_step * tokens_per_step,
        "tokens_per_second": round(clock.steps_per_second(trainer.state.global_step) * tokens_per_step),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "seed": arguments.seed,
        "sources": _source_facts(sources),
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "history": trainer.state.log_history,
        "config": config.to_dict(),
        "arguments": arguments.to_dict(),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir)  # type: ignore[arg-type]
        final = trainer.accelerator.unwrap_model(trainer.model)
        save_model_folder(final, [tokenizer], folder / FINAL_FOLDER, arguments.save_dtype)
        write_json(folder / LOG_FILE, log)
        plot_losses(trainer.state.log_history, folder / "loss.png")
    return log


def main() -> None:
    """Command line: every field of `LanguageModelingArguments` is an option."""
    from transformers import HfArgumentParser

    import geobased  # noqa: F401  (registers the package's model types)

    (arguments,) = HfArgumentParser(LanguageModelingArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    log = train(arguments)
    print(json.dumps({key: value for key, value in log.items() if key in _SUMMARY}, indent=1))


__all__ = [
    "LanguageModelingArguments",
    "LanguageModelingTrainer",
    "ValidationRows",
    "load_config",
    "load_sources",
    "train",
]


if __name__ == "__main__":
    main()
