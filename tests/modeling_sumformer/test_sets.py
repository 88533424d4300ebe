"""Models of sets: equivariance, padding, empty sets, reference values, heads and losses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from geobased import (
    SumformerConfig,
    SumformerForSequenceClassification,
    SumformerForTokenClassification,
    SumformerModel,
)
from geobased.modeling_sumformer.modeling_sumformer import count_parameters

from .conftest import CAUSAL_MIXERS, FIXTURES, MIXERS

VARIANTS = [
    *({"mixer": mixer} for mixer in MIXERS),
    *({"phi_type": phi} for phi in ("fourier", "polynomial", "linear")),
    *({"aggregation": aggregation} for aggregation in ("mean", "scaled")),
    {"psi_type": "bilinear", "phi_type": "fourier"},
    {"use_norm": False, "use_residual": False, "num_hidden_layers": 1},
]
SET_VARIANTS = [variant for variant in VARIANTS if variant.get("mixer") != "linformer"]


def name(variant: dict) -> str:
    return "-".join(map(str, variant.values()))


# equivariance and set membership


@pytest.mark.parametrize("variant", SET_VARIANTS, ids=name)
@settings(max_examples=8, deadline=None)
@given(num_elements=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_permuted_elements_give_permuted_outputs(make_model, variant, num_elements, seed):
    model = make_model(feature_size=3, **variant)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num_elements, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(num_elements, generator=generator)
    y = model(input_features=x).last_hidden_state
    assert y.shape == (2, num_elements, 16)
    assert torch.allclose(model(input_features=x[:, order]).last_hidden_state, y[:, order], rtol=0, atol=1e-9)


def test_linformer_depends_on_the_order_unless_its_rows_are_alike(make_model, make_ids):
    model, ids = make_model("linformer"), make_ids(1, 8)
    order = torch.arange(7, -1, -1)
    difference = model(ids[:, order]).last_hidden_state - model(ids).last_hidden_state[:, order]
    assert difference.abs().max() > 1e-2
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.e.copy_(layer.mixer.e[:1].expand_as(layer.mixer.e))
            layer.mixer.f.copy_(layer.mixer.f[:1].expand_as(layer.mixer.f))
    difference = model(ids[:, order]).last_hidden_state - model(ids).last_hidden_state[:, order]
    assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
@settings(max_examples=8, deadline=None)
@given(real=st.lists(st.booleans(), min_size=1, max_size=10))
def test_elements_outside_the_mask_change_nothing(make_model, variant, real):
    model = make_model(**variant)
    mask = torch.tensor([real])
    ids = torch.arange(1, len(real) + 1)[None]
    alone = model(ids[mask][None]).last_hidden_state
    padded = model(ids, attention_mask=mask.long()).last_hidden_state
    assert padded.isfinite().all()
    assert torch.allclose(padded[mask], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mixer", "causal"), [*((mixer, False) for mixer in MIXERS), *((mixer, True) for mixer in CAUSAL_MIXERS)]
)
def test_rows_without_elements_have_finite_gradients(make_model, make_ids, mixer, causal):
    model = make_model(mixer, SumformerForSequenceClassification, num_labels=3, causal=causal)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    logits = model(make_ids(2, 4), attention_mask=mask).logits
    assert torch.equal(logits[1], model.score.bias)
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_sums_are_float32_in_a_half_precision_model(make_model):
    # with increments of 1/1024 a bfloat16 sum would stop growing at 1/4
    model = make_model(dtype=torch.bfloat16, phi_type="linear", num_hidden_layers=1, use_norm=False, use_residual=False)
    mixer = model.layers[0].mixer
    seen = []
    mixer.psi.sum_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        mixer.phi.weight.zero_()
        mixer.phi.bias.fill_(1 / 1024)
    model(inputs_embeds=torch.zeros(1, 4096, 16, dtype=torch.bfloat16))
    assert torch.equal(seen[0].unique(), torch.tensor([4.0], dtype=torch.bfloat16))


def test_bfloat16_follows_float32(make_model, make_ids):
    for mixer in MIXERS:
        precise, half = make_model(mixer, dtype=torch.float32), make_model(mixer, dtype=torch.bfloat16)
        expected, actual = (model(make_ids(2, 20)).last_hidden_state.float() for model in (precise, half))
        assert (actual - expected).norm() < 0.05 * expected.norm(), mixer


# reference values


@pytest.fixture(scope="module")
def block() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "sumformer_block.safetensors")


@pytest.mark.parametrize("causal", [False, True])
def test_block_has_the_reference_values(block, causal):
    config = SumformerConfig(
        hidden_size=4,
        phi_hidden_size=8,
        latent_size=6,
        intermediate_size=8,
        num_hidden_layers=1,
        use_norm=False,
        use_residual=False,
        causal=causal,
        chunk_size=2,
    )
    model = SumformerModel(config).double().eval()
    width = config.hidden_size
    weights = {
        "phi.fc1.weight": block["phi.0.weight"],
        "phi.fc1.bias": block["phi.0.bias"],
        "phi.fc2.weight": block["phi.2.weight"],
        "phi.fc2.bias": block["phi.2.bias"],
        # the first layer of psi, split: it reads [x, sum] in the reference
        "psi.token_proj.weight": block["psi.0.weight"][:, :width],
        "psi.token_proj.bias": block["psi.0.bias"],
        "psi.sum_proj.weight": block["psi.0.weight"][:, width:],
        "psi.out_proj.weight": block["psi.2.weight"],
        "psi.out_proj.bias": block["psi.2.bias"],
    }
    model.layers[0].mixer.load_state_dict(weights)
    sums = []
    model.layers[0].mixer.psi.sum_proj.register_forward_pre_hook(lambda module, inputs: sums.append(inputs[0]))
    y = model(inputs_embeds=block["x"], attention_mask=block["mask"]).last_hidden_state
    assert torch.allclose(sums[0], block["prefix" if causal else "Sigma"], rtol=0, atol=1e-12)
    assert torch.allclose(y, block["y_causal" if causal else "y_bidir"], rtol=0, atol=1e-12)


def test_mean_and_scaled_divide_by_the_number_of_elements(make_model, make_ids):
    ids, mask = make_ids(1, 6), torch.tensor([[1, 1, 1, 1, 0, 0]])
    sums = {}
    for aggregation in ("sum", "mean", "scaled"):
        model = make_model(aggregation=aggregation, num_hidden_layers=1)
        model.layers[0].mixer.psi.sum_proj.register_forward_pre_hook(
            lambda module, inputs, key=aggregation: sums.update({key: inputs[0]})
        )
        model(ids, attention_mask=mask)
    assert torch.allclose(sums["mean"], sums["sum"] / 4)
    assert torch.allclose(sums["scaled"], sums["sum"] / 2)


def test_the_sum_is_projected_once_for_a_set(make_model, make_ids):
    model, shapes = make_model(num_hidden_layers=1), []
    model.layers[0].mixer.psi.sum_proj.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    model(make_ids(3, 7))
    assert shapes == [(3, 1, 12)]


# heads


@pytest.mark.parametrize("mixer", MIXERS)
def test_sequence_classification(make_model, make_ids, mixer):
    model = make_model(mixer, SumformerForSequenceClassification, num_labels=3)
    ids, mask = make_ids(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    output = model(ids, attention_mask=mask, labels=torch.tensor([2, 0]))
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(output.logits[0], model.score(hidden[0, :4].mean(0)))
    assert torch.allclose(output.loss, F.cross_entropy(output.logits, torch.tensor([2, 0])))
    model.config.pooling = "sum"
    assert torch.allclose(model(ids, attention_mask=mask).logits[0], model.score(hidden[0, :4].sum(0)))


@pytest.mark.parametrize("mixer", CAUSAL_MIXERS)
def test_causal_sequence_classification_reads_the_last_element(make_model, make_ids, mixer):
    model = make_model(mixer, SumformerForSequenceClassification, num_labels=2, causal=True, pad_token_id=0)
    ids = make_ids(1, 5)
    alone = model(ids).logits
    padding = torch.zeros(1, 2, dtype=torch.long)
    assert torch.allclose(alone[0], model.score(model.model(ids).last_hidden_state[0, -1]))
    for padded in (torch.cat([padding, ids], 1), torch.cat([ids, padding], 1)):
        assert torch.allclose(model(padded, attention_mask=(padded != 0).long()).logits, alone, atol=1e-12)
    assert torch.allclose(model(torch.cat([ids, padding], 1)).logits, alone, atol=1e-12)  # told by pad_token_id


def test_sequence_regression(make_model, make_ids):
    model = make_model(model_class=SumformerForSequenceClassification, num_labels=1)
    labels = torch.tensor([0.5, -1.0], dtype=torch.float64)
    output = model(make_ids(2, 6), labels=labels)
    assert torch.allclose(output.loss, F.mse_loss(output.logits[:, 0], labels))


def test_token_classification_ignores_elements_outside_the_mask(make_model, make_ids):
    model = make_model(model_class=SumformerForTokenClassification, num_labels=4)
    ids, labels, mask = make_ids(1, 5), torch.tensor([[3, 0, 1, 2, 2]]), torch.tensor([[1, 1, 1, 0, 0]])
    output = model(ids, attention_mask=mask, labels=labels)
    assert output.logits.shape == (1, 5, 4)
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.logits[0, :3], labels[0, :3]).item(), rel=1e-6)


def test_token_regression_is_the_loss_of_an_equivariant_function(make_model):
    model = make_model(model_class=SumformerForTokenClassification, num_labels=1, feature_size=2, problem_type="regression")
    x, labels, mask = torch.rand(2, 5, 2).double(), torch.rand(2, 5).double(), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    output = model(input_features=x, attention_mask=mask, labels=labels)
    errors = (output.logits[..., 0] - labels).square()
    assert output.loss.item() == pytest.approx(errors[mask.bool()].mean().item(), rel=1e-6)


def test_a_set_function_is_learned():
    # the largest element, told at every element: the best constant has a normalised error of 1
    torch.manual_seed(0)
    config = SumformerConfig(
        feature_size=1, hidden_size=32, latent_size=8, num_labels=1, problem_type="regression", intermediate_size=64
    )
    model = SumformerForTokenClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(250):
        x = torch.rand(32, 6, 1)
        loss = model(input_features=x, labels=x.max(1, keepdim=True).values.expand_as(x)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.rand(512, 6, 1)
    target = x.max(1, keepdim=True).values.expand_as(x)
    assert model.eval()(input_features=x, labels=target).loss < 0.25 * target.var()


# configuration


@pytest.mark.parametrize("mixer", MIXERS)
def test_with_mixer_keeps_the_number_of_parameters(mixer):
    config = SumformerConfig(feature_size=2, hidden_size=32, latent_size=16, max_linformer_len=32, linformer_size=8)
    other = config.with_mixer(mixer)
    assert (other.mixer, other.hidden_size, other.latent_size) == (mixer, 32, 16)
    assert count_parameters(other) == pytest.approx(count_parameters(config), rel=0.01)
    if mixer == "sumformer":
        assert other.to_dict() == config.to_dict()


def test_with_mixer_takes_changes_and_refuses_what_is_too_small():
    config = SumformerConfig(feature_size=2, hidden_size=32, latent_size=16)
    changed = config.with_mixer("sumformer", phi_type="polynomial", phi_variables=2, phi_degree=3)
    assert changed.latent_size == 9
    assert count_parameters(changed) == pytest.approx(count_parameters(config), rel=0.01)
    with pytest.raises(ValueError, match="at least .* parameters, more than the 100 wanted"):
        config.with_mixer("performer", 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "linear"}, "mixer='linear' is unknown: choose from sumformer"),
        ({"phi_type": "spline"}, "phi_type='spline'"),
        ({"aggregation": "max"}, "aggregation='max'"),
        ({"mixer": "linformer", "causal": True}, "cannot be causal: its projections"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"mixer": "softmax", "hidden_size": 30}, "hidden_size=30 is not divisible by num_attention_heads=4"),
        ({"phi_type": "fourier", "latent_size": 7}, "latent_size=7 must be even"),
        ({"phi_type": "polynomial", "phi_variables": 2, "latent_size": 7}, "latent_size=7 is not the number of monomials"),
        ({"input_type": "features"}, "feature_size=None must be at least 1"),
        ({"performer_redraw_interval": -1}, "performer_redraw_interval=-1"),
    ],
)
def test_configurations_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SumformerConfig(**changes)


def test_inputs_that_contradict_the_model_are_refused(make_model, make_ids):
    ids_model, features_model = make_model(), make_model(feature_size=3)
    ids, features = make_ids(1, 4), torch.rand(1, 4, 3, dtype=torch.float64)
    for model, inputs, message in (
        (ids_model, {}, "exactly one"),
        (ids_model, {"input_ids": ids, "inputs_embeds": torch.rand(1, 4, 16)}, "exactly one"),
        (ids_model, {"input_features": features}, "reads ids"),
        (features_model, {"input_ids": ids}, "reads feature vectors"),
        (features_model, {"input_features": features[..., :2]}, r"must be \[batch, n, 3\]"),
        (ids_model, {"input_ids": ids, "attention_mask": torch.ones(1, 5)}, r"\(1, 5\) must be"),
        (ids_model, {"input_ids": ids.float()}, "must be integers"),
        (make_model("linformer"), {"input_ids": make_ids(1, 25)}, "25 elements but e and f have 24 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs)
