"""Recall of real facts from the context: how many questions about held-out places a language model answers exactly.

The towns occur in no training document, and their population or coordinates follow from nothing but the record in the
context. `closed_book` measures the rest: the same questions without any record.

An answer counts as recalled when greedy decoding would write it: the argmax at every token of the answer, and at the token
that ends it, given the *true* tokens before, equals the true token. Greedy decoding sees exactly these prefixes up to its
first mistake, so one forward pass over the document gives the verdict of every question in it, without generating.
"""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geobased.recall.gazetteer_documents import GazetteerDocument, generate_documents
from geobased.recall.places import load_places

# what a name or a country gives away is left out of the overall figure
RECALL_FIELDS = ("population", "region", "climate", "latitude", "longitude")
DISTANCE_BUCKETS = ((0, 64), (64, 128), (128, 256), (256, 512), (512, 1024))


@dataclass(frozen=True)
class TokenQuestion:
    """A question as token positions of its document: the answer and the token that ends it are ids[start:end].

    distance: tokens from the value in the record to the answer.
    """

    start: int
    end: int
    distance: int
    field: str


@dataclass(frozen=True)
class Accuracy:
    """Share of recalled answers with its 95 % bootstrap interval (documents resampled)."""

    accuracy: float
    low: float
    high: float
    num_questions: int


@dataclass(frozen=True)
class GazetteerRecall:
    """Result of `evaluate_recall`. `overall` and `by_distance` count the fields of `RECALL_FIELDS` only.

    by_distance: by tokens between value and answer, keys such as "64-128"; closed_book: without any record.
    """

    overall: Accuracy
    by_field: dict[str, Accuracy]
    by_distance: dict[str, Accuracy]
    closed_book: dict[str, Accuracy]
    num_documents: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return asdict(self)


Located = tuple[list[int], list[TokenQuestion]]


def locate_questions(document: GazetteerDocument, tokenizer: PreTrainedTokenizerBase) -> Located:
    """Ids of a document, after the beginning-of-text token if there is one, and its questions as token positions.

    Raises:
        ValueError: a tokenizer without character offsets (a "slow" one).
    """
    if not tokenizer.is_fast:
        raise ValueError("recall needs a fast tokenizer: it maps characters to tokens")
    encoding = tokenizer(document.text, add_special_tokens=False, verbose=False)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    questions = []
    for question in document.questions:
        # a blank before an answer may belong to no token
        characters = range(question.answer_start, question.answer_end)
        start = next(token for token in map(encoding.char_to_token, characters) if token is not None)
        end = encoding.char_to_token(question.answer_end)
        value = encoding.char_to_token(question.answer_start - question.distance)
        questions.append(TokenQuestion(len(prefix) + start, len(prefix) + end + 1, start - value, question.field))
    return prefix + encoding["input_ids"], questions


def closed_book_documents(documents: Iterable[GazetteerDocument]) -> list[GazetteerDocument]:
    """One document per question: its line alone, without any record."""
    alone = []
    for document in documents:
        for question in document.questions:
            line_start = document.text.rfind("\n", 0, question.answer_start) + 1
            line = document.text[line_start : document.text.index("\n", question.answer_end) + 1]
            start = question.answer_start - line_start
            # without a record there is no distance: the answer stands for the value
            moved = {
                **asdict(question),
                "answer_start": start,
                "answer_end": start + len(question.answer),
                "record_start": 0,
                "record_end": 0,
                "distance": 0,
            }
            alone.append(GazetteerDocument(line, (type(question)(**moved),), (question.geonames_id,), document.layout))
    return alone


@torch.inference_mode()
def recalled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[GazetteerDocument],
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    located: Mapping[GazetteerDocument, Located] | None = None,
) -> list[list[tuple[TokenQuestion, bool]]]:
    """For each document, its questions and whether greedy decoding of the answer, from all the text before, is exact.

    Args:
        batch_size: documents at a time, of similar length; filled up on the right, which a causal model cannot see.
        max_tokens: longer documents are left out (an empty list stands for them).
        located: what `locate_questions` gives for some of the documents, so that several models need no tokenizing anew.
    """
    known = {} if located is None else located
    tokens = [known[item] if item in known else locate_questions(item, tokenizer) for item in documents]
    kept = [i for i, (ids, _) in enumerate(tokens) if max_tokens is None or len(ids) <= max_tokens]
    order = sorted(kept, key=lambda i: len(tokens[i][0]))
    results: list[list[tuple[TokenQuestion, bool]]] = [[] for _ in documents]
    limits_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            width = max(len(tokens[i][0]) for i in rows)
            batch = torch.zeros(len(rows), width, dtype=torch.long)
            for row, i in enumerate(rows):
                batch[row, : len(tokens[i][0])] = torch.tensor(tokens[i][0])
            # the logits of a long context are far larger than the model: only those from the first answer on are computed
            first_answer = min((question.start for i in rows for question in tokens[i][1]), default=width)
            kept_logits = {"logits_to_keep": width - first_answer + 1} if limits_logits else {}
            predicted = model(input_ids=batch.to(model.device), use_cache=False, **kept_logits).logits.argmax(-1).cpu()
            skipped = width - predicted.shape[1]
            hits = (predicted[:, :-1] == batch[:, skipped + 1 :]).tolist()
            for row, i in enumerate(rows):
                results[i] = [
                    (question, all(hits[row][question.start - 1 - skipped : question.end - 1 - skipped]))
                    for question in tokens[i][1]
                ]
    finally:
        model.train(was_training)
    return results


def bootstrap_accuracy(groups: Sequence[Sequence[bool]], samples: int = 1000, seed: int = 0) -> Accuracy:
    """Accuracy over all verdicts; its interval resamples the groups (documents), whose questions share a context."""
    groups = [group for group in groups if group]
    total = sum(map(len, groups))
    if total == 0:
        return Accuracy(float("nan"), float("nan"), float("nan"), 0)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([[sum(group), len(group)] for group in groups], dtype=torch.float64)
    draws = counts[torch.randint(len(groups), (samples, len(groups)), generator=generator)].sum(1)
    low, high = torch.quantile(draws[:, 0] / draws[:, 1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Accuracy(sum(map(sum, groups)) / total, low, high, total)


def evaluate_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[GazetteerDocument],
    *,
    batch_size: int = 16,
    max_tokens: int | None = 1024,
    closed_book: bool = True,
) -> GazetteerRecall:
    """Exact recall of a model on documents: overall, by field, by distance, and without the records.

    Raises:
        ValueError: no document of at most `max_tokens` tokens.

    Example:
        >>> documents = list(generate_documents(load_places("held_out"), 200, seed=1))
        >>> evaluate_recall(model, tokenizer, documents).overall.accuracy  # doctest: +SKIP
        0.93
    """
    results = recalled_answers(model, tokenizer, documents, batch_size=batch_size, max_tokens=max_tokens)
    results = [verdicts for verdicts in results if verdicts]
    if not results:
        raise ValueError(f"no document has a question and at most {max_tokens} tokens")
    fields = sorted({question.field for verdicts in results for question, _ in verdicts})
    alone: list[list[tuple[TokenQuestion, bool]]] = []
    if closed_book:
        alone = recalled_answers(model, tokenizer, closed_book_documents(documents), batch_size=8 * batch_size)

    def by_field(verdicts: list[list[tuple[TokenQuestion, bool]]], names: Sequence[str]) -> Accuracy:
        return bootstrap_accuracy([[hit for question, hit in group if question.field in names] for group in verdicts])

    def within(low: int, high: int) -> Accuracy:
        return bootstrap_accuracy(
            [
                [hit for question, hit in group if question.field in RECALL_FIELDS and low <= question.distance < high]
                for group in results
            ]
        )

    return GazetteerRecall(
        overall=by_field(results, RECALL_FIELDS),
        by_field={name: by_field(results, (name,)) for name in fields},
        by_distance={f"{low}-{high}": within(low, high) for low, high in DISTANCE_BUCKETS},
        closed_book={
            "overall": by_field(alone, RECALL_FIELDS),
            **{name: by_field(alone, (name,)) for name in fields},
        }
        if closed_book
        else {},
        num_documents=len(results),
    )


def plot_recall_by_distance(results: dict[str, GazetteerRecall], path: str | Path) -> None:
    """Draw accuracy over the distance between record and answer for several models, with 95 % intervals (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = [f"{low}–{high}" if low else f"<{high}" for low, high in DISTANCE_BUCKETS]
    for name, result in results.items():
        points = [(i, accuracy) for i, accuracy in enumerate(result.by_distance.values()) if accuracy.num_questions]
        x, y = [i for i, _ in points], [100 * accuracy.accuracy for _, accuracy in points]
        (line,) = axes.plot(x, y, marker="o", linewidth=1.8, label=name)
        low, high = ([100 * getattr(accuracy, side) for _, accuracy in points] for side in ("low", "high"))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("tokens between the record and the answer")
    axes.set_ylabel("answers recalled exactly (%)")
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


@dataclass
class GazetteerRecallArguments:
    """Arguments of `evaluate`."""

    model: str = field(metadata={"help": "folder or Hub name of a causal language model with its tokenizer"})
    num_documents: int = field(default=200, metadata={"help": "documents of held-out places"})
    seed: int = field(default=1, metadata={"help": "seed of the documents"})
    max_words: int = field(default=400, metadata={"help": "most words of a document"})
    min_records: int = field(default=2, metadata={"help": "fewest records in a document"})
    max_records: int = field(default=24, metadata={"help": "most records in a document"})
    max_tokens: int = field(default=1024, metadata={"help": "longer documents are left out"})
    batch_size: int = field(default=16, metadata={"help": "documents at a time"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; CUDA where there is one by default"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, …"})
    plot: str | None = field(default=None, metadata={"help": "PNG of accuracy by distance to write"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


def evaluate(arguments: GazetteerRecallArguments) -> dict[str, Any]:
    """Load a model, evaluate its recall on held-out places, and write JSON and plot where asked.

    Returns:
        the arguments, and under "recall" `GazetteerRecall.to_dict()`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import geobased  # noqa: F401  (registers the package's model types)

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(device)  # type: ignore[arg-type]
    documents = list(
        generate_documents(
            load_places("held_out"),
            arguments.num_documents,
            arguments.seed,
            arguments.max_words,
            min_records=arguments.min_records,
            max_records=arguments.max_records,
        )
    )
    recall = evaluate_recall(model, tokenizer, documents, batch_size=arguments.batch_size, max_tokens=arguments.max_tokens)
    report = {"arguments": asdict(arguments), "recall": recall.to_dict()}
    if arguments.plot:
        plot_recall_by_distance({Path(arguments.model).name: recall}, arguments.plot)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Command line: every field of `GazetteerRecallArguments` is an option."""
    from transformers import HfArgumentParser

    (arguments,) = HfArgumentParser(GazetteerRecallArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    print(json.dumps(evaluate(arguments), indent=1))


__all__ = [
    "DISTANCE_BUCKETS",
    "RECALL_FIELDS",
    "Accuracy",
    "GazetteerRecall",
    "GazetteerRecallArguments",
    "Located",
    "bootstrap_accuracy",
    "closed_book_documents",
    "evaluate",
    "evaluate_recall",
    "locate_questions",
    "plot_recall_by_distance",
    "recalled_answers",
]


if __name__ == "__main__":
    main()
