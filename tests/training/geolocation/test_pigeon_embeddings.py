import json

import numpy as np
import pytest
import torch

from geobased.modeling_streetclip.image_decoding import decode_image
from geobased.modeling_streetclip.image_processing_gpu import GpuImagePreprocessor
from geobased.training import pigeon_embeddings
from geobased.training.geolocation_sources import ImageFolder
from geobased.training.pigeon_embeddings import EmbeddingStore, JoinedEmbeddings, precompute_embeddings
from geobased.training.pigeon_labels import head_labels, standardise_heads
from geobased.training.pigeon_models import load_pigeon


@pytest.fixture(scope="module")
def model(clip):
    return load_pigeon(str(clip), num_cells=2).eval()


@pytest.fixture(scope="module")
def preprocess(clip):
    return GpuImagePreprocessor.from_pretrained(clip)


@pytest.fixture
def source(photos):
    return ImageFolder(photos / "photos.csv")


def run(model, source, preprocess, folder, **changes):
    options = {"batch_size": 5, "images_per_file": 20, "dtype": "float32", "progress": False}
    return precompute_embeddings(model, source, preprocess, folder, **(options | changes))


def test_embeddings_are_the_models(model, source, preprocess, tmp_path):
    result = run(model, source, preprocess, tmp_path)
    assert result["embedded"] == 47 and list(result["skipped"]) == ["08.png"] and result["files"] == 3
    store = EmbeddingStore(tmp_path)
    kept = [row for row in range(48) if row != 8]
    assert np.array_equal(store.coordinates, source.coordinates[kept])
    assert store.columns["town"] == [source.columns["town"][row] for row in kept]
    assert store.name(8) == "09.png"
    pixels = preprocess([decode_image(source.image(row)) for row in (0, 9, 47)])
    with torch.no_grad():
        expected = model.get_embeddings(pixels)[0]
    torch.testing.assert_close(store.embeddings[[0, 8, 46]], expected)
    with pytest.raises(ValueError, match=r"not the image 00\.png"):
        store.image(0)
    assert len(JoinedEmbeddings([store, store])) == 94


def test_interrupted_run_goes_on_and_gives_the_same_bytes(model, source, preprocess, tmp_path, monkeypatch):
    run(model, source, preprocess, tmp_path / "whole")
    write, calls = pigeon_embeddings._write_file, []

    def failing(path, *contents):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, *contents)

    monkeypatch.setattr(pigeon_embeddings, "_write_file", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, source, preprocess, tmp_path / "parts")
    with pytest.raises(ValueError, match="lacks 2 of 3 files"):
        EmbeddingStore(tmp_path / "parts")
    calls.clear()
    calls.append("no failure any more")
    calls.append("")
    run(model, source, preprocess, tmp_path / "parts")
    assert calls[2:] == ["embeddings-00001.safetensors", "embeddings-00002.safetensors"]
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("whole", "parts"))
    assert [path.name for path in one] == [path.name for path in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def test_another_run_is_refused(model, source, preprocess, tmp_path, clip):
    run(model, source, preprocess, tmp_path)
    with pytest.raises(ValueError, match="its images_per_file is 20, not 10"):
        run(model, source, preprocess, tmp_path, images_per_file=10)
    changed = load_pigeon(str(clip), num_cells=2)
    with torch.no_grad():
        changed.vision_tower.encoder.layers[0].mlp.fc1.bias.add_(1)
    with pytest.raises(ValueError, match="its tower is"):
        run(changed, source, preprocess, tmp_path)
    cls = load_pigeon(str(clip), num_cells=2, embedding="cls")
    with pytest.raises(ValueError, match="its embedding is 'token_mean', not 'cls'"):
        run(cls, source, preprocess, tmp_path)
    with pytest.raises(ValueError, match="dtype='int3'"):
        run(model, source, preprocess, tmp_path, dtype="int3")
    with pytest.raises(ValueError, match="batch_size=0"):
        run(model, source, preprocess, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="holds no embeddings"):
        EmbeddingStore(tmp_path / "nowhere")
    (tmp_path / "embeddings-00001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged"):
        EmbeddingStore(tmp_path)


def test_labels_of_heads():
    heads = [
        {"name": "weather", "kind": "regression", "size": 2, "labels": ["rain", "snow"], "log_offsets": [1.0, None]},
        {"name": "climate", "kind": "classification", "size": 2, "labels": ["Csb", "Dfc"]},
        {"name": "zone", "kind": "classification", "size": 4},
    ]
    columns = {"rain": ["0", "", 3], "climate": ["Dfc", None, "Csb"], "zone": ["3", "", 0]}
    labels = head_labels(columns, heads, 3)
    assert labels["climate"].tolist() == [1, -100, 0] and labels["zone"].tolist() == [3, -100, 0]
    assert labels["weather"][:, 0].nan_to_num(-9).tolist() == [0, -9, 3] and bool(labels["weather"][:, 1].isnan().all())
    fitted = standardise_heads(heads, labels, np.arange(3))
    logs = np.log([1.0, 4.0])
    assert fitted[0]["means"] == pytest.approx([logs.mean(), 0]) and fitted[0]["stds"] == pytest.approx([logs.std(), 1])
    assert fitted[1] == heads[1]
    with pytest.raises(ValueError, match="'Bwk'"):
        head_labels({"climate": ["Bwk"]}, heads[1:2], 1)
    with pytest.raises(ValueError, match="holds '4'"):
        head_labels({"zone": ["4"]}, heads[2:], 1)
    with pytest.raises(ValueError, match="'much', which is no number"):
        head_labels({"rain": ["much"]}, heads[:1], 1)
    with pytest.raises(ValueError, match="larger log_offsets"):
        standardise_heads(
            heads, {"weather": torch.tensor([[-1.0, 0.0]]), **labels} | {"weather": torch.tensor([[-1.0, 0.0]])}, np.arange(1)
        )


def test_commands(clip, photos, geocells, tmp_path, capsys):
    from geobased.cli.main import app

    def call(*command):
        with pytest.raises(SystemExit) as end:
            app([str(part) for part in command])
        return end.value.code, capsys.readouterr().out

    code, text = call("train", "pigeon-embeddings", "--model", clip, "--data", photos, "--output_dir", tmp_path / "e", "--json")
    assert code == 0 and json.loads(text)["embedded"] == 47 and json.loads(text)["skipped"] == 1
    common = ("--model", clip, "--use_cpu", "--max_steps", 1, "--holdout_fraction", 0.3, "--report_to", "none", "--json")
    code, text = call(
        *("train", "pigeon", "--embeddings", tmp_path / "e", "--geocells", geocells, "--output_dir", tmp_path / "p"),
        *(*common, "--block_degrees", 0.05, "--bootstrap", 10),
    )
    assert code == 0 and '"eval_median_km"' in text
    code, text = call("train", "streetclip", "--data", photos, "--output_dir", tmp_path / "s", *common, "--holdout_seed", 3)
    assert code == 0 and '"eval_country_accuracy"' in text
    code, text = call("train", "streetclip", "--help")
    assert code == 0 and "--chunk_size" in text and "usage: geobased train streetclip" in text
