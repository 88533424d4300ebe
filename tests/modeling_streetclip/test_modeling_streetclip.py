"""StreetCLIP is CLIP: a CLIP checkpoint loads as it is and gives the same numbers, under every attention implementation."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    BertConfig,
    CLIPModel,
    CLIPProcessor,
    pipeline,
)

from geobased.modeling_streetclip import StreetCLIPConfig, StreetCLIPModel


@pytest.fixture(scope="module")
def model(checkpoint) -> StreetCLIPModel:
    return StreetCLIPModel.from_pretrained(checkpoint)


def assert_same(actual, expected):
    """Equal but for the last bits: BLAS sums in another order where weights lie at other addresses."""
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def outputs(model, pixel_values, texts):
    with torch.no_grad():
        return model(pixel_values=pixel_values, return_loss=pixel_values.shape[0] == len(texts["input_ids"]), **texts)


def test_a_clip_checkpoint_loads_unchanged(checkpoint, clip):
    model, info = StreetCLIPModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model.config, StreetCLIPConfig)
    assert not model.training
    ours, theirs = model.state_dict(), clip.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_loading_clip_warns_of_no_other_type(checkpoint, capfd):
    StreetCLIPConfig.from_pretrained(checkpoint)
    assert "model of type" not in capfd.readouterr().err


def test_outputs_are_those_of_clip(model, clip, pixel_values, texts):
    ours, theirs = (outputs(m, pixel_values[:2], texts) for m in (model, clip))
    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        assert_same(ours[name], theirs[name])


def test_gradients_are_those_of_clip(checkpoint, pixel_values, texts):
    gradients = []
    for model_class in (StreetCLIPModel, CLIPModel):
        model = model_class.from_pretrained(checkpoint)
        model(pixel_values=pixel_values[:2], return_loss=True, **texts).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 50
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-5, msg=name)


def test_random_initialisation_is_that_of_clip(clip):
    states = []
    for model_class in (StreetCLIPModel, CLIPModel):
        torch.manual_seed(3)
        states.append(model_class(clip.config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "geobased"])
def test_attention_implementations_agree(checkpoint, clip, pixel_values, texts, implementation):
    model = StreetCLIPModel.from_pretrained(checkpoint, attn_implementation=implementation)
    assert model.text_model.config._attn_implementation == model.vision_model.config._attn_implementation == implementation
    actual, expected = outputs(model, pixel_values, texts), outputs(clip, pixel_values, texts)
    torch.testing.assert_close(actual.logits_per_image, expected.logits_per_image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.image_embeds, expected.image_embeds, rtol=1e-5, atol=1e-5)


# --- the three embeddings ---------------------------------------------------------------------------------------------


def test_embeddings(model, clip, pixel_values):
    with torch.no_grad():
        embeddings = model.get_image_embeddings(pixel_values)
        vision = clip.vision_model(pixel_values)
        tokens = vision.last_hidden_state
        normed = clip.vision_model.post_layernorm(tokens[:, 0])
    assert list(embeddings.keys()) == ["projected", "cls", "token_mean"]
    torch.testing.assert_close(embeddings.projected, clip.visual_projection(normed))
    torch.testing.assert_close(embeddings.cls, tokens[:, 0])
    torch.testing.assert_close(embeddings.token_mean, tokens.sum(dim=1) / 17)  # 16 patches and the class token
    assert [tuple(vector.shape) for vector in embeddings.values()] == [(3, 16), (3, 32), (3, 32)]


def test_the_embedding_is_what_texts_are_compared_with(model, pixel_values, texts):
    with torch.no_grad():
        projected = model.get_image_embeddings(pixel_values).projected
        expected = outputs(model, pixel_values, texts).image_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(projected, dim=-1), expected)


def test_embeddings_do_not_depend_on_return_dict(model, pixel_values):
    with torch.no_grad():
        expected = model.get_image_embeddings(pixel_values)
        actual = model.get_image_embeddings(pixel_values, return_dict=False)
    assert_same(actual.token_mean, expected.token_mean)


def test_embeddings_of_larger_images(model):
    with torch.no_grad():
        embeddings = model.get_image_embeddings(torch.randn(1, 3, 42, 56), interpolate_pos_encoding=True)
    assert embeddings.projected.shape == (1, 16)


# --- auto classes, saving and loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForZeroShotImageClassification])
def test_auto_classes(model, pixel_values, texts, tmp_path, auto):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "streetclip"
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is StreetCLIPModel
    assert_same(outputs(loaded, pixel_values, texts).logits_per_image, outputs(model, pixel_values, texts).logits_per_image)
    assert type(auto.from_config(loaded.config)) is StreetCLIPModel


def test_auto_config(clip, tmp_path):
    assert type(AutoConfig.for_model("streetclip", projection_dim=24)) is StreetCLIPConfig
    StreetCLIPConfig(**{k: v for k, v in clip.config.to_dict().items() if k != "model_type"}).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is StreetCLIPConfig
    assert (loaded.text_config.hidden_size, loaded.vision_config.patch_size, loaded.projection_dim) == (32, 7, 16)


def test_auto_classes_leave_clip_alone(checkpoint):
    assert type(AutoModel.from_pretrained(checkpoint)) is CLIPModel


def test_a_saved_model_loads_as_clip_too(model, clip, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = CLIPModel.from_pretrained(tmp_path)
    assert all(torch.equal(p, clip.state_dict()[name]) for name, p in loaded.state_dict().items())


def test_zero_shot_pipeline(checkpoint, model, tmp_path):
    from PIL import Image

    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert type(processor) is CLIPProcessor
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is CLIPProcessor
    image = Image.new("RGB", (40, 30), (200, 90, 20))
    labels = ["Peru", "Japan", "the Netherlands"]
    results = []
    for folder in (checkpoint, tmp_path):
        classify = pipeline("zero-shot-image-classification", model=str(folder))
        results.append(classify(image, candidate_labels=labels, hypothesis_template="A Street View photo in {}."))
    of_clip, ours = ({result["label"]: result["score"] for result in r} for r in results)
    assert ours == pytest.approx(of_clip, abs=1e-5)
    assert ours.keys() == set(labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision(checkpoint, clip, pixel_values, dtype):
    model = StreetCLIPModel.from_pretrained(checkpoint, dtype=dtype)
    with torch.no_grad():
        actual = model.get_image_embeddings(pixel_values.to(dtype)).projected
        expected = clip.get_image_features(pixel_values).pooler_output
    assert actual.dtype == dtype
    cosine = torch.nn.functional.cosine_similarity(actual.float(), expected)
    assert cosine.min() > 0.995


def test_another_model_type_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert'"):
        StreetCLIPModel.from_pretrained(tmp_path)


def test_a_damaged_checkpoint_is_no_model(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = folder / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises((OSError, RuntimeError)):
        StreetCLIPModel.from_pretrained(folder)


LOAD_ALONE = """
import sys
from importlib.abc import MetaPathFinder

class NoGeobased(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "geobased":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoGeobased())
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.manual_seed(0)
print(model.get_image_embeddings(torch.randn(1, 3, 28, 28)).token_mean.sum().item())
"""


def test_a_saved_model_loads_without_this_package(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(tmp_path / "model")], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model.get_image_embeddings(torch.randn(1, 3, 28, 28)).token_mean.sum().item()
    assert float(result.stdout) == pytest.approx(expected, abs=1e-4)
