import json
import re
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from geobased.recall.gazetteer_benchmark import (
    BenchmarkResult,
    benchmark_examples,
    contains_answer,
    evaluate_benchmark,
    generate_answers,
    is_exact_answer,
    plot_recall_heat_map,
)
from geobased.recall.gazetteer_documents import LAYOUTS, generate_documents
from geobased.recall.gazetteer_recall import RECALL_FIELDS, locate_questions, recalled_answers
from geobased.recall.places import is_held_out, load_places
from geobased.training.tokenization import train_tokenizer

PLACES = load_places("held_out")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [document.text for document in generate_documents(load_places("train"), 60, seed=1)]
    return train_tokenizer(texts, vocab_size=600)


@pytest.fixture(scope="module")
def examples(tokenizer):
    return benchmark_examples(PLACES, tokenizer, [256, 512], 25, seed=3)


@pytest.fixture(scope="module")
def model(tokenizer, examples):
    """Knows a few of the examples half by heart, so that there are answers of both kinds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for example in examples[:3] * 25:
        ids, (question,) = locate_questions(example.document, tokenizer)
        labels = [-100] * question.start + ids[question.start : question.end] + [-100] * (len(ids) - question.end)
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_contexts_are_as_long_as_asked_for(tokenizer):
    lengths = (256, 1024, 4096)
    for example in benchmark_examples(PLACES, tokenizer, lengths, 10):
        ids, _ = locate_questions(example.document, tokenizer)
        assert len(ids) == example.num_tokens <= example.length
        # another record and its line break would have been too long
        records = example.num_tokens / len(example.document.geonames_ids)
        assert example.length - example.num_tokens < 2.5 * records + 40
        assert all(map(is_held_out, example.document.geonames_ids))


def test_the_answer_stands_in_the_record_at_the_depth(examples):
    for example in examples:
        document, (question,) = example.document, example.document.questions
        number = document.geonames_ids.index(question.geonames_id)
        assert number == round(example.depth * (len(document.geonames_ids) - 1))
        assert question.answer in document.text[question.record_start : question.record_end]
        assert document.text == f"{example.prompt} {example.answer}{example.ending}\n"
        assert example.field == question.field in RECALL_FIELDS and example.ending in ("", ".")
        # every record tells the field, so that the name must be looked up
        if example.layout != "table":
            told = re.findall(
                {"population": "inhabitants|population"}.get(example.field, example.field), document.text, re.IGNORECASE
            )
            assert len(told) >= len(document.geonames_ids)
        assert 1 / len(document.geonames_ids) <= example.random_record <= 1


def test_depths_layouts_and_fields_are_balanced(tokenizer):
    examples = benchmark_examples(PLACES, tokenizer, [256], 125)
    assert set(Counter((e.depth, e.layout, e.field) for e in examples).values()) == {1}
    few = benchmark_examples(PLACES, tokenizer, [256], 25)
    assert few == examples[:25] and len({(e.layout, e.field) for e in few}) == len(LAYOUTS) * len(RECALL_FIELDS)
    assert benchmark_examples(PLACES, tokenizer, [256], 25, seed=2) != few
    cards = benchmark_examples(PLACES, tokenizer, [256], 6, layouts=["card"], depths=[0.5])
    assert {(e.layout, e.depth) for e in cards} == {("card", 0.5)} and len({e.field for e in cards}) == 5


def test_another_length_or_tokenizer_only_changes_how_many_records_there_are(examples, tokenizer):
    coarse = train_tokenizer(
        [document.text for document in generate_documents(load_places("train"), 60, seed=1)], vocab_size=1200
    )
    for short, long, other in zip(examples[:25], examples[25:], benchmark_examples(PLACES, coarse, [256], 25, 3), strict=True):
        assert (short.layout, short.field, short.depth) == (long.layout, long.field, long.depth)
        count = len(short.document.geonames_ids)
        assert long.document.geonames_ids[:count] == short.document.geonames_ids and len(long.document.geonames_ids) > count
        assert len(other.document.geonames_ids) >= count and other.document.text[:200] == short.document.text[:200]


def test_exact_equals_greedy_generation(model, tokenizer, examples):
    chosen = examples[:12]
    verdicts = recalled_answers(model, tokenizer, [example.document for example in chosen])
    lines = generate_answers(model, tokenizer, [example.prompt for example in chosen], batch_tokens=1)
    # filled up on the left or alone, the answers are the same
    assert generate_answers(model, tokenizer, [example.prompt for example in chosen], batch_tokens=2000) == lines
    hits = [hit for ((_, hit),) in verdicts]
    # a right answer that does not end where it should is no exact one; the stop is the line's end in both
    assert hits == [is_exact_answer(line, e.answer, e.ending) for line, e in zip(lines, chosen, strict=True)]
    assert set(hits) == {True, False}


def test_evaluation_counts_what_the_metrics_say(model, tokenizer, examples, tmp_path):
    result = evaluate_benchmark(model, tokenizer, examples, batch_tokens=1500)
    lines = generate_answers(model, tokenizer, [example.prompt for example in examples], batch_tokens=1)
    contained = [contains_answer(line, example.answer) for line, example in zip(lines, examples, strict=True)]
    assert result.contains.overall.accuracy == sum(contained) / len(examples) >= result.exact.overall.accuracy > 0
    short = [hit for hit, example in zip(contained, examples, strict=True) if example.length == 256]
    assert result.contains.by_length["256"].accuracy == sum(short) / 25
    cells = result.exact.by_length_and_depth
    assert {cell.num_questions for row in cells.values() for cell in row.values()} == {5}
    assert list(cells) == list(result.tokens) == ["256", "512"] and list(cells["256"]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert sum(group.num_questions for group in result.exact.by_layout.values()) == result.num_examples == 50
    assert set(result.closed_book) == {"exact", "contains"} and set(result.closed_book["exact"]) == {"overall", *RECALL_FIELDS}
    assert 0.05 < result.random_record["512"] < result.random_record["256"] < 0.5
    assert BenchmarkResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    quick = evaluate_benchmark(model, tokenizer, examples, contains=False, closed_book=False)
    assert quick.contains is None and quick.closed_book == {} and quick.exact == result.exact
    pytest.importorskip("matplotlib")
    plot_recall_heat_map({"exact": result.exact, "contains": result.contains}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_metrics():
    assert contains_answer(" about 48.9° n.", "48.9° N") and not contains_answer("48.8° N", "48.9° N")
    assert not contains_answer("1a234", "1.234")  # the answer is no pattern
    assert is_exact_answer(" Skåne\nQ:", "Skåne") and is_exact_answer(" Skåne.", "Skåne", ".")
    assert not is_exact_answer(" Skåne län", "Skåne") and not is_exact_answer(" Skåne", "Skåne", ".")


def test_wrong_arguments(tokenizer, model):
    for settings, message in (
        ({"layouts": ["card", "poem"]}, "not poem"),
        ({"layouts": []}, "not none"),
        ({"depths": [1.5]}, "between 0"),
        ({"lengths": []}, "at least one length"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"lengths": [40]}, "40 tokens do not hold"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark_examples(PLACES, tokenizer, **{"lengths": [256], "num_examples": 2, **settings})
    with pytest.raises(ValueError, match="records of all 20 places fill"):
        benchmark_examples(PLACES[:20], tokenizer, [8192], 1)
    with pytest.raises(ValueError, match="no examples"):
        evaluate_benchmark(model, tokenizer, [])
