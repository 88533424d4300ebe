"""Documents made of records of real places, followed by questions whose answers stand in the records.

A document holds a few records (layouts: prose, statements, card, bullets, table) and questions about them, with exact
answers copied from the record. Some documents put the questions at the end, some interleave them with the records. The
same seed and index always give the same document.

By default all values are real; nobody knows the population or the coordinates of a small town without reading its record, so
answering measures recall of the context. A model in training meets each town many times, though, and would soon know the
answers by heart: `counterfactual` documents give every town the values of other towns, drawn anew each time, so that reading
the record is the only way to an answer. It would know the towns' names by heart as well, and may learn to look up those alone:
documents with `counterfactual_names` call towns by new names, recombined from parts of real ones, that hardly ever come again.
"""

import json
import random
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from geobased.recall.places import PLACES_FILE, Place, load_places
from geobased.recall.recombined_names import with_recombined_names
from geobased.whole_file import whole_file

LAYOUTS = ("prose", "statements", "card", "bullets", "table")
LAYOUT_WEIGHTS = (3, 3, 3, 2, 2)
# how often a field is asked for; the values of the first five cannot be told from the name or the country alone
FIELD_WEIGHTS = {
    "population": 3.0,
    "region": 3.0,
    "climate": 2.5,
    "latitude": 1.0,
    "longitude": 1.0,
    "country": 0.7,
    "driving_side": 0.3,
}
LABELS = {
    "population": "Population",
    "region": "Region",
    "climate": "Climate",
    "latitude": "Latitude",
    "longitude": "Longitude",
    "country": "Country",
    "driving_side": "Driving side",
}
PROSE = {
    "population": ("It has a population of {}.", "It has {} inhabitants.", "Its population is {}."),
    "region": ("It is in the region of {}.", "Its region is {}."),
    "climate": ("Its climate is {}.", "The climate there is {}."),
    "latitude": ("Its latitude is {}.",),
    "longitude": ("Its longitude is {}.",),
    "country": ("It is in {}.", "It belongs to {}."),
    "driving_side": ("People drive on the {}.",),
}
STATEMENTS = {key: f"The {label.lower()} of {{name}} is {{value}}." for key, label in LABELS.items()}
QUESTIONS = {
    "population": ("What is the population of {}?", "How many people live in {}?", "How many inhabitants has {}?"),
    "region": ("What is the region of {}?", "Which region is home to {}?", "In which region lies {}?"),
    "climate": ("What is the climate of {}?", "What kind of climate has {}?"),
    "latitude": ("What is the latitude of {}?", "At which latitude lies {}?"),
    "longitude": ("What is the longitude of {}?", "At which longitude lies {}?"),
    "country": ("What is the country of {}?", "Which country is home to {}?"),
    "driving_side": ("What is the driving side of {}?", "On which side do people drive in {}?"),
}
FRAMES = ("Question: {question} Answer: {answer}", "Q: {question} A: {answer}", "{statement}")
FRAME_WEIGHTS = (5, 2, 3)


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a document. Offsets are characters of the document's text, ends exclusive.

    `answer_end` is the offset of the character that ends the answer (a line break or a full stop).
    """

    question: str
    answer: str
    field: str
    geonames_id: int
    answer_start: int
    answer_end: int
    record_start: int
    record_end: int
    distance: int
    """From the value in the record to the answer, in characters."""


@dataclass(frozen=True, slots=True)
class GazetteerDocument:
    """Text, its questions in order, and the GeoNames ids of its records."""

    text: str
    questions: tuple[Question, ...]
    geonames_ids: tuple[int, ...]
    layout: str


def format_value(place: Place, field_name: str) -> str:
    """A field of a town as it is written in records and answers, e.g. "2,138,551" or "48.9° N"."""
    if field_name == "population":
        return f"{place.population:,}"
    if field_name == "latitude":
        return f"{abs(place.latitude):.1f}° {'N' if place.latitude >= 0 else 'S'}"
    if field_name == "longitude":
        return f"{abs(place.longitude):.1f}° {'E' if place.longitude >= 0 else 'W'}"
    return str(getattr(place, field_name))


def _piece(template: str, name: str, value: str) -> tuple[str, int]:
    """A record's piece and the offset of the value in it."""
    before, after = template.format(name=name, value="\0").split("\0")
    return before + value + after, len(before)


def _record(place: Place, fields: Sequence[str], layout: str, rng: random.Random) -> tuple[str, dict[str, int]]:
    """Text of a record and the offset of each field's value in it."""
    if layout == "table":
        pieces = [(f"| {place.name} ", -1)] + [_piece("| {value} ", place.name, format_value(place, key)) for key in fields]
        end, separator = "|\n", ""
    elif layout == "card":
        pieces = [(f"Name: {place.name}\n", -1)]
        pieces += [_piece(f"{LABELS[key]}: {{value}}\n", place.name, format_value(place, key)) for key in fields]
        end, separator = "\n", ""
    elif layout == "bullets":
        pieces = [(f"- {place.name}: ", -1)]
        for i, key in enumerate(fields):
            template = f"{LABELS[key].lower()} {{value}}" + ("; " if i + 1 < len(fields) else "")
            pieces.append(_piece(template, place.name, format_value(place, key)))
        end, separator = ".\n", ""
    elif layout == "statements":
        pieces = [_piece(STATEMENTS[key], place.name, format_value(place, key)) for key in fields]
        end, separator = "\n", " "
    else:
        pieces = [(f"This record is about {place.name}.", -1)]
        for key in fields:
            template = rng.choice(PROSE[key]).replace("{}", "{value}")
            pieces.append(_piece(template, place.name, format_value(place, key)))
        end, separator = "\n", " "
    text, offsets = "", {}
    keys = list(fields) if layout == "statements" else [None, *fields]
    for i, (answered, (piece, offset)) in enumerate(zip(keys, pieces, strict=True)):
        text += separator if i else ""
        if answered is not None:
            offsets[answered] = len(text) + offset
        text += piece
    return text + end, offsets


@dataclass(slots=True)
class DocumentBuilder:
    """Text so far, where each value stands in it, and which questions are still open."""

    rng: random.Random
    text: str = ""
    words: int = 0
    questions: list[Question] = field(default_factory=list)
    values: dict[tuple[int, str], tuple[int, int, int]] = field(default_factory=dict)
    open: list[tuple[Place, str]] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.text += text
        self.words += len(text.split())

    def add_table_header(self, fields: Sequence[str]) -> None:
        """The line over the records of the layout "table"."""
        self.add("| Name | " + " | ".join(LABELS[key] for key in fields) + " |\n")

    def add_record(self, place: Place, fields: Sequence[str], layout: str) -> None:
        """A record of a town; each of its fields can be asked for from here on."""
        start = len(self.text)
        text, offsets = _record(place, fields, layout, self.rng)
        self.add(text)
        for key in fields:
            self.values[place.geonames_id, key] = (start + offsets[key], start, len(self.text))
            self.open.append((place, key))

    def add_question(self) -> None:
        """A line with one of the open questions, drawn by the weight of its field, and its answer."""
        weights = [FIELD_WEIGHTS[key] for _, key in self.open]
        place, key = self.open.pop(self.rng.choices(range(len(weights)), weights)[0])
        answer = format_value(place, key)
        frame = self.rng.choices(FRAMES, FRAME_WEIGHTS)[0]
        question = self.rng.choice(QUESTIONS[key]).format(place.name)
        statement = STATEMENTS[key].format(name=place.name, value="{answer}")
        line = frame.format(question=question, answer="{answer}", statement=statement)
        before, after = line.split("{answer}")
        answer_start = len(self.text) + len(before)
        value_start, record_start, record_end = self.values[place.geonames_id, key]
        self.questions.append(
            Question(
                question=question,
                answer=answer,
                field=key,
                geonames_id=place.geonames_id,
                answer_start=answer_start,
                answer_end=answer_start + len(answer),
                record_start=record_start,
                record_end=record_end,
                distance=answer_start - value_start,
            )
        )
        self.add(before + answer + after + "\n")


def draw_fields(rng: random.Random, asked: str | None = None) -> list[str]:
    """Two to four fields of a record in random order, `asked` among them."""
    names = [key for key in FIELD_WEIGHTS if key != asked]
    size = rng.randint(2, 4) - (asked is not None)
    picked = sorted(names, key=lambda key: rng.random() ** (1 / FIELD_WEIGHTS[key]), reverse=True)[:size]
    picked += [] if asked is None else [asked]
    rng.shuffle(picked)
    return picked


def _with_values_of_others(place: Place, places: Sequence[Place], rng: random.Random) -> Place:
    return replace(place, **{key: getattr(rng.choice(places), key) for key in FIELD_WEIGHTS})


def _document(
    places: Sequence[Place],
    rng: random.Random,
    max_words: int,
    min_records: int,
    max_records: int,
    counterfactual: float,
    counterfactual_names: float,
    real_names: Collection[str],
) -> GazetteerDocument:
    # log-uniform: short documents teach the skill, long ones stretch it
    count = round(min_records * (max_records / min_records) ** rng.random())
    chosen = rng.sample(places, min(count, len(places)))
    if counterfactual and rng.random() < counterfactual:
        chosen = [_with_values_of_others(place, places, rng) for place in chosen]
    if counterfactual_names and rng.random() < counterfactual_names:
        chosen = with_recombined_names(chosen, places, real_names, rng)
    layout = rng.choices(LAYOUTS, LAYOUT_WEIGHTS)[0]
    interleaved = rng.random() < 0.5
    question_share = rng.uniform(0.4, 0.65)
    record_words = int(max_words * (1 - question_share))
    builder = DocumentBuilder(rng)
    shared_fields = draw_fields(rng)
    if layout == "table":
        builder.add_table_header(shared_fields)
    asked_words = 0
    written: list[int] = []
    for place in chosen:
        fields = shared_fields if layout == "table" else draw_fields(rng)
        words = 8 * len(fields)
        full = builder.words - asked_words + words > record_words or builder.words + words + 16 > max_words
        if written and full:
            break
        builder.add_record(place, fields, layout)
        written.append(place.geonames_id)
        if interleaved and len(written) > 1 and rng.random() < 0.7:
            before = builder.words
            for _ in range(rng.randint(1, 3)):
                if builder.open and builder.words + 16 <= max_words:
                    builder.add_question()
            asked_words += builder.words - before
    target = min(max_words, int((builder.words - asked_words) / (1 - question_share)))
    while builder.open and (builder.words + 16 <= target or not builder.questions):
        builder.add_question()
    return GazetteerDocument(builder.text, tuple(builder.questions), tuple(written), layout)


@lru_cache(maxsize=4)
def _names(table: str | Path) -> frozenset[str]:
    return frozenset(place.name for place in load_places("all", table))


def generate_documents(
    places: Sequence[Place],
    num_documents: int,
    seed: int,
    max_words: int = 400,
    *,
    min_records: int = 2,
    max_records: int = 24,
    counterfactual: float = 0.0,
    counterfactual_names: float = 0.0,
    table: str | Path = PLACES_FILE,
    start: int = 0,
) -> Iterator[GazetteerDocument]:
    """Documents `start` to `start + num_documents - 1` of the endless sequence that a seed stands for.

    Args:
        places: towns to draw from, e.g. `load_places("train")`.
        num_documents: how many documents.
        seed: of the sequence; a document depends on `places`, the seed, its index and the sizes alone.
        max_words: most whitespace-separated words of a document, but for its first record and first question, which are
            always there and never cut.
        min_records, max_records: number of records, drawn log-uniformly; fewer where the words do not suffice.
        counterfactual: share of documents whose towns carry the values of other towns.
        counterfactual_names: share of documents whose towns carry new names, each for one document, made of parts of the
            names of `places`; questions have the ids of the towns themselves.
        table: of all places, held-out ones among them; no new name is one of theirs.
        start: index of the first document.

    Raises:
        ValueError: fewer places than `min_records`, or sizes out of range.

    Example:
        >>> document = next(generate_documents(load_places("held_out"), 1, seed=0))
        >>> question = document.questions[0]
        >>> document.text[question.answer_start : question.answer_end] == question.answer
        True
    """
    if not 1 <= min_records <= max_records:
        raise ValueError(f"need 1 <= min_records <= max_records, got {min_records} and {max_records}")
    if len(places) < min_records:
        raise ValueError(f"{len(places)} places are fewer than min_records={min_records}")
    for name, share in (("counterfactual", counterfactual), ("counterfactual_names", counterfactual_names)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} is a share of the documents: choose 0 to 1")
    if max_words < 40:
        raise ValueError(f"max_words={max_words} does not hold a record and a question; use at least 40")
    real_names = _names(table) if counterfactual_names else frozenset()
    for index in range(start, start + num_documents):
        yield _document(
            places,
            random.Random(f"{seed}/{index}"),
            max_words,
            min_records,
            max_records,
            counterfactual,
            counterfactual_names,
            real_names,
        )


def document_json(document: GazetteerDocument) -> str:
    """One JSON line: `text` and `answers`, the character ranges [start, end) of the answers."""
    answers = [[question.answer_start, question.answer_end] for question in document.questions]
    return json.dumps({"text": document.text, "answers": answers}, ensure_ascii=False)


@dataclass
class WriteDocumentsArguments:
    """Arguments of `write_documents`."""

    output: str = field(metadata={"help": "JSON-lines file to write: text and answers' character ranges"})
    num_documents: int = field(default=10_000, metadata={"help": "number of documents"})
    split: str = field(default="train", metadata={"help": "train, held_out or all"})
    seed: int = field(default=0, metadata={"help": "seed of the sequence of documents"})
    max_words: int = field(default=400, metadata={"help": "most words of a document"})
    min_records: int = field(default=2, metadata={"help": "fewest records in a document"})
    max_records: int = field(default=24, metadata={"help": "most records in a document"})
    counterfactual: float = field(default=0.0, metadata={"help": "share of documents whose towns have other towns' values"})
    counterfactual_names: float = field(default=0.0, metadata={"help": "share of documents whose towns have recombined names"})
    num_workers: int = field(default=1, metadata={"help": "processes"})
    places: str | None = field(default=None, metadata={"help": "another table of places than the shipped one"})


def document_lines(arguments: WriteDocumentsArguments, chunk: tuple[int, int]) -> list[str]:
    """The lines of the file that `write_documents` writes from document chunk[0] on, chunk[1] of them."""
    table = arguments.places or PLACES_FILE
    places = load_places(arguments.split, table)
    documents = generate_documents(
        places,
        chunk[1],
        arguments.seed,
        arguments.max_words,
        min_records=arguments.min_records,
        max_records=arguments.max_records,
        counterfactual=arguments.counterfactual,
        counterfactual_names=arguments.counterfactual_names,
        table=table,
        start=chunk[0],
    )
    return [document_json(document) for document in documents]


def write_documents(arguments: WriteDocumentsArguments) -> dict[str, Any]:
    """Write documents as JSON lines; the file is the same for any number of processes, and appears only when complete.

    Returns:
        the arguments and the size of the file in bytes.
    """
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    size = 500
    chunks = [(i, min(size, arguments.num_documents - i)) for i in range(0, arguments.num_documents, size)]
    work = partial(document_lines, arguments)
    with (
        whole_file(output) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
        tqdm(total=arguments.num_documents, unit="doc") as progress,
    ):
        if arguments.num_workers > 1:
            with ProcessPoolExecutor(arguments.num_workers) as pool:
                for chunk, lines in zip(chunks, pool.map(work, chunks), strict=True):
                    file.writelines(line + "\n" for line in lines)
                    progress.update(chunk[1])
        else:
            for chunk in chunks:
                file.writelines(line + "\n" for line in work(chunk))
                progress.update(chunk[1])
    return {**asdict(arguments), "bytes": output.stat().st_size}


def main() -> None:
    """Command line: every field of `WriteDocumentsArguments` is an option."""
    from transformers import HfArgumentParser

    (arguments,) = HfArgumentParser(WriteDocumentsArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    print(json.dumps(write_documents(arguments), indent=1))


__all__ = [
    "FIELD_WEIGHTS",
    "LAYOUTS",
    "DocumentBuilder",
    "GazetteerDocument",
    "Question",
    "WriteDocumentsArguments",
    "document_json",
    "document_lines",
    "draw_fields",
    "format_value",
    "generate_documents",
    "write_documents",
]


if __name__ == "__main__":
    main()
