"""Explicit rules for short answers from a context, and preference pairs that follow from them.

A prompt is the beginning of a gazetteer document (`geobased.recall.gazetteer_documents`) up to the answer of one of its
questions; a completion should give the value that stands in the record and end the line. Every rule is a pure function to a
score from 0 (broken) to 1 (kept), so that what a reward model has learnt, and what a policy makes of it, can be checked.

    prompt: "The population of Lund is 94,393.\\nQuestion: What is the population of Lund? Answer:"   kept: " 94,393\\n"
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from geobased.recall.gazetteer_documents import GazetteerDocument, format_value, generate_documents
from geobased.recall.places import Place, load_places
from geobased.whole_file import whole_file

MIN_WORDS, MAX_WORDS = 1, 12
# the value outweighs all rules of form together: a right answer in bad form beats a wrong one in perfect form
WEIGHTS = {
    "answers_from_record": 0.6,
    "names_no_other_place": 0.1,
    "ends_the_line": 0.1,
    "repeats_nothing": 0.1,
    "length_within_bounds": 0.1,
}
HALVES = ("first", "second")
FILES = {
    "first": "first_half.jsonl",
    "second": "second_half.jsonl",
    "held_out": "held_out.jsonl",
    "prompts": "prompts.jsonl",
    "held_out_prompts": "held_out_prompts.jsonl",
}
# share of pairs of which both completions break a rule: how bad an answer is has to be learnt as well
BOTH_FLAWED = 0.25
_CAPITALISED = re.compile(r"[^\W\d_]\S*")


def answers_from_record(prompt: str, completion: str, answer: str) -> float:
    """1 if the completion's first line is the record's value, with or without a full stop; 0.5 if it has it among other words."""
    first_line = completion.strip().partition("\n")[0].strip()
    if first_line.removesuffix(".") == answer.removesuffix("."):
        return 1.0
    return 0.5 if re.search(rf"(?<![\w,.]){re.escape(answer)}(?![\w]|[,.]\d)", first_line) else 0.0


def names_no_other_place(prompt: str, completion: str, answer: str) -> float:
    """1 unless a town of the gazetteer is named that the prompt does not name."""
    names, longest = _place_names()
    words = completion.split()
    for start, word in enumerate(words):
        if not _CAPITALISED.match(word) or not word[0].isupper():
            continue
        for end in range(start + 1, min(start + longest, len(words)) + 1):
            name = " ".join(words[start:end]).strip(".,;:!?()\"'")
            if name in names and name not in prompt:
                return 0.0
    return 1.0


def ends_the_line(prompt: str, completion: str, answer: str) -> float:
    """1 for one line, ended by a full stop or a line break; 0.5 if further whole lines follow; 0 if the completion breaks off."""
    if not completion.strip() or not completion.rstrip(" ").endswith((".", "\n")):
        return 0.0
    return 0.5 if "\n" in completion.strip() else 1.0


def repeats_nothing(prompt: str, completion: str, answer: str) -> float:
    """Share of the completion's lines and sentences that do not stand in it before; 1 for none at all."""
    parts = [part.strip().removesuffix(".") for part in re.split(r"\n|(?<=\.)\s", completion) if part.strip()]
    return len(set(parts)) / len(parts) if parts else 1.0


def length_within_bounds(prompt: str, completion: str, answer: str) -> float:
    """1 from `MIN_WORDS` to `MAX_WORDS` words; below that 0, above it their ratio."""
    words = len(completion.split())
    return float(words >= MIN_WORDS) * min(1.0, MAX_WORDS / max(words, 1))


RULES: dict[str, Callable[[str, str, str], float]] = {
    rule.__name__: rule
    for rule in (answers_from_record, names_no_other_place, ends_the_line, repeats_nothing, length_within_bounds)
}


@functools.cache
def _place_names() -> tuple[frozenset[str], int]:
    names = frozenset(place.name for place in load_places("all"))
    return names, max(len(name.split()) for name in names)


def rule_scores(prompt: str, completion: str, answer: str) -> dict[str, float]:
    """Score of each rule, 0 to 1.

    Args:
        prompt: the context and the question.
        completion: what was written after it.
        answer: the value in the record.

    Raises:
        ValueError: an empty answer, which anything would contain.

    Example:
        >>> rule_scores("The population of Lund is 94,393.\\nThe population of Lund is", " 94,393.\\n", "94,393")["ends_the_line"]
        1.0
    """
    if not answer.strip():
        raise ValueError("the answer is empty: give the value that stands in the record")
    return {name: rule(prompt, completion, answer) for name, rule in RULES.items()}


def total_score(scores: dict[str, float]) -> float:
    """Weighted mean of rule scores by `WEIGHTS`, 0 to 1."""
    return sum(WEIGHTS[name] * score for name, score in scores.items())


def rule_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[str],
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float]:
    """The rules as a reward function in TRL's form; the data need a column "answer", the value in the record.

    Args:
        prompts, completions: texts, or conversations as lists of messages.
        answer: of each prompt.
        log_metric: gets each rule's mean score, such as "rules/ends_the_line"; TRL's trainers pass theirs.

    Returns:
        total scores, 0 to 1.
    """
    rows = zip(prompts, completions, answer, strict=True)
    found = [rule_scores(_text(prompt), _text(completion), value) for prompt, completion, value in rows]
    if log_metric is not None and found:
        for name in RULES:
            log_metric(f"rules/{name}", sum(scores[name] for scores in found) / len(found))
    return [total_score(scores) for scores in found]


def _text(item: Any) -> str:
    """A text as it is; of a conversation its messages' contents."""
    return item if isinstance(item, str) else "\n".join(message["content"] for message in item)


def half_of(name: str) -> str:
    """The half of the places, "first" or "second", that a town belongs to: a hash of its name, so that namesakes go together."""
    return HALVES[hashlib.sha256(f"geobased-half-{name}".encode()).digest()[0] % 2]


def preference_places(part: str) -> list[Place]:
    """Towns of a part of the data: "first" and "second" are halves of the training places, "held_out" is neither.

    A training town with a held-out namesake is left out of the halves.

    Raises:
        ValueError: another part.
    """
    if part == "held_out":
        return load_places("held_out")
    if part not in HALVES:
        raise ValueError(f"the part of the places is first, second or held_out, not {part!r}")
    held_out = {place.name for place in load_places("held_out")}
    return [place for place in load_places("train") if place.name not in held_out and half_of(place.name) == part]


@dataclass(frozen=True, slots=True)
class AnswerPrompt:
    """A prompt with its question's answer.

    end: what ends the line after the answer in the document; rest: the document after that line; others: answers of its other
    questions on the same field.
    """

    prompt: str
    answer: str
    field: str
    end: str
    rest: str
    others: tuple[str, ...]


def answer_prompts(documents: Iterable[GazetteerDocument], rng: random.Random) -> Iterator[AnswerPrompt]:
    """One prompt per document: its text up to the answer of one of its questions, without the blank before it."""
    for document in documents:
        question = rng.choice(document.questions)
        prompt = document.text[: question.answer_start].rstrip(" ")
        line_end = document.text.index("\n", question.answer_end) + 1
        end, rest = document.text[question.answer_end : line_end], document.text[line_end:]
        values = {other.answer for other in document.questions if other.field == question.field}
        yield AnswerPrompt(prompt, question.answer, question.field, end, rest, tuple(sorted(values - {question.answer})))


def _wrong_value(item: AnswerPrompt, places: Sequence[Place], rng: random.Random) -> str:
    # a value from the context is the likelier mistake; without one, that of another town
    if item.others and rng.random() < 0.7:
        return rng.choice(item.others)
    values = (format_value(rng.choice(places), item.field) for _ in range(1000))
    return next(value for value in values if value != item.answer)


def _other_value(item: AnswerPrompt, text: str, places: Sequence[Place], rng: random.Random) -> str:
    return text.replace(item.answer, _wrong_value(item, places, rng), 1)


def _other_place(item: AnswerPrompt, text: str, places: Sequence[Place], rng: random.Random) -> str:
    names = (rng.choice(places).name for _ in range(1000))
    return text.rstrip(".\n") + f", as in {next(name for name in names if name not in item.prompt)}" + item.end


def _unfinished(item: AnswerPrompt, text: str, places: Sequence[Place], rng: random.Random) -> str:
    return text.rstrip(".\n") + rng.choice(("", " and", ", the", " of the", ", which"))


def _repeated(item: AnswerPrompt, text: str, places: Sequence[Place], rng: random.Random) -> str:
    line = text.rstrip("\n")
    return "\n".join([line] * rng.randint(2, 4)) + "\n"


def _too_long(item: AnswerPrompt, text: str, places: Sequence[Place], rng: random.Random) -> str:
    # goes on with words of its own context
    words = item.prompt.split()
    start = rng.randrange(max(len(words) - 24, 1))
    return text.rstrip("\n") + " " + " ".join(words[start : start + rng.randint(MAX_WORDS + 2, 24)]) + "\n"


def _goes_on(item: AnswerPrompt, text: str, places: Sequence[Place], rng: random.Random) -> str:
    # what a model does that has learnt whole documents: the next lines, broken off where its tokens end
    following = item.rest or "\n".join(item.prompt.splitlines()[-2:]) + "\n"
    cut = rng.choice((len(following), rng.randint(1, len(following))))
    return text.rstrip("\n") + "\n" + following[:cut]


def _empty(item: AnswerPrompt, text: str, places: Sequence[Place], rng: random.Random) -> str:
    return rng.choice(("\n", " .\n"))


CORRUPTIONS: dict[str, Callable[[AnswerPrompt, str, Sequence[Place], random.Random], str]] = {
    "other_value": _other_value,
    "other_place": _other_place,
    "unfinished": _unfinished,
    "repeated": _repeated,
    "too_long": _too_long,
    "goes_on": _goes_on,
    "empty": _empty,
}
# how often each is drawn: a wrong value is the mistake that matters
_CORRUPTION_WEIGHTS = (4, 2, 2, 2, 2, 3, 1)


def _corrupted(item: AnswerPrompt, places: Sequence[Place], rng: random.Random) -> tuple[str, str]:
    """A flawed completion and what is wrong with it; a fifth of them have two flaws."""
    names = rng.choices(list(CORRUPTIONS), _CORRUPTION_WEIGHTS, k=1 + (rng.random() < 0.2))
    # of an empty completion nothing else is left
    names = ["empty"] if "empty" in names else sorted(set(names), key=list(CORRUPTIONS).index)
    text = f" {item.answer}{item.end}"
    for name in names:
        text = CORRUPTIONS[name](item, text, places, rng)
    return text, "+".join(names)


def preference_pairs(items: Iterable[AnswerPrompt], places: Sequence[Place], rng: random.Random) -> Iterator[dict[str, Any]]:
    """A pair for each prompt: "prompt", "chosen", "rejected", "answer", what was corrupted, and both total scores.

    The chosen completion always has the higher score; three quarters of them keep every rule.
    """
    for item in items:
        good = f" {item.answer}{item.end}"
        for _ in range(100):
            first, flaws = good, ["", ""]
            if rng.random() < BOTH_FLAWED:
                first, flaws[0] = _corrupted(item, places, rng)
            second, flaws[1] = _corrupted(item, places, rng)
            scores = [total_score(rule_scores(item.prompt, text, item.answer)) for text in (first, second)]
            # closer scores are no clear preference
            if abs(scores[0] - scores[1]) >= 0.02:
                break
        else:
            raise ValueError(f"no corruption of {good!r} changes its score")
        (low, rejected, rejected_flaw), (high, chosen, chosen_flaw) = sorted(zip(scores, (first, second), flaws, strict=True))
        yield {
            "prompt": item.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "answer": item.answer,
            "chosen_corruption": chosen_flaw,
            "rejected_corruption": rejected_flaw,
            "chosen_score": round(high, 6),
            "rejected_score": round(low, 6),
        }


@dataclass
class PreferenceArguments:
    """Arguments of `write_preferences`."""

    output: str = field(metadata={"help": "folder to write the JSON-lines files to"})
    num_pairs: int = field(default=4000, metadata={"help": "preference pairs of each half of the training places"})
    num_held_out_pairs: int = field(default=500, metadata={"help": "preference pairs of held-out places, to evaluate with"})
    num_prompts: int = field(default=2000, metadata={"help": "prompts of training places, to optimise a policy on"})
    num_held_out_prompts: int = field(default=200, metadata={"help": "prompts of held-out places, to evaluate a policy on"})
    seed: int = field(default=0, metadata={"help": "of all files"})
    max_words: int = field(default=100, metadata={"help": "most words of a document"})
    max_records: int = field(default=6, metadata={"help": "most records in a document"})
    counterfactual: float = field(default=0.5, metadata={"help": "share of documents whose towns have other towns' values"})


def gazetteer_prompts(
    places: Sequence[Place],
    num_prompts: int,
    seed: str | int = 0,
    *,
    max_words: int = 100,
    max_records: int = 6,
    counterfactual: float = 0.0,
) -> Iterator[AnswerPrompt]:
    """Prompts from documents of these places (`generate_documents`, whose arguments and errors these are)."""
    number = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    documents = generate_documents(places, num_prompts, number, max_words, max_records=max_records, counterfactual=counterfactual)
    return answer_prompts(documents, random.Random(number))


def write_preferences(arguments: PreferenceArguments) -> dict[str, Any]:
    """Write preference pairs and prompts as JSON lines; the same arguments give the same files.

    `first_half.jsonl` is for the reward model that filters, `second_half.jsonl` for its held-out twin: they share no town.
    `held_out.jsonl` and `held_out_prompts.jsonl` are of towns that occur in none of the others. Prompts carry the columns
    "prompt" and "answer" (for `rule_reward`).

    Returns:
        the arguments, and the number of lines and of distinct towns that each file draws from.

    Raises:
        ValueError: numbers below 1, or sizes that `generate_documents` refuses.
    """
    numbers = {
        "first": arguments.num_pairs,
        "second": arguments.num_pairs,
        "held_out": arguments.num_held_out_pairs,
        "prompts": arguments.num_prompts,
        "held_out_prompts": arguments.num_held_out_prompts,
    }
    if min(numbers.values()) < 1:
        raise ValueError(f"every number of pairs and prompts must be at least 1, not {min(numbers.values())}")
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    places = {part: preference_places(part) for part in (*HALVES, "held_out")}
    places["prompts"] = [*places["first"], *places["second"]]
    places["held_out_prompts"] = places["held_out"]
    report: dict[str, Any] = {**asdict(arguments), "files": {}}
    for name, number in numbers.items():
        items = gazetteer_prompts(
            *(places[name], number, f"{arguments.seed}/{name}"),
            max_words=arguments.max_words,
            max_records=arguments.max_records,
            counterfactual=arguments.counterfactual,
        )
        rows: Iterable[dict[str, Any]]
        if name.endswith("prompts"):
            rows = ({"prompt": item.prompt, "answer": item.answer} for item in items)
        else:
            rows = preference_pairs(items, places[name], random.Random(f"{arguments.seed}/{name}"))
        with whole_file(folder / FILES[name]) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        report["files"][FILES[name]] = {"lines": number, "places": len(places[name])}
    return report


__all__ = [
    "CORRUPTIONS",
    "RULES",
    "WEIGHTS",
    "AnswerPrompt",
    "PreferenceArguments",
    "answer_prompts",
    "answers_from_record",
    "ends_the_line",
    "gazetteer_prompts",
    "half_of",
    "length_within_bounds",
    "names_no_other_place",
    "preference_pairs",
    "preference_places",
    "repeats_nothing",
    "rule_reward",
    "rule_scores",
    "total_score",
    "write_preferences",
]
