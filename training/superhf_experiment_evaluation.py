"""What every policy of the comparison is measured by, on the same prompts: rewards, rules, variety, distance and forgetting."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from geobased.training.perplexity import exp_or_infinity, mean_loss
from geobased.training.preference_rules import RULES, rule_scores, total_score
from geobased.training.reward_models import RewardModelScorer
from geobased.training.superhf_experiment_settings import VALIDATION, ExperimentSettings
from geobased.training.superhf_loss import predict, selected_texts, superhf_loss
from geobased.training.superhf_metrics import distinct_n, meteor_similarity

Rows = Sequence[dict[str, Any]]
# rows that generate, and rows whose logits are compared, at a time
BATCH, KL_BATCH = 128, 64


class StandardizedReward:
    """A reward model's scores, less their mean over the completions of preference pairs, in units of their deviation there.

    That puts two reward models on one scale. It is a reward function in TRL's form.
    """

    def __init__(self, scorer: RewardModelScorer, mean: float, deviation: float, name: str) -> None:
        self.scorer, self.mean, self.deviation, self.__name__ = scorer, mean, deviation, name

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return [(score - self.mean) / self.deviation for score in self.scorer(prompts, completions)]


@contextlib.contextmanager
def plain_forward(model: Any) -> Iterator[None]:
    """Takes off what TRL puts in the place of a forward pass: BASED's fast generation serves only models with their own."""
    patched = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            model.forward = patched


@torch.no_grad()
def sample(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], number: int, settings: ExperimentSettings
) -> list[list[list[int]]]:
    """`number` completions of each prompt as ids, the end-of-text token included where a completion has ended.

    The model's training mode is restored.
    """
    rows = [prompt for prompt in prompts for _ in range(number)]
    found: list[list[int]] = []
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(rows), BATCH):
            batch = tokenizer(rows[first : first + BATCH], return_tensors="pt", padding=True, padding_side="left")
            with plain_forward(model):
                ids = model.generate(
                    input_ids=batch["input_ids"].to(model.device),
                    attention_mask=batch["attention_mask"].to(model.device),
                    do_sample=True,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=0,
                    max_new_tokens=settings.max_new_tokens,
                    use_cache=True,
                )
            new = ids[:, batch["input_ids"].shape[1] :].tolist()
            found += [_up_to_end(row, tokenizer.eos_token_id) for row in new]
    finally:
        model.train(was_training)
    return [found[i : i + number] for i in range(0, len(found), number)]


def _up_to_end(ids: list[int], end: Any) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def decoded(tokenizer: PreTrainedTokenizerBase, completions: list[list[int]]) -> list[str]:
    """Texts of completions, without special tokens."""
    return tokenizer.batch_decode(completions, skip_special_tokens=True)


@dataclass(frozen=True)
class Evaluator:
    """Measures policies on the test prompts, against the policy that they started from."""

    settings: ExperimentSettings
    tokenizer: PreTrainedTokenizerBase
    reward: StandardizedReward
    held_out_reward: StandardizedReward
    base: Any
    test: Rows
    """Rows with "prompt" and "answer"."""
    windows: dict[str, list[tuple[torch.Tensor, int]]]
    """Of held-out texts, for perplexities."""

    def best_completions(self, model: Any, prompts: Sequence[str], number: int) -> list[list[int]]:
        """One completion for each prompt: of `number`, the best by the training reward."""
        groups = sample(model, self.tokenizer, prompts, number, self.settings)
        if number == 1:
            return [group[0] for group in groups]
        texts = decoded(self.tokenizer, [ids for group in groups for ids in group])
        scores = self.reward([prompt for prompt in prompts for _ in range(number)], texts)
        best = torch.tensor(scores).view(-1, number).argmax(1).tolist()
        return [group[i] for group, i in zip(groups, best, strict=True)]

    def validation_rewards(self, model: Any, prompts: Sequence[str]) -> dict[str, float]:
        """Means of one completion for each prompt, by the names in `VALIDATION`."""
        with torch.random.fork_rng():
            texts = decoded(self.tokenizer, self.best_completions(model, prompts, 1))
        scores = {name: getattr(self, reward)(prompts, texts) for reward, name in VALIDATION.items()}
        return {name: sum(values) / len(values) for name, values in scores.items()}

    def measure(self, model: Any, number: int = 1) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Means over the test prompts, and the rewards of each.

        The state of the random numbers is left as it was, so that training does not depend on how often it is measured.

        Args:
            number: completions of a prompt, the best of which by the training reward counts.
        """
        started = time.perf_counter()
        prompts = [row["prompt"] for row in self.test]
        with torch.random.fork_rng():
            completions = self.best_completions(model, prompts, number)
        texts = decoded(self.tokenizer, completions)
        rules = [rule_scores(row["prompt"], text, row["answer"]) for row, text in zip(self.test, texts, strict=True)]
        each = {
            "reward": self.reward(prompts, texts),
            "held_out_reward": self.held_out_reward(prompts, texts),
            "rule_reward": [total_score(scores) for scores in rules],
        }
        each |= {name: [scores[name] for scores in rules] for name in RULES}
        lengths = [len(ids) for ids in completions]
        measured: dict[str, Any] = {name: sum(values) / len(values) for name, values in each.items()}
        measured["similarity"] = meteor_similarity(texts)
        measured["distinct_2"] = distinct_n(texts, 2)
        measured["mean_length"] = sum(lengths) / len(lengths)
        with plain_forward(model):
            # chosen among several, completions are no longer samples of the policy
            measured["kl"] = self._divergence(model, prompts, completions) if number == 1 else None
            measured["perplexity"] = {
                name: exp_or_infinity(mean_loss(model, windows, batch_size=32)) for name, windows in self.windows.items()
            }
        measured = {name: round(value, 5) if isinstance(value, float) else value for name, value in measured.items()}
        measured["evaluation_seconds"] = round(time.perf_counter() - started, 2)
        kept = {name: [round(value, 4) for value in values] for name, values in each.items()}
        return measured, kept

    @torch.no_grad()
    def _divergence(self, model: Any, prompts: Sequence[str], completions: Sequence[Sequence[int]]) -> float:
        """KL(policy || base) in nats per token of the policy's own completions, over the whole vocabulary."""
        was_training = model.training
        model.eval()
        total = count = 0.0
        encoded: list[list[int]] = self.tokenizer(list(prompts))["input_ids"]
        rows = [(ids, list(new)) for ids, new in zip(encoded, completions, strict=True) if new]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        for first in range(0, len(rows), KL_BATCH):
            part = rows[first : first + KL_BATCH]
            ids = [torch.tensor(prompt + new) for prompt, new in part]
            padded = torch.nn.utils.rnn.pad_sequence(ids, True).to(model.device)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True).to(model.device)
            starts = torch.tensor([len(prompt) for prompt, _ in part], device=model.device)
            texts = selected_texts(padded, mask, starts)
            policy, base = (predict(item, texts, chunked=False) for item in (model, self.base))
            terms = superhf_loss(policy, base, texts.labels, beta=1.0, kl_direction="reverse")
            total, count = total + terms.kl_sum.item(), count + terms.num_kl_tokens.item()
        model.train(was_training)
        return total / max(count, 1.0)


__all__ = ["Evaluator", "StandardizedReward", "decoded", "plain_forward", "sample"]
