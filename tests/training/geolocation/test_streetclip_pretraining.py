import csv
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from geobased.modeling_streetclip import StreetCLIPModel
from geobased.training.geolocation_sources import RecordStream
from geobased.training.streetclip_pretraining import StreetCLIPArguments, country_accuracy, train


def arguments(clip, output_dir, **changes):
    options = {
        "output_dir": str(output_dir),
        "model": str(clip),
        "mixture": "pigeon",
        "max_steps": 4,
        "per_device_train_batch_size": 12,
        "chunk_size": 5,
        "learning_rate": 1e-3,
        "holdout_fraction": 0.3,
        "holdout_seed": 3,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return StreetCLIPArguments(**(options | changes))


@pytest.fixture(scope="module")
def run(photos, clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, train(arguments(clip, folder, data=[str(photos / "photos.csv")]))


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(photos, clip, run, tmp_path):
    folder, log = run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    resumed = train(arguments(clip, tmp_path / "run", data=[str(photos / "photos.csv")], resume=True))
    assert resumed["losses"] == log["losses"] and resumed["metrics"] == log["metrics"]
    one, two = (StreetCLIPModel.from_pretrained(path / "final").state_dict() for path in (folder, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_a_run_leaves_behind(run):
    folder, log = run
    assert json.loads((folder / "training_log.json").read_text())["losses"] == log["losses"]
    assert list(log["skipped_images"]) == ["08.png"] and "no image" in log["skipped_images"]["08.png"]
    assert log["split"]["training_images"] + log["split"]["evaluation_images"] == 48
    assert log["countries"] == ["Fiji", "Kenya", "Peru", "Sweden", "the Netherlands"]
    assert set(log["metrics"]) == {"eval_loss", "eval_country_accuracy"}
    with (folder / "learning_curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert list(rows[0]) == ["step", "eval_country_accuracy", "eval_loss", "grad_norm", "learning_rate", "loss"]
    assert rows[1]["eval_loss"] and not rows[0]["eval_loss"]
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert CLIPModel.from_pretrained(folder / "final", dtype="auto").dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(folder / "final")) == 514
    assert CLIPImageProcessorPil.from_pretrained(folder / "final").crop_size["height"] == 16
    card = (folder / "final" / "README.md").read_text()
    assert "held out" in card and "country accuracy" in card and "1 images could not be read" in card


@pytest.mark.parametrize("accumulated", [1, 2])
def test_chunks_change_nothing_but_memory(photos, clip, tmp_path, accumulated):
    options = {
        "data": [str(photos / "photos.csv")],
        "gradient_accumulation_steps": accumulated,
        "save_strategy": "no",
        "eval_steps": 4,
        # once with workers, which report unreadable images too
        "dataloader_num_workers": 2 * (accumulated - 1),
    }
    chunked, whole = (train(arguments(clip, tmp_path / str(size), chunk_size=size, **options)) for size in (5, 0))
    norms = [[entry["grad_norm"] for entry in log["history"] if "grad_norm" in entry] for log in (chunked, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for (_, one), (_, two) in zip(chunked["losses"], whole["losses"], strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    assert list(chunked["skipped_images"]) == ["08.png"]


def test_training_learns(photos, clip, tmp_path):
    options = {"max_steps": 40, "save_strategy": "no", "mixture": "streetclip", "share_equal_captions": True}
    log = train(arguments(clip, tmp_path, data=[str(photos / "photos.csv")], eval_steps=40, **options))
    losses = [loss for _, loss in log["losses"]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_stream_is_trained_on(photos, clip, tmp_path):
    with (photos / "photos.csv").open() as file:
        rows = [{**row, "path": str(photos / row["path"])} for row in csv.DictReader(file)]
    log = train(arguments(clip, tmp_path, eval_steps=4, save_strategy="no"), stream=RecordStream(rows), countries=["Peru"])
    assert len(log["losses"]) == 4 and log["split"] is None
    assert list(log["skipped_images"]) == ["row 8"]


def test_a_configuration_trains_from_nothing(photos, clip, tmp_path):
    changes = {"model": None, "config": str(clip / "config.json"), "processor": str(clip), "max_steps": 1}
    log = train(arguments(clip, tmp_path, data=[str(photos)], save_dtype="bfloat16", save_strategy="no", **changes))
    assert log["steps"] == 1
    assert StreetCLIPModel.from_pretrained(tmp_path / "final", dtype="auto").dtype == torch.bfloat16


def test_country_accuracy_leaves_out_unknown_countries():
    from transformers.trainer_utils import EvalPrediction

    assert country_accuracy(EvalPrediction([0, 1, 2], [0, 0, -1])) == {"country_accuracy": 50.0}
    assert country_accuracy(EvalPrediction([0], [-1])) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": None}, "output_dir"),
        ({"data": []}, "give the images once"),
        ({"mixture": "poem"}, "'poem'"),
        ({"save_dtype": "int3"}, "int3"),
        ({"chunk_size": -1}, "chunk_size=-1"),
        ({"model": None}, "exactly one of --model"),
        ({"holdout_fraction": 1.5}, "fraction=1.5"),
        ({"max_steps": -1, "num_train_epochs": 0.0}, "num_train_epochs"),
        ({"block_degrees": 90.0, "holdout_fraction": 0.01}, "no image to hold out"),
    ],
)
def test_bad_arguments(photos, clip, tmp_path, changes, message):
    options = {"data": [str(photos / "photos.csv")], "output_dir": str(tmp_path / "run")} | changes
    with pytest.raises(ValueError, match=message):
        train(arguments(clip, options.pop("output_dir"), **options) if options["output_dir"] else _without_output(clip, options))


def _without_output(clip, options):
    made = arguments(clip, "unused", **{name: value for name, value in options.items() if name != "output_dir"})
    made.output_dir = None
    return made


def test_runs_are_not_overwritten_and_nothing_is_no_run(photos, clip, run, tmp_path):
    data = [str(photos / "photos.csv")]
    with pytest.raises(FileExistsError, match="--resume"):
        train(arguments(clip, run[0], data=data))
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(arguments(clip, tmp_path, data=data, resume=True))
