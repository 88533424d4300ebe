"""The losses: reference values of all heads, the two smoothing rules, unknown labels, transformed targets, bad labels."""

import math

import pytest
import torch
import torch.nn.functional as F

from geobased.geography.coordinates import PIGEON_EARTH_RADIUS_KM, haversine_matrix_km
from geobased.geography.smoothing import haversine_smoothed_targets
from geobased.modeling_pigeon import PigeonConfig
from geobased.modeling_pigeon.geodesy_pigeon import haversine_km
from geobased.modeling_pigeon.loss_pigeon import cell_loss, classification_loss, regression_loss, smoothed_cell_targets


@pytest.fixture
def reference_model(make_model, reference):
    model = make_model(smoothing_rule="code")
    weights = reference["state_dict"]
    names = {
        "cell_head": "cell_layer",
        "heads.environment": "multi_task_head",
        "heads.climate": "climate_layer",
        "heads.month": "month_layer",
    }
    with torch.no_grad():
        for ours, theirs in names.items():
            model.get_submodule(ours).weight.copy_(torch.tensor(weights[f"{theirs}.weight"]))
            model.get_submodule(ours).bias.copy_(torch.tensor(weights[f"{theirs}.bias"]))
    return model


def labels_of(reference) -> dict:
    return {
        "labels": torch.tensor(reference["labels_clf"]),
        "coordinates": torch.tensor(reference["labels_lnglat"], dtype=torch.float64).flip(1),
        "head_labels": {
            "environment": torch.tensor(reference["labels_multi_task"]),
            "climate": torch.tensor(reference["labels_climate_index"]),
            "month": torch.tensor(reference["labels_month"]),
        },
    }


def test_heads_match_the_reference(reference_model, reference):
    expected = reference["outputs"]
    output = reference_model(embeddings=torch.tensor(reference["embedding"]), **labels_of(reference))
    torch.testing.assert_close(output.embeddings, torch.tensor(reference["pooled"]), rtol=1e-5, atol=1e-6)
    for name, loss, value in (
        ("loss", output.loss, expected["loss"]),
        ("cells", output.cell_loss, expected["loss_clf"]),
        ("environment", output.head_losses["environment"], expected["loss_reg"]),
        ("climate", output.head_losses["climate"], expected["loss_climate"]),
        ("month", output.head_losses["month"], expected["loss_month"]),
    ):
        assert loss.item() == pytest.approx(value, rel=1e-5), name
    for name, key in (("environment", "preds_mt"), ("climate", "preds_climate_logits"), ("month", "preds_month_logits")):
        torch.testing.assert_close(output.head_outputs[name], torch.tensor(expected[key]), rtol=1e-5, atol=1e-5)


def test_answers_match_the_reference(reference_model, reference):
    expected = reference["outputs"]
    answer = reference_model.locate(embeddings=torch.tensor(reference["embedding"]), top_k=5)
    assert answer.candidate_cells.tolist() == expected["top5_indices"]
    assert answer.candidate_cells[:, 0].tolist() == expected["preds_geocell"]
    torch.testing.assert_close(answer.candidate_scores, torch.tensor(expected["top5_probs"]), rtol=1e-5, atol=1e-7)
    places = torch.tensor(expected["preds_LLH_lnglat"], dtype=torch.float64).flip(1)
    torch.testing.assert_close(answer.coordinates, places, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_targets_agree_with_those_of_the_geography_package(reference, centroids, rule):
    places = torch.tensor(reference["labels_lnglat"], dtype=torch.float64).flip(1)
    cells = torch.tensor(reference["labels_clf"])
    distances = haversine_km(places[:, None], centroids[None])
    theirs = haversine_matrix_km(places, centroids, radius_km=PIGEON_EARTH_RADIUS_KM)
    torch.testing.assert_close(distances, theirs, rtol=1e-12, atol=1e-6)
    targets = smoothed_cell_targets(distances, cells, 75.0, rule)
    torch.testing.assert_close(targets, haversine_smoothed_targets(theirs, cells, 75.0, rule), rtol=1e-9, atol=0)


def test_rules_differ_by_the_cell_that_targets_are_relative_to(reference, centroids):
    places = torch.tensor(reference["labels_lnglat"], dtype=torch.float64).flip(1)
    cells = torch.tensor(reference["labels_clf"])
    distances = haversine_km(places[:, None], centroids[None])
    paper, code = (smoothed_cell_targets(distances, cells, 75.0, rule) for rule in ("paper", "code"))
    own = torch.ones(len(cells), dtype=torch.float64)
    torch.testing.assert_close(paper.gather(1, cells[:, None])[:, 0], own)
    torch.testing.assert_close(code.amax(1), own)
    nearer = distances.argmin(1) != cells
    assert nearer.sum() == 3
    assert ((paper.sum(1) > code.sum(1) + 1e-9) == nearer).all()
    rows = [smoothed_cell_targets(distances, cells, 75.0, rule, normalize=True) for rule in ("paper", "code")]
    torch.testing.assert_close(rows[0], rows[1])
    torch.testing.assert_close(rows[0].sum(1), own)


def test_loss_without_smoothing_is_cross_entropy(make_model, images):
    model = make_model(smoothing_tau_km=None, cell_loss_weight=3.0)
    labels = torch.tensor([0, 5, 99, 5])
    output = model(images, labels=labels)
    assert output.loss.item() == pytest.approx(3 * F.cross_entropy(output.logits, labels).item(), rel=1e-6)
    # so does a distance over which nothing is left of the next cell
    places = model.geocells.centroids()[labels]
    smoothed = cell_loss(output.logits, labels, places, model.geocells.centroids(), tau_km=1e-3)
    assert smoothed.item() == pytest.approx(F.cross_entropy(output.logits, labels).item(), rel=1e-6)


def test_loss_is_the_sum_of_those_that_have_labels(make_model, images, centroids):
    model, labels = make_model(), torch.tensor([1, 2, 3, 4])
    alone = model(images, labels=labels, coordinates=centroids[labels])
    assert alone.head_losses is None and alone.loss == alone.cell_loss
    months = {"month": torch.tensor([0, 11, 5, 5])}
    both = model(images, labels=labels, coordinates=centroids[labels], head_labels=months)
    assert set(both.head_losses) == {"month"}
    assert both.loss.item() == pytest.approx(alone.loss.item() + both.head_losses["month"].item(), rel=1e-6)
    assert model(images, head_labels=months).cell_loss is None
    assert model(images).loss is None


def test_labels_that_are_not_known_are_left_out(make_model, images):
    model = make_model()
    values, classes = torch.randn(4, 6), torch.tensor([3, -100, 7, -100])
    values[1], values[3, 2] = math.nan, math.nan
    output = model(images, head_labels={"environment": values, "climate": classes})
    squares = [(output.head_outputs["environment"][i, j] - values[i, j]) ** 2 for i in (0, 2, 3) for j in range(6)]
    known = torch.stack([square for square in squares if not square.isnan()])
    assert len(known) == 17
    assert output.head_losses["environment"].item() == pytest.approx(8 * known.mean().item(), rel=1e-5)
    expected = 2 * F.cross_entropy(output.head_outputs["climate"][[0, 2]], classes[[0, 2]])
    assert output.head_losses["climate"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [(regression_loss, torch.full((4, 3), math.nan)), (classification_loss, torch.full((4,), -100))],
)
def test_batch_without_known_labels_has_zero_loss_and_gradient(loss, targets):
    outputs = torch.randn(4, 3, requires_grad=True)
    value = loss(outputs, targets)
    value.backward()
    assert value.item() == 0 and outputs.grad.abs().max() == 0


def test_probabilities_are_labels_of_a_classification_too(make_model, images):
    model, classes = make_model(), torch.tensor([3, 27, 0, 0])
    by_class = model(images, head_labels={"climate": classes}).loss
    by_probability = model(images, head_labels={"climate": F.one_hot(classes, 28).float()}).loss
    torch.testing.assert_close(by_class, by_probability)


def test_targets_of_a_regression_are_transformed_and_back(make_model, images):
    head = {
        "name": "environment",
        "kind": "regression",
        "size": 2,
        "log_offsets": [408.0, None],
        "means": [6.0, 10.0],
        "stds": [0.5, 8.0],
    }
    model, values = make_model(heads=[head]), torch.tensor([[0.0, -5.0], [8848.0, 30.0], [-400.0, 10.0], [100.0, 18.0]])
    targets = model.heads.targets("environment", values)
    torch.testing.assert_close(targets[:, 0], ((values[:, 0] + 408).log() - 6) / 0.5)
    torch.testing.assert_close(targets[:, 1], (values[:, 1] - 10) / 8)
    torch.testing.assert_close(model.heads.natural_values("environment", targets), values, rtol=1e-4, atol=1e-2)
    output = model(images, head_labels={"environment": values})
    assert output.loss.item() == pytest.approx(F.mse_loss(output.head_outputs["environment"], targets).item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"\[1, 0\] is -500, and its logarithm with offset 408"):
        model(images, head_labels={"environment": torch.tensor([[0.0, 0], [-500, 0], [0, 0], [0, 0]])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 100])}, "labels holds cell 100, but there are cells 0 to 99"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, "labels holds cell -1"),
        ({"labels": torch.tensor([0, 1, 2])}, r"integers \[4\]"),
        ({"labels": torch.zeros(4)}, "must be the true geocells"),
        ({"coordinates": None}, "needs the true coordinates"),
        ({"coordinates": torch.zeros(3, 2)}, "coordinates has 3 rows but labels has 4"),
        ({"coordinates": torch.zeros(4, 3)}, r"must be \[n, 2\]"),
        ({"coordinates": torch.tensor([[0.0, 0], [0, 0], [math.nan, 0], [0, 0]])}, r"coordinates\[2\] .* nan"),
        ({"coordinates": torch.tensor([[91.0, 0], [0, 0], [0, 0], [0, 0]])}, r"coordinates\[0\] is \(latitude 91"),
        ({"coordinates": torch.tensor([[0.0, 0], [0, 180.5], [0, 0], [0, 0]])}, "longitudes from -180 to 180"),
        ({"coordinates": torch.tensor([[151.2, -33.9], [2.3, 48.9], [174.8, -41.3], [0, 0]])}, "seem to be swapped"),
        ({"head_labels": {"season": torch.zeros(4)}}, "'season', but the heads are: environment, climate, month"),
        ({"head_labels": {"month": torch.tensor([0, 1, 12, 3])}}, "holds class 12"),
        ({"head_labels": {"month": torch.tensor([0, 1])}}, r"shape \(2,\), not \(4,\)"),
        ({"head_labels": {"environment": torch.zeros(4, 5)}}, r"shape \(4, 5\), not \(4, 6\)"),
        ({"head_labels": {"environment": torch.full((4, 6), math.inf)}}, "no number"),
    ],
)
def test_bad_labels(make_model, images, centroids, changes, message):
    labels = torch.tensor([0, 1, 2, 3])
    arguments = {"labels": labels, "coordinates": centroids[labels]} | changes
    with pytest.raises(ValueError, match=message):
        make_model()(images, **arguments)


def test_unknown_rule():
    with pytest.raises(ValueError, match="rule='nearest' is unknown"):
        smoothed_cell_targets(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 75.0, "nearest")
    with pytest.raises(ValueError, match="smoothing_rule='nearest' is unknown"):
        PigeonConfig(smoothing_rule="nearest")
    with pytest.raises(ValueError, match="needs coordinates"):
        cell_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), tau_km=75.0)
