"""Causal models: nothing from the future, prefixes and steps agree, states of constant size, generation."""

import copy

import pytest
import torch

from geobased import SumformerCache, SumformerForCausalLM, SumformerModel
from geobased.modeling_sumformer.prefix_sums import prefix_sums

from .conftest import CAUSAL_MIXERS

VARIANTS = [
    *({"mixer": mixer} for mixer in CAUSAL_MIXERS),
    {"aggregation": "mean", "position_embedding_type": "sinusoidal"},
    {"aggregation": "scaled", "phi_type": "fourier", "psi_type": "bilinear"},
    {"mixer": "performer", "position_embedding_type": "sinusoidal"},
]
all_variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))


@all_variants
def test_no_gradient_comes_from_the_future(make_model, variant):
    model = make_model(causal=True, **variant)
    x = torch.randn(1, 21, 16, dtype=torch.float64, requires_grad=True)
    for position in (0, 3, 4, 17):  # within and at the edges of chunks
        (gradient,) = torch.autograd.grad(model(inputs_embeds=x).last_hidden_state[0, position].square().sum(), x)
        assert torch.equal(gradient[0, position + 1 :], torch.zeros_like(gradient[0, position + 1 :]))
        assert gradient[0, : position + 1].abs().amax(-1).min() > 0


@all_variants
def test_a_prefix_does_not_know_what_follows(make_model, make_ids, variant):
    model, ids = make_model(causal=True, **variant), make_ids(2, 19)
    whole = model(ids).last_hidden_state
    for length in (1, 4, 18):
        assert torch.allclose(model(ids[:, :length]).last_hidden_state, whole[:, :length], rtol=0, atol=1e-12)


@all_variants
def test_token_by_token_is_the_same_as_all_at_once(make_model, make_ids, variant):
    model, ids = make_model(model_class=SumformerForCausalLM, **variant), make_ids(2, 19)
    whole = model(ids).logits
    cache, pieces = SumformerCache(model.config), []
    for piece in (ids[:, :7], ids[:, 7:8], ids[:, 8:13], *ids[:, 13:].split(1, dim=1)):
        pieces.append(model(piece, past_key_values=cache).logits)
    assert torch.allclose(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    assert cache.get_seq_length() == 19


@all_variants
def test_left_padding_changes_nothing(make_model, make_ids, variant):
    model, ids = make_model(model_class=SumformerForCausalLM, **variant), make_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    logits = model(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert torch.allclose(logits[:, 3:], model(ids).logits, rtol=0, atol=1e-12)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], alone)
    assert torch.equal(model.generate(ids, use_cache=False, **options), alone)


@pytest.mark.parametrize("mixer", CAUSAL_MIXERS)
def test_beam_search_reorders_the_cache(make_model, make_ids, mixer):
    model, ids = make_model(mixer, SumformerForCausalLM), make_ids(2, 5)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_the_size_of_a_running_sum_does_not_grow(make_model, make_ids):
    for mixer, numbers in (("sumformer", 12 + 1), ("performer", 2 * 16 * (8 + 1))):
        model = make_model(mixer, SumformerForCausalLM, dtype=torch.bfloat16, num_random_features=16)
        sizes = []
        cache = SumformerCache(model.config)
        assert cache.size_bytes() == 0
        for length in (3, 1, 12):
            model(make_ids(2, length), past_key_values=cache)
            sizes.append(cache.size_bytes())
        # float32 in a bfloat16 model too, for 2 sequences and 2 layers
        assert sizes == [2 * 2 * numbers * 4] * 3


@pytest.mark.parametrize("mixer", CAUSAL_MIXERS)
@torch.no_grad()
def test_cache_operations(make_model, make_ids, mixer):
    model, ids = make_model(mixer, causal=True), make_ids(2, 9)
    cache = model(ids, use_cache=True).past_key_values
    further = make_ids(2, 3, seed=2)
    expected = model(torch.cat([ids, further], 1)).last_hidden_state[:, 9:]

    chosen, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    assert torch.allclose(model(further[1:], past_key_values=chosen).last_hidden_state, expected[1:], atol=1e-12)
    repeated.batch_repeat_interleave(2)
    actual = model(further.repeat_interleave(2, 0), past_key_values=repeated).last_hidden_state
    assert torch.allclose(actual, expected.repeat_interleave(2, 0), atol=1e-12)
    cache.reset()
    assert cache.get_seq_length() == 0
    if mixer != "softmax":
        assert torch.allclose(model(ids, past_key_values=cache).last_hidden_state, model(ids).last_hidden_state, atol=1e-12)
        with pytest.raises(ValueError, match="does not forget"):
            cache.crop(-1)


def test_caches_that_do_not_fit_are_refused(make_model, make_ids):
    model = make_model(causal=True)
    cache = model(make_ids(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="batch of 2 sequences but the input has 3"):
        model(make_ids(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"make it with SumformerCache\(model.config\)"):
        model(make_ids(2, 1), past_key_values=SumformerCache(make_model(num_hidden_layers=3).config))
    with pytest.raises(ValueError, match="needs a causal model"):
        make_model()(make_ids(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        make_model(model_class=SumformerForCausalLM).generate(make_ids(1, 3), cache_implementation="static", max_new_tokens=2)


def test_language_models_are_causal(make_model):
    assert make_model(model_class=SumformerForCausalLM).config.causal is True
    assert make_model(model_class=SumformerModel).config.causal is None
    with pytest.raises(ValueError, match="config.causal=False"):
        make_model(model_class=SumformerForCausalLM, causal=False)
    with pytest.raises(ValueError, match='mixer="linformer" cannot be causal'):
        make_model("linformer", SumformerForCausalLM)
    with pytest.raises(ValueError, match="input_type='features'"):
        make_model(model_class=SumformerForCausalLM, feature_size=2)


def test_prefix_sums_in_chunks_lose_less_than_a_running_sum():
    x = torch.rand(1, 5000, 1, generator=torch.Generator().manual_seed(0))
    exact = x.double().cumsum(1)
    assert torch.allclose(prefix_sums(x.double(), chunk_size=64), exact)
    assert (prefix_sums(x, chunk_size=64) - exact).abs().max() < 1e-3
    start = torch.tensor([[2.0]])
    for length in (0, 1, 64, 65, 130):
        assert torch.allclose(prefix_sums(x[:, :length], start, chunk_size=64), 2 + exact[:, :length].float(), atol=1e-3)
