import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geobased.recall.repeated_bigrams import evaluate_split_perplexity, frequent_bigrams, repeated_bigram_mask
from geobased.training.perplexity import evaluate_perplexity
from geobased.training.tokenization import train_tokenizer

TEXT = "Walvis Bay lies in Namibia. The harbour of Walvis Bay is deep; Walvis Bay has a lagoon."
ROWS = st.integers(1, 24).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 4), min_size=length, max_size=length), min_size=1, max_size=3)
)
BIGRAMS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, "Rundu lies in Kavango East, Namibia."], vocab_size=275)


class Copier(nn.Module):
    """Sure of a token that once followed the last one in the row, and undecided between all tokens elsewhere."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.device = vocab_size, torch.device("cpu")

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for position, token in enumerate(ids):
                for earlier in range(position):
                    if ids[earlier] == token:
                        logits[row, position, ids[earlier + 1]] = 20.0
        return SimpleNamespace(logits=logits)


@settings(max_examples=200, deadline=None)
@given(ROWS, BIGRAMS)
def test_mask_equals_a_loop_over_the_tokens(rows, frequent):
    expected = []
    for ids in rows:
        seen, row = set(), [False]
        for bigram in zip(ids, ids[1:], strict=False):
            row.append(bigram in seen and bigram not in frequent)
            seen.add(bigram)
        expected.append(row)
    table = torch.tensor(frequent, dtype=torch.int64).view(-1, 2)
    assert repeated_bigram_mask(torch.tensor(rows), table).tolist() == expected
    assert repeated_bigram_mask(torch.tensor(rows[0]), table).tolist() == expected[0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=24), max_size=4), st.integers(0, 3))
def test_frequent_bigrams_equal_a_count(sequences, threshold):
    counts = Counter(bigram for ids in sequences for bigram in zip(ids, ids[1:], strict=False))
    expected = sorted(list(bigram) for bigram, count in counts.items() if count > threshold)
    assert frequent_bigrams(sequences, threshold).tolist() == expected


def test_large_ids_are_told_apart():
    ids = torch.tensor([2**30, 1, 2**30, 2, 2**30, 1])
    assert repeated_bigram_mask(ids).tolist() == [False] * 5 + [True]
    assert frequent_bigrams([ids], 1).tolist() == [[2**30, 1]]


@pytest.mark.parametrize(("context_length", "stride"), [(1024, None), (16, 4), (5, 4)])
def test_both_kinds_make_up_the_perplexity(tokenizer, context_length, stride):
    model = Copier(len(tokenizer))
    texts = [TEXT, "Walvis Bay"]
    split = evaluate_split_perplexity(model, tokenizer, texts, context_length, stride, batch_size=3)
    whole = evaluate_perplexity(model, tokenizer, texts, context_length, stride)
    assert split.overall.num_tokens == split.repeated.num_tokens + split.other.num_tokens == whole.num_tokens
    assert split.overall.negative_log_likelihood == pytest.approx(whole.negative_log_likelihood)
    assert split.overall.token_perplexity == pytest.approx(whole.token_perplexity)
    assert split.other.token_perplexity > len(tokenizer) / 2


def test_a_copier_is_sure_of_repeated_bigrams_alone(tokenizer):
    model = Copier(len(tokenizer))
    split = evaluate_split_perplexity(model, tokenizer, TEXT)
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)])
    assert split.repeated.num_tokens == repeated_bigram_mask(ids).sum() > 3
    assert 1 <= split.repeated.token_perplexity < 5 < len(tokenizer) / 2 < split.other.token_perplexity
    # what the model has by heart from training is no recall
    known = frequent_bigrams([ids], 1)
    without = evaluate_split_perplexity(model, tokenizer, TEXT, frequent=known)
    assert without.repeated.num_tokens == 0 and math.isnan(without.repeated.token_perplexity)
    assert without.num_frequent_bigrams == len(known) > 0
    assert without.overall == split.overall


def test_errors(tokenizer):
    with pytest.raises(ValueError, match=r"not of shape \(1, 2, 3\)"):
        repeated_bigram_mask(torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="threshold=-1"):
        frequent_bigrams([], -1)
    with pytest.raises(ValueError, match="the text is empty"):
        evaluate_split_perplexity(Copier(len(tokenizer)), tokenizer, " ")
