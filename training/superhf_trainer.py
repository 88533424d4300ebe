"""SuperHF: sample completions, keep the best of each prompt, and train on them with a KL prior, as a trainer of TRL."""

import contextlib
import copy
import functools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import RLOOTrainer
from trl.data_utils import is_conversational
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id, nanstd, pad, use_adapter

from geobased.training.superhf_config import COMPLETION_FILTERS, SuperHFConfig
from geobased.training.superhf_loss import Predictions, SelectedTexts, call_inside, predict, selected_texts, superhf_loss
from geobased.training.superhf_metrics import distinct_n, meteor_name, meteor_similarity
from geobased.training.superhf_selection import (
    CompletionFilter,
    check_reward_signature,
    checked_reward_function,
    penalized_scores,
    select_completions,
    top_k_filter,
    trim_completion,
)

logger = get_logger(__name__)

RewardFunction = str | PreTrainedModel | Callable[..., Any]
HELD_OUT = "held_out"


class SuperHFTrainer(RLOOTrainer):
    """Trainer of Supervised Human Feedback (Mukobi et al. 2023, arXiv 2310.16763).

    Samples `num_generations` completions of each prompt, scores them, keeps the best, and takes a supervised step on those
    with a KL divergence from the reference as prior. Prompts are never trained on, the end of a completion is. It takes the
    arguments of `trl.RLOOTrainer`, data sets of plain or conversational prompts, reward models and functions, PEFT and vLLM
    included, and two more:

    Args:
        eval_reward_funcs: reward functions or models, like `reward_funcs`, that score every completion, are logged, and have
            no say in what is trained on. Training rewards that rise alone show that the policy exploits its reward model.
        eval_reward_processing_classes: tokenizers of those that are models, like `reward_processing_classes`.

    A reward function returns None for a completion that it cannot score; one that none of `reward_funcs` scores is not trained
    on. The reference is the model with its adapter disabled, or for full fine-tuning a copy of the model as it is passed: to
    go on with a run, build the trainer from the model that the run began with.

    Raises:
        TypeError: `args` of another class, or a reward function of no usable type.
        ValueError: settings that contradict each other, a tokenizer without an end-of-sequence token, a reference that cannot
            be made; while training, rewards that are NaN or of the wrong number, or completions that are all empty.
        RuntimeError: a reward function raised.

    Example:
        >>> trainer = SuperHFTrainer(model, reward, SuperHFConfig("out"), prompts, eval_reward_funcs=other)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "superhf"]
    _name = "SuperHF"
    _paper = {
        "title": "SuperHF: Supervised Iterative Learning from Human Feedback",
        "id": "2310.16763",
        "citation": textwrap.dedent("""\
            @article{mukobi2023superhf,
                title        = {{SuperHF: Supervised Iterative Learning from Human Feedback}},
                author       = {Gabriel Mukobi and Peter Chatain and Su Fong and Robert Windesheim and Gitta Kutyniok and Kush Bhatia and Silas Alberti},
                year         = 2023,
                eprint       = {arXiv:2310.16763}
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: SuperHFConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        eval_reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        eval_reward_processing_classes: Any = None,
    ) -> None:
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SuperHFConfig(f"{model_id.split('/')[-1] or 'model'}-SuperHF")
        if not isinstance(args, SuperHFConfig):
            raise TypeError(f"args must be a SuperHFConfig, not a {type(args).__name__}")
        if processing_class is not None:
            _check_tokenizer(processing_class)
        _check_prompts(train_dataset, args)
        training, held_out = _as_list(reward_funcs), _as_list(eval_reward_funcs)
        if not training:
            raise ValueError("reward_funcs is empty: completions are selected by at least one reward function")
        columns = getattr(train_dataset, "column_names", None) or []
        rewards = [_checked(function, columns) for function in (*training, *held_out)]
        weights = [1.0] * len(training) if args.reward_weights is None else list(args.reward_weights)
        if len(weights) != len(training):
            raise ValueError(f"reward_weights has {len(weights)} values for {len(training)} reward_funcs: give one for each")
        tokenizers = _tokenizers(reward_processing_classes, training, "reward_processing_classes")
        tokenizers += _tokenizers(eval_reward_processing_classes, held_out, "eval_reward_processing_classes")

        if isinstance(model, str):
            model = _loaded_if_foreign(model, args)
        # TRL makes the reference from a path on disk; a model that was passed is copied instead
        own_forward = None if isinstance(model, str) else vars(_base(model)).get("forward")
        copies = args.beta > 0 and not isinstance(model, str) and not is_peft_model(model) and peft_config is None
        reference = copied_reference(model, args.beta) if copies else None
        hidden = {"beta": 0.0, "sync_ref_model": False} if copies else {}
        with overridden(args, reward_weights=[*weights, *[0.0] * len(held_out)], **hidden):
            super().__init__(
                model=model,
                reward_funcs=rewards,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=tokenizers,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        _check_tokenizer(self._tokenizer)
        self.beta = args.beta
        self.num_training_rewards = len(training)
        for i in range(len(training), len(rewards)):
            name = self.reward_func_names[i]
            self.reward_func_names[i] = f"{name}_{HELD_OUT}" if name in self.reward_func_names[:i] else name
        if reference is not None:
            self._set_reference(reference)
        self.completion_filter: CompletionFilter = _completion_filter(args)
        self._restore_forward(own_forward)
        self._num_generated = {"train": 0, "eval": 0}
        # of the last evaluation, by the names of the metrics: each prompt's mean reward, [prompts] in parts
        self._prompt_rewards: dict[str, list[torch.Tensor]] = {}
        if args.kl_chunked and not _has_plain_head(self.model):
            logger.warning(
                f"kl_chunked: {type(_base(self.model)).__name__} has no plain linear head, or an adapter of virtual tokens; the "
                "loss is computed from full logits"
            )
        if self.aux_loss_enabled:
            logger.warning(
                f"the load-balancing loss of {type(self.model).__name__} (router_aux_loss_coef={self.router_aux_loss_coef}) is "
                "not part of the SuperHF loss: its experts are trained without it"
            )
        if args.meteor_every:
            meteor_name()  # says at once whether synonyms count
        groups = args.per_device_train_batch_size * args.steps_per_generation // args.num_generations
        if groups * args.top_k_completions < args.steps_per_generation:
            logger.warning(
                f"a process keeps at most {groups} * {args.top_k_completions} completions for "
                f"{args.steps_per_generation} steps per generation: some of these have nothing to train on. Lower "
                "gradient_accumulation_steps (or steps_per_generation) and raise per_device_train_batch_size."
            )

    def _set_reference(self, reference: PreTrainedModel) -> None:
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    def _restore_forward(self, own_forward: Any) -> None:
        """Takes RLOO's head for log-probabilities off the policy, which this loss does not use.

        BASED's fast generation serves only models with their own forward pass.
        """
        base = _base(self.model)
        if own_forward is not None:
            base.forward = own_forward
        elif not hasattr(base, "_hf_hook"):  # else split over devices while it was loaded
            vars(base).pop("forward", None)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        self._prompt_rewards = {}
        return super().evaluate(*arguments, **options)

    @property
    def prompt_rewards(self) -> dict[str, torch.Tensor]:
        """Rewards in the last evaluation under the names of their metrics, the mean of each prompt's completions: [prompts]."""
        return {name: torch.cat(parts) for name, parts in self._prompt_rewards.items()}

    def _generate_single_turn(self, *arguments: Any) -> Any:
        # dropout would make the samples those of another policy; vLLM has none and reads the mode
        if self.use_vllm:
            return super()._generate_single_turn(*arguments)
        with _evaluating(self.model), _without_input_hook(self.model):
            return super()._generate_single_turn(*arguments)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        if len(inputs) % size:
            raise ValueError(
                f"a batch of {len(inputs)} completions does not hold whole groups of {size} per process: set "
                f"per_device_{mode}_batch_size to a multiple of {size}"
            )
        self._check_reference()
        if "image" in inputs[0] or "images" in inputs[0]:
            raise ValueError("SuperHFTrainer trains on text: remove the columns image and images of the data set")
        prompts = [example["prompt"] for example in inputs]
        prompt_ids, completion_ids, completions = self._generate(prompts)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        truncated = torch.tensor([not ids or ids[-1] not in ends for ids in completion_ids])
        if self.args.stop_regex is not None:
            completion_ids, completions, was_cut = self._trimmed(completion_ids, completions)
            truncated &= ~was_cut
        texts = [_text(completion) for completion in completions]

        rewards = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        self._check_reward_models(rewards)
        first = self.accelerator.process_index * len(prompts)
        totals = self._weighted(rewards)[first : first + len(prompts)].cpu()
        lengths = torch.tensor([len(text.strip()) for text in texts])
        scores = penalized_scores(totals, lengths, self.args.length_penalty)
        scores[lengths == 0] = torch.nan
        if self.mask_truncated_completions:
            scores[truncated] = torch.nan
        selected = select_completions(scores.view(-1, size), self.completion_filter).flatten()

        kept = selected.nonzero()[:, 0].tolist()
        rows = [(prompt_ids[i], self._ended(completion_ids[i])) for i in kept]
        self._log_selection(mode, rewards, selected, lengths == 0, scores.isnan(), [texts[i] for i in kept], rows)
        self._log_table(prompts, completions, rewards, selected)
        return self._training_batch(rows, self.args.steps_per_generation if mode == "train" else 1)

    def _trimmed(
        self, completion_ids: list[list[int]], completions: list[Any]
    ) -> tuple[list[list[int]], list[Any], torch.Tensor]:
        """-> ids and completions up to `stop_regex`, and which of them it cut."""
        texts = [trim_completion(_text(completion), self.args.stop_regex) for completion in completions]
        # strip() alone is no cut
        was_cut = torch.tensor([_text(c).strip() != text.strip() for c, text in zip(completions, texts, strict=True)])
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
        if is_conversational({"prompt": completions[0]}):
            return ids, [[{"role": "assistant", "content": text}] for text in texts], was_cut
        return ids, texts, was_cut

    def _ended(self, ids: list[int]) -> list[int]:
        ends = self.args.append_eos and ids[-1] not in self.eos_token_ids
        return [*ids, self._tokenizer.eos_token_id] if ends else ids

    def _weighted(self, rewards: torch.Tensor) -> torch.Tensor:
        """Training reward of each completion, [completions], from rewards [completions, functions]; NaN where there is none."""
        training = rewards[:, : self.num_training_rewards]
        weights = self.reward_weights[: self.num_training_rewards].to(rewards.device)
        totals = (training * weights).nansum(1).masked_fill(training.isnan().all(1), torch.nan)
        return totals.clamp(*self.reward_clip_range) if self.reward_clip_range else totals

    def _check_reward_models(self, rewards: torch.Tensor) -> None:
        for i, (function, name) in enumerate(zip(self.reward_funcs, self.reward_func_names, strict=True)):
            if isinstance(function, nn.Module) and rewards[:, i].isnan().any():
                count = int(rewards[:, i].isnan().sum())
                raise ValueError(
                    f"the reward model {name!r} scored {count} of {len(rewards)} completions with NaN: check its weights, and "
                    "try it in float32 or bfloat16 if it runs in float16"
                )

    def _training_batch(self, rows: list[tuple[list[int], list[int]]], num_steps: int) -> dict[str, torch.Tensor]:
        """Kept texts, padded at the right, in as many rows for each step.

        Rows that fill up are one token of padding with nothing to predict, so that every process takes every step.
        """
        device = self.accelerator.device
        num_labels = torch.tensor(float(sum(len(completion) for _, completion in rows)), device=device)
        total = self.accelerator.reduce(num_labels, reduction="sum").clamp(min=1)
        fill = max(num_steps - len(rows), -len(rows) % num_steps)
        ids = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
        ids += [torch.tensor([self._tokenizer.pad_token_id])] * fill
        ones = [torch.ones_like(row) for row in ids]
        never = torch.iinfo(torch.long).max
        multiple = self.pad_to_multiple_of
        return {
            "input_ids": pad(ids, self._tokenizer.pad_token_id, "right", pad_to_multiple_of=multiple).to(device),
            "attention_mask": pad(ones, 0, "right", pad_to_multiple_of=multiple).to(device),
            "prompt_lengths": torch.tensor([len(prompt) for prompt, _ in rows] + [never] * fill, device=device),
            # gradients are averaged over processes and steps: this makes them a mean over all tokens
            "token_weight": self.accelerator.num_processes * num_steps / total,
        }

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        mode = "train" if self.model.training else "eval"
        texts = selected_texts(
            inputs["input_ids"], inputs["attention_mask"], inputs["prompt_lengths"], self.args.reproduce_defects
        )
        unwrapped = self.accelerator.unwrap_model(model)
        chunked = self._uses_chunks(unwrapped)
        with self.accelerator.autocast():
            reference = self._reference_predictions(texts, chunked) if self.beta > 0 else None

            def terms() -> Any:
                return superhf_loss(
                    predict(unwrapped, texts, chunked),
                    reference,
                    texts.labels,
                    beta=self.beta,
                    kl_direction=self.args.kl_direction,
                    kl_reduction=self.args.kl_reduction,
                    kl_one_late=self.args.reproduce_defects,
                    inverse_loss_penalty=self.args.inverse_loss_penalty,
                    token_weight=inputs["token_weight"],
                )

            loss = call_inside(model, unwrapped, terms)
        sums = [loss.nll_sum, loss.entropy_sum, loss.num_tokens, loss.kl_sum, loss.num_kl_tokens]
        sums = [value.float().to(self.accelerator.device) for value in sums]
        nll, entropy, tokens, kl, kl_tokens = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        if tokens:
            self._metrics[mode]["nll"].append(nll / tokens)
            self._metrics[mode]["entropy"].append(entropy / tokens)
            if reference is not None:
                self._metrics[mode]["kl"].append(kl / kl_tokens)
        return loss.loss

    def _check_reference(self) -> None:
        if self.beta > 0 and self.ref_model is None and not is_peft_model(self.accelerator.unwrap_model(self.model)):
            raise RuntimeError(
                f"beta={self.beta} needs a reference, but the trainer has no ref_model and the model no adapter to disable: "
                "set beta in SuperHFConfig before the trainer is made, or pass peft_config"
            )

    def _uses_chunks(self, unwrapped: nn.Module) -> bool:
        return self.args.kl_chunked and _has_plain_head(unwrapped)

    @torch.no_grad()
    def _reference_predictions(self, texts: SelectedTexts, chunked: bool) -> Predictions:
        if self.ref_model is not None:
            unwrapped = self.accelerator.unwrap_model(self.ref_model)
            return call_inside(self.ref_model, unwrapped, predict, unwrapped, texts, chunked)
        policy = self.accelerator.unwrap_model(self.model)
        adapter = "ref" if "ref" in policy.peft_config else None
        with _evaluating(policy), use_adapter(policy, adapter_name=adapter):
            return call_inside(self.model, policy, predict, policy, texts, chunked)

    def _log_selection(
        self,
        mode: str,
        rewards: torch.Tensor,
        selected: torch.Tensor,
        empty: torch.Tensor,
        excluded: torch.Tensor,
        kept_texts: list[str],
        rows: list[tuple[list[int], list[int]]],
    ) -> None:
        """Means over all processes; every process computes them all, so that callbacks decide alike.

        Raises ValueError where all completions are empty.
        """
        metrics, device = self._metrics[mode], rewards.device
        flags = self.accelerator.gather(torch.stack([selected, empty, excluded], dim=1).to(device))
        kept, empty, excluded = flags.unbind(1)
        if empty.all():
            raise ValueError(
                f"all {len(empty)} completions of this batch are empty: nothing can be trained on. Check the prompt's format, "
                "min_new_tokens in generation_kwargs, and that stop_regex does not match the beginning of a completion"
            )
        totals = self._weighted(rewards)
        size = self.num_generations if mode == "train" else self.num_generations_eval
        each = {"reward": totals}
        for i, name in enumerate(self.reward_func_names):
            group = "rewards" if i < self.num_training_rewards else f"rewards_{HELD_OUT}"
            each[f"{group}/{name}/mean"] = rewards[:, i]
            metrics[f"{group}/{name}/mean"].append(rewards[:, i].nanmean().item())
            metrics[f"{group}/{name}/std"].append(nanstd(rewards[:, i]).item())
        if mode == "eval":
            for name, values in each.items():
                self._prompt_rewards.setdefault(name, []).append(values.view(-1, size).nanmean(1).cpu())
        spread = totals.view(-1, size).nan_to_num(nan=torch.inf).amin(1), totals.view(-1, size).nan_to_num(nan=-torch.inf).amax(1)
        metrics["reward"].append(totals.nanmean().item())
        metrics["reward_std"].append(nanstd(totals).item())
        metrics["frac_reward_zero_std"].append((spread[0] >= spread[1]).float().mean().item())
        metrics["reward_filtered"].append(totals[kept].nanmean().item())
        if len(self.reward_funcs) > self.num_training_rewards:
            held_out = rewards[:, self.num_training_rewards :].nanmean(1)
            metrics[f"reward_{HELD_OUT}"].append(held_out.nanmean().item())
            metrics[f"reward_{HELD_OUT}_filtered"].append(held_out[kept].nanmean().item())
            metrics["reward_gap"].append((totals[kept].nanmean() - held_out[kept].nanmean()).item())
        metrics["frac_kept"].append(kept.float().mean().item())
        metrics["frac_empty"].append(empty.float().mean().item())
        metrics["frac_excluded"].append(excluded.float().mean().item())

        lengths = gather_object([len(completion) for _, completion in rows])
        if lengths:
            metrics["filtered/mean_length"].append(sum(lengths) / len(lengths))
        texts = gather_object(kept_texts)
        for n in (1, 2):
            share = distinct_n(texts, n)
            if share is not None:
                metrics[f"filtered/distinct_{n}"].append(share)
        every, count = self.args.meteor_every, self._num_generated[mode]
        self._num_generated[mode] += 1
        similarity = meteor_similarity(texts) if every and count % every == 0 else None
        if similarity is not None:
            metrics[f"similarity/{meteor_name()}"].append(similarity)

        # what reward functions logged themselves; sorted, so that all processes gather in the same order
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            local = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=device)
            total, number = self.accelerator.reduce(local, reduction="sum").tolist()
            metrics[name].append(total / number)
        self._pending_metrics.clear()

    def _log_table(self, prompts: list[Any], completions: list[Any], rewards: torch.Tensor, selected: torch.Tensor) -> None:
        """Fills TRL's table of completions; its advantage is 1 for what is trained on and 0 for the rest."""
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        for i, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(rewards[:, i].tolist())
        kept = gather_object(selected.tolist())
        self._logs["advantages"].extend(float(value) for value in kept)
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [None] * len(prompts))
            self._logs["extra"][column].extend(gather_object(values))
        self._logs["extra"]["selected"].extend(kept)
        self._pending_extra_logs.clear()


def _as_list(functions: Any) -> list[Any]:
    if functions is None:
        return []
    return list(functions) if isinstance(functions, list | tuple) else [functions]


def _check_prompts(dataset: Any, args: SuperHFConfig) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"train_dataset has no column 'prompt', only {', '.join(columns)}: rename the one with the prompts")
    needed = args.generation_batch_size // args.num_generations
    # a streamed data set has no length
    if hasattr(dataset, "__len__") and len(dataset) < needed:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, less than the {needed} of one generation of completions "
            f"({args.generation_batch_size} completions, {args.num_generations} for each): lower per_device_train_batch_size or "
            "gradient_accumulation_steps, or raise num_generations"
        )


def _checked(function: Any, columns: Sequence[str]) -> Any:
    if isinstance(function, str | nn.Module):
        return function
    if not callable(function):
        raise TypeError(f"a reward function must be a model, its path, or callable, not {function!r}")
    check_reward_signature(function, columns)
    return checked_reward_function(function)


def _tokenizers(given: Any, functions: list[Any], name: str) -> list[Any]:
    tokenizers = [None] * len(functions) if given is None else _as_list(given)
    if len(tokenizers) != len(functions):
        raise ValueError(f"{name} has {len(tokenizers)} entries for {len(functions)} reward functions: give one for each")
    return tokenizers


def _check_tokenizer(processing_class: Any) -> None:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.eos_token_id is None:
        also = " and no padding token" if tokenizer.pad_token_id is None else ""
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no end-of-sequence token{also}: completions could not be ended or "
            "padded. Set tokenizer.eos_token, and tokenizer.pad_token if it should differ from it"
        )


def _loaded_if_foreign(name: str, args: SuperHFConfig) -> Any:
    """The name of a model; the model itself where its architecture is none of transformers', as BASED's: TRL fails on those."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if any(hasattr(transformers, architecture) for architecture in config.architectures or ()) or hasattr(config, "auto_map"):
        return name
    options = dict(args.model_init_kwargs or {})
    return AutoModelForCausalLM.from_pretrained(name, **{"dtype": "float32", **options})


def copied_reference(model: nn.Module, beta: float) -> Any:
    """A frozen copy of a model, for a prior of weight `beta`. Raises `ValueError` where it cannot be copied."""
    try:
        return copy.deepcopy(model).requires_grad_(False).eval()
    except Exception as error:
        raise ValueError(
            f"beta={beta} needs a reference, and the model cannot be copied ({error}): pass its path instead of the model, "
            "train an adapter with peft_config, or set beta=0"
        ) from error


def _completion_filter(args: SuperHFConfig) -> CompletionFilter:
    chosen: Any = args.completion_filter
    if callable(chosen):
        return chosen
    if chosen not in COMPLETION_FILTERS:
        raise ValueError(f"completion_filter={chosen!r} names a function that was not stored: set it to the function again")
    return functools.partial(top_k_filter, top_k=args.top_k_completions, threshold=args.reward_threshold)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def _base(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def _has_plain_head(model: Any) -> bool:
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return False  # its virtual tokens enter through the adapter's own forward pass
    return isinstance(_base(model).get_output_embeddings(), nn.Linear)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _without_input_hook(model: Any) -> Iterator[None]:
    """Takes gradient checkpointing's hook off the embeddings, which would keep BASED from its fast generation."""
    hooked = isinstance(model, PreTrainedModel) and bool(getattr(model, "_require_grads_hooks", None))
    if hooked:
        model.disable_input_require_grads()
    try:
        yield
    finally:
        # TRL switches checkpointing on again after generating, and with it the hook
        if hooked and not model._require_grads_hooks:
            model.enable_input_require_grads()


@contextlib.contextmanager
def overridden(args: Any, **values: Any) -> Iterator[None]:
    """Other values of some attributes, for a while."""
    before = {name: getattr(args, name) for name in values}
    for name, value in values.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


__all__ = ["SuperHFTrainer", "copied_reference", "overridden"]
