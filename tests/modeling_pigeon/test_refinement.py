"""Prototypes and refinement: clusters against scikit-learn, answers against a loop over images, limits, storage, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.modeling_pigeon import PigeonConfig, PigeonPrototypes, build_prototypes
from geobased.modeling_pigeon.geodesy_pigeon import haversine_km, spherical_mean
from geobased.modeling_pigeon.refinement_pigeon import PrototypeRefinement

pytest.importorskip("sklearn")


def by_a_loop(config, prototypes, embedding, probabilities, centroids):
    """Cells, scores and places of one image, best first, by the words of the specification."""
    cells = probabilities.topk(config.refinement_top_k).indices.tolist()
    nearest, places = {}, {}
    for cell in cells:
        places[cell] = centroids[cell]
        own = [i for i in range(len(prototypes)) if prototypes.cells[i] == cell]
        if own:
            nearest[cell], best = min((math.dist(embedding.tolist(), prototypes.embeddings[i].tolist()), i) for i in own)
            members = [i for i, owner in enumerate(prototypes.image_prototypes.tolist()) if owner == best]
            places[cell] = prototypes.coordinates[best]
            if members:
                places[cell] = prototypes.image_coordinates[
                    min(members, key=lambda i: math.dist(embedding.tolist(), prototypes.image_embeddings[i].tolist()))
                ]
    normalizer = sum(math.exp(-distance / config.refinement_temperature) for distance in nearest.values())
    weights = {cell: 1 / len(cells) for cell in cells}
    for cell, distance in nearest.items():
        share = len(nearest) / len(cells)
        weights[cell] = math.exp(-distance / config.refinement_temperature) / normalizer * share
    products = {cell: probabilities[cell].item() * weights[cell] for cell in cells}
    mass = sum(probabilities[cell].item() for cell in cells)
    scores = {cell: mass * product / sum(products.values()) for cell, product in products.items()}
    limit, first = config.refinement_max_km, cells[0]
    best = max(cells, key=lambda cell: scores[cell])
    if limit is not None and haversine_km(places[best], centroids[first]) > limit:
        scores = {cell: probabilities[cell].item() for cell in cells}
        if haversine_km(places[first], centroids[first]) > limit:
            places[first] = centroids[first]
    ranked = sorted(cells, key=lambda cell: -scores[cell])
    return ranked, [scores[cell] for cell in ranked], torch.stack([places[cell] for cell in ranked])


@pytest.mark.parametrize("keep_images", [True, False])
@pytest.mark.parametrize("changes", [{}, {"refinement_temperature": 0.2}, {"refinement_max_km": 400.0}, {"refinement_top_k": 40}])
def test_refinement_matches_a_loop(make_model, make_prototypes, changes, keep_images):
    model, prototypes = make_model(**changes), make_prototypes(keep_images=keep_images)
    model.set_prototypes(prototypes)
    embeddings = torch.randn(60, 32)
    answer, plain = model.locate(embeddings=embeddings), model.locate(embeddings=embeddings, refine=False)
    changed = 0
    for i in range(60):
        cells, scores, places = by_a_loop(
            model.config, prototypes, embeddings[i], plain.cell_probabilities[i], model.geocells.centroids()
        )
        assert answer.candidate_cells[i].tolist() == cells
        torch.testing.assert_close(answer.candidate_scores[i], torch.tensor(scores), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(answer.candidate_coordinates[i], places, rtol=0, atol=1e-6)
        changed += cells[0] != plain.candidate_cells[i, 0].item()
    assert 0 < changed < 60, "refinement changes nothing, or everything: the test shows little"
    torch.testing.assert_close(answer.coordinates, answer.candidate_coordinates[:, 0])


def test_nearest_image_is_found_not_the_farthest(make_model, make_prototypes):
    model = make_model(refinement_max_km=None, refinement_top_k=100, refinement_temperature=1e-2)
    prototypes = make_prototypes(empty=())
    model.set_prototypes(prototypes)
    single = torch.bincount(prototypes.image_prototypes)[prototypes.image_prototypes] == 1
    queries = prototypes.image_embeddings[single]  # which are prototypes themselves
    answer = model.locate(embeddings=queries)
    torch.testing.assert_close(answer.coordinates, prototypes.image_coordinates[single], rtol=0, atol=1e-6)


def test_cell_without_prototypes_answers_with_its_centroid(make_model, make_prototypes):
    model = make_model(refinement_top_k=100)
    empty = tuple(range(0, 100, 7))
    model.set_prototypes(make_prototypes(empty=empty))
    answer = model.locate(embeddings=torch.randn(20, 32))
    has_none = torch.isin(answer.candidate_cells, torch.tensor(empty))
    assert has_none.any(1).all()
    centroids = model.geocells.centroids()[answer.candidate_cells]
    torch.testing.assert_close(answer.candidate_coordinates[has_none], centroids[has_none])
    assert (answer.candidate_coordinates[~has_none] != centroids[~has_none]).any(1).all()


def test_no_cell_with_prototypes_changes_nothing(make_model, make_prototypes):
    model, embeddings = make_model(refinement_top_k=3), torch.randn(20, 32)
    without = model.locate(embeddings=embeddings)
    # prototypes in cells that none of these images is near to
    empty = tuple(without.candidate_cells.unique().tolist())
    model.set_prototypes(make_prototypes(empty=empty))
    answer = model.locate(embeddings=embeddings)
    for name in ("candidate_cells", "candidate_scores", "coordinates"):
        torch.testing.assert_close(answer[name], without[name])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(1, 12),
    competing=st.integers(1, 12),
    temperature=st.floats(1e-3, 50),
    limit=st.one_of(st.none(), st.floats(1, 20000)),
)
def test_scores_stay_a_distribution_and_the_limit_holds(seed, top_k, competing, temperature, limit):
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.stack(
        [180 * torch.rand(12, generator=generator) - 90, 360 * torch.rand(12, generator=generator) - 180], dim=1
    ).double()
    cells = torch.arange(12).repeat_interleave(torch.randint(0, 3, (12,), generator=generator))
    means = torch.randn(len(cells), 8, generator=generator)
    owners = torch.arange(len(cells))
    prototypes = PigeonPrototypes(means, centroids[cells].flip(0), cells, means, centroids[cells].flip(0), owners)
    config = PigeonConfig(
        vision_config={"hidden_size": 8, "num_attention_heads": 2},
        num_cells=12,
        num_prototypes=len(cells),
        num_prototype_images=len(cells),
        refinement_top_k=competing,
        refinement_temperature=temperature,
        refinement_max_km=limit,
    )
    refinement = PrototypeRefinement(config)
    refinement.fill(prototypes)
    probabilities = torch.randn(9, 12, generator=generator).mul(3).softmax(1)
    refined = refinement(torch.randn(9, 8, generator=generator), probabilities, centroids, top_k)
    assert refined.cells.shape == refined.scores.shape == (9, top_k)
    assert (refined.scores.diff(dim=1) <= 0).all()
    assert torch.isfinite(refined.scores).all()
    if top_k >= competing:
        best = probabilities.topk(top_k).values.sum(1)
        torch.testing.assert_close(refined.scores.sum(1), best, rtol=1e-4, atol=1e-5)
    if limit is not None:
        first = centroids[probabilities.argmax(1)]
        assert (haversine_km(refined.coordinates[:, 0], first) <= limit * (1 + 1e-9) + 1e-3).all()


def test_prototypes_survive_saving(make_model, make_prototypes, tmp_path):
    model, embeddings = make_model(radius_scales={"0.9": 1.7}), torch.randn(10, 32)
    model.set_prototypes(make_prototypes())
    answer = model.locate(embeddings=embeddings)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.num_prototypes == model.config.num_prototypes > 0
    for name, value in loaded.locate(embeddings=embeddings).items():
        assert torch.equal(value, answer[name]), name
    loaded.set_prototypes(None)
    loaded.save_pretrained(tmp_path / "without")
    again = type(model).from_pretrained(tmp_path / "without")
    assert again.config.num_prototypes == 0
    plain = model.locate(embeddings=embeddings, refine=False)
    assert torch.equal(again.locate(embeddings=embeddings).coordinates, plain.coordinates)


def test_int8_prototypes_answer_the_same(make_model, make_prototypes, tmp_path):
    exact, small = make_model(), make_model(prototype_storage="int8")
    prototypes, embeddings = make_prototypes(), torch.randn(100, 32)
    exact.set_prototypes(prototypes)
    small.set_prototypes(prototypes)
    assert small.refinement.images.embeddings.dtype == torch.int8
    rows = small.refinement.images.rows(torch.arange(len(prototypes.image_embeddings)))
    span = prototypes.image_embeddings.amax(0) - prototypes.image_embeddings.amin(0)
    assert ((rows - prototypes.image_embeddings).abs() <= span / 254 * 0.501 + 1e-6).all()
    ours, theirs = small.locate(embeddings=embeddings), exact.locate(embeddings=embeddings)
    assert (ours.candidate_cells[:, 0] == theirs.candidate_cells[:, 0]).float().mean() >= 0.97
    small.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = type(small).from_pretrained(tmp_path, dtype=dtype)
        assert loaded.refinement.images.embeddings.dtype == torch.int8
    again = type(small).from_pretrained(tmp_path).locate(embeddings=embeddings)
    assert torch.equal(again.coordinates, ours.coordinates)


# building


def clustered(seed: int = 0):
    """Three tight clusters of five images in cell 2, two images in cell 4, images scattered all over in cell 5."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.tensor([[45.0, 9.0], [45.4, 9.4], [44.6, 9.9]], dtype=torch.float64)
    tight = middles.repeat_interleave(5, 0) + 0.005 * torch.randn(15, 2, generator=generator, dtype=torch.float64)
    pair = torch.tensor([[46.0, 13.0], [46.5, 13.5]], dtype=torch.float64)
    wide = torch.tensor([[-20.0, 20], [-21, 35], [-33, 22], [-5, 30]], dtype=torch.float64)
    places, cells = torch.cat([wide, tight, pair]), torch.tensor([5] * 4 + [2] * 15 + [4] * 2)
    order = torch.randperm(21, generator=generator)
    return torch.randn(21, 32, generator=generator), places[order], cells[order]


def test_clusters_of_a_cell_become_prototypes():
    embeddings, places, cells = clustered()
    prototypes = build_prototypes(embeddings, places, cells, progress=False)
    assert (prototypes.cells == 2).sum() == 3
    assert (prototypes.cells == 4).sum() == 1, "a cell of fewer images than min_samples is one cluster"
    for i in range(len(prototypes)):
        members = prototypes.image_prototypes == i
        torch.testing.assert_close(prototypes.embeddings[i], prototypes.image_embeddings[members].mean(0))
        torch.testing.assert_close(prototypes.coordinates[i], spherical_mean(prototypes.image_coordinates[members]))
        spread = haversine_km(prototypes.coordinates[i], prototypes.image_coordinates[members])
        assert prototypes.cells[i] != 2 or (spread.max() < 3 and members.sum() == 5)


def test_clusters_are_those_of_scikit_learn():
    import numpy as np
    from sklearn.cluster import OPTICS

    generator = torch.Generator().manual_seed(3)
    places = torch.tensor([46.0, 10.0]) + 0.5 * torch.randn(80, 2, generator=generator, dtype=torch.float64)
    prototypes = build_prototypes(torch.randn(80, 4), places, torch.zeros(80, dtype=torch.int64), progress=False)
    distances = haversine_km(places[:, None], places[None]).clamp(min=1e-5).numpy()
    np.fill_diagonal(distances, 0)
    labels = OPTICS(min_samples=3, xi=0.15, metric="precomputed").fit_predict(distances)
    assert len(prototypes) == labels.max() + 1 > 1
    assert len(prototypes.image_prototypes) == (labels >= 0).sum() < 80
    for i in range(len(prototypes)):
        expected = places[torch.from_numpy(labels == i)]
        assert torch.equal(prototypes.image_coordinates[prototypes.image_prototypes == i], expected)


def test_building_does_not_depend_on_chance_or_on_other_cells():
    embeddings, places, cells = clustered()
    first = build_prototypes(embeddings, places, cells, max_images_per_prototype=2, progress=False)
    second = build_prototypes(embeddings, places, cells, max_images_per_prototype=2, progress=False)
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.bincount(first.image_prototypes).max() == 2
    alone = build_prototypes(embeddings[cells == 2], places[cells == 2], cells[cells == 2], progress=False)
    assert torch.equal(alone.embeddings, first.embeddings[first.cells == 2])
    none = build_prototypes(embeddings, places, cells, max_images_per_prototype=0, progress=False)
    assert len(none) == len(first) and len(none.image_prototypes) == 0


def test_images_of_one_place_and_noise():
    same = torch.tensor([[59.3, 18.1]], dtype=torch.float64).repeat(6, 1)
    prototypes = build_prototypes(torch.randn(6, 4), same, torch.zeros(6, dtype=torch.int64), progress=False)
    assert torch.isfinite(prototypes.coordinates).all()
    generator = torch.Generator().manual_seed(3)
    places = torch.tensor([46.0, 10.0]) + 0.5 * torch.randn(80, 2, generator=generator, dtype=torch.float64)
    arguments = (torch.randn(80, 4), places, torch.zeros(80, dtype=torch.int64))
    dropped, single = (build_prototypes(*arguments, noise=noise, progress=False) for noise in ("drop", "single"))
    assert len(single.image_prototypes) == 80
    assert len(single) - len(dropped) == 80 - len(dropped.image_prototypes) > 0


def test_building_from_nothing(make_model):
    prototypes = build_prototypes(torch.zeros(0, 32), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), progress=False)
    assert len(prototypes) == 0
    model = make_model()
    model.set_prototypes(prototypes)
    assert model.locate(embeddings=torch.randn(2, 32)).coordinates.shape == (2, 2)


def test_middle_of_places_across_the_date_line():
    middle = spherical_mean(torch.tensor([[-17.0, 179.5], [-17.0, -179.5]]))
    assert abs(abs(middle[1].item()) - 180) < 1e-9 and abs(middle[0].item() + 17) < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinates": torch.full((21, 2), math.nan)}, "is no place"),
        ({"coordinates": torch.zeros(20, 2)}, "must be of one length"),
        ({"embeddings": torch.full((21, 32), math.inf)}, "NaN or infinite"),
        ({"cells": torch.full((21,), -1)}, "holds -1"),
        ({"noise": "keep"}, "choose from drop, single"),
        ({"min_samples": 1}, "min_samples=1"),
        ({"xi": 1.0}, "xi=1.0"),
    ],
)
def test_bad_input_of_building(changes, message):
    arguments = dict(zip(("embeddings", "coordinates", "cells"), clustered(), strict=True)) | {"progress": False} | changes
    with pytest.raises(ValueError, match=message):
        build_prototypes(**arguments)


def test_prototypes_that_do_not_fit(make_model):
    empty = (torch.zeros(0, 32), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="prototypes are of cells up to 100"):
        make_model().set_prototypes(PigeonPrototypes(torch.zeros(1, 32), torch.zeros(1, 2), torch.tensor([100]), *empty))
    with pytest.raises(ValueError, match=r"must be \[n, 32\]"):
        make_model().set_prototypes(PigeonPrototypes(torch.zeros(1, 8), torch.zeros(1, 2), torch.tensor([0]), *empty))
    with pytest.raises(ValueError, match="ascending"):
        PigeonPrototypes(torch.zeros(2, 8), torch.zeros(2, 2), torch.tensor([1, 0]), *empty)
    with pytest.raises(ValueError, match="different lengths"):
        PigeonPrototypes(torch.zeros(2, 8), torch.zeros(1, 2), torch.tensor([0, 1]), *empty)
    with pytest.raises(ValueError, match="there are 1 prototypes"):
        PigeonPrototypes(
            torch.zeros(1, 8), torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 8), torch.zeros(1, 2), torch.tensor([1])
        )
