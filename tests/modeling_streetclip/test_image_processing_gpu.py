"""The torch preprocessor against transformers' own, which resizes with Pillow."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from geobased.modeling_streetclip.image_processing_gpu import GpuImagePreprocessor
from geobased.modeling_streetclip.resampling import resize_crop

TOLERANCE = 1e-5


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise of full contrast: every weight of the resampling shows, and sums are often clipped."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def pil_processor(edge: int = 224, height: int | None = None, width: int | None = None, **options) -> CLIPImageProcessorPil:
    crop = {"height": height or edge, "width": width or edge}
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=crop, **options)


def expected_values(processor: CLIPImageProcessorPil, images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(processor([Image.fromarray(image) for image in images])["pixel_values"]))


SIZES = [
    *((480, 640), (640, 480), (600, 600), (224, 224), (224, 300), (300, 224), (223, 225), (225, 223), (777, 333), (231, 1999)),
    *((1, 1), (1, 7), (7, 1), (2, 3), (50, 40), (100, 90), (1800, 1790), (449, 448)),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("edge", [224, 336])
def test_values_of_the_pil_processor(size, edge):
    processor = pil_processor(edge)
    image = random_image(*size)
    actual = GpuImagePreprocessor.from_image_processor(processor)([as_tensor(image)])
    torch.testing.assert_close(actual, expected_values(processor, [image]), rtol=0, atol=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    edge=st.integers(1, 120),
    cut=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    seed=st.integers(0, 1000),
)
def test_grey_levels_are_those_of_pillow(height, width, edge, cut, seed):
    if max(height, width) / min(height, width) * edge > 4000:
        return  # Pillow computes the whole strip
    processor = pil_processor(edge, max(edge - cut[0], 1), max(edge - cut[1], 1), do_rescale=False, do_normalize=False)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    actual = GpuImagePreprocessor.from_image_processor(processor)([as_tensor(image)])
    expected = expected_values(processor, [image]).float()
    # shrinking to less than an eighth may differ by a grey level
    assert (actual - expected).abs().max() <= (0 if min(height, width) <= 8 * edge else 1)


def test_a_batch_of_many_sizes_keeps_its_order():
    images = [random_image(*size, seed=i) for i, size in enumerate([(40, 60), (60, 40), (40, 60), (33, 91), (60, 40), (40, 60)])]
    processor = pil_processor(32)
    actual = GpuImagePreprocessor.from_image_processor(processor)([as_tensor(image) for image in images])
    torch.testing.assert_close(actual, expected_values(processor, images), rtol=0, atol=TOLERANCE)


def test_a_batch_in_one_tensor():
    images = [random_image(50, 70, seed=i) for i in range(3)]
    preprocess = GpuImagePreprocessor(32, 32, 32)
    stacked = torch.stack([as_tensor(image) for image in images])
    assert torch.equal(preprocess(stacked), preprocess(list(stacked)))


def test_an_image_gives_the_same_values_in_any_batch_and_layout():
    images = [as_tensor(random_image(90, 70, seed=i)) for i in range(5)]
    preprocess = GpuImagePreprocessor(32, 32, 32)
    together = preprocess(images)
    for i, image in enumerate(images):
        assert torch.equal(preprocess([image])[0], together[i])
        assert torch.equal(preprocess([image.contiguous()])[0], together[i])


def test_rescaling_and_normalising_can_be_off_or_different():
    image = random_image(50, 40)
    for options in (
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 1.0]},
    ):
        processor = pil_processor(32, **options)
        actual = GpuImagePreprocessor.from_image_processor(processor)([as_tensor(image)])
        torch.testing.assert_close(actual, expected_values(processor, [image]).float(), rtol=0, atol=TOLERANCE)


def test_dtype_and_shape():
    values = GpuImagePreprocessor(32, 24, 16)([as_tensor(random_image(50, 40))], dtype=torch.bfloat16)
    assert values.dtype == torch.bfloat16
    assert values.shape == (1, 3, 24, 16)


def test_a_long_strip_needs_no_long_result():
    """Pillow would make 336 x 33,600,000 pixels of it before it crops."""
    strip = torch.arange(100_000, dtype=torch.float64).mul(255 / 99_999).round().to(torch.uint8).expand(3, 1, -1)
    values = GpuImagePreprocessor(336, 336, 336, image_mean=(0, 0, 0), image_std=(1, 1, 1))([strip])
    assert values.shape == (1, 3, 336, 336)
    torch.testing.assert_close(values, torch.full_like(values, 128 / 255), atol=1 / 255, rtol=0)


def test_autocast_changes_nothing():
    image = as_tensor(random_image(90, 70))
    preprocess = GpuImagePreprocessor(32, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(preprocess([image]), preprocess([image]))
        inside = preprocess([image])
    assert torch.equal(inside, preprocess([image]))


def test_the_processor_of_a_checkpoint(checkpoint, tmp_path):
    assert GpuImagePreprocessor.from_pretrained(checkpoint) == GpuImagePreprocessor(28, 28, 28)
    with pytest.raises(OSError, match="preprocessor_config.json"):
        GpuImagePreprocessor.from_pretrained(tmp_path)


def test_old_preprocessor_configurations(tmp_path):
    """Checkpoints of CLIP's first years, StreetCLIP among them, give sizes as numbers."""
    config = {
        "crop_size": 336,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 336,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert GpuImagePreprocessor.from_pretrained(tmp_path) == GpuImagePreprocessor(336, 336, 336)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        ([torch.zeros(3, 8, 8)], "image 0 is torch.float32"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)], r"image 1 is .*\(8, 8, 3\)"),
        ([torch.zeros(3, 0, 8, dtype=torch.uint8)], r"\(3, 0, 8\)"),
        ([torch.zeros(8, 8, dtype=torch.uint8)], r"\(8, 8\)"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "there are no images"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        GpuImagePreprocessor(4, 4, 4)(images)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (8, 9, 8), (8, 8, 9), (8, 0, 8)], ids=str)
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=f"shortest_edge={sizes[0]}"):
        GpuImagePreprocessor(*sizes)


@pytest.mark.parametrize(
    "processor",
    [
        pil_processor(32, do_resize=False),
        pil_processor(32, do_center_crop=False),
        CLIPImageProcessorPil(size={"height": 32, "width": 32}),
        pil_processor(32, resample=2),
    ],
    ids=["no_resize", "no_crop", "fixed_size", "bilinear"],
)
def test_other_preprocessing_is_refused(processor):
    with pytest.raises(ValueError, match="CLIP"):
        GpuImagePreprocessor.from_image_processor(processor)


def test_bad_resampling():
    with pytest.raises(ValueError, match="uint8"):
        resize_crop(torch.zeros(1, 3, 8, 8), (4, 4), (0, 0, 4, 4))
    with pytest.raises(ValueError, match=r"\(0, 0, 5, 4\) lies outside"):
        resize_crop(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (4, 4), (0, 0, 5, 4))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_gives_the_grey_levels_of_the_cpu(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    images = [as_tensor(random_image(*size, seed=i)) for i, size in enumerate([*SIZES, (3000, 4000)])]
    preprocess = GpuImagePreprocessor(336, 336, 336)
    torch.testing.assert_close(preprocess(images, device="cuda").cpu(), preprocess(images), rtol=0, atol=1e-6)
