"""Scores of a trained reward model, in the form in which TRL's trainers and geobased's SuperHF take rewards."""

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from geobased.checkpoints import checkpoint_or_name
from geobased.training.bootstrap import mean_interval
from geobased.training.text_files import numbered_lines

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Message = dict[str, str]
Text = str | list[Message]


class RewardModelScorer:
    """A reward function: `scorer(prompts, completions) -> [score, …]`.

    A text is tokenised as TRL's RewardTrainer does it: prompt and completion in one piece, followed by the end-of-text token
    unless they end with it; conversations by the tokenizer's chat template. Texts longer than `max_length` lose tokens at their
    beginning, so that the completion and its end are always read. Texts of similar length go through the model together, filled
    up on the side of `padding_side` with an attention mask; batches change no score beyond rounding.

    Args:
        model: folder or Hub name of a sequence classification model with one label and its tokenizer, or the model itself.
        tokenizer: needed with a model that is no folder or name.
        device: where to score; by default CUDA where there is one, and a given model stays where it is.
        dtype: of the weights: "float32", "bfloat16" or "float16"; scores are float32 always. None leaves a given model as it is,
            and stands for "float32" otherwise.
        batch_size: texts at a time.
        max_length: tokens of a text; the model's `max_position_embeddings` where that is smaller.
        padding_side: "right" or "left".
        name: of the reward in logs; the folder's name by default.

    Raises:
        ValueError: a model with another number of labels than one, a tokenizer without a padding or an end-of-text token, or
            arguments out of range.

    Example:
        >>> scorer = RewardModelScorer("runs/reward/final")  # doctest: +SKIP
        >>> scorer(["The capital of France is"], [" Paris.\\n"])  # doctest: +SKIP
        [1.37]
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        batch_size: int = 16,
        max_length: int = 1024,
        padding_side: str = "right",
        name: str | None = None,
    ) -> None:
        if batch_size < 1 or max_length < 2:
            raise ValueError(f"need batch_size >= 1 and max_length >= 2, got {batch_size} and {max_length}")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is right or left, not {padding_side!r}")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype is one of {', '.join(_DTYPES)}, not {dtype!r}")
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ValueError("a model without its folder needs the tokenizer as well")
            self.model = model
        else:
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            wanted: Any = _DTYPES[dtype or "float32"]
            self.model = load_reward_model(str(model), dtype=wanted)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, this one has {self.model.config.num_labels}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token to end a text with")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token")
        if dtype is not None:
            self.model.to(_DTYPES[dtype])  # type: ignore[arg-type]
        if device is not None:
            self.model.to(device)  # type: ignore[arg-type]
        self.tokenizer, self.batch_size, self.padding_side = tokenizer, batch_size, padding_side
        # read by models that find the last token by the padding id instead of the mask
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(max_length, positions or max_length)
        # TRL names a reward's metrics after the function
        self.__name__ = name or (type(model).__name__ if isinstance(model, PreTrainedModel) else reward_name(model))

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float]:
        """Score of each completion after its prompt, a float32 number without bounds; the higher, the better.

        Args:
            prompts, completions: texts, or conversations as lists of {"role": …, "content": …}.
            completion_ids: not read: the reward model has a tokenizer of its own.

        Raises:
            ValueError: lists of different lengths, or a text beside a conversation.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: give one completion for each prompt")
        return self.score_ids([self.encode(*pair) for pair in zip(prompts, completions, strict=True)])

    def encode(self, prompt: Text, completion: Text) -> list[int]:
        """Ids that are scored, at most `max_length` of them."""
        encoding: Any
        if isinstance(prompt, str) and isinstance(completion, str):
            text, end = prompt + completion, str(self.tokenizer.eos_token)
            # verbose: it would warn of texts longer than the model's context, which are cut below
            encoding = self.tokenizer(text if text.endswith(end) else text + end, verbose=False)
        elif isinstance(prompt, list) and isinstance(completion, list):
            encoding = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)
        else:
            raise ValueError("prompt and completion must both be texts or both be conversations")
        return list(encoding["input_ids"])[-self.max_length :]

    @torch.inference_mode()
    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Scores of token ids; the model's training mode is restored."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        was_training = self.model.training
        self.model.eval()
        try:
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                for row, score in zip(batch, self._scores([rows[i] for i in batch]), strict=True):
                    scores[row] = score
        finally:
            self.model.train(was_training)
        return scores

    def _scores(self, rows: list[Sequence[int]]) -> list[float]:
        tokens = [torch.tensor(row) for row in rows]
        side: Any = self.padding_side

        def fill(items: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(items, True, value, side).to(self.model.device)

        mask = fill([torch.ones_like(row) for row in tokens], 0)
        inputs = {"input_ids": fill(tokens, int(self.tokenizer.pad_token_id)), "attention_mask": mask}
        if self.padding_side == "left" and "position_ids" in inspect.signature(self.model.forward).parameters:
            # absolute positions count from the first real token
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        return self.model(**inputs).logits[:, 0].float().cpu().tolist()


def reward_name(model: str | Path) -> str:
    """The name of a reward model's folder; of `runs/reward/final` that is "reward"."""
    path = Path(model)
    return path.parent.name if path.name == "final" and path.parent.name else path.name


def load_reward_model(model: str, *, dtype: Any = torch.float32) -> PreTrainedModel:
    """A sequence classification model with one label from a reward model, a language model, or a shipped checkpoint.

    A language model gets a new head, drawn at random.

    Raises:
        ValueError: a checkpoint that lacks other weights than the head's.
    """
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        checkpoint_or_name(model), num_labels=1, dtype=dtype, output_loading_info=True
    )
    missing = [name for name in sorted(report["missing_keys"]) if name.startswith(f"{loaded.base_model_prefix}.")]
    if missing:
        raise ValueError(f"{model} lacks {len(missing)} weights of the reward model, among them {missing[0]}")
    return loaded


def read_preferences(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Preference pairs of JSON-lines files: "prompt", "chosen" and "rejected", texts or conversations.

    Other fields are kept as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, a malformed line, or texts and conversations mixed.
    """
    pairs: list[dict[str, Any]] = []
    for path in paths:
        pairs += [_preference(line, where) for where, line in numbered_lines(path, "preferences")]
    if len({isinstance(pair["prompt"], str) for pair in pairs}) > 1:
        raise ValueError("some preferences are texts and some are conversations: give one kind")
    return pairs


def _preference(line: str, where: str) -> dict[str, Any]:
    expected = f'{where}: expected {{"prompt": …, "chosen": …, "rejected": …}}, all texts or all lists of messages'
    try:
        row = json.loads(line)
        values = [row[name] for name in ("prompt", "chosen", "rejected")]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{expected}: {error!r}") from error
    conversation = [
        isinstance(value, list)
        and all(isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message for message in value)
        for value in values
    ]
    if not all(isinstance(value, str) for value in values) and not all(conversation):
        raise ValueError(expected)
    if values[1] == values[2]:
        raise ValueError(f"{where}: chosen and rejected are the same")
    return row


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Share of pairs whose chosen completion scores higher, with a 95 % bootstrap interval over pairs.

    margin: mean difference of the scores; by_corruption: "accuracy" and "num_pairs" by corruption of the rejected completion,
    over pairs that name it and whose chosen completion has none (`geobased train preferences`); of several, each counts.
    """

    accuracy: float
    low: float
    high: float
    margin: float
    num_pairs: int
    by_corruption: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return asdict(self)


def evaluate_preferences(scorer: RewardModelScorer, pairs: Sequence[dict[str, Any]], seed: int = 0) -> PreferenceAccuracy:
    """Accuracy of a reward model on preference pairs (`read_preferences`); equal scores count as wrong.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("no preferences to evaluate on")
    prompts = [pair["prompt"] for pair in pairs]
    scores = scorer(prompts * 2, [pair[name] for name in ("chosen", "rejected") for pair in pairs])
    margins = torch.tensor(scores[: len(pairs)]) - torch.tensor(scores[len(pairs) :])
    hits = (margins > 0).double()
    low, high = mean_interval(hits, seed=seed)
    groups: dict[str, list[float]] = {}
    for pair, hit in zip(pairs, hits.tolist(), strict=True):
        if not pair.get("chosen_corruption"):
            for name in filter(None, pair.get("rejected_corruption", "").split("+")):
                groups.setdefault(name, []).append(hit)
    by_corruption = {
        name: {"accuracy": sum(values) / len(values), "num_pairs": len(values)} for name, values in sorted(groups.items())
    }
    return PreferenceAccuracy(hits.mean().item(), low, high, margins.mean().item(), len(pairs), by_corruption)


__all__ = [
    "PreferenceAccuracy",
    "RewardModelScorer",
    "evaluate_preferences",
    "load_reward_model",
    "read_preferences",
    "reward_name",
]
