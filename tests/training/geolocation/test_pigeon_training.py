import json
import shutil

import numpy as np
import pytest
import torch

from geobased.modeling_pigeon import PigeonForImageGeolocalization
from geobased.training.geolocation_sources import RecordStream
from geobased.training.pigeon_embeddings import PigeonEmbeddingArguments, embed
from geobased.training.pigeon_evaluation import PigeonMetrics
from geobased.training.pigeon_training import PigeonArguments, train

HEADS = [
    {"name": "environment", "kind": "regression", "size": 1, "weight": 8.0, "labels": ["elevation"], "log_offsets": [1.0]},
    {"name": "month", "kind": "classification", "size": 12, "labels": [str(month) for month in range(1, 13)]},
]


def arguments(clip, geocells, output_dir, **changes):
    options = {
        "output_dir": str(output_dir),
        "model": str(clip),
        "geocells": str(geocells),
        "heads": json.dumps(HEADS),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        # smaller than the towns: their images are on both sides
        "block_degrees": 0.05,
        "holdout_fraction": 0.3,
        "holdout_seed": 1,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "bootstrap": 20,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return PigeonArguments(**(options | changes))


@pytest.fixture(scope="module")
def embeddings(photos, clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    embed(PigeonEmbeddingArguments(str(clip), [str(photos)], str(folder), dtype="float32", device="cpu", disable_tqdm=True))
    return folder


@pytest.fixture(scope="module")
def run(photos, clip, geocells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, train(arguments(clip, geocells, folder, data=[str(photos)], trainable_layers=1))


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(photos, clip, geocells, run, tmp_path):
    folder, log = run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    resumed = train(arguments(clip, geocells, tmp_path / "run", data=[str(photos)], trainable_layers=1, resume=True))
    assert resumed["losses"] == log["losses"] and resumed["metrics"] == log["metrics"]
    one, two = (PigeonForImageGeolocalization.from_pretrained(path / "final").state_dict() for path in (folder, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_a_run_leaves_behind(run, clip):
    folder, log = run
    assert list(log["skipped_images"]) == ["08.png"]
    assert {
        "eval_median_km",
        "eval_within_25km",
        "eval_geoscore",
        "eval_country_accuracy",
        "eval_cell_accuracy",
        "eval_cell_top5_accuracy",
        "eval_loss",
    } <= set(log["metrics"])
    assert {"step", "eval_median_km", "loss"} <= set((folder / "learning_curve.csv").read_text().split("\n")[0].split(","))
    assert (folder / "learning_curve.png").stat().st_size > 1000
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["count"] == log["split"]["evaluation_images"] and evaluation["settings"]["bootstrap"] == 20
    assert evaluation["metrics"]["median_km"]["value"] == pytest.approx(log["metrics"]["eval_median_km"])
    assert "<html" in (folder / "evaluation.html").read_text()
    model = PigeonForImageGeolocalization.from_pretrained(folder / "final")
    assert model.geocells.centroids()[2].tolist() == [-12.0, -77.0]
    head = model.config.head("environment") if hasattr(model.config, "head") else model.config.heads[0]
    assert 2 < head["means"][0] < 6 and head["stds"][0] > 1
    # the first layer is frozen, the last was trained
    clip_weights = PigeonForImageGeolocalization.from_clip(_clip(clip), num_cells=6).vision_tower.encoder.layers
    layers = model.vision_tower.encoder.layers
    assert torch.equal(layers[0].mlp.fc1.weight, clip_weights[0].mlp.fc1.weight)
    assert not torch.equal(layers[1].mlp.fc1.weight, clip_weights[1].mlp.fc1.weight)
    assert "geocells" in (folder / "final" / "README.md").read_text()


def _clip(folder):
    from geobased.modeling_streetclip import StreetCLIPModel

    return StreetCLIPModel.from_pretrained(folder)


def test_embeddings_train_as_images_do(photos, clip, geocells, embeddings, tmp_path):
    # whole batches of one order: the unreadable image is left out on both sides
    images = train(arguments(clip, geocells, tmp_path / "images", data=[str(photos)], heads=None, save_strategy="no"))
    stored = train(arguments(clip, geocells, tmp_path / "stored", embeddings=[str(embeddings)], heads=None, save_strategy="no"))
    assert stored["split"]["training_images"] + stored["split"]["evaluation_images"] == 47
    assert stored["skipped_images"].keys() == images["skipped_images"].keys()
    assert stored["losses"][0][1] == pytest.approx(images["losses"][0][1], rel=0.2)


def test_training_learns_and_prototypes_come_with_the_model(clip, geocells, embeddings, tmp_path):
    pytest.importorskip("sklearn")
    options = {"max_steps": 150, "learning_rate": 0.05, "heads": None, "eval_steps": 150, "save_strategy": "no"}
    log = train(
        arguments(
            clip, geocells, tmp_path / "run", embeddings=[str(embeddings)], prototypes=True, prototype_min_samples=2, **options
        )
    )
    assert log["metrics"]["eval_cell_accuracy"] > 60 and log["metrics"]["eval_within_25km"] > 60
    model = PigeonForImageGeolocalization.from_pretrained(tmp_path / "run" / "final")
    assert model.config.num_prototypes == log["prototypes"] > 0
    again = train(
        arguments(
            tmp_path / "run" / "final", geocells, tmp_path / "more", embeddings=[str(embeddings)], heads=None, processor=str(clip)
        )
    )
    assert again["losses"][0][1] < log["losses"][0][1] / 2 and again["prototypes"] == log["prototypes"]


def test_prototypes_from_images(photos, clip, geocells, tmp_path):
    pytest.importorskip("sklearn")
    log = train(arguments(clip, geocells, tmp_path, data=[str(photos)], prototypes=True, prototype_min_samples=30, max_steps=1))
    assert log["prototypes"] == 6


def test_a_stream_is_trained_on(photos, clip, geocells, tmp_path):
    import csv

    with (photos / "photos.csv").open() as file:
        rows = [{**row, "path": str(photos / row["path"])} for row in csv.DictReader(file)]
    heads = json.dumps([HEADS[0] | {"means": [5.0], "stds": [2.0]}, HEADS[1]])
    log = train(arguments(clip, geocells, tmp_path, heads=heads, save_strategy="no"), stream=RecordStream(rows))
    assert len(log["losses"]) == 4 and "eval_median_km" in log["metrics"]


def test_metrics_by_hand():
    metrics = PigeonMetrics(["SE", "PE", "SE"], 0.9)
    predictions = np.array([[55.7, 13.2, 50.0, 0.9, 0, 1, 2, -1, -1], [0.0, 0.0, 1.0, 0.5, 2, 1, 0, -1, -1]])
    truths = np.array([[55.7, 13.2, 0], [0.0, 1.0, 1]])
    result = metrics.result(predictions, truths)
    assert result.metrics["country_accuracy"].value == 50.0
    assert result.metrics["median_km"].value == pytest.approx(6371.0 * np.pi / 180 / 2, rel=2e-3)
    from transformers.trainer_utils import EvalPrediction

    found = metrics(EvalPrediction(predictions, truths))
    assert found["cell_accuracy"] == 50.0 and found["cell_top5_accuracy"] == 100.0 and found["within_200km"] == 100.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model is required"),
        ({"data": []}, "give the images once"),
        ({"trainable_layers": 9}, "trainable_layers=9"),
        ({"heads": "nowhere.json"}, "neither a JSON list nor a file"),
        ({"heads": '[{"name": "rain", "kind": "regression", "size": 1}]'}, "needs columns rain"),
        ({"geocells": "nowhere.geocells"}, "no file of geocells"),
        ({"save_dtype": "int3"}, "int3"),
        ({"smoothing_rule": "mine"}, "mine"),
    ],
)
def test_bad_arguments(photos, clip, geocells, tmp_path, changes, message):
    made = arguments(clip, geocells, tmp_path / "run", data=[str(photos)])
    for name, value in changes.items():
        setattr(made, name, value)
    with pytest.raises(ValueError, match=message):
        train(made)


def test_embeddings_of_another_tower_are_refused(photos, clip, geocells, embeddings, run, tmp_path):
    with pytest.raises(ValueError, match="not of the tower"):
        train(arguments(run[0] / "final", geocells, tmp_path, embeddings=[str(embeddings)], processor=str(clip), heads=None))
    with pytest.raises(ValueError, match="trainable_layers=1 needs images"):
        train(arguments(clip, geocells, tmp_path, embeddings=[str(embeddings)], trainable_layers=1))
    with pytest.raises(ValueError, match="means and stds"):
        train(arguments(clip, geocells, tmp_path), stream=RecordStream([]))
    with pytest.raises(FileExistsError, match="--resume"):
        train(arguments(clip, geocells, run[0], data=[str(photos)]))
