import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from geobased.training.packing import (
    MixtureDataset,
    MixtureSchedule,
    encode_document,
    pack_documents,
    pack_text,
    token_dtype,
)
from geobased.training.text_files import parse_document, read_documents, read_text

LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return AutoTokenizer.from_pretrained(corpus / "tokenizer")


@pytest.fixture(scope="module")
def text(corpus, tokenizer):
    return pack_text([corpus / "text.txt"], tokenizer, corpus / "cache")


@pytest.fixture(scope="module")
def blocks(corpus, tokenizer):
    return pack_documents(corpus / "documents.jsonl", tokenizer, LENGTH, corpus / "cache")


def mixture(text, blocks, **changes):
    options = {"size": 64, "context_length": LENGTH, "seed": 3, "answer_weight": 4.0} | changes
    return MixtureDataset([text, blocks], MixtureSchedule((1, 1), (0, 1), 0.5), **options)


def test_text_tokens_decode_to_the_text(corpus, tokenizer, text):
    assert text.tokens.dtype == np.uint16 and isinstance(text.tokens, np.memmap)
    assert text.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(text.tokens[:-1].tolist()) == read_text(corpus / "text.txt")


def test_documents_are_packed_whole(corpus, tokenizer, blocks):
    expected = sorted(document.text for document in read_documents(corpus / "documents.jsonl"))
    found = []
    for row, length in zip(blocks.tokens, blocks.lengths, strict=True):
        assert (row[length:] == tokenizer.pad_token_id).all() and row[length - 1] == tokenizer.eos_token_id
        found += tokenizer.decode(row[: length - 1].tolist()).split("<|endoftext|>")
    assert sorted(found) == expected
    assert blocks.num_documents == len(expected) and blocks.dropped == 0
    assert blocks.num_tokens > 0.85 * blocks.tokens.size


def test_answer_masks_cover_the_answers(corpus, tokenizer):
    for line in (corpus / "documents.jsonl").read_text(encoding="utf-8").splitlines()[:20]:
        ids, mask = encode_document(line, tokenizer.backend_tokenizer)
        document = parse_document(line)
        # each answer, then the one token that ends it
        runs = "".join(tokenizer.decode([i]) if m else "\0" for i, m in zip(ids, mask, strict=True)).split("\0")
        answers = [run.strip() for run in runs if run]
        assert [answer.rstrip(".") for answer in answers] == [document.text[a:b] for a, b in document.answers]


def test_long_documents_are_dropped_and_counted(corpus, tokenizer, tmp_path):
    blocks = pack_documents(corpus / "documents.jsonl", tokenizer, 128, tmp_path)
    assert blocks.dropped > 0 and blocks.num_documents + blocks.dropped == 50
    with pytest.raises(ValueError, match="no document fits"):
        pack_documents(corpus / "documents.jsonl", tokenizer, 8, tmp_path)


def test_cache_is_reused_and_independent_of_the_number_of_processes(corpus, tokenizer, blocks, tmp_path):
    names = sorted(path.name for path in (corpus / "cache").iterdir())
    again = pack_documents(corpus / "documents.jsonl", tokenizer, LENGTH, corpus / "cache")
    assert sorted(path.name for path in (corpus / "cache").iterdir()) == names
    tokenizer(["a", "b c d"], padding=True, truncation=True)  # leaves padding switched on in the backend
    names_after = pack_text([corpus / "text.txt"], tokenizer, corpus / "cache").num_tokens
    assert names_after and sorted(path.name for path in (corpus / "cache").iterdir()) == names
    parallel = pack_documents(corpus / "documents.jsonl", tokenizer, LENGTH, tmp_path, num_workers=2)
    for other in (again, parallel):
        assert np.array_equal(other.tokens, blocks.tokens) and np.array_equal(other.answers, blocks.answers)


def test_rows_depend_on_seed_and_index_alone(text, blocks):
    dataset = mixture(text, blocks)
    batch = dataset.__getitems__(list(range(8)))
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "loss_weights"), (8, LENGTH)
    )
    single = dataset[5]
    assert all((batch[key][5] == single[key]).all() for key in batch)
    assert (mixture(text, blocks).__getitems__([5, 1])["input_ids"][1] == batch["input_ids"][1]).all()
    other = mixture(text, blocks, seed=4).__getitems__(list(range(8)))
    assert not (other["input_ids"] == batch["input_ids"]).all()
    assert (batch["labels"][batch["labels"] != -100] == batch["input_ids"][batch["labels"] != -100]).all()
    assert "loss_weights" not in mixture(text, blocks, answer_weight=1.0)[0]


def test_labels_skip_padding_and_weights_mark_answers(text, blocks, tokenizer):
    batch = mixture(text, blocks).__getitems__(list(range(40, 64)))  # after the transition: documents only
    padding = batch["input_ids"] == tokenizer.pad_token_id
    assert ((batch["labels"] == -100) == padding).all() and padding.any()
    assert set(batch["loss_weights"].unique().tolist()) == {1.0, 4.0}
    assert 0.03 < (batch["loss_weights"] == 4.0).float().mean() < 0.4


def test_schedule_moves_from_start_to_end():
    schedule = MixtureSchedule((1, 3), (3, 1), 0.5)
    shares = schedule.cumulative(np.array([0.0, 0.25, 0.5, 1.0]))[:, 0]
    assert np.allclose(shares, [0.25, 0.5, 0.75, 0.75])
    assert np.allclose(MixtureSchedule((1,), (1,), 0.0).cumulative(np.array([0.0]))[:, 0], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((-1.0, 1.0), (1.0, 1.0), 0.1), "non-negative"),
        (((0.0,), (1.0,), 0.1), "not all zero"),
        (((1.0,), (1.0, 1.0), 0.1), "1 mixture weights at the start but 2"),
        (((1.0,), (1.0,), 2.0), "transition"),
    ],
)
def test_schedule_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureSchedule(*arguments)


def test_dataset_errors(text, blocks):
    with pytest.raises(ValueError, match="longer than the text"):
        mixture(text, blocks, context_length=10**6)
    with pytest.raises(ValueError, match="1 sources but 2 mixture weights"):
        MixtureDataset([text], MixtureSchedule((1, 1), (1, 1), 0), size=1, context_length=8, seed=0)


def test_file_errors(tokenizer, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FileNotFoundError, match="missing"):
        pack_text([tmp_path / "missing"], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="is empty"):
        pack_text([tmp_path / "empty"], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(tmp_path / "bytes")
    with pytest.raises(FileNotFoundError, match="missing"):
        list(read_documents(tmp_path / "missing"))
    (tmp_path / "none").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        list(read_documents(tmp_path / "none"))
    for bad in ("[]", "{", '{"text": ""}', '{"text": "ab", "answers": [[1, 5]]}', '{"text": "ab", "answers": 3}'):
        with pytest.raises(ValueError):
            parse_document(bad)
    assert parse_document(json.dumps({"text": "ab"})).answers == ()


def test_token_dtype():
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32
