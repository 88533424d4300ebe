import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from geobased.training.tokenization import TrainTokenizerArguments, train, train_tokenizer

TEXTS = [
    "Fellow-Citizens of the Senate and of the House of Representatives: among the vicissitudes incident to life\n",
    "Question: What is the population of Walvis Bay? Answer: 73,598\n",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer\n",
] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=320)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@settings(max_examples=100, deadline=None)
@given(number=st.integers(0, 10**12))
def test_digits_are_tokens_of_their_own(tokenizer, number):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(f"has {number:,} inhabitants"))
    digits = [token for token in tokens if any(c.isdigit() for c in token)]
    assert digits == list(str(number))


def test_a_prefix_keeps_its_tokens(tokenizer):
    """Questions are completed from their prompt, so a prompt's tokens must be the beginning of the whole text's."""
    whole = tokenizer.encode(TEXTS[1])
    prompt = tokenizer.encode(TEXTS[1].split(" 73")[0])
    assert whole[: len(prompt)] == prompt


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.padding_side == "left" and len(tokenizer) == 320
    batch = tokenizer(["To be, or not to be", "or"], padding=True)
    assert batch["input_ids"][1][0] == 1 and batch["attention_mask"][1][0] == 0


def test_training_is_deterministic_and_survives_saving(tokenizer, tmp_path):
    again = train_tokenizer(TEXTS, vocab_size=320)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert loaded.padding_side == "left" and loaded.pad_token_id == 1
    assert loaded.decode(loaded.encode("a  b , c .")) == "a  b , c ."


def test_train_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("".join(TEXTS), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXTS[1], "answers": [[56, 62]]}) + "\n", encoding="utf-8")
    arguments = TrainTokenizerArguments(
        str(tmp_path / "tokenizer"), [str(tmp_path / "a.txt")], [str(tmp_path / "b.jsonl")], vocab_size=300
    )
    assert train(arguments)["vocab_size"] == 300
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == 300


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="below 258"):
        train_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(ValueError, match="fewer than vocab_size"):
        train_tokenizer(["too short"], vocab_size=4096)
    with pytest.raises(ValueError, match="give text files"):
        train(TrainTokenizerArguments(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        train(TrainTokenizerArguments(str(tmp_path), [str(tmp_path / "missing.txt")]))
