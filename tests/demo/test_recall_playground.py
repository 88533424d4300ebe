"""Recall from a document: answers, where they stand, distances, and that the page's notes on its examples are true."""

from pathlib import Path

import pytest

import geobased
from geobased.cli.errors import CommandError

pytest.importorskip("gradio_client")

from geobased.demo.comparison import ComparedModel
from geobased.demo.generation import SHIPPED_RECALL_NOTE
from geobased.demo.recall_playground import (
    CARD_RECALL,
    DOCUMENTS,
    FILLER_TOKENS,
    RecallPlayground,
    card_recall,
    highlighted,
    recall_view,
    spans_of,
)
from geobased.demo.text_generator import Generator


@pytest.fixture(scope="module")
def playground() -> RecallPlayground:
    generator = Generator.load("based-mini")
    return RecallPlayground(ComparedModel("based-mini", generator.model, generator.tokenizer))


def test_notes_on_the_examples_are_true(playground):
    answers = [next(playground.answers(*example)) for example in DOCUMENTS.values()]
    assert [recall.answer for recall in answers[:2]] == ["94,393", "humid subtropical"]
    assert answers[2].answer == "Makkah" and answers[2].spans
    assert answers[3].spans == ()
    document, _ = DOCUMENTS["Another kind of text"]
    assert "does not stand in the document" in recall_view(document, answers[3:], 1024, shipped=True)
    assert "the first two rightly, the third with the value of another record" in SHIPPED_RECALL_NOTE


def test_rates_are_those_of_the_model_card():
    card = (Path(geobased.checkpoint_path()) / "README.md").read_text(encoding="utf-8")
    least = 0
    for most, percent in CARD_RECALL:
        assert f"| {least}-{most} | {percent} (" in card
        least = most
    assert "54% of facts at up to 64 tokens" in SHIPPED_RECALL_NOTE and "15% at 512 to 1,024" in SHIPPED_RECALL_NOTE
    assert card_recall(64) == 54.4 and card_recall(65) == 37.6 and card_recall(1025) is None


def test_an_answer_is_found_where_it_stands(playground):
    document, question = DOCUMENTS["One fact"]
    (recall,) = playground.answers(document, question)
    ((start, end),) = recall.spans
    assert document[start:end] == recall.answer == "94,393" and 0.2 < recall.score <= 1
    assert 0 < recall.tokens_between < recall.context_tokens
    view = recall_view(document, [recall], 1024, shipped=True)
    assert "is <mark>94,393</mark>." in view and "the model recalled 54% of facts" in view and "<table" not in view
    assert "model card" not in recall_view(document, [recall], 1024, shipped=False)


def test_distances_put_filler_between(playground):
    document, question = DOCUMENTS["One fact"]
    recalls = list(playground.answers(document, question, FILLER_TOKENS))
    assert [recall.filler_tokens for recall in recalls] == list(FILLER_TOKENS)
    for recall in recalls[1:]:
        added = recall.context_tokens - recalls[0].context_tokens
        assert recall.filler_tokens <= added < recall.filler_tokens + 40
    assert recalls == list(playground.answers(document, question, FILLER_TOKENS))
    view = recall_view(document, recalls, 512, shipped=True)
    assert view.count("<tr>") == 1 + len(FILLER_TOKENS)
    assert "longer than the 512 tokens" in view


def test_spans_are_whole_words_and_numbers():
    text = "Lund has 94,393, not 94 or 1,94. lund."
    assert [text[start:end] for start, end in spans_of("94", text)] == ["94"]
    assert len(spans_of("Lund", text)) == 2
    assert spans_of("94,393", text) == ((9, 15),)
    assert spans_of("", text) == ()
    assert spans_of("(x)", "a (x) b") == ((2, 5),)


def test_text_of_others_is_escaped():
    assert highlighted("<i> & b", ((6, 7),)) == "&lt;i&gt; &amp; <mark>b</mark>"


@pytest.mark.parametrize(
    ("document", "question", "message"),
    [
        (" ", "What?", "The document is empty"),
        ("Lund", "\n", "The question is empty"),
        ("Lund", "what " * 200, "The question has 1,000 characters: at most 500"),
        ("word " * 20_000, "What?", "The document is too long: it has .* tokens, and at most 16,384"),
    ],
)
def test_wrong_input_is_a_message(playground, document, question, message):
    with pytest.raises(CommandError, match=message):
        next(playground.answers(document, question))
