"""Calibration of a causal language model's answers to multiple-choice questions: is it right as often as it is sure?

A choice's score is the log-likelihood of its text after the question; the softmax over a question's choices is the model's
confidence. Training for reward can move that away from how often the answers are right, in either direction.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geobased.geography.calibration import DEFAULT_BINS, expected_calibration_error, reliability_table
from geobased.geography.evaluation import Estimate
from geobased.recall.gazetteer_documents import format_value
from geobased.recall.places import load_places
from geobased.training.artifacts import save_figure
from geobased.training.perplexity import window_losses
from geobased.training.preference_rules import gazetteer_prompts
from geobased.training.text_files import numbered_lines
from geobased.whole_file import whole_file

NORMALIZATIONS = ("none", "token", "byte")
BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """A question with its choices; `answer` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Calibration:
    """Result of `evaluate_calibration`. Intervals are 95 % bootstrap intervals over questions.

    expected_calibration_error: mean distance between confidence and accuracy over bins; over few questions it comes out too
    large, the more so the more bins, and its interval as well. mean_confidence: of the likeliest choices; above the accuracy
    the model is too sure. brier_score: squared distance between probabilities and truth, 0 (sure and right) to 2.
    negative_log_likelihood: of the right choice among the choices, in nats. reliability: rows of `reliability_table`.
    """

    accuracy: Estimate
    expected_calibration_error: Estimate
    mean_confidence: Estimate
    brier_score: Estimate
    negative_log_likelihood: Estimate
    num_questions: int
    num_bins: int
    adaptive: bool
    normalization: str
    reliability: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return asdict(self)


def read_multiple_choice(path: str | Path) -> list[MultipleChoice]:
    """Questions of a JSON-lines file: "question", "choices" (two or more), "answer" (index from 0, or the right choice's text).

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file or a malformed line.
    """
    return [_parse(line, where) for where, line in numbered_lines(path, "questions")]


def _parse(line: str, where: str) -> MultipleChoice:
    try:
        row = json.loads(line)
        question, choices, answer = row["question"], tuple(row["choices"]), row["answer"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: expected {{"question": …, "choices": […], "answer": …}}: {error!r}') from error
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: the question is empty")
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices) or len({*choices}) < len(choices):
        raise ValueError(f"{where}: choices must be two or more different texts")
    if isinstance(answer, str):
        if answer not in choices:
            raise ValueError(f"{where}: the answer {answer!r} is none of the choices")
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: the answer must be a choice or its index from 0 to {len(choices) - 1}, not {answer!r}")
    return MultipleChoice(question, choices, answer)


def gazetteer_questions(
    num_questions: int, seed: int = 1, *, num_choices: int = 4, max_words: int = 100, max_records: int = 6
) -> list[MultipleChoice]:
    """Questions about held-out places whose records stand in the question's text.

    The other choices are values of the same field: those that the document's other answers name first, then other towns'.

    Raises:
        ValueError: numbers out of range, or more choices than there are values.
    """
    if num_questions < 1 or num_choices < 2:
        raise ValueError(f"need num_questions >= 1 and num_choices >= 2, got {num_questions} and {num_choices}")
    places = load_places("held_out")
    rng = random.Random(f"calibration/{seed}")
    questions: list[MultipleChoice] = []
    # some fields have few values, as the side of the road has: such questions are passed over
    items = gazetteer_prompts(
        places, 4 * num_questions + 100, f"calibration/{seed}", max_words=max_words, max_records=max_records
    )
    for item in items:
        values = [*rng.sample(item.others, len(item.others))]
        values += [format_value(place, item.field) for place in rng.sample(places, 50)]
        others = [value for value in dict.fromkeys(values) if value != item.answer][: num_choices - 1]
        if len(others) < num_choices - 1:
            continue
        order = rng.sample([item.answer, *others], num_choices)
        choices = tuple(f" {value}{item.end}" for value in order)
        questions.append(MultipleChoice(item.prompt, choices, order.index(item.answer)))
        if len(questions) == num_questions:
            break
    if len(questions) < num_questions:
        raise ValueError(f"too few places have {num_choices} different values: only {len(questions)} questions could be made")
    return questions


def write_multiple_choice(questions: Sequence[MultipleChoice], path: str | Path) -> None:
    """Write questions as JSON lines that `read_multiple_choice` reads."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions)


@torch.inference_mode()
def choice_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[MultipleChoice],
    *,
    normalization: str = "none",
    batch_size: int = 16,
    max_tokens: int = 1024,
) -> list[list[float]]:
    """Score of each choice: its log-likelihood after the question, in nats, in all or per token or UTF-8 byte.

    A choice that does not begin with white space is set off by a blank, unless the question ends with white space. Question and
    choice are tokenised in one piece, and scored from the first token on in which the choices can differ. What is longer than
    `max_tokens` loses its beginning.

    Args:
        normalization: "none"; "token" or "byte" divide by the choice's length, which spares long choices.
        batch_size: choices at a time, of similar length.

    Raises:
        ValueError: another normalization, or a choice that does not fit into `max_tokens`.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, not {normalization!r}")
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(text: str) -> list[int]:
        return prefix + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    windows: list[tuple[torch.Tensor, int]] = []
    lengths: list[int] = []
    for question in questions:
        context = encode(question.question)
        texts = [_joined(question.question, choice) for choice in question.choices]
        rows = [encode(text) for text in texts]
        # the last tokens of the question may be others where a choice follows
        starts = [next((i for i, (a, b) in enumerate(zip(context, row)) if a != b), len(context)) for row in rows]  # noqa: B905
        start = max(min(starts), 1)
        for text, row in zip(texts, rows, strict=True):
            removed = max(len(row) - max_tokens, 0)
            if removed >= start:
                raise ValueError(f"the choice {text[-40:]!r} does not fit into {max_tokens} tokens")
            windows.append((torch.tensor(row[removed:]), start - removed))
            size = len(text.encode("utf-8")) - len(question.question.encode("utf-8"))
            lengths.append({"none": 1, "token": len(row) - start, "byte": size}[normalization])
    scores = _scores(model, windows, batch_size)
    flat = iter(score / length for score, length in zip(scores, lengths, strict=True))
    return [[next(flat) for _ in question.choices] for question in questions]


def _joined(question: str, choice: str) -> str:
    separated = question[-1:].isspace() or choice[:1].isspace()
    return question + ("" if separated else " ") + choice


def _scores(model: PreTrainedModel, windows: list[tuple[torch.Tensor, int]], batch_size: int) -> list[float]:
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
    scores = [0.0] * len(windows)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            _, losses, counted = window_losses(model, [windows[i] for i in batch])
            for i, score in zip(batch, (-(losses * counted).sum(1)).tolist(), strict=True):
                scores[i] = score
    finally:
        model.train(was_training)
    return scores


def calibration_of_scores(
    scores: Sequence[Sequence[float]],
    answers: Sequence[int],
    *,
    bins: int = DEFAULT_BINS,
    adaptive: bool = False,
    normalization: str = "none",
    seed: int = 0,
) -> Calibration:
    """Calibration of choices' scores, which a softmax turns into probabilities.

    Args:
        scores: of each question's choices, any number of them.
        answers: index of the right choice of each question.
        bins, adaptive: of `reliability_table`.
        normalization: of the scores, for the record.

    Raises:
        ValueError: no questions, different lengths, or scores that are not finite.
    """
    if not scores or len(scores) != len(answers):
        raise ValueError(f"need the answer of each of one or more questions, got {len(scores)} questions, {len(answers)} answers")
    columns: dict[str, list[float]] = {"confidence": [], "correct": [], "brier": [], "loss": []}
    for row, answer in zip(scores, answers, strict=True):
        values = np.asarray(row, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"scores must be finite, got {list(row)}")
        log_probabilities = values - values.max() - np.log(np.exp(values - values.max()).sum())
        probabilities = np.exp(log_probabilities)
        truth = np.arange(len(values)) == answer
        columns["confidence"].append(float(probabilities.max()))
        columns["correct"].append(float(probabilities.argmax() == answer))
        columns["brier"].append(float(((probabilities - truth) ** 2).sum()))
        columns["loss"].append(float(-log_probabilities[answer]))
    table = np.array([columns[name] for name in ("confidence", "correct", "brier", "loss")])
    # rounding may put a probability a hair above 1
    table[0] = np.minimum(table[0], 1.0)

    def measures(part: np.ndarray) -> list[float]:
        error = expected_calibration_error(part[0], part[1], bins, adaptive=adaptive)
        return [error, *part.mean(axis=1).tolist()]

    rng = np.random.default_rng(seed)
    draws = [measures(table[:, rng.integers(0, len(answers), len(answers))]) for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.quantile(np.array(draws), [0.025, 0.975], axis=0)
    error, confidence, accuracy, brier, loss = (
        Estimate(value, float(low[i]), float(high[i])) for i, value in enumerate(measures(table))
    )
    return Calibration(
        accuracy=accuracy,
        expected_calibration_error=error,
        mean_confidence=confidence,
        brier_score=brier,
        negative_log_likelihood=loss,
        num_questions=len(answers),
        num_bins=bins,
        adaptive=adaptive,
        normalization=normalization,
        reliability=reliability_table(table[0], table[1], bins, adaptive=adaptive),
    )


def evaluate_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[MultipleChoice],
    *,
    normalization: str = "none",
    bins: int = DEFAULT_BINS,
    adaptive: bool = False,
    batch_size: int = 16,
    max_tokens: int = 1024,
) -> Calibration:
    """Calibration of a model on questions; see `choice_log_likelihoods` and `calibration_of_scores`.

    Example:
        >>> questions = gazetteer_questions(500)
        >>> evaluate_calibration(model, tokenizer, questions).expected_calibration_error.value  # doctest: +SKIP
        0.08
    """
    scores = choice_log_likelihoods(
        model, tokenizer, questions, normalization=normalization, batch_size=batch_size, max_tokens=max_tokens
    )
    answers = [question.answer for question in questions]
    return calibration_of_scores(scores, answers, bins=bins, adaptive=adaptive, normalization=normalization)


def plot_reliability(results: dict[str, Calibration], path: str | Path) -> None:
    """Draw accuracy over confidence for one or several models (PNG); areas of dots grow with the questions in a bin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    for name, result in results.items():
        x, y = ([row[key] for row in result.reliability] for key in ("confidence", "accuracy"))
        sizes = [20 + 300 * row["count"] / result.num_questions for row in result.reliability]
        error = result.expected_calibration_error.value
        (line,) = axes.plot(x, y, linewidth=1.4, label=f"{name}: calibration error {error:.3f}")
        axes.scatter(x, y, s=sizes, color=line.get_color(), alpha=0.6, linewidths=0, clip_on=False)
    axes.set_xlabel("confidence in the likeliest choice")
    axes.set_ylabel("share of right answers")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    save_figure(figure, path)


__all__ = [
    "Calibration",
    "MultipleChoice",
    "calibration_of_scores",
    "choice_log_likelihoods",
    "evaluate_calibration",
    "gazetteer_questions",
    "plot_reliability",
    "read_multiple_choice",
    "write_multiple_choice",
]
