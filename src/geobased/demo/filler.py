"""Text that makes a context longer: statements about real towns, which the model that ships was trained to read."""

import random
from functools import cache
from typing import TYPE_CHECKING

from geobased.recall.gazetteer_documents import STATEMENTS, format_value
from geobased.recall.places import load_places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("population", "climate", "region")
STATEMENTS_AT_ONCE = 256


@cache
def _statements() -> tuple[tuple[str, str], ...]:
    """Names of towns, each with a statement about it, in an order that never changes."""
    places = load_places()
    random.Random(0).shuffle(places)
    return tuple(
        (place.name, STATEMENTS[field].format(name=place.name, value=format_value(place, field)))
        for place, field in zip(places, FIELDS * len(places), strict=False)
    )


def filler_text(tokenizer: "PreTrainedTokenizerBase", tokens: int, beside: str = "") -> str:
    """The fewest statements that have at least so many tokens; none about a town that the text `beside` names."""
    chosen: list[str] = []
    count, start = 0, 0
    known = [statement for name, statement in _statements() if name not in beside]
    while count < tokens:
        some = [known[i % len(known)] for i in range(start, start + STATEMENTS_AT_ONCE)]
        start += STATEMENTS_AT_ONCE
        lengths = (len(ids) for ids in tokenizer([f" {text}" for text in some], add_special_tokens=False)["input_ids"])
        for statement, length in zip(some, lengths, strict=True):
            if count >= tokens:
                break
            chosen.append(statement)
            count += length
    return " ".join(chosen)
