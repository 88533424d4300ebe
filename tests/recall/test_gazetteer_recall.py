import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from geobased.recall.gazetteer_documents import generate_documents
from geobased.recall.gazetteer_recall import (
    RECALL_FIELDS,
    GazetteerRecallArguments,
    closed_book_documents,
    evaluate,
    evaluate_recall,
    locate_questions,
    plot_recall_by_distance,
    recalled_answers,
)
from geobased.recall.places import load_places
from geobased.training.tokenization import train_tokenizer


@pytest.fixture(scope="module")
def documents():
    return list(generate_documents(load_places("held_out"), 12, seed=5, max_words=120))


@pytest.fixture(scope="module")
def tokenizer():
    texts = [document.text for document in generate_documents(load_places("train"), 60, seed=1)]
    return train_tokenizer(texts, vocab_size=400)


class Oracle(nn.Module):
    """Knows the documents; right about every next token, except after the positions in `mistakes`."""

    def __init__(self, rows, vocab_size, mistakes=()):
        super().__init__()
        self.rows, self.vocab_size, self.mistakes = rows, vocab_size, set(mistakes)
        self.device = torch.device("cpu")

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            number, known = next((n, r) for n, r in enumerate(self.rows) if ids[: len(r)] == r)
            for position, target in enumerate(known[1:]):
                wrong = (number, position + 1) in self.mistakes
                logits[row, position, (target + 1) % self.vocab_size if wrong else target] = 1.0
        return SimpleNamespace(logits=logits)


def test_token_positions_decode_to_the_answers(documents, tokenizer):
    for document in documents:
        ids, questions = locate_questions(document, tokenizer)
        assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == document.text
        for question, token_question in zip(document.questions, questions, strict=True):
            text = tokenizer.decode(ids[token_question.start : token_question.end - 1])
            assert text.strip() == question.answer
            value_start = token_question.start - token_question.distance
            assert tokenizer.decode(ids[value_start:]).strip().startswith(question.answer)


def test_oracle_recalls_everything_but_its_mistakes(documents, tokenizer):
    located = [locate_questions(document, tokenizer) for document in documents]
    rows = [ids for ids, _ in located]
    perfect = evaluate_recall(Oracle(rows, 400), tokenizer, documents, batch_size=3, closed_book=False)
    assert perfect.overall.accuracy == perfect.overall.low == perfect.overall.high == 1.0
    assert perfect.closed_book == {}
    counted = [question for _, questions in located for question in questions if question.field in RECALL_FIELDS]
    assert perfect.overall.num_questions == len(counted)
    assert sum(bucket.num_questions for bucket in perfect.by_distance.values()) == len(counted)
    # one wrong digit, or going on where the answer ends, fails the question; a mistake elsewhere does not
    first, second = located[0][1][:2]
    mistakes = [(0, first.start), (0, second.end - 1), (1, 1)]
    verdicts = recalled_answers(Oracle(rows, 400, mistakes), tokenizer, documents, batch_size=5)
    assert [hit for _, hit in verdicts[0]][:2] == [False, False]
    assert all(hit for verdict in verdicts[1:] for _, hit in verdict)


def test_verdicts_equal_greedy_generation(documents, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # learn two documents half by heart, so that there are answers of both kinds
    for document in documents[:2] * 45:
        ids = torch.tensor([locate_questions(document, tokenizer)[0]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.train()
    verdicts = recalled_answers(model, tokenizer, documents[:4])
    assert model.training
    model.eval()
    seen = set()
    for document, verdict in zip(documents[:4], verdicts, strict=True):
        ids, _ = locate_questions(document, tokenizer)
        for question, hit in verdict:
            length = question.end - question.start
            output = model.generate(
                torch.tensor([ids[: question.start]]), max_new_tokens=length, min_new_tokens=length, do_sample=False
            )
            assert (output[0, question.start :].tolist() == ids[question.start : question.end]) == hit
            seen.add(hit)
    assert seen == {True, False}


def test_closed_book_documents_hold_the_question_alone(documents, tokenizer):
    alone = closed_book_documents(documents)
    assert len(alone) == sum(len(document.questions) for document in documents)
    for document in alone:
        (question,) = document.questions
        assert document.text[question.answer_start : question.answer_end] == question.answer
        assert document.text.count("\n") == 1 and document.text.endswith("\n")
        locate_questions(document, tokenizer)


def test_too_long_documents_are_left_out(documents, tokenizer):
    rows = [locate_questions(document, tokenizer)[0] for document in documents]
    limit = sorted(map(len, rows))[5]
    result = evaluate_recall(Oracle(rows, 400), tokenizer, documents, max_tokens=limit, closed_book=False)
    assert result.num_documents == sum(len(ids) <= limit for ids in rows)
    with pytest.raises(ValueError, match="no document"):
        evaluate_recall(Oracle(rows, 400), tokenizer, documents, max_tokens=5)


def test_plot(documents, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [locate_questions(document, tokenizer)[0] for document in documents]
    result = evaluate_recall(Oracle(rows, 400), tokenizer, documents, closed_book=False)
    plot_recall_by_distance({"one": result, "two": result}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_from_a_folder(tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    report = evaluate(
        GazetteerRecallArguments(
            str(tmp_path / "model"), num_documents=3, max_words=100, device="cpu", output=str(tmp_path / "recall.json")
        )
    )
    assert json.loads((tmp_path / "recall.json").read_text())["recall"]["overall"] == report["recall"]["overall"]
    assert set(report["recall"]["closed_book"]) >= {"overall", "population"}
