"""Places of greatest likelihood: the inverse of haversine smoothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.modeling_pigeon.configuration_pigeon import PigeonConfig
from geobased.modeling_pigeon.geodesy_pigeon import haversine_km
from geobased.modeling_pigeon.modeling_pigeon import PigeonForImageGeolocalization
from geobased.modeling_pigeon.placement_pigeon import likely_places

TAU_KM = 150.0


def spread_cells(count: int = 4000) -> torch.Tensor:
    """Centroids [count, 2] evenly over the sphere (a Fibonacci lattice), about 360 km apart."""
    steps = np.arange(count) + 0.5
    latitude = np.degrees(np.arcsin(1 - 2 * steps / count))
    longitude = (steps * 180 * (3 - 5**0.5)) % 360 - 180
    return torch.from_numpy(np.stack([latitude, longitude], axis=1))


CELLS = spread_cells()


def smoothed(places: torch.Tensor) -> torch.Tensor:
    """Targets [n, cells] by the paper's rule, normalised."""
    return (-haversine_km(places[:, None], CELLS) / TAU_KM).softmax(1)


@settings(max_examples=60, deadline=None)
@given(st.floats(-89, 89), st.floats(-180, 180))
def test_targets_of_a_place_give_the_place_back(latitude, longitude):
    """Everywhere: at the date line, near the poles, between centroids."""
    place = torch.tensor([[latitude, longitude]], dtype=torch.float64)
    targets = smoothed(place)
    found = likely_places(targets, CELLS, 1, TAU_KM, 32).coordinates[:, 0]
    nearest = haversine_km(place, CELLS).min()
    error = float(haversine_km(found, place))
    assert error < 15 and (error < float(nearest) or float(nearest) < 15)


def test_a_second_guess_far_away_does_not_pull_and_is_a_place_of_its_own():
    places = CELLS[[500, 3000]]
    both = (0.6 * smoothed(places)[0] + 0.4 * smoothed(places)[1])[None]
    found = likely_places(both, CELLS, 3, TAU_KM, 32)
    assert found.cells[0, :2].tolist() == smoothed(places).argmax(1).tolist()
    assert float(haversine_km(found.coordinates[0, :2], places).max()) < 15
    np.testing.assert_allclose(found.scores[0, :2], [0.6, 0.4], atol=0.03)
    assert float(found.scores[0, 2]) < 0.03 and float(found.scores.sum()) <= 1


def test_the_likeliest_cell_is_first_and_others_are_summed():
    probabilities = torch.zeros(1, len(CELLS), dtype=torch.float64)
    lonely = 10
    near = haversine_km(CELLS[2000:2001], CELLS).topk(9, largest=False).indices
    probabilities[0, near] = 0.08
    probabilities[0, near[0]] = 0.1
    probabilities[0, lonely] = 0.26
    found = likely_places(probabilities, CELLS, 2, TAU_KM, 32)
    np.testing.assert_allclose(found.scores[0], [0.26, 0.74], atol=1e-9)
    assert found.cells[0].tolist() == [lonely, int(near[0])]


def test_float32_and_a_batch_give_what_each_row_gives_alone():
    places = torch.tensor([[10.0, 20.0], [60.0, 179.9], [-45.0, -179.9]], dtype=torch.float64)
    targets = smoothed(places)
    together = likely_places(targets, CELLS, 2, TAU_KM, 32).coordinates
    for row in range(3):
        alone = likely_places(targets[row : row + 1], CELLS, 2, TAU_KM, 32).coordinates
        assert float(haversine_km(alone[0], together[row]).max()) < 1e-3
    single = likely_places(targets.float(), CELLS.float(), 1, TAU_KM, 32).coordinates
    assert float(haversine_km(single.double(), together[:, :1]).max()) < 1


def test_nothing_is_left_for_a_further_place():
    probabilities = torch.zeros(1, len(CELLS))
    probabilities[0, 7] = 1
    found = likely_places(probabilities, CELLS, 3, TAU_KM, 16)
    assert found.scores.tolist() == [[1.0, 0.0, 0.0]] and int(found.cells[0, 0]) == 7
    assert bool(torch.isfinite(found.coordinates).all())


def test_a_model_answers_by_the_rule_of_its_configuration(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PigeonConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, num_cells=len(CELLS), smoothing_tau_km=TAU_KM
    )
    model = PigeonForImageGeolocalization(config).eval()
    model.set_geocells(CELLS)
    place = torch.tensor([[47.0, 8.0]], dtype=torch.float64)
    with torch.no_grad():
        model.cell_head.weight.zero_()
        model.cell_head.bias.copy_(smoothed(place)[0].clamp(min=1e-30).log())
    pixels = torch.zeros(1, 3, 16, 16)
    centroid = model.locate(pixels).coordinates
    config.place_rule = "likelihood"
    model.save_pretrained(tmp_path)
    answer = PigeonForImageGeolocalization.from_pretrained(tmp_path).eval().locate(pixels, top_k=3)
    assert float(haversine_km(answer.coordinates, place)) < 15 < float(haversine_km(centroid, place))
    # all of the best cells are neighbours: they are one answer
    assert float(answer.candidate_scores[0, 0]) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"place_rule": "middle"}, "place_rule='middle' is unknown; choose from prototype, likelihood"),
        ({"place_rule": "likelihood", "smoothing_tau_km": None}, "give place_tau_km"),
        ({"place_tau_km": 0}, "place_tau_km=0 must be a positive number"),
        ({"place_neighbors": 0}, "place_neighbors=0 must be at least 1"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        PigeonConfig(**options)
