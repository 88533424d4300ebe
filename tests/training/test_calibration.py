import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from geobased.geography.calibration import expected_calibration_error, reliability_table
from geobased.recall.places import load_places
from geobased.training.calibration import (
    MultipleChoice,
    calibration_of_scores,
    choice_log_likelihoods,
    evaluate_calibration,
    gazetteer_questions,
    plot_reliability,
    read_multiple_choice,
    write_multiple_choice,
)

QUESTIONS = [
    MultipleChoice("the river runs past", ("the town", "the river and the town looks at the river"), 0),
    MultipleChoice("the town", (" looks", " runs", " river"), 2),
    MultipleChoice("the town looks at the river and the ", ("river", "town"), 1),
]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_scores_are_the_log_likelihoods_of_the_choices(model, tokenizer):
    scores = choice_log_likelihoods(model, tokenizer, QUESTIONS, batch_size=3)
    for question, row in zip(QUESTIONS, scores, strict=True):
        for choice, score in zip(question.choices, row, strict=True):
            separator = "" if choice.startswith(" ") or question.question.endswith(" ") else " "
            whole = tokenizer(question.question + separator + choice)["input_ids"]
            starts = []
            for other in question.choices:
                ids = tokenizer(question.question + separator + other)["input_ids"]
                context = tokenizer(question.question)["input_ids"]
                same = [a == b for a, b in zip(context, ids, strict=False)]
                starts.append(same.index(False) if False in same else len(context))
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            expected = sum(logits[i - 1, whole[i]].item() for i in range(min(starts), len(whole)))
            assert score == pytest.approx(expected, abs=1e-4)


def test_normalised_scores_are_per_token_or_byte(model, tokenizer):
    total, token, byte = (
        choice_log_likelihoods(model, tokenizer, QUESTIONS[1:2], normalization=name)[0] for name in ("none", "token", "byte")
    )
    lengths = [len(tokenizer(choice)["input_ids"]) for choice in QUESTIONS[1].choices]
    assert token == pytest.approx([score / n for score, n in zip(total, lengths, strict=True)])
    assert byte == pytest.approx([score / n for score, n in zip(total, (6, 5, 6), strict=True)])
    with pytest.raises(ValueError, match="none, token, byte, not 'word'"):
        choice_log_likelihoods(model, tokenizer, QUESTIONS, normalization="word")


def test_long_questions_lose_their_beginning_and_batches_change_nothing(model, tokenizer):
    question = MultipleChoice("the river " * 50 + QUESTIONS[1].question, QUESTIONS[1].choices, 0)
    short = choice_log_likelihoods(model, tokenizer, [question], max_tokens=6)
    longer = choice_log_likelihoods(model, tokenizer, [question], max_tokens=12)
    assert short[0] != pytest.approx(longer[0], abs=1e-3)
    alone = choice_log_likelihoods(model, tokenizer, QUESTIONS, batch_size=1)
    together = choice_log_likelihoods(model, tokenizer, QUESTIONS, batch_size=7)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    with pytest.raises(ValueError, match="does not fit into 2 tokens"):
        choice_log_likelihoods(model, tokenizer, QUESTIONS[:1], max_tokens=2)


def test_calibration_by_hand():
    sure = [np.log([0.9, 0.1]).tolist()] * 10
    found = calibration_of_scores(sure, [0] * 7 + [1] * 3, bins=10)
    assert found.accuracy.value == 0.7 and found.mean_confidence.value == pytest.approx(0.9)
    assert found.expected_calibration_error.value == pytest.approx(0.2)
    assert found.brier_score.value == pytest.approx(0.7 * 0.02 + 0.3 * 1.62)
    assert found.negative_log_likelihood.value == pytest.approx(-0.7 * np.log(0.9) - 0.3 * np.log(0.1))
    assert found.accuracy.low < 0.7 < found.accuracy.high
    assert [row["count"] for row in found.reliability] == [10]
    assert json.loads(json.dumps(found.to_dict()))["num_questions"] == 10
    with pytest.raises(ValueError, match="0 questions, 0 answers"):
        calibration_of_scores([], [])
    with pytest.raises(ValueError, match="must be finite"):
        calibration_of_scores([[0.0, float("-inf")]], [0])


def test_a_calibrated_model_has_a_small_error_and_a_sharpened_one_a_large_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3000, 4)) * 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    answers = [int(rng.choice(4, p=row)) for row in probabilities]
    for adaptive in (False, True):
        calibrated = calibration_of_scores(logits.tolist(), answers, adaptive=adaptive)
        sharpened = calibration_of_scores((4 * logits).tolist(), answers, adaptive=adaptive)
        assert calibrated.expected_calibration_error.value < 0.04
        assert sharpened.expected_calibration_error.low > 0.2
        assert sharpened.accuracy == calibrated.accuracy


def test_adaptive_bins_hold_equally_many_answers_and_never_part_equal_ones():
    confidences = np.linspace(0.5, 0.6, 40)
    assert [row["count"] for row in reliability_table(confidences, [1] * 40, 4, adaptive=True)] == pytest.approx([10] * 4, abs=1)
    ties = [0.3] * 10 + [0.8] * 30
    rows = reliability_table(ties, [0, 1] * 5 + [1] * 30, 4, adaptive=True)
    assert sum(row["count"] for row in rows) == 40 and max(row["count"] for row in rows) == 40 or len(rows) == 2
    assert reliability_table([0.7] * 3, [1, 0, 0], 5, adaptive=True)[0]["count"] == 3
    assert expected_calibration_error([0.7] * 10, [1] * 7 + [0] * 3, 5, adaptive=True) == pytest.approx(0)


def test_gazetteer_questions_ask_for_what_stands_in_records_of_held_out_places(tmp_path):
    questions = gazetteer_questions(40)
    names = {place.name for place in load_places("held_out")}
    for question in questions:
        assert len(set(question.choices)) == 4
        assert question.choices[question.answer].strip().rstrip(".") in question.question
        assert any(name in question.question for name in names)
    assert len({question.answer for question in questions}) == 4
    assert gazetteer_questions(40) == questions != gazetteer_questions(40, seed=2)
    write_multiple_choice(questions, tmp_path / "questions.jsonl")
    assert read_multiple_choice(tmp_path / "questions.jsonl") == questions
    with pytest.raises(ValueError, match="too few places have 60 different values"):
        gazetteer_questions(5, num_choices=60)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "choices": ["b", "c"]}, "1: expected"),
        ({"question": " ", "choices": ["b", "c"], "answer": 0}, "the question is empty"),
        ({"question": "a", "choices": ["b", "b"], "answer": 0}, "two or more different texts"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "index from 0 to 1, not 2"),
        ({"question": "a", "choices": ["b", "c"], "answer": "d"}, "'d' is none of the choices"),
    ],
)
def test_malformed_questions_name_their_line(row, message, tmp_path):
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        read_multiple_choice(tmp_path / "questions.jsonl")


def test_answers_may_be_texts_and_the_diagram_is_drawn(model, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [json.dumps({"question": "the river", "choices": [" runs", " past"], "answer": answer}) for answer in (" past", 1)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    questions = read_multiple_choice(tmp_path / "questions.jsonl")
    assert [question.answer for question in questions] == [1, 1]
    plot_reliability({"tiny": evaluate_calibration(model, tokenizer, questions)}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
