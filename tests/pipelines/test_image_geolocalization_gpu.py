"""The image geolocalization pipeline on a GPU answers batches side by side."""

import io
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from geobased.geography.gazetteer import countries
from geobased.modeling_streetclip import resampling
from geobased.modeling_streetclip.configuration_streetclip import StreetCLIPConfig
from geobased.modeling_streetclip.modeling_streetclip import StreetCLIPModel
from geobased.modeling_streetclip.zero_shot import SearchLevel
from geobased.pipelines.image_geolocalization import ImageGeolocalizationPipeline
from geobased.training.earthclip_data import caption_tokenizer

EDGE, PROMPT = 32, "A photo in {country}."
SIZES = ((40, 60), (60, 40), (48, 48))


@pytest.fixture(scope="module")
def parts():
    """Model, tokenizer, image processor and candidates of a tiny zero-shot search."""
    tokenizer = caption_tokenizer([f"A photo in {country.name}." for country in countries()] * 4, 400, 32)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **ends, "vocab_size": 400, "max_position_embeddings": 32}
    vision = {**tower, "image_size": EDGE, "patch_size": 8}
    torch.manual_seed(0)
    model = StreetCLIPModel(StreetCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE})
    candidates = SimpleNamespace(candidates=lambda level, *, within=None, k=None: countries()[:20])
    return model, tokenizer, processor, candidates


def locator(parts, device: int) -> ImageGeolocalizationPipeline:
    model, tokenizer, processor, candidates = parts
    levels = (SearchLevel("country", (PROMPT,)),)
    options = {"tokenizer": tokenizer, "image_processor": processor, "candidates": candidates, "levels": levels}
    return ImageGeolocalizationPipeline(model, **options, label_cache_dir=None, device=device)


def jpegs(count: int) -> list[bytes]:
    generator = np.random.default_rng(0)
    files = []
    for number in range(count):
        file = io.BytesIO()
        pixels = generator.integers(0, 256, (*SIZES[number % len(SIZES)], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def scores(results: list) -> np.ndarray:
    """[images, candidates], in the order of the countries' names."""
    ordered = [sorted(result, key=lambda place: place["country"]) for result in results]
    return np.array([[place["score"] for place in result] for result in ordered])


@pytest.mark.gpu
def test_batches_side_by_side_answer_as_one_image_does(parts):
    """A last batch that is not full, and one with a bad file, among them."""
    files = jpegs(43)
    expected = scores([locator(parts, -1)(file, top_k=20) for file in files])
    files.insert(10, b"no image")
    found = locator(parts, 0)(files, batch_size=4, top_k=20)
    assert "is no image" in found.pop(10)["error"]
    np.testing.assert_allclose(scores(found), expected, atol=1e-5)


@pytest.mark.gpu
def test_stopping_early_and_a_single_batch(parts):
    locate = locator(parts, 0)
    results = locate(iter(jpegs(20)), batch_size=4)
    assert len([next(results) for _ in range(9)]) == 9
    results.close()
    assert len(locate(jpegs(3), batch_size=4)) == 3


@pytest.mark.gpu
def test_streams_share_what_is_kept_of_many_sizes(parts, monkeypatch):
    """More sizes than resampling keeps weights of: none is overwritten while another stream still uses it."""
    monkeypatch.setattr(resampling, "_weights", lru_cache(maxsize=2)(resampling._weights.__wrapped__))
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(generator.integers(0, 256, (40 + n % 17, 60 - n % 13, 3), dtype=np.uint8)) for n in range(200)]
    expected = scores(locator(parts, -1)(photos, batch_size=8, top_k=20))
    np.testing.assert_allclose(scores(locator(parts, 0)(photos, batch_size=8, top_k=20)), expected, atol=1e-5)
