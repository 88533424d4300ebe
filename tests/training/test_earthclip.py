import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from geobased.modeling_pigeon.modeling_pigeon import PigeonForImageGeolocalization
from geobased.modeling_pigeon.prototypes_pigeon import PigeonPrototypes
from geobased.modeling_streetclip.modeling_streetclip import StreetCLIPModel
from geobased.training import earthclip
from geobased.training import earthclip_release as release
from geobased.training.earthclip_evaluation import compact_prototypes
from geobased.training.earthclip_stages import fit


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Options that name a small world: smooth colours, two climates, land everywhere, hills by latitude, four units."""
    import geopandas
    import shapely

    folder = tmp_path_factory.mktemp("sources")
    lat, lng = np.meshgrid(np.linspace(89, -89, 90), np.linspace(-179, 179, 180), indexing="ij")
    phi, lam = np.radians(lat), np.radians(lng)
    vectors = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)
    Image.fromarray(np.rint((vectors + 1) * 127.5).astype(np.uint8)).save(folder / "earth.png")
    zones = np.zeros((18, 36), np.uint8)
    zones[:6] = 1
    Image.fromarray(zones).save(folder / "koeppen.png")
    with open(folder / "codes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["zoneNum", "kg_zone"], [0, "Af"], [1, "Dfb"], [2, "Ocean"]])
    latitudes, longitudes = np.arange(-90, 91, 10.0), np.arange(-180, 180, 10.0)
    np.savetxt(folder / "heights.txt", np.repeat(latitudes[:, None] * 10, len(longitudes), axis=1))
    np.savetxt(folder / "latitudes.txt", latitudes)
    np.savetxt(folder / "longitudes.txt", longitudes)
    boxes = [shapely.box(x, y, x + 180, y + 90) for x in (-180, 0) for y in (-90, 0)]
    frame = geopandas.GeoDataFrame(
        {"iso_a2": list("ABCD"), "name": ["Southwest", "Northwest", "Southeast", "Northeast"]}, geometry=boxes
    )
    frame.to_parquet(folder / "units.parquet")
    elevation = [str(folder / f"{name}.txt") for name in ("heights", "latitudes", "longitudes")]
    koeppen = [str(folder / name) for name in ("koeppen.png", "codes.csv")]
    image, boundaries = str(folder / "earth.png"), str(folder / "units.parquet")
    common = ["--preset", "tiny", "--device", "cpu", "--quiet"]
    return ["--image", image, "--elevation", *elevation, "--koeppen", *koeppen, "--boundaries", boundaries, *common]


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "full"
    earthclip.main([*sources, "--output", str(output), "--steps", "3", "3"])
    return output


def test_a_run_leaves_models_that_load_and_says_what_it_measured(finished):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    for name in ("seen", "held_out"):
        results = evaluation["sets"][name]
        assert results["crops"] == 24
        parts = ("pigeon", "pigeon_without_refinement", "pigeon_prototype_places", "pigeon_centroids")
        for row in (*parts, "zero_shot", "regression", "chance", "mean", "nearest"):
            assert {"within_200km", "within_750km", "within_2500km", "median_km", "country_accuracy"} <= set(results[row])
        assert (finished / f"{name}.html").is_file()
    assert evaluation["stages"]["clip"]["steps"] == evaluation["stages"]["pigeon"]["steps"] == 3
    assert evaluation["prototypes"]["prototypes"] > 0
    assert evaluation["bytes"]["together"] < 16_000_000
    pigeon = PigeonForImageGeolocalization.from_pretrained(finished / "pigeon", dtype=torch.float32)
    assert pigeon.config.radius_scales and pigeon.config.cell_temperature > 0
    assert [head["name"] for head in pigeon.config.heads] == ["elevation", "climate"]
    assert pigeon.refinement.prototypes.embeddings.dtype == torch.int8
    clip = StreetCLIPModel.from_pretrained(finished / "streetclip", dtype=torch.float32)
    assert clip.config.vision_config.image_size == 16
    for folder in ("streetclip", "pigeon"):
        card = (finished / folder / "README.md").read_text()
        assert "Overhead imagery, not street photos" in card and "public domain" in card and "CC BY 4.0" in card


def test_a_run_goes_on_where_it_stopped_and_ends_as_if_it_had_not(sources, finished, tmp_path, monkeypatch):
    output = tmp_path / "stopped"
    options = [*sources, "--output", str(output), "--steps", "3", "3"]
    monkeypatch.setattr("geobased.training.earthclip_stages.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("geobased.training.earthclip_stages.LOG_STEPS", 1)
    real = earthclip.pigeon_loss

    def stops(*args, **kwargs):
        loss, calls = real(*args, **kwargs), []

        def stopping(generator):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return loss(generator)

        return stopping

    monkeypatch.setattr(earthclip, "pigeon_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        earthclip.main(options)
    assert not (output / "pigeon").exists()
    monkeypatch.setattr(earthclip, "pigeon_loss", real)
    earthclip.main(options)
    for folder in ("streetclip", "pigeon"):
        weights = [(run / folder / "model.safetensors").read_bytes() for run in (output, finished)]
        assert weights[0] == weights[1]
    with pytest.raises(SystemExit, match="other seed: choose another output"):
        earthclip.main([*options, "--seed", "1"])


@pytest.mark.parametrize("ablation", ["no_smoothing", "naive_cells", "no_pretraining", "no_multitask", "world_cells"])
def test_ablations_leave_out_what_they_say(sources, finished, tmp_path, ablation):
    sets = ["--sets", str(finished / "work"), "--no-baselines"]
    options = [*sources, *sets, "--output", str(tmp_path / "run"), "--steps", "1", "1", "--ablation", ablation]
    if ablation != "no_pretraining":
        options += ["--clip", str(finished / "streetclip")]
    earthclip.main(options)
    config = json.loads((tmp_path / "run/pigeon/config.json").read_text())
    assert (config["smoothing_tau_km"] is None) == (ablation == "no_smoothing")
    assert (config["heads"] == []) == (ablation == "no_multitask")
    full = json.loads((finished / "pigeon/config.json").read_text())
    assert (config["num_cells"] == 2659) == (ablation == "world_cells")
    assert (config["num_cells"] == full["num_cells"]) == (ablation not in ("world_cells", "naive_cells"))
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["stages"]["clip"] is None


def test_what_is_missing_is_named(sources, tmp_path):
    missing = [option.replace("codes.csv", "nothing.csv") for option in sources]
    with pytest.raises(SystemExit, match="there is no file .*nothing.csv"):
        earthclip.main([*missing, "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="is no CLIP folder"):
        earthclip.main([*sources, "--output", str(tmp_path), "--clip", str(tmp_path)])


def test_seconds_choose_the_steps_and_a_loss_that_diverges_stops(tmp_path):
    options = {"folder": tmp_path, "seed": 0, "learning_rate": 0.1, "warmup": 1, "progress": False}
    model = torch.nn.Linear(2, 1)
    found = fit("timed", model, lambda generator: model(torch.ones(1, 2)).square().mean(), seconds=0.3, **options)
    assert found["steps"] > 25 and found["losses"][-1][1] < found["losses"][0][1]
    with pytest.raises(FloatingPointError, match="diverging is nan at step 1"):
        fit("diverging", model, lambda generator: model(torch.full((1, 2), torch.nan)).mean(), steps=1, **options)


def test_prototypes_fit_the_room_there_is():
    # one prototype of three images, two of one
    owners = torch.tensor([0, 0, 0, 1, 2])
    places = torch.zeros(5, 2, dtype=torch.float64)
    prototypes = PigeonPrototypes(torch.ones(3, 8), places[:3], torch.arange(3), torch.ones(5, 8), places, owners)
    for room, sizes in ((1000, (3, 3)), (3 * 24 + 2 * 16, (3, 2)), (3 * 24, (3, 0)), (2 * 24, (2, 0))):
        compact = compact_prototypes(prototypes, room)
        assert (len(compact), len(compact.image_embeddings)) == sizes
    with pytest.raises(ValueError, match="make the model smaller"):
        compact_prototypes(prototypes, 10)


def test_a_finished_run_is_measured_again_and_released(sources, finished, tmp_path):
    models = [str(finished / name) for name in ("pigeon", "streetclip")]
    earthclip.main([*sources, "--sets", str(finished / "work"), "--models", *models, "--output", str(tmp_path / "again")])
    again, before = (json.loads((run / "evaluation.json").read_text()) for run in (tmp_path / "again", finished))
    assert again["sets"] == before["sets"] and again["example"] == before["example"]
    assert again["settings"]["files"]["image"] == "earth.png"

    release.main([str(finished), str(tmp_path / "checkpoints")])
    folder = tmp_path / "checkpoints" / "earthclip-mini"
    assert {path.name for path in folder.iterdir()} == {
        *(
            "README.md",
            "config.json",
            "evaluation.json",
            "example.png",
            "loss.png",
            "model.safetensors",
            "preprocessor_config.json",
        ),
    }
    assert PigeonForImageGeolocalization.from_pretrained(folder).config.abstain_radius_km == 1000
    assert Image.open(folder / "example.png").size == (16, 16)
    assert StreetCLIPModel.from_pretrained(tmp_path / "checkpoints" / "earthclip-mini-clip").config.projection_dim == 16
