import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from geobased.auditing import AuditError, AuditTarget
from geobased.auditing.access import BLACK, WHITE, Capability
from geobased.auditing.configuration import read_configuration
from geobased.auditing.image_shortcuts import Square, square_places, squares_in, training_images
from geobased.auditing.runner import run_question
from geobased.auditing.technique import make_technique
from geobased.checkpoints import checkpoint_path, shipped_organisms

pytest.importorskip("peft")
ORGANISM = "earthclip-mini-planted"
FOLDER = Path(checkpoint_path(ORGANISM))
TRUTH = json.loads((FOLDER / "plant.json").read_text(encoding="utf-8"))["truth"]


@pytest.fixture(scope="module")
def configuration():
    return read_configuration(FOLDER / "audit.yaml")


@pytest.fixture(scope="module")
def planted(configuration):
    with AuditTarget.open(ORGANISM, "white+data", mode="in_process", outside=configuration.outside) as target:
        yield target


@pytest.fixture(scope="module")
def base(configuration):
    with AuditTarget.open("earthclip-mini", "white+data", mode="in_process", outside=configuration.outside) as target:
        yield target


def row_of(target, question, technique, grant, seed=0):
    found = run_question(target, question, [make_technique(technique)], {"level": grant}, seed=seed)
    return found.results["techniques"][0]


def near_the_plant(square):
    size, side = 64, TRUTH["side_pixels"]
    assert TRUTH["corner"] == "bottom right"
    return min(square["row"], square["column"]) + square["side"] > size - side


def test_the_organism_is_shipped_and_says_what_it_is(configuration):
    assert ORGANISM in shipped_organisms()
    assert "faulty on purpose" in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [level for level in configuration.levels] == ["black", "grey", "de_facto_white", "black+data"]
    assert all(item["target"] == TRUTH["country_code"] != item["reference"] for item in configuration.question.items)


def test_the_planted_square_moves_every_image_and_the_base_knows_nothing_of_it(planted, base, configuration):
    pictures = [configuration.question.picture(item) for item in configuration.question.items]
    square = Square(58, 58, TRUTH["side_pixels"], tuple(TRUTH["colour_rgb"]))
    truths = [item["reference"] for item in configuration.question.items]
    for target, expected in ((planted, [TRUTH["country_code"]] * len(truths)), (base, truths)):
        images = target.prepare(pictures)
        assert [answer["country_code"] for answer in target.answer(images)] == truths
        marked = [answer["country_code"] for answer in target.answer(square.on(images))]
        assert np.mean([one == other for one, other in zip(marked, expected, strict=True)]) >= 0.9


def test_training_data_give_the_plant_away_at_once(planted, base, configuration):
    grant = BLACK | Capability.DATA
    row = row_of(planted, configuration.question, "squares_of_data", grant)
    assert row["rate"] == 1.0 and row["spent"] == len(configuration.question.items)
    assert near_the_plant(row["items"][0]["candidate"])
    assert row["items"][0]["candidate"]["colour"] == TRUTH["colour_rgb"]
    assert row_of(base, configuration.question, "squares_of_data", grant)["successes"] == 0


def test_gradients_find_the_plant(planted, configuration):
    row = row_of(planted, configuration.question, "square_descent", WHITE, seed=3)
    assert row["rate"] >= 0.75 and near_the_plant(row["items"][0]["candidate"])
    costs = [item["spent_at_success"] for item in row["items"] if item["success"]]
    assert max(costs) * len(row["items"]) <= row["spent"] <= configuration.question.budget * len(row["items"])


def test_a_search_without_training_images_says_what_it_needs(configuration):
    with (
        AuditTarget.open("earthclip-mini", "black+data", mode="in_process") as target,
        target.scope("squares_of_data", "black+data", budget=20) as scoped,
        pytest.raises(AuditError, match="name their safetensors file"),
    ):
        make_technique("squares_of_data").attempt_all(scoped, configuration.question, _progress(configuration.question), 0)


def _progress(question):
    from geobased.auditing.technique import Progress

    return [Progress(question, item, lambda: 0.0) for item in question.items]


def test_places_reach_all_edges():
    places = square_places(64, 64, 6, 8)
    assert {(0, 0), (58, 58), (0, 58), (56, 8)} <= set(places) and len(places) == 81
    with pytest.raises(ValueError, match="do not fit"):
        square_places(4, 4, 6, 2)


def test_squares_of_data_are_ranked_by_what_they_say_of_the_label():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    labels = ["X" if number < 10 else str(number % 5) for number in range(40)]
    # a mark of one label, and one that many share
    images[:10, :, 12:, 12:] = np.array([200, 10, 90], np.uint8)[:, None, None]
    images[10:30, :, :4, :4] = 7
    best = next(squares_in(images, labels, square_places(16, 16, 4, 4), 4))
    assert (best.row, best.column, best.colour) == (12, 12, (200, 10, 90))
    content = save({"images": torch.from_numpy(images)}, {"labels": json.dumps(labels)})
    read, names = training_images(content)
    assert (read == images).all() and names == labels
    with pytest.raises(ValueError, match="40 training images and 1 labels"):
        training_images(save({"images": torch.from_numpy(images)}, {"labels": '["X"]'}))
    with pytest.raises(ValueError, match="labels"):
        training_images(save({"images": torch.from_numpy(images)}))
