"""The forward pass: what each token sees, padding, packing, losses, gradients, attention implementations, bad input."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening

from geobased import BasedCache, BasedForCausalLM, BasedForSequenceClassification, BasedModel


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (length - row.shape[1], 0)) for row in rows])
    return ids, torch.cat([F.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])


def right_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (0, length - row.shape[1])) for row in rows])
    return ids, torch.cat([F.pad(torch.ones_like(row), (0, length - row.shape[1])) for row in rows])


# what a token sees


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["parallel", "stepwise", "in_halves"])
@pytest.mark.parametrize("window", [1, 2, 8])
def test_window_counts_the_token_itself(make_model, make_ids, implementation, how, window):
    model = make_model(mixers=["sliding_attention"], sliding_window=window, attn_implementation=implementation)

    @torch.no_grad()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        if how == "parallel":
            return model(ids, use_cache=False).logits
        cache, size = BasedCache(model.config), 1 if how == "stepwise" else 10
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(size, dim=1)], dim=1)

    ids, changed = make_ids(1, 20), make_ids(1, 20)
    at = 5
    changed[0, at] = ids[0, at] % 60 + 1
    difference = (logits(ids) - logits(changed)).abs().amax(-1)[0]
    seen = difference[at : at + window] > 1e-6
    assert seen.all(), f"token {at} does not reach all of its window: {difference.tolist()}"
    assert difference[at + window :].max() == 0, f"token {at} reaches past its window: {difference.tolist()}"
    assert difference[:at].max() == 0, "a token changes what is before it"


@pytest.mark.parametrize("mixer", ["conv", "linear_attention", "sliding_attention"])
def test_layers_are_causal(make_model, make_ids, mixer):
    model, ids, changed = make_model(mixers=[mixer]), make_ids(1, 30), make_ids(1, 30)
    changed[0, 12] = ids[0, 12] % 60 + 1
    difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    reach = {"conv": 3, "linear_attention": 18, "sliding_attention": 8}[mixer]
    assert difference[:12].max() == 0
    assert (difference[12 : 12 + reach] > 0).all()
    assert difference[12 + reach :].sum() == 0


def test_linear_attention_layer_is_the_second_order_taylor_expansion(make_model, assert_near):
    layer = make_model(mixers=["linear_attention"]).double().model.layers[0].mixer
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    q, k = (proj(x).view(2, 13, 2, 8).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj))
    v = layer.v_proj(x).view(2, 13, 2, 16).transpose(1, 2)
    s = q @ k.mT * 8**-0.5
    weights = (1 + s + s * s / 2).tril()
    expected = (weights @ v / weights.sum(-1, keepdim=True)).transpose(1, 2).reshape(2, 13, 32)
    assert_near(layer(x)[0], layer.o_proj(expected), tolerance=1e-12, name="linear attention")


def test_convolution_layer(make_model, assert_near):
    layer = make_model(mixers=["conv"]).double().model.layers[0].mixer
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    value, gate = layer.in_proj(x).chunk(2, dim=-1)
    padded = F.pad(value, (0, 0, 2, 0))
    conv = sum(layer.conv1d.weight[:, 0, i] * padded[:, i : i + 13] for i in range(3))
    assert_near(layer(x)[0], layer.out_proj(F.silu(conv) * gate), tolerance=1e-12, name="gated convolution")


# attention implementations


@pytest.mark.parametrize(
    ("implementation", "padding"),
    [
        *((implementation, padding) for implementation in ("sdpa", "eager") for padding in (None, left_padded, right_padded)),
        pytest.param("flex_attention", left_padded, marks=pytest.mark.slow),  # transformers compiles it
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_attention_implementations_agree(make_model, make_ids, assert_near, implementation, padding):
    changes = {"mixers": ["linear_attention", "sliding_attention"], "sliding_window": 16}
    reference, model = make_model(**changes), make_model(**changes, attn_implementation=implementation)
    rows = [make_ids(1, n, seed=n) for n in (40, 25, 9)]
    if padding is None:
        rows = rows[:1]
        ids, mask = rows[0], None
    else:
        ids, mask = padding(rows)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            actual = logits[i] if mask is None else logits[i, mask[i].bool()]
            assert_near(actual, reference(row).logits[0], name=f"{implementation} logits of row {i}")


@pytest.mark.parametrize("window", [4, 100])
def test_attention_weights_are_returned_by_eager(make_model, make_ids, window):
    model = make_model(
        mixers=["sliding_attention", "conv", "sliding_attention"], attn_implementation="eager", sliding_window=window
    )
    attentions = model(make_ids(2, 12), output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(2, 2, 12, 12)] * 2
    offset = torch.arange(12)[:, None] - torch.arange(12)
    for weights in attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 12))
        assert weights[..., (offset < 0) | (offset >= window)].abs().sum() == 0


def test_attention_dropout_acts_in_training_only(make_model, make_ids):
    model = make_model(attention_dropout=0.5)
    ids = make_ids(1, 20)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


# padding and packing


@pytest.mark.parametrize("model_class", [BasedModel, BasedForCausalLM])
@pytest.mark.parametrize("pad", [left_padded, right_padded], ids=["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["no_cache", "cache"])
def test_padded_rows_equal_rows_alone(make_model, make_ids, assert_near, model_class, pad, use_cache):
    model = make_model(model_class)
    rows = [make_ids(1, n, seed=n) for n in (23, 1, 8, 17)]
    ids, mask = pad(rows)
    for dtype in (torch.long, torch.bool, torch.float32):
        outputs = model(ids, attention_mask=mask.to(dtype), use_cache=use_cache)[0]
        for i, row in enumerate(rows):
            alone = model(row, use_cache=use_cache)[0][0]
            assert_near(outputs[i, mask[i].bool()], alone, name=f"row {i} with a mask of {dtype}")


def test_left_padding_leaves_the_same_state(make_model, make_ids, assert_near):
    model = make_model()
    rows = [make_ids(1, n, seed=n) for n in (23, 2, 8)]
    ids, mask = left_padded(rows)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for i, row in enumerate(rows):
        alone = model(row, use_cache=True).past_key_values
        assert_near(cache.layers[0].conv_states[0][i], alone.layers[0].conv_states[0][0], name="convolution state")
        assert_near(cache.layers[1].recurrent_states[0][i], alone.layers[1].recurrent_states[0][0], name="running sum")
        n = alone.layers[2].values.shape[2]
        assert_near(cache.layers[2].values[i, :, -n:], alone.layers[2].values[0], name="window")


@pytest.mark.parametrize("told_by", ["cu_seq_lens", "position_ids", "collator"])
@pytest.mark.parametrize("use_cache", [False, None], ids=["no_cache", "default_cache"])
def test_packed_sequences_equal_separate_ones(make_model, make_ids, assert_near, told_by, use_cache):
    model = make_model()
    rows = [make_ids(1, n, seed=n)[0] for n in (19, 1, 2, 30)]
    if told_by == "collator":
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        batch = collator([{"input_ids": row.tolist()} for row in rows])
        outputs = model(**batch, use_cache=use_cache)
    else:
        lengths = torch.tensor([0] + [len(row) for row in rows])
        packing = {"position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None]}
        if told_by == "cu_seq_lens":
            packing = {"cu_seq_lens_q": lengths.cumsum(0).int()}
        outputs = model(torch.cat(rows)[None], **packing, use_cache=use_cache)
    assert outputs.past_key_values is None
    start = 0
    for row in rows:
        alone = model(row[None]).logits
        assert_near(outputs.logits[:, start : start + len(row)], alone, name=f"logits of the packed sequence of {len(row)}")
        start += len(row)


def test_packed_gradients_equal_separate_ones(make_model, make_ids, assert_near):
    rows = [make_ids(1, n, seed=n)[0] for n in (19, 5, 12)]
    packed, separate = make_model(), make_model()
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed(torch.cat(rows)[None], position_ids=positions).logits.logsumexp(-1).sum().backward()
    for row in rows:
        separate(row[None]).logits.logsumexp(-1).sum().backward()
    for (name, p), q in zip(packed.named_parameters(), separate.parameters(), strict=True):
        assert_near(p.grad, q.grad, tolerance=1e-4, name=f"gradient of {name}")


# outputs


def test_logits_to_keep(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 12)
    everything = model(ids).logits
    assert everything.shape == (2, 12, 61)
    assert torch.equal(model(ids, logits_to_keep=0).logits, everything)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, everything[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 7])).logits, everything[:, [1, 7]])


def test_inputs_embeds_equal_input_ids(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 12)
    expected = model(ids, output_hidden_states=True)
    actual = model(inputs_embeds=model.get_input_embeddings()(ids), output_hidden_states=True)
    assert torch.equal(actual.logits, expected.logits)
    assert len(expected.hidden_states) == 4
    assert torch.equal(expected.hidden_states[0], model.get_input_embeddings()(ids))
    last = model.model(ids).last_hidden_state
    assert torch.equal(expected.hidden_states[-1], last)


def test_outputs_as_tuple(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 12)
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], model(ids).logits)


def test_loss_is_the_shifted_cross_entropy(make_model, make_ids, assert_near):
    model, ids = make_model(), make_ids(2, 12)
    labels = ids.clone()
    labels[0, :4] = -100
    outputs = model(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_near(outputs.loss, expected, name="loss")
    total = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    for items in (50, torch.tensor(50)):
        assert_near(model(ids, labels=labels, num_items_in_batch=items).loss, total / 50, name="loss per item")


def test_residual_stream_is_float32_in_half_precision(make_model, make_ids):
    model, ids = make_model().bfloat16(), make_ids(2, 12)
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    assert hidden_states[1].dtype == torch.float32
    assert hidden_states[-1].dtype == torch.bfloat16
    model.config.residual_in_fp32 = False
    assert model(ids, output_hidden_states=True).hidden_states[1].dtype == torch.bfloat16


# sequence classification


@pytest.mark.parametrize("told_by", ["attention_mask", "pad_token_id"])
def test_padding_side_never_changes_a_score(make_model, make_ids, assert_near, told_by):
    model = make_model(BasedForSequenceClassification, num_labels=3, pad_token_id=0)
    rows = [make_ids(1, n, seed=n) for n in (15, 1, 9)]
    alone = torch.cat([model(row).logits for row in rows])
    assert alone.shape == (3, 3)
    for pad in (left_padded, right_padded):
        ids, mask = pad(rows)
        if told_by == "attention_mask":
            assert_near(model(ids, attention_mask=mask).logits, alone, name=f"scores after {pad.__name__}")
            embeds = model.get_input_embeddings()(ids)
            assert_near(model(inputs_embeds=embeds, attention_mask=mask).logits, alone, name="scores of embeddings")
        elif pad is right_padded:  # without a mask tokens after padding on the left would see it, as in every causal model
            assert_near(model(ids).logits, alone, name="scores")


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem_type", "loss"),
    [
        (1, torch.tensor([0.5, -1.0]), "regression", lambda x, y: F.mse_loss(x.squeeze(), y)),
        (3, torch.tensor([2, 0]), "single_label_classification", F.cross_entropy),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), "multi_label_classification", F.binary_cross_entropy_with_logits),
    ],
    ids=["regression", "single_label", "multi_label"],
)
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "inferred"])
def test_classification_losses(make_model, make_ids, assert_near, num_labels, labels, problem_type, loss, stated):
    problem = {"problem_type": problem_type} if stated else {}
    model = make_model(BasedForSequenceClassification, num_labels=num_labels, pad_token_id=0, **problem)
    outputs = model(make_ids(2, 9), labels=labels)
    assert_near(outputs.loss, loss(outputs.logits, labels), name="loss")
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# training


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_ids, assert_near, use_reentrant):
    ids = make_ids(2, 40)
    plain, checkpointed = make_model().train(), make_model().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = [model(ids, labels=ids) for model in (plain, checkpointed)]
    assert losses[1].past_key_values is None
    for outputs in losses:
        outputs.loss.backward()
    assert torch.equal(losses[0].loss, losses[1].loss)
    for (name, p), q in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert_near(q[1].grad, p.grad, name=f"gradient of {name}")


def test_every_parameter_gets_a_gradient(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.abs().sum() > 0, f"the gradient of {name} is zero"


def test_autocast(make_model, make_ids, assert_near):
    model, ids = make_model(initializer_range=0.05), make_ids(2, 40)
    expected = model(ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids)
    assert_near(outputs.logits.float(), expected.logits, tolerance=2e-2, name="logits under autocast")
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cache = BasedCache(model.config)
        steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40)], 1)
    assert_near(steps.float(), expected.logits, tolerance=2e-2, name="logits of steps under autocast")


@pytest.mark.parametrize(
    ("backend", "length"),
    [pytest.param("inductor", 30, marks=pytest.mark.slow), ("aot_eager", 30), ("aot_eager", 300)],
)
def test_compiled_forward_equals_eager(make_model, make_ids, assert_near, backend, length):
    torch.compiler.reset()
    model, ids = make_model(), make_ids(2, length)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        assert_near(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, name="compiled logits")


def test_compiled_training_step_equals_eager(make_model, make_ids, assert_near):
    torch.compiler.reset()
    eager, model, ids = make_model().train(), make_model().train(), make_ids(2, 30)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    eager(ids, labels=ids, use_cache=False).loss.backward()
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert_near(q.grad, p.grad, tolerance=1e-4, name=f"gradient of {name}")


@pytest.mark.parametrize("padded", [False, True], ids=["no_mask", "mask"])
def test_exported_program_equals_eager(make_model, make_ids, padded):
    model, ids = make_model(), make_ids(2, 20)
    arguments = {"input_ids": ids, "use_cache": False}
    if padded:
        arguments["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(5), 0)
    program = torch.export.export(model, (), arguments)
    torch.testing.assert_close(program.module()(**arguments).logits, model(**arguments).logits)


# bad input


def test_bad_input_ids_are_named(make_model, make_ids):
    model = make_model()
    for ids, message in [
        (torch.tensor([[3, 61]]), r"61, which is outside the vocabulary \(0 to 60\)"),
        (torch.tensor([[3, -1]]), "-1, which is outside"),
        (torch.tensor([[3.0, 1.0]]), "torch.float32"),
        (torch.tensor([3, 1]), r"not of shape \(2,\)"),
        (torch.empty(1, 0, dtype=torch.long), "prompt is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids)
    with pytest.raises(ValueError, match="prompt is empty"):
        model(inputs_embeds=torch.zeros(1, 0, 32))
    ids = make_ids(1, 3)
    for both_or_none in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**both_or_none)


def test_bad_masks_are_named(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 5)
    with pytest.raises(ValueError, match="attention_mask has 4 columns but there are 0 tokens in the cache and 5 new"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask has 3 rows but the input has 2"):
        model(ids, attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"not of shape \(2, 5, 5\)"):
        model(ids, attention_mask=torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match=r"shape \(2, 1, 5, 5\) says which token sees which"):
        model(ids, attention_mask=torch.zeros(2, 1, 5, 5))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 1 columns but there are 5 tokens in the cache and 1 new"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_sliding_layers_alone_follow_a_mask_in_four_dimensions(make_model, make_ids, assert_near):
    model, ids = make_model(mixers=["sliding_attention"]), make_ids(1, 12)
    apart = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).tril().bool()[None, None]
    logits = model(ids, attention_mask=apart).logits
    assert_near(logits, torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], 1), name="logits")


def test_bad_packing_is_named(make_model, make_ids):
    ids, bounds = make_ids(1, 9), torch.tensor([0, 4, 9], dtype=torch.int32)
    model = make_model()
    with pytest.raises(ValueError, match="cannot be used with a cache"):
        model(ids, cu_seq_lens_q=bounds, past_key_values=BasedCache(model.config))
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        make_model(attn_implementation="eager")(ids, cu_seq_lens_q=bounds, use_cache=False)


def test_classification_without_a_way_to_tell_padding(make_model, make_ids):
    model = make_model(BasedForSequenceClassification, num_labels=2)
    assert model(make_ids(1, 5)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="cannot tell padding in a batch of 2"):
        model(make_ids(2, 5))
