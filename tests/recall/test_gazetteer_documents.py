import hashlib
import json
import re
from dataclasses import replace
from itertools import islice

import pytest

from geobased.recall.gazetteer_documents import (
    FIELD_WEIGHTS,
    LAYOUTS,
    WriteDocumentsArguments,
    document_json,
    format_value,
    generate_documents,
    write_documents,
)
from geobased.recall.places import load_places

PLACES = {place.geonames_id: place for place in load_places()}


@pytest.fixture(scope="module")
def documents():
    return list(generate_documents(load_places("train"), 300, seed=7))


def test_generation_is_deterministic_and_can_start_anywhere(documents):
    assert list(generate_documents(load_places("train"), 20, seed=7)) == documents[:20]
    assert list(generate_documents(load_places("train"), 20, seed=7, start=100)) == documents[100:120]
    assert list(generate_documents(load_places("train"), 20, seed=8)) != documents[:20]


def test_answers_are_copied_from_the_record(documents):
    for document in documents:
        assert document.questions
        for question in document.questions:
            place = PLACES[question.geonames_id]
            answer = document.text[question.answer_start : question.answer_end]
            assert answer == question.answer == format_value(place, question.field)
            assert document.text[question.answer_end] in "\n."
            value_start = question.answer_start - question.distance
            assert question.record_start <= value_start < question.record_end <= question.answer_start
            assert document.text[value_start : value_start + len(answer)] == answer
            assert place.name in document.text[question.record_start : question.record_end]
            line_start = document.text.rfind("\n", 0, question.answer_start) + 1
            assert place.name in document.text[line_start : question.answer_start]


def test_no_question_is_asked_twice(documents):
    for document in documents:
        asked = [(question.geonames_id, question.field) for question in document.questions]
        assert len(asked) == len(set(asked))


def test_sizes_layouts_and_fields(documents):
    assert {document.layout for document in documents} == set(LAYOUTS)
    assert {question.field for document in documents for question in document.questions} == set(FIELD_WEIGHTS)
    assert max(len(document.text.split()) for document in documents) <= 420
    assert max(len(document.geonames_ids) for document in documents) > 12
    assert min(len(document.geonames_ids) for document in documents) == 2
    for document in documents:
        assert len(set(document.geonames_ids)) == len(document.geonames_ids) <= 24


def test_some_documents_interleave_questions(documents):
    def interleaved(document):
        return document.questions[0].answer_start < max(q.record_start for q in document.questions)

    share = sum(map(interleaved, documents)) / len(documents)
    assert 0.2 < share < 0.8


def test_held_out_names_never_occur_in_training_documents():
    text = "\n".join(document.text for document in generate_documents(load_places("train"), 3000, seed=1))
    held_out = {place.name for place in load_places("held_out")}
    # runs of up to five whole words: cheaper than one search a name
    for line in text.splitlines():
        words = re.findall(r"\w+|[^\w]+", line)
        phrases = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + 10, len(words) + 1), 2)}
        assert not phrases & held_out


def test_errors():
    places = load_places()[:10]
    with pytest.raises(ValueError, match="min_records"):
        next(generate_documents(places, 1, 0, min_records=5, max_records=2))
    with pytest.raises(ValueError, match="fewer than min_records"):
        next(generate_documents(places[:1], 1, 0))
    with pytest.raises(ValueError, match="max_words"):
        next(generate_documents(places, 1, 0, max_words=10))


def test_written_files_do_not_depend_on_the_number_of_processes(tmp_path):
    reports = [
        write_documents(WriteDocumentsArguments(str(tmp_path / f"{n}.jsonl"), num_documents=700, seed=3, num_workers=n))
        for n in (1, 2)
    ]
    lines = (tmp_path / "1.jsonl").read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "2.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert len(lines) == 700 and reports[0]["bytes"] == (tmp_path / "1.jsonl").stat().st_size
    expected = generate_documents(load_places("train"), 700, seed=3)
    for line, document in zip(islice(lines, 50), expected, strict=False):
        parsed = json.loads(line)
        assert parsed["text"] == document.text
        assert [parsed["text"][a:b] for a, b in parsed["answers"]] == [q.answer for q in document.questions]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl"]


def test_counterfactual_documents_change_values_but_answers_still_stand_in_the_record() -> None:
    places = load_places("train")
    real = {place.geonames_id: place for place in places}
    changed = total = 0
    for document in generate_documents(places, 40, seed=5, counterfactual=1.0):
        for question in document.questions:
            assert question.answer in document.text[question.record_start : question.record_end]
            total += 1
            changed += question.answer != format_value(real[question.geonames_id], question.field)
    assert changed / total > 0.7, "most values are those of other towns"
    assert list(generate_documents(places, 3, seed=5, counterfactual=0.5)) == list(
        generate_documents(places, 3, seed=5, counterfactual=0.5)
    )
    with pytest.raises(ValueError, match="counterfactual=1.5"):
        next(generate_documents(places, 1, seed=0, counterfactual=1.5))


def test_documents_of_a_seed_never_change() -> None:
    digest = hashlib.sha256()
    for options in ({}, {"counterfactual": 0.9}, {"max_words": 3200, "max_records": 250, "counterfactual": 0.9}):
        for document in generate_documents(load_places("train"), 20, 101, **options):
            digest.update(document_json(document).encode())
    assert digest.hexdigest() == "ddd3cea0fd008422d4361d70dc07a7089e546cc8f23e54354d048f17bff133d7"


def test_counterfactual_names_are_new_ones_and_hardly_one_comes_twice() -> None:
    places, real = load_places("train"), {place.name for place in load_places()}
    names = []
    for document in generate_documents(places, 300, seed=5, counterfactual_names=1.0):
        for question in document.questions:
            assert question.answer in document.text[question.record_start : question.record_end]
            assert question.answer == format_value(PLACES[question.geonames_id], question.field), "the values are the town's own"
        if document.layout in ("card", "bullets"):
            names.append(re.findall(r"^(?:Name: |- )(.+?)(?:$|: )", document.text, re.MULTILINE))
            assert len(names[-1]) == len(document.geonames_ids)
    assert all(len(of_one) == len(set(of_one)) for of_one in names), "unique in a document"
    every = [name for of_one in names for name in of_one]
    assert len(every) > 500 and len(set(every)) > 0.98 * len(every)
    assert not real & set(every)
    assert all(name[0].isupper() and not re.search(r"\s\s|^\s|\s$", name) for name in every)


def test_a_share_of_the_documents_has_counterfactual_names_always_the_same(tmp_path) -> None:
    places = load_places("train")
    documents = list(generate_documents(places, 100, seed=5, counterfactual_names=0.5))
    assert documents[40:] == list(generate_documents(places, 60, seed=5, counterfactual_names=0.5, start=40))
    asks_for_real_names = [PLACES[d.questions[0].geonames_id].name in d.questions[0].question for d in documents]
    assert 0.3 < sum(asks_for_real_names) / len(documents) < 0.7
    arguments = WriteDocumentsArguments(str(tmp_path / "documents.jsonl"), num_documents=5, seed=5, counterfactual_names=0.5)
    write_documents(arguments)
    lines = (tmp_path / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == [document_json(document) for document in documents[:5]]


def test_counterfactual_names_need_names_to_be_made_of() -> None:
    place = load_places("train")[0]
    same = [replace(place, geonames_id=number, name="Oba") for number in range(3)]
    with pytest.raises(ValueError, match="the names of 3 places are too few to make new ones of"):
        next(generate_documents(same, 1, 0, counterfactual_names=1.0))
    with pytest.raises(ValueError, match="counterfactual_names=-1 is a share"):
        next(generate_documents(same, 1, 0, counterfactual_names=-1))
