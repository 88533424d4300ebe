import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from geobased.training.perplexity import evaluate_perplexity


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return AutoTokenizer.from_pretrained(corpus / "tokenizer")


class Unigram(nn.Module):
    """Gives id i the probability 2 ** -(i % 3 + 1) / Z, whatever the context."""

    def __init__(self, vocab_size):
        super().__init__()
        self.device = torch.device("cpu")
        weights = torch.tensor([2.0 ** -(i % 3 + 1) for i in range(vocab_size)])
        self.log_probabilities = (weights / weights.sum()).log()

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.log_probabilities.expand(*input_ids.shape, -1))


@pytest.mark.parametrize(("context_length", "stride"), [(4, None), (4, 1), (16, 15), (1000, None), (2, 1)])
def test_equals_the_sum_by_hand_for_any_window(tokenizer, context_length, stride):
    text = "Walvis Bay lies in Erongo,\nNamibia. "
    model = Unigram(len(tokenizer))
    expected = -sum(model.log_probabilities[i].item() for i in tokenizer.encode(text, add_special_tokens=False))
    result = evaluate_perplexity(model, tokenizer, text, context_length, stride, batch_size=3)
    assert result.negative_log_likelihood == pytest.approx(expected, rel=1e-6)
    assert result.num_words == 6 and result.num_bytes == len(text)
    assert result.token_perplexity == pytest.approx(math.exp(expected / result.num_tokens), rel=1e-5)
    assert result.word_perplexity == pytest.approx(math.exp(expected / 6), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / len(text) / math.log(2), rel=1e-6)


def test_one_window_equals_the_models_own_loss(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).train()
    text = "Rundu lies in Kavango East, Namibia."
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    loss = model(input_ids=ids, labels=ids).loss.item()
    result = evaluate_perplexity(model, tokenizer, text, 512)
    assert math.log(result.token_perplexity) == pytest.approx(loss, rel=1e-5)
    assert model.training
    # several texts do not see each other
    twice = evaluate_perplexity(model, tokenizer, [text, text], 512)
    assert twice.negative_log_likelihood == pytest.approx(2 * result.negative_log_likelihood, rel=1e-6)
    assert twice.word_perplexity == pytest.approx(result.word_perplexity, rel=1e-5)


def test_errors(tokenizer):
    model = Unigram(len(tokenizer))
    with pytest.raises(ValueError, match="the text is empty"):
        evaluate_perplexity(model, tokenizer, " \n")
    with pytest.raises(ValueError, match="stride"):
        evaluate_perplexity(model, tokenizer, "a", 8, 8)
    without = SimpleNamespace(bos_token_id=None)
    with pytest.raises(ValueError, match="beginning-of-text"):
        evaluate_perplexity(model, without, "a", 8)
