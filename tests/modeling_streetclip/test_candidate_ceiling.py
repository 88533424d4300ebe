"""The ceiling of a candidate set against all distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.modeling_streetclip import candidate_ceiling as module
from geobased.modeling_streetclip.candidate_ceiling import RADII_KM, candidate_ceiling

LATITUDE = st.floats(-90, 90)
LONGITUDE = st.floats(-180, 180)
POINTS = st.lists(st.tuples(LATITUDE, LONGITUDE), min_size=1, max_size=30)


def all_distances(candidates: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """[truths, candidates] km, by the angle between unit vectors as atan2 of their cross and dot product."""

    def vectors(points):
        lat, lng = np.radians(points).T
        return np.stack([np.cos(lat) * np.cos(lng), np.cos(lat) * np.sin(lng), np.sin(lat)], axis=-1)

    a, b = vectors(truths)[:, None], vectors(candidates)[None]
    return 6371.0088 * np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(axis=-1))


@settings(max_examples=100, deadline=None)
@given(POINTS, POINTS)
def test_ceiling_is_the_smallest_of_all_distances(candidates, truths):
    candidates, truths = np.array(candidates), np.array(truths)
    ceiling = candidate_ceiling(*candidates.T, *truths.T)
    distances = all_distances(candidates, truths)
    np.testing.assert_allclose(ceiling.distance_km, distances.min(axis=1), atol=2e-3)
    chosen = distances[np.arange(len(truths)), ceiling.nearest]
    np.testing.assert_allclose(chosen, distances.min(axis=1), atol=2e-3)


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    points = rng.uniform(-90, 90, 200), rng.uniform(-180, 180, 200), rng.uniform(-90, 90, 57), rng.uniform(-180, 180, 57)
    whole = candidate_ceiling(*points)
    monkeypatch.setattr(module, "MAX_ELEMENTS", 1000)
    in_blocks = candidate_ceiling(*points)
    assert np.array_equal(whole.nearest, in_blocks.nearest)
    assert np.array_equal(whole.distance_km, in_blocks.distance_km)


def test_summaries():
    # a degree of latitude is 111.195 km on the mean sphere
    ceiling = candidate_ceiling([0.0], [0.0], [0.0, 1.0, -2.0, 10.0], [0.0, 0.0, 0.0, 0.0])
    assert ceiling.percent_within() == {1.0: 25.0, 25.0: 25.0, 200.0: 50.0, 750.0: 75.0, 2500.0: 100.0}
    assert list(ceiling.percent_within()) == list(RADII_KM)
    assert ceiling.median_km == pytest.approx(1.5 * 111.195, abs=0.01)
    assert ceiling.mean_km == pytest.approx(13 / 4 * 111.195, abs=0.01)
    assert ceiling.percent_within([float(ceiling.distance_km[1])]) == {ceiling.distance_km[1]: 50.0}


def test_across_the_dateline():
    ceiling = candidate_ceiling([-17.7, -17.7], [179.9, 170.0], [-17.7], [-179.9])
    assert ceiling.nearest.tolist() == [0]
    assert ceiling.distance_km[0] == pytest.approx(21.19, abs=0.01)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (([], [], [0.0], [0.0]), "0 candidates and 1 true places"),
        (([0.0], [0.0], [], []), "1 candidates and 0 true places"),
        (([0.0], [0.0], [120.0], [10.0]), "swapped"),
        (([95.0], [10.0], [0.0], [0.0]), "candidates"),
        (([0.0], [0.0], [np.nan], [10.0]), "true places"),
        (([0.0], [0.0, 1.0], [0.0], [10.0]), "candidates"),
    ],
)
def test_bad_points(points, message):
    with pytest.raises(ValueError, match=message):
        candidate_ceiling(*points)
