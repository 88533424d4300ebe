"""Places of greatest likelihood: the inverse of haversine smoothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.modeling_pigeon.configuration_pigeon import PigeonConfig
from geobased.modeling_pigeon.geodesy_pigeon import haversine_km
from geobased.modeling_pigeon.modeling_pigeon import PigeonForImageGeolocalization
from geobased.modeling_pigeon.placement_pigeon import likeliest_places

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
    found = likeliest_places(targets, targets.topk(1).indices, CELLS, TAU_KM, 32)[:, 0]
    nearest = haversine_km(place, CELLS).min()
    error = float(haversine_km(found, place))
    assert error < 15 and (error < float(nearest) or float(nearest) < 15)


def test_a_second_guess_far_away_does_not_pull():
    places = torch.tensor([[50.0, 10.0], [-30.0, 140.0]], dtype=torch.float64)
    both = (0.6 * smoothed(places)[0] + 0.4 * smoothed(places)[1])[None]
    cells = torch.stack([smoothed(places)[i].argmax() for i in range(2)])[None]
    found = likeliest_places(both, cells, CELLS, TAU_KM, 32)
    assert found.shape == (1, 2, 2)
    assert float(haversine_km(found[0], places).max()) < 15


def test_float32_and_a_batch_give_what_each_row_gives_alone():
    places = torch.tensor([[10.0, 20.0], [60.0, 179.9], [-45.0, -179.9]], dtype=torch.float64)
    targets = smoothed(places)
    cells = targets.topk(2).indices
    together = likeliest_places(targets, cells, CELLS, TAU_KM, 32)
    for row in range(3):
        alone = likeliest_places(targets[row : row + 1], cells[row : row + 1], CELLS, TAU_KM, 32)
        assert float(haversine_km(alone[0], together[row]).max()) < 1e-3
    single = likeliest_places(targets.float(), cells, CELLS.float(), TAU_KM, 32)
    assert float(haversine_km(single.double(), together).max()) < 1


def test_cells_without_probability_around_keep_the_centroid():
    probabilities = torch.zeros(1, len(CELLS))
    probabilities[0, 0] = 1
    last = len(CELLS) - 1
    found = likeliest_places(probabilities, torch.tensor([[last]]), CELLS, TAU_KM, 16)
    assert float(haversine_km(found[0], CELLS[last : last + 1])) < 1e-6


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
    # all of the best cells are neighbours: around each of them the same place is likeliest
    assert float(haversine_km(answer.candidate_coordinates[0], place).max()) < 30


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
