"""The model: embeddings and panoramas, frozen and trainable towers, answers, abstention, saving and loading, bad input."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, CLIPVisionModel

from geobased.modeling_pigeon import (
    PIGEON_HEADS,
    AutoModelForImageGeolocalization,
    PigeonConfig,
    PigeonForImageGeolocalization,
)
from geobased.modeling_pigeon.answers_pigeon import mass_radius_km
from geobased.modeling_pigeon.geodesy_pigeon import haversine_km

TINY_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


# embeddings and panoramas


@pytest.mark.parametrize("embedding", ["token_mean", "cls"])
def test_embedding_is_read_before_the_last_norm(make_model, images, embedding):
    model = make_model(embedding=embedding)
    hidden = model.vision_tower(images).last_hidden_state
    expected = hidden.mean(1) if embedding == "token_mean" else hidden[:, 0]
    output = model(images)
    torch.testing.assert_close(output.embeddings, expected)
    torch.testing.assert_close(output.logits, model.cell_head(expected))
    torch.testing.assert_close(model(embeddings=expected).logits, output.logits)


def test_panorama_of_one_view_is_the_image(make_model, images):
    model = make_model()
    single, panorama = model(images), model(images[:, None])
    assert torch.equal(single.logits, panorama.logits)
    masked = model(images[:, None], view_mask=torch.ones(4, 1))
    torch.testing.assert_close(single.logits, masked.logits)


def test_panorama_is_the_mean_of_its_views(make_model):
    model, views = make_model(), torch.randn(2, 3, 3, 16, 16)
    each = model(views.flatten(0, 1)).embeddings.view(2, 3, -1)
    torch.testing.assert_close(model(views).embeddings, each.mean(1))
    torch.testing.assert_close(model(embeddings=each).embeddings, each.mean(1))


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_views_that_are_not_there_do_not_count(make_model, padding):
    model, views = make_model(), torch.randn(3, 4, 3, 16, 16)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]])
    padded = torch.where(mask.view(3, 4, 1, 1, 1) == 1, views, padding)
    logits = model(padded, view_mask=mask).logits
    for i in range(3):
        alone = model(views[i : i + 1, mask[i] == 1]).logits[0]
        torch.testing.assert_close(logits[i], alone)


# training


def losses(model, images):
    labels = torch.tensor([1, 2, 3, 4])
    places = model.geocells.centroids()[labels]
    heads = {"environment": torch.randn(4, 6), "climate": labels, "month": labels}
    return model(images, labels=labels, coordinates=places, head_labels=heads)


def with_gradient(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_gradients_reach_every_weight(make_model, images):
    model = make_model().train()
    losses(model, images).loss.backward()
    # the bias of keys moves all of a query's scores alike, so that its gradient is nothing but rounding
    missing = {name for name, _ in model.named_parameters()} - with_gradient(model)
    assert not {name for name in missing if not name.endswith("k_proj.bias")}


@pytest.mark.parametrize("trainable_layers", [0, 1, 3])
def test_frozen_layers_get_no_gradient(make_model, images, trainable_layers):
    model = make_model().train()
    model.freeze_tower(trainable_layers)
    losses(model, images).loss.backward()
    tower = {name for name in with_gradient(model) if name.startswith("vision_tower.")}
    layers = {name.split(".")[3] for name in tower}
    assert layers == {str(i) for i in range(3 - trainable_layers, 3)}
    assert "cell_head.weight" in with_gradient(model) and "heads.month.weight" in with_gradient(model)
    model.unfreeze_tower()
    assert all(p.requires_grad for p in model.parameters())


def test_forward_compiles_as_one_graph(make_model, images):
    model, labels = make_model(), torch.tensor([1, 2, 3, 4])
    arguments = {"labels": labels, "coordinates": model.geocells.centroids()[labels], "head_labels": {"month": labels}}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, **arguments).loss, model(images, **arguments).loss)


def test_freezing_more_layers_than_there_are(make_model):
    with pytest.raises(ValueError, match="trainable_layers=4 must lie between 0 and the tower's 3 layers"):
        make_model().freeze_tower(4)


def test_a_model_learns_where_images_are(make_model, images, centroids):
    model, labels = make_model(heads=[], smoothing_tau_km=2.0).train(), torch.tensor([10, 30, 60, 90])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(images, labels=labels, coordinates=centroids[labels]).loss.backward()
        optimizer.step()
    assert model.eval().locate(images).candidate_cells[:, 0].tolist() == labels.tolist()


# answers


def test_answer_without_prototypes_is_a_centroid(make_model, images, centroids):
    answer = make_model().locate(images, top_k=3)
    assert answer.candidate_cells.shape == (4, 3) and answer.cell_probabilities.shape == (4, 100)
    torch.testing.assert_close(answer.cell_probabilities.sum(1), torch.ones(4))
    torch.testing.assert_close(answer.coordinates, centroids[answer.candidate_cells[:, 0]], rtol=0, atol=1e-7)
    assert not answer.coordinates.requires_grad


def test_temperature_flattens_probabilities_but_keeps_their_order(make_model, images):
    sharp, flat = make_model().locate(images), make_model(cell_temperature=3.0).locate(images)
    assert torch.equal(sharp.candidate_cells, flat.candidate_cells)
    assert (flat.candidate_scores[:, 0] < sharp.candidate_scores[:, 0]).all()
    logits = make_model()(images).logits
    torch.testing.assert_close(flat.cell_probabilities, (logits / 3).softmax(1))


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.999])
def test_radius_is_of_the_smallest_disc_that_holds_the_mass(centroids, mass):
    probabilities = torch.randn(7, 100, dtype=torch.float64).mul(2).softmax(1)
    places, radii = centroids[torch.randint(0, 100, (7,))], 30 * torch.rand(100, dtype=torch.float64)
    found = mass_radius_km(places, probabilities, centroids, radii, mass)
    reach = haversine_km(places[:, None], centroids[None]) + radii
    for i in range(7):
        assert probabilities[i, reach[i] <= found[i]].sum() >= mass - 1e-9
        assert probabilities[i, reach[i] < found[i] - 1e-9].sum() < mass


def test_radius_grows_with_coverage_and_calibration(make_model, images):
    model = make_model()
    half, most = (model.locate(images, coverage=coverage).error_radius_km for coverage in (0.5, 0.95))
    assert (half <= most).all() and (half < most).any() and (half > 0).all()
    calibrated = make_model(radius_scales={"0.5": 2.0, "0.9": 1.5})
    torch.testing.assert_close(calibrated.locate(images, coverage=0.5).error_radius_km, 2 * half)
    with pytest.raises(ValueError, match=r"not calibrated for coverage=0.95, only for 0.5, 0.9"):
        calibrated.locate(images, coverage=0.95)


def test_abstention(make_model, images):
    answer = make_model().locate(images)
    radii, scores = answer.error_radius_km, answer.candidate_scores[:, 0]
    assert not answer.abstain.any()
    limit = radii.sort().values[1].item()
    assert torch.equal(make_model(abstain_radius_km=limit).locate(images).abstain, radii > limit)
    # a radius at another coverage does not change who abstains
    assert torch.equal(make_model(abstain_radius_km=limit).locate(images, coverage=0.2).abstain, radii > limit)
    limit = scores.sort().values[2].item()
    assert torch.equal(make_model(abstain_probability=limit).locate(images).abstain, scores < limit)


# saving and loading


@pytest.mark.parametrize("auto_class", [PigeonForImageGeolocalization, AutoModel, AutoModelForImageGeolocalization])
def test_round_trip(make_model, images, tmp_path, auto_class):
    model = make_model(smoothing_rule="code", radius_scales={"0.9": 1.25})
    model.set_geocells(model.geocells.centroids(), torch.linspace(0, 99, 100))
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert isinstance(loaded, PigeonForImageGeolocalization)
    for name, value in model.locate(images).items():
        assert torch.equal(loaded.locate(images)[name], value), name
    assert loaded.config.heads == model.config.heads and loaded.config.radius_scales == {"0.9": 1.25}
    assert losses(loaded, images).keys() == losses(model, images).keys()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PigeonConfig)


def test_half_precision_does_not_move_places(make_model, make_prototypes, images, tmp_path):
    model = make_model()
    model.set_prototypes(make_prototypes())
    model.save_pretrained(tmp_path)
    for half in (type(model).from_pretrained(tmp_path, dtype=torch.bfloat16), model.bfloat16()):
        torch.testing.assert_close(half.geocells.centroids(), make_model().geocells.centroids(), rtol=0, atol=0)
        answer = half.locate(images.bfloat16())
        known = torch.cat([half.geocells.centroids_e7, half.refinement.images.coordinates])
        offsets = (answer.coordinates[:, None] - known[None].double() / 1e7).abs().sum(-1)
        assert offsets.amin(1).max() < 1e-12
        assert losses(half.float(), images).loss.isfinite()


def test_model_without_geocells_says_so(make_model, images, tmp_path):
    model = make_model(num_cells=7)
    with pytest.raises(ValueError, match="no geocells yet"):
        model.locate(images)
    with pytest.raises(ValueError, match="no geocells yet"):
        model(images, labels=torch.zeros(4, dtype=torch.int64), coordinates=torch.zeros(4, 2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no geocells yet"):
        type(model).from_pretrained(tmp_path).locate(images)


def test_checkpoint_without_buffers_loads_as_without_geocells(make_model, images, tmp_path):
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(("geocells.", "refinement."))}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = PigeonForImageGeolocalization.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no geocells yet"):
        loaded.locate(images)


def test_saved_model_carries_its_code(make_model, make_prototypes, images, tmp_path):
    model = make_model()
    model.set_prototypes(make_prototypes())
    model.save_pretrained(tmp_path / "model")
    expected = model.locate(images)
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import json, sys
sys.modules["geobased"] = None  # as where it is not installed
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
print(json.dumps([type(model).__module__, model.locate(torch.load({str(tmp_path / "images.pt")!r})).coordinates.tolist()]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    module, places = json.loads(result.stdout)
    assert module.startswith("transformers_modules.")
    torch.testing.assert_close(torch.tensor(places, dtype=torch.float64), expected.coordinates, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModel", "path"])
def test_tower_comes_from_a_clip_model(make_model, images, tmp_path, kind):
    vision = make_model().config.vision_config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=TINY_TEXT, vision_config=vision, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path)
    source = {"CLIPModel": clip, "CLIPVisionModel": clip.vision_model, "path": str(tmp_path)}[kind]
    model = PigeonForImageGeolocalization.from_clip(source, num_cells=9, heads=[]).eval()
    assert model.config.num_cells == 9
    torch.testing.assert_close(model(images).embeddings, clip.vision_model(images).last_hidden_state.mean(1))
    with torch.no_grad():
        clip.vision_model.embeddings.class_embedding.add_(1)
    assert not torch.equal(model.vision_tower.embeddings.class_embedding, clip.vision_model.embeddings.class_embedding)


def test_clip_without_a_tower():
    with pytest.raises(ValueError, match="Linear has no CLIP vision tower"):
        PigeonForImageGeolocalization.from_clip(torch.nn.Linear(2, 2), num_cells=9)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_the_tower(make_model, images, tmp_path, implementation):
    make_model().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.vision_tower.config._attn_implementation == implementation
    torch.testing.assert_close(loaded(images).logits, make_model()(images).logits, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_tuples(make_model, images):
    model = make_model()
    output = model(images, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    as_tuple = model(images, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


# configuration and bad input


def test_presets_are_the_published_models():
    pigeon, pigeotto = PigeonConfig.pigeon(num_cells=2203), PigeonConfig.pigeotto()
    assert [(head["name"], head["weight"]) for head in pigeon.heads] == [("environment", 8), ("climate", 2), ("month", 1)]
    assert (pigeon.vision_config.hidden_size, pigeon.vision_config.image_size, pigeon.num_cells) == (1024, 336, 2203)
    assert (pigeon.smoothing_tau_km, pigeon.refinement_top_k, pigeon.refinement_temperature) == (75, 5, 1.6)
    assert (pigeotto.smoothing_tau_km, pigeotto.refinement_top_k, pigeotto.refinement_temperature) == (65, 40, 0.6)
    assert pigeotto.refinement_max_km is None and len(pigeotto.heads) == 2
    pigeon.heads[0]["weight"] = 1.0
    assert PIGEON_HEADS[0]["weight"] == 8.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_cells": 0}, "num_cells=0 must be at least 1"),
        ({"embedding": "projected"}, "embedding='projected' is unknown; choose from token_mean, cls"),
        ({"smoothing_tau_km": 0}, "smoothing_tau_km=0 must be a positive number or None"),
        ({"refinement_temperature": -1.0}, "refinement_temperature=-1.0 must be a positive number"),
        ({"radius_coverage": 1.0}, "radius_coverage=1.0"),
        ({"radius_scales": {"0.9": 0.0}}, "radius_scales has '0.9': 0.0"),
        ({"abstain_probability": 2}, "abstain_probability=2"),
        ({"prototype_storage": "int4"}, "choose from float, int8"),
        ({"heads": [{"name": "a b", "kind": "regression", "size": 1}]}, "a head named 'a b'"),
        ({"heads": [{"name": "a", "kind": "ranking", "size": 1}]}, "kind='ranking'"),
        ({"heads": [{"name": "a", "kind": "classification", "size": 1}]}, "size=1"),
        ({"heads": [{"name": "a", "kind": "regression", "size": 1, "weight": -1}]}, "weight=-1"),
        ({"heads": [{"name": "a", "kind": "regression", "size": 1, "scale": 2}]}, "unknown key 'scale'"),
        ({"heads": [{"name": "a", "kind": "regression", "size": 2, "means": [0.0]}]}, "1 means but size=2"),
        ({"heads": [{"name": "a", "kind": "classification", "size": 2, "means": [0.0, 1.0]}]}, "is a classification"),
        ({"heads": [{"name": "a", "kind": "regression", "size": 1, "stds": [0.0]}]}, "all must be positive"),
        ({"heads": [{"name": "a", "kind": "regression", "size": 1}] * 2}, "two heads named 'a'"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        PigeonConfig(**changes)


def test_name_of_a_head_that_modules_use(make_model):
    with pytest.raises(ValueError, match="cannot be named 'losses'"):
        make_model(heads=[{"name": "losses", "kind": "regression", "size": 1}])
    with pytest.raises(ValueError, match="no head is named 'rain'; there are: none"):
        PigeonConfig().head("rain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of pixel_values and embeddings"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16), "embeddings": torch.zeros(1, 32)}, "exactly one"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, r"not of shape \(3, 16, 16\)"),
        ({"pixel_values": torch.zeros(1, 0, 3, 16, 16)}, "has no views"),
        ({"embeddings": torch.zeros(2, 31)}, r"must be \[batch, 32\]"),
        ({"embeddings": torch.zeros(2, 2, 32), "view_mask": torch.ones(2, 3)}, r"view_mask has shape \(2, 3\)"),
        ({"embeddings": torch.zeros(2, 2, 32), "view_mask": torch.tensor([[1, 0], [0, 0]])}, "image 1 without any view"),
        ({"embeddings": torch.full((2, 32), math.nan)}, "image 0 gives no finite logits"),
        ({"embeddings": torch.zeros(2, 32), "top_k": 0}, "top_k=0"),
        ({"embeddings": torch.zeros(2, 32), "coverage": 1.0}, "coverage=1.0"),
    ],
)
def test_bad_images(make_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().locate(**arguments)


@pytest.mark.parametrize(
    ("centroids", "radii", "message"),
    [
        (torch.zeros(99, 2), None, "99 centroids but num_cells=100"),
        (torch.full((100, 2), math.nan), None, r"centroids\[0\] .* is no place"),
        (torch.tensor([[139.7, 35.7]]).repeat(100, 1), None, "seem to be swapped"),
        (torch.zeros(100, 2), -torch.ones(100), r"radii_km must be \[100\]"),
    ],
)
def test_bad_geocells(make_model, centroids, radii, message):
    with pytest.raises(ValueError, match=message):
        make_model().set_geocells(centroids, radii)


def test_unused_vision_layers_are_not_kept(make_model):
    assert not [name for name in make_model().state_dict() if "post_layernorm" in name]
    assert CLIPVisionModel(make_model().config.vision_config).post_layernorm.weight is not None
