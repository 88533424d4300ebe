import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from geobased.auditing import AccessDeniedError, Technique
from geobased.auditing.access import BLACK, DE_FACTO_WHITE, GREY, parse_access
from geobased.auditing.held_target import Forward
from geobased.auditing.image_attribution import (
    attention_rollout,
    deletion_and_insertion,
    integrated_gradients,
    occlusion,
    randomisation,
)
from geobased.auditing.image_black_box import CORRUPTIONS, corrupted, crop_boxes, with_sign
from geobased.auditing.image_gradient import APGD, PGD, Cloak, apgd_steps, in_ball, pgd_steps
from geobased.auditing.image_search import square_edge
from geobased.auditing.runner import run_question
from geobased.auditing.technique import TECHNIQUES, make_technique

from .image_audits import FIXTURES, LABELS, REFERENCE, clip_question, open_clip, reference_images

ATTACKS = REFERENCE["attack_results"]
PREDICTED = torch.tensor(REFERENCE["labels(pred)"])


@pytest.fixture(scope="module")
def clip():
    with open_clip("de_facto_white") as target:
        yield target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


def attacked(target, steps, number, labels=PREDICTED, sign=-1.0):
    """Cross entropies of the predicted labels after so many steps of an attack on all images."""

    def loss(images):
        return sign * F.cross_entropy(target.forward(images).logits, labels, reduction="none")

    changed = next(itertools.islice(steps(loss), number - 1, None))
    with torch.no_grad():
        logits = target.forward(changed).logits
    return changed, F.cross_entropy(logits, PREDICTED, reduction="none").tolist(), logits.argmax(1).tolist()


@pytest.mark.parametrize("levels", [1, 4, 8])
def test_pgd_gives_what_torchattacks_and_foolbox_give(clip, levels):
    images = reference_images()
    changed, losses, labels = attacked(clip, lambda loss: pgd_steps(loss, images, levels / 255, 2 / 255), 10)
    assert losses == pytest.approx(ATTACKS[f"ta_pgd_eps{levels}"]["ce"], abs=2e-3)
    assert labels == ATTACKS[f"ta_pgd_eps{levels}"]["pred"]
    assert float((changed - images).abs().max()) * 255 == pytest.approx(levels, abs=1e-3)


def test_pgd_from_a_start_towards_a_label_and_fgsm_give_what_torchattacks_gives(clip):
    images, epsilon = reference_images(), 8 / 255
    torch.manual_seed(5)
    start = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    _, losses, labels = attacked(clip, lambda loss: pgd_steps(loss, images, epsilon, 2 / 255, start=start), 10)
    assert losses == pytest.approx(ATTACKS["ta_pgd_rs_eps8_seed5"]["ce"], abs=5e-3)
    assert labels == ATTACKS["ta_pgd_rs_eps8_seed5"]["pred"]
    following = (PREDICTED + 1) % 5
    # signs of the smallest gradients hang on the last digits: on those of the logits themselves
    _, losses, labels = attacked(_Logits(clip), lambda loss: pgd_steps(loss, images, epsilon, 2 / 255), 10, following, 1.0)
    assert losses == pytest.approx(ATTACKS["ta_pgd_targeted_eps8(y+1)"]["ce"], abs=5e-3)
    assert labels == ATTACKS["ta_pgd_targeted_eps8(y+1)"]["pred"]
    _, losses, _ = attacked(clip, lambda loss: pgd_steps(loss, images, epsilon, epsilon), 1)
    assert losses == pytest.approx(ATTACKS["ta_fgsm_eps8"]["ce"], abs=2e-3)


def test_apgd_is_no_worse_than_pgd_and_stays_in_its_ball(clip):
    images, epsilon = reference_images(), 8 / 255
    changed, losses, _ = attacked(clip, lambda loss: apgd_steps(loss, images, epsilon, 20), 20)
    assert float((changed - images).abs().max()) <= epsilon + 1e-6
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert sum(losses) >= 0.9 * sum(ATTACKS["ta_pgd_eps8"]["ce"])


def test_normalised_images_are_refused_everywhere(clip):
    normalised = (reference_images()[:1] - 0.45) / 0.27
    with pytest.raises(ValueError, match="between 0 and 1"):
        clip.forward(normalised)
    with pytest.raises(ValueError, match="between 0 and 1"):
        next(pgd_steps(lambda images: images.sum((1, 2, 3)), normalised, 0.1, 0.1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        integrated_gradients(clip, normalised, 0)


def test_integrated_gradients_and_occlusion_give_what_captum_gives(clip, reference_tensors):
    expected, images = reference_tensors("audit/captum"), reference_images()
    for number, image in enumerate(images.split(1)):
        column = int(PREDICTED[number])
        # scores are log probabilities: captum's are of logits, whose logarithm of a sum is taken off
        found = integrated_gradients(_Logits(clip), image, column, steps=64)
        torch.testing.assert_close(found.values, expected["ig"][number], atol=1e-4, rtol=1e-3)
        assert found.total == pytest.approx(REFERENCE["ig"]["f(x)-f(0)"][number], abs=1e-3)
        assert found.delta == pytest.approx(REFERENCE["ig"]["delta"][number], abs=1e-3)
        hidden = occlusion(_Logits(clip), image, column, side=8)
        torch.testing.assert_close(hidden.values, expected["occlusion"][number], atol=1e-4, rtol=1e-3)


class _Logits:
    """The target with the logits that CLIP itself gives, made from its embeddings."""

    def __init__(self, target):
        self.target = target
        self.texts = load_file(FIXTURES / "tiny_clip.safetensors")["text_embeds"]
        self.scale = load_file(FIXTURES / "tiny_clip.safetensors")["model.logit_scale"].exp()

    def forward(self, images):
        embeddings = self.target.forward(images, read=("embeddings",)).embeddings
        return Forward({"logits": self.scale * F.normalize(embeddings, dim=-1) @ self.texts.T})


def test_embeddings_give_the_reference_logits(clip):
    logits = _Logits(clip).forward(reference_images()).logits
    torch.testing.assert_close(logits, torch.tensor(REFERENCE["clean_logits"]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clip.forward(reference_images()).logits, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_more_steps_make_integrated_gradients_more_complete(clip):
    image = reference_images()[:1]
    assert integrated_gradients(clip, image, 0, steps=256).relative_delta < 0.05
    assert integrated_gradients(clip, image, 0, steps=4).relative_delta > 0.05


def test_attention_is_spread_over_patches(clip):
    found = attention_rollout(clip, reference_images()[:1], head_width=8)
    assert found.values.shape == (1, 32, 32)
    patches = found.values[0, ::8, ::8]
    assert (patches > 0).all() and float(patches.sum()) < 1


class _CornerModel:
    """Knows nothing but how bright the upper left quarter is."""

    def forward(self, images):
        score = 8 * images[:, :, :4, :4].mean((1, 2, 3)) - 4
        return Forward({"logits": torch.stack([score, -score], 1)})


def test_deletion_and_insertion_tell_a_faithful_map_from_others():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.1
    image[:, :, :4, :4] += 0.7
    true = np.zeros((8, 8))
    true[:4, :4] = 1
    black = torch.zeros_like(image)
    faithful = deletion_and_insertion(_CornerModel(), image, 0, true, squares=4, steps=8, baseline=black)
    assert faithful.deletion < faithful.random_deletion and faithful.insertion > faithful.random_insertion
    wrong = deletion_and_insertion(_CornerModel(), image, 0, -true, squares=4, steps=8, baseline=black)
    assert wrong.deletion > faithful.deletion and wrong.insertion < faithful.insertion
    assert randomisation(true, true, squares=4) == pytest.approx(1)
    drawn = np.random.default_rng(0).random((2, 8, 8))
    assert abs(randomisation(*drawn, squares=8)) < 0.3


IMAGE_TECHNIQUES = [name for name in TECHNIQUES if make_technique(name).kind == "image"]
# what a technique lacks at the level below
TOO_LITTLE = {
    **{name: "query" for name in ("square_attack", "occlusion", "attention", "square_search")},
    **{name: "grey" for name in ("pgd", "apgd", "cloak", "patch_embedding_pgd", "integrated_gradients", "square_descent")},
    "squares_of_data": "white",
}


@pytest.mark.parametrize("name", IMAGE_TECHNIQUES)
def test_a_technique_is_refused_without_its_capabilities(clip, folder, name):
    question, technique = clip_question(folder, 10), make_technique(name)
    if name not in TOO_LITTLE:
        assert technique.needs == BLACK
        return
    lesser = parse_access(TOO_LITTLE[name])
    with pytest.raises(ValueError, match="no technique is permitted"):
        run_question(clip, question, [technique], {"lesser": lesser & clip.grant})
    # nor does its code get further by itself
    with clip.scope(name, lesser & clip.grant, budget=500) as scoped, pytest.raises(AccessDeniedError):
        run_alone(technique, scoped, question)


def run_alone(technique: Technique, target, question) -> None:
    from geobased.auditing.technique import Progress

    progress = [Progress(question, item, lambda: target.spent) for item in question.items]
    if technique.whole_set:
        technique.attempt_all(target, question, progress, 0)
    else:
        technique.attempt(target, question, question.items[0], progress[0], 0)


def result_of(target, question, technique, seed=0):
    return run_question(target, question, [technique], {"all": DE_FACTO_WHITE}, seed=seed).results["techniques"][0]


def test_gradients_find_smaller_changes_than_scores_and_answers(clip, folder):
    question = clip_question(folder, 120)
    found = {
        name: result_of(clip, question, make_technique({"name": name, "epsilon": epsilon, **more}))
        for name, epsilon, more in (
            ("hop_skip_jump", 64.0, {}),
            ("square_attack", 8.0, {}),
            ("pgd", 8.0, {"bisections": 4}),
            ("apgd", 8.0, {"bisections": 4}),
        )
    }
    for name, row in found.items():
        assert row["perturbation_unit"] == "levels of 255"
        for item in row["items"]:
            assert not item["success"] or item["perturbation"] <= (64 if name == "hop_skip_jump" else 8) + 1e-3
    assert found["pgd"]["successes"] == found["apgd"]["successes"] == 4
    assert found["pgd"]["successes"] >= found["square_attack"]["successes"]
    assert found["pgd"]["median_perturbation"] < found["square_attack"]["median_perturbation"]
    # costs stay within the budget
    assert all(item["spent"] <= 120 for row in found.values() for item in row["items"])


def test_without_a_limit_every_attack_succeeds(clip, folder):
    question = clip_question(folder, 100)
    for technique in (PGD(epsilon=255.0, step_size=32.0), APGD(epsilon=255.0)):
        assert result_of(clip, question, technique)["rate"] == 1.0


def test_a_cloak_is_the_smallest_ball_that_was_found(clip, folder):
    row = result_of(clip, clip_question(folder, 400), Cloak(steps=10))
    assert row["rate"] == 1.0
    assert 1 <= row["median_perturbation"] <= 4


def test_changed_embeddings_are_an_upper_bound_and_count_in_no_level(clip, folder):
    question = clip_question(folder, 100)
    findings = run_question(clip, question, [make_technique("patch_embedding_pgd")], {"white": DE_FACTO_WHITE})
    row = findings.results["techniques"][0]
    assert not row["reachable"] and row["rate"] == 1.0
    assert all(item["perturbation"] <= 0.5 + 1e-3 for item in row["items"])
    assert findings.results["levels"][0]["techniques"] == []


def test_maps_are_shown_with_their_checks(clip, folder):
    question = clip_question(folder, 400)
    technique = make_technique({"name": "integrated_gradients", "squares": 4, "steps": 8})
    findings = run_question(clip, question, [technique], {"white": DE_FACTO_WHITE})
    before = clip.forward(reference_images()).logits
    measures = findings.results["techniques"][0]["items"][0]["measures"]
    assert {"completeness delta", "deletion", "insertion", "correlation with a random model's map"} <= measures.keys()
    assert abs(measures["correlation with a random model's map"]) < 0.9
    assert any(picture.heat is not None for _, _, picture in findings.pictures)
    # parameters were drawn anew on the way, and are back
    torch.testing.assert_close(clip.forward(reference_images()).logits, before)


def test_black_box_techniques_ask_for_answers_alone(folder):
    with open_clip("black") as target:
        question = clip_question(folder, 80)
        for name in ("corruptions", "signs", "crops", "lying_exif"):
            row = run_question(target, question, [make_technique(name)], {"black": BLACK}).results["techniques"][0]
            assert all(item["answer"]["label"] in LABELS for item in row["items"])
        used = {capability for entry in target.ledger() for capability in entry.get("capabilities", [])}
        assert used <= {"query"}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity_and_keep_to_the_range(name):
    axis = torch.linspace(0, 1, 48)
    image = torch.stack(
        [axis[:, None].expand(48, 48), axis[None].expand(48, 48), 0.5 + 0.4 * torch.sin(40 * axis[:, None] * axis)]
    )
    changes = []
    for severity in (1, 3, 5):
        changed = corrupted(image, name, severity, seed=1)
        assert changed.shape == image.shape and float(changed.min()) >= 0 and float(changed.max()) <= 1
        torch.testing.assert_close(changed, corrupted(image, name, severity, seed=1))
        changes.append(float((changed - image).abs().mean()))
    assert 0 < changes[0] < changes[1] < changes[2]


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="'rust' is unknown"):
        make_technique({"name": "corruptions", "corruptions": ["rust"]})
    with pytest.raises(ValueError, match="severity=9"):
        corrupted(torch.zeros(3, 4, 4), "blur", 9)
    for name, settings in (("pgd", {"epsilon": 0}), ("square_attack", {"share": 2}), ("hop_skip_jump", {"directions": 1})):
        with pytest.raises(ValueError, match="epsilon"):
            make_technique({"name": name, **settings})


def test_a_sign_covers_what_it_says_and_stays_in_the_picture():
    picture = Image.new("RGB", (200, 100), (10, 20, 30))
    for height in (0.1, 0.3, 0.9):
        signed, share = with_sign(picture, "Rio de Janeiro", height, place=(0.0, 1.0))
        changed = (np.asarray(signed) != np.asarray(picture)).any(-1)
        assert changed.mean() == pytest.approx(share, rel=0.15)
    boxes = dict(crop_boxes((200, 100), 0.5))
    assert boxes["bottom right"] == (100, 50, 200, 100) and boxes["middle"] == (50, 25, 150, 75)


def test_squares_shrink_and_balls_hold():
    edges = [square_edge(step, 1000, 0.3, 64, 64) for step in (0, 100, 900)]
    assert edges[0] == round(math.sqrt(0.3 * 64 * 64)) and edges[0] > edges[1] > edges[2] >= 1
    images = torch.rand(2, 3, 4, 4)
    held = in_ball(images + 5, images, 0.1)
    torch.testing.assert_close(held, (images + 0.1).clamp(max=1))
    assert GREY & BLACK
