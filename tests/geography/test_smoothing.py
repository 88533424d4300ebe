import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from geobased.geography.coordinates import PIGEON_EARTH_RADIUS_KM, haversine_matrix_km
from geobased.geography.smoothing import haversine_smoothed_targets

FIXTURES = Path(__file__).parents[1] / "fixtures/geo"


def reference():
    heads = json.loads((FIXTURES / "pigeon_heads.json").read_text())
    with open(FIXTURES / "pigeon_geocells.csv", newline="") as file:
        cells = np.array([(float(row["lat"]), float(row["lng"])) for row in csv.DictReader(file)])
    points = np.array(heads["labels_lnglat"])[:, ::-1]
    return heads, haversine_matrix_km(points, cells, radius_km=PIGEON_EARTH_RADIUS_KM)


def test_rule_of_the_code_gives_the_reference_loss():
    heads, distances = reference()
    weights, pooled = heads["state_dict"], torch.tensor(heads["pooled"])
    logits = pooled @ torch.tensor(weights["cell_layer.weight"]).T + torch.tensor(weights["cell_layer.bias"])
    targets = haversine_smoothed_targets(distances, np.array(heads["labels_clf"]), heads["tau"], rule="code")
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets, dtype=torch.float32))
    assert loss.item() == pytest.approx(heads["outputs"]["loss_clf"], rel=1e-5)
    sums = targets.sum(axis=1)
    assert sums.min() == pytest.approx(1.35, abs=0.01) and sums.max() == pytest.approx(13.7, abs=0.05)


def test_rules_differ_where_another_centroid_is_nearer():
    heads, distances = reference()
    true_cell = np.array(heads["labels_clf"])
    paper = haversine_smoothed_targets(distances, true_cell, 75.0)
    code = haversine_smoothed_targets(distances, true_cell, 75.0, rule="code")
    assert paper[np.arange(9), true_cell].tolist() == [1.0] * 9
    assert code.max(axis=1).tolist() == [1.0] * 9
    differ = ~np.isclose(paper, code).all(axis=1)
    assert differ.sum() == 3
    assert (differ == (distances.argmin(axis=1) != true_cell)).all()
    np.testing.assert_allclose(paper / paper.sum(axis=1, keepdims=True), code / code.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_tensors_and_arrays_agree(rule):
    heads, distances = reference()
    true_cell = heads["labels_clf"]
    array = haversine_smoothed_targets(distances, np.array(true_cell), 65.0, rule=rule)
    tensor = haversine_smoothed_targets(torch.tensor(distances), torch.tensor(true_cell), 65.0, rule=rule)
    np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-12)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_rule_of_the_code_turns_what_is_not_finite_to_zero(kind):
    distances = kind([[10.0, float("nan"), float("inf")], [float("nan")] * 3])
    targets = haversine_smoothed_targets(distances, kind([0, 1]), 75.0, rule="code")
    assert np.asarray(targets).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="NaN or infinity"):
        haversine_smoothed_targets(distances, kind([0, 1]), 75.0)


@pytest.mark.parametrize(
    ("distances", "true_cell", "tau", "rule", "message"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), 75.0, "paper", "true_cell holds 0 to 3 but there are 3 cells"),
        (np.zeros((2, 3)), np.array([0, -1]), 75.0, "code", "leave points without a cell out"),
        (np.zeros((2, 3)), np.array([0]), 75.0, "paper", r"true_cell must be \[2\]"),
        (np.zeros(3), np.array([0, 0, 0]), 75.0, "paper", r"must be \[batch, num_cells\]"),
        (np.zeros((1, 3)), np.array([0]), 0.0, "paper", "tau_km must be a positive"),
        (np.zeros((1, 3)), np.array([0]), float("nan"), "paper", "tau_km must be a positive"),
        (np.zeros((1, 3)), np.array([0]), 75.0, "linear", "rule must be 'paper' or 'code'"),
    ],
)
def test_bad_input(distances, true_cell, tau, rule, message):
    with pytest.raises(ValueError, match=message):
        haversine_smoothed_targets(distances, true_cell, tau, rule=rule)
    with pytest.raises(ValueError, match=message):
        haversine_smoothed_targets(torch.tensor(distances), torch.tensor(true_cell), tau, rule=rule)
