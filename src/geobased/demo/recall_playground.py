"""Facts recalled from a document by the package's own pipeline, where they stand in it, and what distance does to them."""

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from geobased.cli.errors import CommandError
from geobased.cli.sources import quiet_transformers
from geobased.pipelines import ContextQuestionAnsweringPipeline

from .comparison import MAX_CONTEXT_TOKENS, ComparedModel
from .filler import filler_text

FILLER_TOKENS = (0, 64, 128, 256, 512, 900)
MAX_ANSWER_TOKENS, MAX_QUESTION_CHARACTERS = 32, 500
QUESTION_TEMPLATE = "Question: {question} Answer:"
# from the model card of based-mini: tokens between the record and the answer, up to; answers recalled exactly, %
CARD_RECALL = ((64, 54.4), (128, 37.6), (256, 27.1), (512, 22.0), (1024, 14.8))
DOCUMENTS = {
    "One fact": ("The population of Lund is 94,393.", "What is the population of Lund?"),
    "Statements": (
        "The population of Nanjing is 9,314,685. The climate of Nanjing is humid subtropical. The region of Nanjing is Jiangsu"
        " Sheng. The population of Jeddah is 4,697,000. The climate of Jeddah is hot desert.",
        "What is the climate of Nanjing?",
    ),
    "Records": (
        "Name: Guangzhou\nPopulation: 16,096,724\nClimate: dry-winter subtropical\nRegion: Guangdong\n\n"
        "Name: Nanjing\nPopulation: 9,314,685\nClimate: humid subtropical\nRegion: Jiangsu Sheng\n\n"
        "Name: Jeddah\nPopulation: 4,697,000\nClimate: hot desert\nRegion: Makkah",
        "What is the region of Guangzhou?",
    ),
    "Another kind of text": (
        "The ferry to the island leaves at nine in the morning and comes back at six. A ticket costs 14 crowns.",
        "What does a ticket cost?",
    ),
}


@dataclass(frozen=True)
class Recall:
    """An answer and where it stands.

    Attributes:
        answer: what the model wrote up to the end of the line.
        score: the probability that it gave to these tokens, not that they are right.
        spans: [start, end) characters of the document that equal the answer.
        filler_tokens: tokens of filler asked for between document and question.
        tokens_between: from the end of the last span to the answer; None where the answer is not in the document.
        context_tokens: length of document, filler and question.
    """

    answer: str
    score: float
    spans: tuple[tuple[int, int], ...]
    filler_tokens: int
    tokens_between: int | None
    context_tokens: int


def spans_of(answer: str, document: str) -> tuple[tuple[int, int], ...]:
    """[start, end) of every place where the answer stands as whole words, whatever its case."""
    if not answer:
        return ()
    # digits and their separators belong together: 94 is not in 94,393
    pattern = rf"(?<![\w])(?<!\d[.,]){re.escape(answer)}(?![\w])(?![.,]\d)"
    return tuple(found.span() for found in re.finditer(pattern, document, re.IGNORECASE))


@dataclass
class RecallPlayground:
    """Answers questions about documents with one model; one question at a time."""

    compared: ComparedModel
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        tokenizer: Any = self.compared.tokenizer
        self._reader = ContextQuestionAnsweringPipeline(model=self.compared.model, tokenizer=tokenizer)

    def answers(self, document: str, question: str, filler_tokens: Sequence[int] = (0,)) -> Iterator[Recall]:
        """The answer for each length of filler put between the document and the question. To stop, ask for no more.

        Raises `CommandError` for an empty document or question, and for too long ones.
        """
        if not document.strip():
            raise CommandError("The document is empty: paste a text that holds the fact.")
        if not question.strip():
            raise CommandError("The question is empty: ask for something that stands in the document.")
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise CommandError(f"The question has {len(question):,} characters: at most {MAX_QUESTION_CHARACTERS} are taken.")
        if (count := self._count(document)) > MAX_CONTEXT_TOKENS:
            raise CommandError(f"The document is too long: it has {count:,} tokens, and at most {MAX_CONTEXT_TOKENS:,} are read.")
        for tokens in filler_tokens:
            yield self._answer(document.strip(), question.strip(), tokens)

    def _answer(self, document: str, question: str, filler_tokens: int) -> Recall:
        filler = filler_text(self.compared.tokenizer, filler_tokens, beside=document + question)
        context = f"{document}\n{filler}" if filler else document
        with self.lock, quiet_transformers():
            result = self._reader(
                context=context, question=question, question_template=QUESTION_TEMPLATE, max_new_tokens=MAX_ANSWER_TOKENS
            )
        spans = spans_of(result["answer"], document)
        asked = "\n" + QUESTION_TEMPLATE.replace("{question}", question)
        return Recall(
            answer=result["answer"],
            score=result["score"],
            spans=spans,
            filler_tokens=filler_tokens,
            tokens_between=self._count(context[spans[-1][1] :] + asked) if spans else None,
            context_tokens=self._count(context + asked),
        )

    def _count(self, text: str) -> int:
        return len(self.compared.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def card_recall(tokens: int) -> float | None:
    """Percentage of answers that based-mini recalled at this distance in its test; None beyond what was tested."""
    return next((percent for most, percent in CARD_RECALL if tokens <= most), None)


def highlighted(document: str, spans: Sequence[tuple[int, int]]) -> str:
    """The document as HTML, with the spans marked."""
    parts, end = [], 0
    for start, stop in spans:
        parts += [escape(document[end:start]), f"<mark>{escape(document[start:stop])}</mark>"]
        end = stop
    return "".join(parts) + escape(document[end:])


def recall_view(document: str, recalls: Sequence[Recall], trained_tokens: int, shipped: bool) -> str:
    """The answer, its place in the document and, for several distances, a table, as HTML."""
    first = recalls[0]
    times = {1: "once", 2: "twice"}.get(len(first.spans), f"{len(first.spans)} times")
    if first.spans:
        where = f"stands in the document {times}, marked below. That does not make it the right one"
    else:
        where = "does not stand in the document: the model did not copy it from there"
    parts = [
        f"<p>The answer {where}.</p>",
        f"<p>Probability that the model gives these tokens: <b>{first.score:.0%}</b>. That is no probability of being right.</p>",
    ]
    if shipped and first.tokens_between is not None and (percent := card_recall(first.tokens_between)) is not None:
        parts.append(
            f"<p>{first.tokens_between:,} tokens lie between this place and the answer: in the test of its model card, the model"
            f" recalled {percent:.0f}% of facts at such a distance.</p>"
        )
    if max(recall.context_tokens for recall in recalls) > trained_tokens:
        parts.append(f"<p>Some of this is longer than the {trained_tokens:,} tokens that the model was trained on.</p>")
    parts.append(
        '<p class="label">Document</p><div class="document" role="region" tabindex="0" aria-label="Document">'
        f"{highlighted(document.strip(), first.spans)}</div>"
    )
    if len(recalls) > 1:
        parts.append(_distances(recalls, shipped))
    return f'<div class="recall">{"".join(parts)}</div>'


def _distances(recalls: Sequence[Recall], shipped: bool) -> str:
    """The answers at every length of filler as a table."""
    near, notes = recalls[0], ["The filler is statements about other towns, whose values can mislead the model."]
    headings = ["Filler, tokens", "Answer", "Probability", "In the document"]
    rows = [
        [f"{recall.filler_tokens:,}", recall.answer or "(nothing)", f"{recall.score:.0%}", "yes" if recall.spans else "no"]
        for recall in recalls
    ]
    if shipped and near.tokens_between is not None:
        headings.append("Model card")
        notes.append("The last column is the share of facts recalled at such a distance in the test of the model card.")
        for row, recall in zip(rows, recalls, strict=True):
            percent = card_recall(near.tokens_between + recall.filler_tokens)
            row.append("not tested" if percent is None else f"{percent:.0f}%")
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>" for row in rows)
    return (
        '<p class="label">With filler between the document and the question</p>'
        '<div class="scrolls" role="region" tabindex="0" aria-label="Answers by length of filler">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p>{' '.join(notes)}</p>"
    )
