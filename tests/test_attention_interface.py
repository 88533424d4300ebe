"""`attn_implementation="geobased"` on transformers' own models: what eager attention gives, on the CPU in float32."""

import logging

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from geobased import attention_interface
from geobased.kernels import flash_attention, sliding_window_attention

TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(TEXT, image_size=28, patch_size=7)
DECODER = dict(TEXT, vocab_size=60, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)


def pair(model_class, config):
    """The same random weights under eager attention and under ours."""
    models = []
    for implementation in ("eager", "geobased"):
        torch.manual_seed(0)
        config._attn_implementation = implementation
        models.append(model_class(config).eval())
    models[1].load_state_dict(models[0].state_dict())
    return models


def decoders(**changes):
    yield pair(LlamaForCausalLM, LlamaConfig(**DECODER, **changes))
    yield pair(MistralForCausalLM, MistralConfig(**DECODER, sliding_window=5, **changes))


def assert_close(actual, expected, tolerance=1e-5):
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= tolerance, error


@pytest.fixture
def no_fallback(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("scaled_dot_product_attention ran instead of our kernels")

    monkeypatch.setattr(attention_interface, "sdpa_attention_forward", fail)


@pytest.fixture
def warnings_of(monkeypatch):
    messages: list[str] = []
    attention_interface.logger.warning_once.cache_clear()
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = attention_interface.logger
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def tokens(batch, seq_len, seed=0):
    return torch.randint(1, 60, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def padding(side, batch, seq_len):
    """Row 0 is whole; row n lacks 2n + 1 tokens."""
    mask = torch.ones(batch, seq_len, dtype=torch.long)
    for row in range(1, batch):
        missing = 2 * row + 1
        if side == "left":
            mask[row, :missing] = 0
        elif side == "right":
            mask[row, -missing:] = 0
    return mask


# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_fallback")
def test_clip_vision():
    eager, ours = pair(CLIPVisionModel, CLIPVisionConfig(**VISION))
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert_close(ours(pixels).last_hidden_state, eager(pixels).last_hidden_state)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_clip_text(side):
    eager, ours = pair(CLIPTextModel, CLIPTextConfig(**TEXT, vocab_size=60, max_position_embeddings=20, eos_token_id=2))
    ids, mask = tokens(3, 11), padding(side, 3, 11)
    kept = mask.bool()
    actual, expected = (model(ids, attention_mask=mask).last_hidden_state[kept] for model in (ours, eager))
    assert_close(actual, expected)


@pytest.mark.usefixtures("no_fallback")
def test_clip_scores_and_gradients():
    config = CLIPConfig(
        text_config=dict(TEXT, vocab_size=60, max_position_embeddings=20, eos_token_id=2), vision_config=VISION, projection_dim=16
    )
    eager, ours = pair(CLIPModel, config)
    assert ours.vision_model.config._attn_implementation == ours.text_model.config._attn_implementation == "geobased"
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (ours, eager):
        output = model(input_ids=tokens(3, 11), attention_mask=padding("right", 3, 11), pixel_values=pixels, return_loss=True)
        output.loss.backward()
        gradients.append((output.logits_per_image, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (logits, actual), (expected_logits, expected) = gradients
    assert_close(logits, expected_logits)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * (gradient.norm() + 1e-2), name


# --- decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_decoders(side):
    ids, mask = tokens(3, 17), padding(side, 3, 17)
    kept = mask.bool()
    for eager, ours in decoders():
        actual, expected = (model(ids, attention_mask=mask).logits[kept] for model in (ours, eager))
        assert_close(actual, expected)


@pytest.mark.usefixtures("no_fallback")
def test_decoders_gradients():
    ids, mask = tokens(2, 17), padding("right", 2, 17)
    labels = ids.masked_fill(mask == 0, -100)
    for eager, ours in decoders():
        for model in (eager, ours):
            model.train()
            model(ids, attention_mask=mask, labels=labels).loss.backward()
        for (name, ours_p), eager_p in zip(ours.named_parameters(), eager.parameters(), strict=True):
            assert (ours_p.grad - eager_p.grad).norm() <= 1e-5 * (eager_p.grad.norm() + 1e-2), name


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(side, cache):
    ids, mask = tokens(3, 9), padding(side, 3, 9)
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation=cache, disable_compile=True)
    for eager, ours in decoders():
        assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.usefixtures("no_fallback")
def test_pieces_with_a_cache_equal_the_whole():
    ids = tokens(2, 20)
    for eager, ours in decoders():
        expected = eager(ids).logits
        cache, pieces = None, []
        for start, end in ((0, 7), (7, 8), (8, 15), (15, 16), (16, 20)):
            output = ours(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        assert_close(torch.cat(pieces, 1), expected)


# --- what the kernels cannot do ---------------------------------------------------------------------------------------


def test_packed_positions_fall_back(warnings_of):
    """Sequences packed into one row by their positions alone need a mask of their own."""
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None]
    for eager, ours in decoders():
        actual, expected = (model(tokens(1, 12), position_ids=position_ids, use_cache=False).logits for model in (ours, eager))
        assert_close(actual, expected)
    assert len(warnings_of) == 1 and "more than padding" in warnings_of[0]


def test_arbitrary_mask_falls_back(warnings_of):
    ids = tokens(2, 10)
    visible = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.5
    visible |= torch.eye(10, dtype=torch.bool)
    bias = torch.zeros(2, 1, 10, 10).masked_fill(~visible, torch.finfo(torch.float32).min)
    eager, ours = next(decoders())
    assert_close(ours(ids, attention_mask=bias).logits, eager(ids, attention_mask=bias).logits)
    assert len(warnings_of) == 1 and "scaled_dot_product_attention" in warnings_of[0]


def test_dropout_falls_back_in_training(warnings_of, monkeypatch):
    _, ours = next(decoders(attention_dropout=0.5))
    ids, mask = tokens(2, 10), padding("left", 2, 10)
    ours.eval()(ids, attention_mask=mask)
    assert not warnings_of
    seen = []
    original = attention_interface.sdpa_attention_forward

    def spy(*args, **kwargs):
        seen.append((kwargs["dropout"], args[4].shape))
        return original(*args, **kwargs)

    monkeypatch.setattr(attention_interface, "sdpa_attention_forward", spy)
    ours.train()(ids, attention_mask=mask)
    assert seen == [(0.5, (2, 1, 10, 10))] * 2  # the padding mask arrives with causality in it
    assert len(warnings_of) == 1 and "dropout=0.5" in warnings_of[0]


@pytest.mark.parametrize(
    "causal, window, padded",
    [(True, None, True), (True, None, False), (True, 3, True), (True, 3, False), (False, None, True), (False, None, False)],
)
def test_fallback_sees_the_same_keys(causal, window, padded):
    """An option that the kernels lack changes nothing but the path."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    mask = padding("right", 2, 9).bool() if padded else None
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = causal, 2
    expected, _ = attention_interface.geobased_attention_forward(module, q, k, v, mask, sliding_window=window)
    actual, _ = attention_interface.geobased_attention_forward(module, q, k, v, mask, sliding_window=window, head_mask=1)
    assert_close(actual, expected)


def test_output_attentions_behaves_as_with_sdpa():
    """transformers refuses it for every implementation but eager, or returns none."""
    config = LlamaConfig(**DECODER)
    for implementation in ("sdpa", "geobased"):
        config._attn_implementation = implementation
        model = LlamaForCausalLM(config)
        results = []
        try:
            results.append(model(tokens(1, 4), output_attentions=True).attentions)
        except ValueError as error:
            results.append(str(error).replace(implementation, ""))
        if implementation == "sdpa":
            expected = results
    assert results == expected


# --- transformers' conventions ----------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    _, ours = next(decoders())
    ours.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="geobased")
    assert again.config._attn_implementation == "geobased"
    assert torch.equal(again(tokens(1, 6)).logits, ours(tokens(1, 6)).logits)
    switched = LlamaForCausalLM.from_pretrained(tmp_path)
    assert switched.config._attn_implementation == "sdpa"
    switched.set_attn_implementation("geobased")
    assert torch.equal(switched(tokens(1, 6)).logits, ours(tokens(1, 6)).logits)


def test_bidirectional_encoder():
    eager, ours = pair(BertModel, BertConfig(**TEXT, vocab_size=60, max_position_embeddings=20))
    ids, mask = tokens(3, 11), padding("left", 3, 11)
    kept = mask.bool()
    actual, expected = (model(ids, attention_mask=mask).last_hidden_state[kept] for model in (ours, eager))
    assert_close(actual, expected)


@pytest.mark.usefixtures("no_fallback")
def test_masks_are_padding_or_nothing(monkeypatch):
    """Nothing of size seq_len x seq_len is made, and the right op runs in each layer."""
    seen = []
    for module, name in ((flash_attention, "flash_attention"), (sliding_window_attention, "sliding_window_attention")):
        original = getattr(module, name)

        def spy(*args, _original=original, _name=name, **kwargs):
            mask = kwargs["attention_mask"]
            seen.append((_name, None if mask is None else tuple(mask.shape)))
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    for _, ours in decoders():
        ours(tokens(2, 10), attention_mask=padding("none", 2, 10))
        ours(tokens(2, 10), attention_mask=padding("left", 2, 10))
    plain, windowed = "flash_attention", "sliding_window_attention"
    expected = [(plain, None)] * 2 + [(plain, (2, 10))] * 2 + [(windowed, None)] * 2 + [(windowed, (2, 10))] * 2
    assert seen == expected


@pytest.mark.usefixtures("no_fallback")
def test_torch_compile():
    _, ours = next(decoders())
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    ids, mask = tokens(2, 10), padding("left", 2, 10)
    kept = mask.bool()
    assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits[kept], ours(ids, attention_mask=mask).logits[kept])
