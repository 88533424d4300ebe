"""Extraction of facts about real places from contexts of set lengths, in the way of SWDE and FDA.

A context is filled with records of held-out towns up to a length in the model's own tokens and ends in one question, or one
sentence to complete, whose answer stands in a single record at a set relative depth: 0 is the first record, 1 the last. All
records of a context tell the field that is asked for, so that only the right one helps. The same index has the same towns in
the same order, the same layout, field and depth at every length and for every tokenizer; only how many records fit differs.

Two metrics: `exact`, greedy decoding writes the answer and then ends it; and `contains`, the papers' metric, the answer
occurs anywhere in the line that greedy decoding writes, whatever the case.
"""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geobased.recall.gazetteer_documents import LAYOUTS, DocumentBuilder, GazetteerDocument, draw_fields, format_value
from geobased.recall.gazetteer_recall import (
    RECALL_FIELDS,
    Accuracy,
    Located,
    bootstrap_accuracy,
    closed_book_documents,
    recalled_answers,
)
from geobased.recall.places import Place

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_NEW_TOKENS = 48
# tokens that are read at a time: one context of 16,384, two of 8,192, and so on
BATCH_TOKENS = 16_384
_RECORDS_AT_A_TIME = 16


@dataclass(frozen=True, slots=True)
class BenchmarkExample:
    """A context with one question.

    Attributes:
        document: text of the context, the question and its answer, and where the answer stands, with the blank before it.
        index: of the example among those of its length.
        length: most tokens of the text, with the beginning-of-text token, the answer and the token that ends it.
        depth: 0 where the first record is asked for, 1 where the last is.
        num_tokens: of the text in the tokenizer that the example was made for.
        random_record: share of the context's records that hold the very answer: what naming the value of a record at random
            gets right.
    """

    document: GazetteerDocument
    index: int
    length: int
    depth: float
    num_tokens: int
    random_record: float

    @property
    def prompt(self) -> str:
        """Everything up to the answer, without the blank before it."""
        return self.document.text[: self.document.questions[0].answer_start]

    @property
    def answer(self) -> str:
        return self.document.questions[0].answer.strip()

    @property
    def ending(self) -> str:
        """What ends the answer's line: a full stop after a sentence to complete, nothing after a question."""
        return self.document.text[self.document.questions[0].answer_end :].rstrip("\n")

    @property
    def field(self) -> str:
        return self.document.questions[0].field

    @property
    def layout(self) -> str:
        return self.document.layout


@dataclass(frozen=True)
class Breakdown:
    """Accuracy of one metric: overall, by group, and in the cells of length and depth (keys such as "1024" and "0.25")."""

    overall: Accuracy
    by_length: dict[str, Accuracy]
    by_depth: dict[str, Accuracy]
    by_layout: dict[str, Accuracy]
    by_field: dict[str, Accuracy]
    by_length_and_depth: dict[str, dict[str, Accuracy]]


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of `evaluate_benchmark`; `contains` is None where nothing was generated.

    Attributes:
        closed_book: by metric, accuracy on the questions without any record, overall and by field.
        random_record: what naming the value of a random record of the context would get right, by length.
        tokens: mean tokens of the contexts by length.
    """

    exact: Breakdown
    contains: Breakdown | None
    closed_book: dict[str, dict[str, Accuracy]]
    random_record: dict[str, float]
    tokens: dict[str, float]
    num_examples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, report: dict[str, Any]) -> "BenchmarkResult":
        """What `to_dict` made plain dictionaries of, for instance on another machine."""

        def group(items: dict[str, Any]) -> dict[str, Accuracy]:
            return {name: Accuracy(**item) for name, item in items.items()}

        def breakdown(items: dict[str, Any]) -> Breakdown:
            cells = {length: group(row) for length, row in items["by_length_and_depth"].items()}
            groups = {name: group(items[name]) for name in ("by_length", "by_depth", "by_layout", "by_field")}
            return Breakdown(overall=Accuracy(**items["overall"]), by_length_and_depth=cells, **groups)

        metrics = {name: breakdown(report[name]) if report[name] else None for name in ("exact", "contains")}
        closed_book = {metric: group(items) for metric, items in report["closed_book"].items()}
        return cls(**{**report, **metrics, "closed_book": closed_book})


def contains_answer(generation: str, answer: str) -> bool:
    """Whether the answer occurs in the generated text, whatever the case: the metric `contains` of SWDE and FDA."""
    return re.search(re.escape(answer), generation, re.IGNORECASE) is not None


def is_exact_answer(generation: str, answer: str, ending: str = "") -> bool:
    """Whether the first line of the generated text is the answer and what ends it, but for blanks around them."""
    return generation.partition("\n")[0].strip() == answer + ending


def benchmark_examples(
    places: Sequence[Place],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] = LENGTHS,
    num_examples: int = 100,
    seed: int = 1,
    layouts: Sequence[str] = LAYOUTS,
    depths: Sequence[float] = DEPTHS,
    start: int = 0,
) -> list[BenchmarkExample]:
    """`num_examples` examples of each length, in the order of `lengths`.

    Every depth comes equally often; so does, within a depth, every pair of layout and field once `num_examples` is a multiple
    of their product (125 with the defaults).

    Args:
        places: towns to draw from, e.g. `load_places("held_out")`.
        tokenizer: a fast one; contexts hold as many records as fit in its tokens.
        lengths: tokens of a context with its question and answer.
        seed: an example depends on it, its index, `places`, `layouts` and `depths`; its number of records on the tokenizer.
        start: index of the first example of each length.

    Raises:
        ValueError: an unknown layout, a depth outside [0, 1], a length that does not hold two records and a question, or more
            tokens than all places together fill.

    Example:
        >>> examples = benchmark_examples(load_places("held_out"), tokenizer, [512], 10)  # doctest: +SKIP
        >>> examples[0].prompt[-40:], examples[0].answer  # doctest: +SKIP
        ('What is the population of Loei? Answer:', '33,000')
    """
    unknown = [layout for layout in layouts if layout not in LAYOUTS]
    if unknown or not layouts:
        raise ValueError(f"layouts must be some of {', '.join(LAYOUTS)}, not {', '.join(unknown) or 'none'}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must lie between 0 (first record) and 1 (last), got {list(depths)}")
    if not lengths or num_examples < 1:
        raise ValueError(f"need at least one length and one example, got {list(lengths)} and num_examples={num_examples}")
    if not tokenizer.is_fast:
        raise ValueError("recall needs a fast tokenizer: it maps characters to tokens")
    kinds = list(product(layouts, RECALL_FIELDS))
    random.Random(f"{seed}").shuffle(kinds)
    by_length: dict[int, list[BenchmarkExample]] = {length: [] for length in lengths}
    for index in range(start, start + num_examples):
        turn, number = divmod(index, len(depths))
        # at each depth all kinds take turns, and the depths begin with different ones
        layout, key = kinds[(turn + number * math.ceil(len(kinds) / len(depths))) % len(kinds)]
        context = _Context(places, tokenizer, layout, key, f"{seed}/{index}")
        for length in by_length:
            by_length[length].append(context.example(index, length, depths[number]))
    return [example for examples in by_length.values() for example in examples]


class _Context:
    """The endless context that the examples of one index at several lengths are the beginnings of."""

    def __init__(self, places: Sequence[Place], tokenizer: PreTrainedTokenizerBase, layout: str, asked: str, seed: str) -> None:
        self.tokenizer, self.layout, self.asked, self.seed = tokenizer, layout, asked, seed
        rng = random.Random(seed)
        self.builder = DocumentBuilder(rng)
        self.places = rng.sample(places, len(places))
        self.shared_fields = draw_fields(rng, asked)
        if layout == "table":
            self.builder.add_table_header(self.shared_fields)
        # tokens and characters up to the end of each record; pieces that are tokenized apart give about their sum
        self.tokens = [0]
        self.ends = [len(self.builder.text)]

    def _grow(self) -> None:
        first = len(self.ends) - 1
        for place in self.places[first : first + _RECORDS_AT_A_TIME]:
            fields = self.shared_fields if self.layout == "table" else draw_fields(self.builder.rng, self.asked)
            self.builder.add_record(place, fields, self.layout)
            self.ends.append(len(self.builder.text))
        bounds = zip(self.ends[first:-1], self.ends[first + 1 :], strict=True)
        records = [self.builder.text[start:end] for start, end in bounds]
        for ids in self.tokenizer(records, add_special_tokens=False, verbose=False)["input_ids"]:
            self.tokens.append(self.tokens[-1] + len(ids))

    def example(self, index: int, length: int, depth: float) -> BenchmarkExample:
        """The example with as many records as fit into `length` tokens."""
        while self.tokens[-1] < length:
            if len(self.ends) > len(self.places):
                raise ValueError(f"records of all {len(self.places)} places fill {self.tokens[-1]} tokens, not {length}")
            self._grow()
        for num_records in range(bisect_right(self.tokens, length) - 1, 1, -1):
            document = self._document(num_records, depth)
            num_tokens = len(self.tokenizer(document.text.rstrip("\n"), add_special_tokens=False, verbose=False)["input_ids"])
            num_tokens += 1 + (self.tokenizer.bos_token_id is not None)
            if num_tokens <= length:
                values = [format_value(place, self.asked) for place in self.places[:num_records]]
                share = values.count(document.questions[0].answer.strip()) / num_records
                return BenchmarkExample(document, index, length, depth, num_tokens, share)
        raise ValueError(f"{length} tokens do not hold two records and a question; use longer contexts")

    def _document(self, num_records: int, depth: float) -> GazetteerDocument:
        place = self.places[round(depth * (num_records - 1))]
        text = self.builder.text[: self.ends[num_records]]
        asking = DocumentBuilder(
            random.Random(f"{self.seed}/question"), text, values=self.builder.values, open=[(place, self.asked)]
        )
        asking.add_question()
        (question,) = asking.questions
        # to write the blank before it is part of the task: the prompt ends without, as tokenizers want it
        question = replace(
            question,
            answer=f" {question.answer}",
            answer_start=question.answer_start - 1,
            distance=question.distance - 1,
        )
        ids = tuple(place.geonames_id for place in self.places[:num_records])
        return GazetteerDocument(asking.text, (question,), ids, self.layout)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> list[str]:
    """What greedy decoding writes after each prompt, up to the end of the line.

    Prompts follow the beginning-of-text token if there is one. Those of similar length are decoded together, filled up on the
    left under an attention mask.

    Args:
        batch_tokens: at most so many tokens of prompts at a time, but at least one prompt.
    """
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [prefix + ids for ids in tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]]
    filler = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    ends = _line_ends(model, tokenizer)
    lines = [""] * len(rows)
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(rows), unit="answer", desc="generating", disable=not progress) as bar:
            for chosen in _batches([len(ids) for ids in rows], batch_tokens):
                width = max(len(rows[i]) for i in chosen)
                batch = torch.tensor([[filler] * (width - len(rows[i])) + rows[i] for i in chosen])
                mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in chosen])
                output = model.generate(  # type: ignore[operator]
                    batch.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=filler,
                    eos_token_id=ends,
                )
                texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
                for i, text in zip(chosen, texts, strict=True):
                    lines[i] = text.partition("\n")[0]
                bar.update(len(chosen))
    finally:
        model.train(was_training)
    return lines


def _line_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a line, and those that end a text; as ends, unlike `stop_strings`, they cost `generate` nothing."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    of_text = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return sorted({token for token, text in enumerate(texts) if "\n" in text}.union(of_text))


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of rows of similar length, the longest first, so that memory runs out at once or not at all."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def evaluate_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[BenchmarkExample],
    *,
    contains: bool = True,
    closed_book: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: bool = False,
    located: Mapping[GazetteerDocument, Located] | None = None,
) -> BenchmarkResult:
    """Accuracy of a model on examples, with 95 % intervals from resampled contexts.

    `exact` takes one forward pass a context (see `recalled_answers`). An exact answer is contained in what greedy decoding
    writes, so only the other contexts are decoded for `contains`.

    Args:
        model: in the dtype and on the device to evaluate with; bfloat16 halves the memory of long contexts on a GPU.
        examples: of `benchmark_examples` with the same tokenizer.
        contains: also decode, for the metric `contains`.
        closed_book: also ask without any record.
        batch_tokens: about so many tokens at a time, but at least one context.
        located: tokens of documents that are known already, see `recalled_answers`.

    Raises:
        ValueError: no examples.

    Example:
        >>> examples = benchmark_examples(load_places("held_out"), tokenizer, [256, 1024], 100)  # doctest: +SKIP
        >>> evaluate_benchmark(model, tokenizer, examples).contains.by_length["1024"].accuracy  # doctest: +SKIP
        0.42
    """
    if not examples:
        raise ValueError("there are no examples")
    documents = [example.document for example in examples]
    verdicts = {"exact": _exact(model, tokenizer, documents, batch_tokens, progress, located)}
    questions = closed_book_documents(documents)
    alone = {"exact": _exact(model, tokenizer, questions, batch_tokens, False, located)} if closed_book else {}
    if contains:
        prompts = {
            "contains": [example.prompt for example in examples],
            "alone": [document.text[: document.questions[0].answer_start] for document in questions],
        }
        decode = partial(
            generate_answers, model, tokenizer, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, progress=progress
        )
        answers = [example.answer for example in examples]

        def contained(exact: list[bool], texts: list[str]) -> list[bool]:
            open_ = [i for i, hit in enumerate(exact) if not hit]
            lines = dict(zip(open_, decode([texts[i] for i in open_]), strict=True))
            return [hit or contains_answer(lines[i], answers[i]) for i, hit in enumerate(exact)]

        verdicts["contains"] = contained(verdicts["exact"], prompts["contains"])
        if closed_book:
            alone["contains"] = contained(alone["exact"], prompts["alone"])
    lengths = sorted({example.length for example in examples})
    by_length = {str(length): [example for example in examples if example.length == length] for length in lengths}
    return BenchmarkResult(
        exact=_breakdown(examples, verdicts["exact"]),
        contains=_breakdown(examples, verdicts["contains"]) if contains else None,
        closed_book={
            metric: {"overall": _accuracy(hits), **_grouped(examples, hits, lambda example: example.field)}
            for metric, hits in alone.items()
        },
        random_record={key: sum(item.random_record for item in group) / len(group) for key, group in by_length.items()},
        tokens={key: sum(item.num_tokens for item in group) / len(group) for key, group in by_length.items()},
        num_examples=len(examples),
    )


def _exact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[GazetteerDocument],
    batch_tokens: int,
    progress: bool,
    located: Mapping[GazetteerDocument, Located] | None,
) -> list[bool]:
    """Whether greedy decoding answers the question of each document exactly."""
    # characters stand for tokens here: they only decide which documents are read together, and at least as many fit
    hits = [False] * len(documents)
    with tqdm(total=len(documents), unit="context", desc="reading", disable=not progress) as bar:
        for chosen in _batches([len(document.text) for document in documents], 2 * batch_tokens):
            batch = [documents[i] for i in chosen]
            verdicts = recalled_answers(model, tokenizer, batch, batch_size=len(batch), located=located)
            for i, ((_, hit),) in zip(chosen, verdicts, strict=True):
                hits[i] = hit
            bar.update(len(chosen))
    return hits


def _accuracy(hits: Sequence[bool]) -> Accuracy:
    return bootstrap_accuracy([[hit] for hit in hits])


def _grouped(
    examples: Sequence[BenchmarkExample], hits: Sequence[bool], key: Callable[[BenchmarkExample], Any]
) -> dict[str, Accuracy]:
    """Accuracy by group, sorted by the group's key."""
    groups: dict[Any, list[bool]] = {}
    for example, hit in zip(examples, hits, strict=True):
        groups.setdefault(key(example), []).append(hit)
    return {str(name): _accuracy(groups[name]) for name in sorted(groups)}


def _breakdown(examples: Sequence[BenchmarkExample], hits: Sequence[bool]) -> Breakdown:
    cells = {}
    for length in sorted({example.length for example in examples}):
        chosen = [i for i, example in enumerate(examples) if example.length == length]
        cells[str(length)] = _grouped([examples[i] for i in chosen], [hits[i] for i in chosen], lambda example: example.depth)
    return Breakdown(
        overall=_accuracy(hits),
        by_length=_grouped(examples, hits, lambda example: example.length),
        by_depth=_grouped(examples, hits, lambda example: example.depth),
        by_layout=_grouped(examples, hits, lambda example: example.layout),
        by_field=_grouped(examples, hits, lambda example: example.field),
        by_length_and_depth=cells,
    )


def plot_recall_heat_map(results: dict[str, Breakdown], path: str | Path) -> None:
    """Draw accuracy over length and depth, one panel for each model, as a PNG file.

    Args:
        results: name of a model: one metric of its `BenchmarkResult`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(result.by_length) for result in results.values())
    figure = Figure(figsize=(1.2 + len(results) * (1.0 + 0.75 * columns), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        lengths, depths = list(result.by_length), list(result.by_depth)
        cells = [[result.by_length_and_depth[length].get(depth) for length in lengths] for depth in depths]
        shares = [[100 * cell.accuracy if cell else float("nan") for cell in row] for row in cells]
        image = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for row, values in enumerate(shares):
            for column, value in enumerate(values):
                if value == value:
                    color = "black" if value > 60 else "white"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{int(length):,}" for length in lengths])
        axes.set_yticks(range(len(depths)), depths)
        axes.set_xlabel("tokens of the context")
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("depth of the record (0: first, 1: last)")
    figure.colorbar(image, ax=list(panels), label="answered (%)")
    figure.savefig(path, dpi=150)


__all__ = [
    "BATCH_TOKENS",
    "DEPTHS",
    "LENGTHS",
    "MAX_NEW_TOKENS",
    "BenchmarkExample",
    "BenchmarkResult",
    "Breakdown",
    "benchmark_examples",
    "contains_answer",
    "evaluate_benchmark",
    "generate_answers",
    "is_exact_answer",
    "plot_recall_heat_map",
]
