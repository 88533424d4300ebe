"""The loss of language modelling is transformers' own, whoever computes it."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from geobased import BasedConfig, BasedForCausalLM
from geobased.modeling_based.loss_based import causal_lm_loss


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (2, 7), generator=generator)
    labels[0, :3] = -100
    return dict(logits=torch.randn(2, 7, 50, generator=generator), labels=labels, vocab_size=50)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_items_in_batch=5),
        dict(num_items_in_batch=torch.tensor(5)),
        dict(ignore_index=7),
        dict(shift_labels=torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))),
    ],
    ids=["mean", "items", "items-tensor", "ignore-index", "shift-labels"],
)
def test_loss_and_gradient_are_those_of_transformers(inputs, options):
    inputs["labels"] = inputs["labels"].clamp_min(0) if "ignore_index" in options else inputs["labels"]
    results = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        logits = inputs["logits"].clone().requires_grad_()
        loss = function(**(inputs | dict(logits=logits) | options))
        results.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*results)


def test_loss_without_any_label_is_that_of_transformers(inputs):
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert causal_lm_loss(**inputs).isnan() and ForCausalLMLoss(**inputs).isnan()


@pytest.fixture
def model() -> BasedForCausalLM:
    torch.manual_seed(0)
    config = BasedConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    return BasedForCausalLM(config)


def test_model_uses_it_unless_another_loss_is_chosen(model, inputs):
    ids = inputs["labels"].clamp_min(0)
    result = model(ids, labels=inputs["labels"])
    torch.testing.assert_close(result.loss, ForCausalLMLoss(result.logits, inputs["labels"], 50))
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + vocab_size
    assert model(ids, labels=inputs["labels"]).loss.item() == 50


def test_training_steps_make_no_cache(model, inputs):
    ids = inputs["labels"].clamp_min(0)
    assert model.train()(ids, labels=ids).past_key_values is None
    assert model(ids, labels=ids, use_cache=True).past_key_values is not None
    assert model.eval()(ids, labels=ids).past_key_values is not None
