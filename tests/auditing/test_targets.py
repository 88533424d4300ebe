"""What granted verbs give: the model's own values, gradients through the gate, and a price for each."""

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from geobased.auditing import AccessDeniedError, AuditTarget, BudgetExhaustedError, Intervention
from geobased.auditing.ledger import ledger_problems
from geobased.auditing.text_model import generation_cost

LAYER = "model.layers.1"


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def metered(target):
    with target.scope("test", "white", budget=1000) as scope:
        yield scope


def test_values_are_those_of_the_model(metered, model, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = "the river runs"
    (ids,) = metered.tokenize([text])
    assert ids == tokenizer(text).input_ids and metered.detokenize([ids]) == [text]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), output_hidden_states=True)
    got = metered.forward(ids=torch.tensor([ids]), read=["logits", "embeddings", LAYER])
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.embeddings, expected.hidden_states[-1])
    logs = expected.logits.log_softmax(-1)
    scored = metered.score_ids(torch.tensor([ids]))
    torch.testing.assert_close(scored[0], logs[0, :-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0])
    (completion,) = metered.score(["the river"], [" runs"])
    assert torch.allclose(completion.sum(), scored[0, -len(completion) :].sum(), atol=1e-5)
    _, best, values = metered.top_tokens([text, "the"], k=3)
    torch.testing.assert_close(values[0], logs[0, -1].topk(3).values)
    assert best.shape == (2, 3)


def test_padding_at_the_end_changes_nothing(metered):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = metered.forward(ids=ids, attention_mask=mask).logits
    alone = metered.forward(ids=ids[1:, :2]).logits
    torch.testing.assert_close(padded[1, :2], alone[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="equal length"):
        metered.forward(ids=ids, attention_mask=mask, last=1)


def test_gradients_pass_through_the_gate(metered, model):
    ids = torch.tensor([[5, 6, 7]])
    weights = torch.nn.functional.one_hot(ids, 300).float().requires_grad_()
    metered.forward(token_weights=weights).logits[0, -1].log_softmax(-1)[9].backward()
    own = torch.nn.functional.one_hot(ids, 300).float().requires_grad_()
    model(inputs_embeds=own @ model.get_input_embeddings().weight).logits[0, -1].log_softmax(-1)[9].backward()
    torch.testing.assert_close(weights.grad, own.grad, atol=1e-5, rtol=1e-4)
    assert metered.spent == 1 + 2

    got = metered.forward(ids=ids, parameters=["model.embed_tokens.weight", "model.norm.*"])
    norms = metered.parameter_gradients(got, got.logits[0, -1].logsumexp(-1), norms=True)
    full = metered.parameter_gradients(got, got.logits[0, -1].logsumexp(-1))
    model.zero_grad()
    model(ids).logits[0, -1].logsumexp(-1).backward()
    expected = dict(model.named_parameters())["model.norm.weight"].grad
    torch.testing.assert_close(full["model.norm.weight"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norms["model.norm.weight"], expected.norm(), atol=1e-5, rtol=1e-4)


def test_inner_values_are_changed_and_their_gradients_had(metered):
    ids = torch.tensor([[5, 6, 7]])
    plain = metered.forward(ids=ids, read=["logits", LAYER])
    same = metered.forward(ids=ids, interventions=[Intervention(LAYER, plain.outputs[LAYER], "replace")])
    torch.testing.assert_close(same.logits, plain.logits)
    change = torch.zeros(1, 3, 32, requires_grad=True)
    mask = torch.tensor([False, False, True])[None, :, None]
    changed = metered.forward(ids=ids, interventions=[Intervention(LAYER, change, mask=mask)])
    changed.logits[0, -1, 3].backward()
    assert change.grad[0, 2].abs().sum() > 0 and not change.grad[0, :2].any()
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        metered.forward(ids=ids, interventions=[Intervention("nowhere", change)])


def test_changed_parameters_are_restored_at_the_end(target, tiny_model_dir):
    ids = torch.tensor([[5, 6, 7]])
    with target.scope("tune", "white", budget=100) as scope:
        before = scope.forward(ids=ids).logits
        losses = scope.fine_tune(["the river"] * 2, [" looks"] * 2, steps=5, learning_rate=1e-2, batch_size=2)
        assert losses[-1] < losses[0] and scope.spent == 1 + 5 * 2 * 3
        assert not torch.allclose(scope.forward(ids=ids).logits, before)
        scope.restore()
        torch.testing.assert_close(scope.forward(ids=ids).logits, before)
        assert scope.randomise("model.embed_tokens.weight", "model.norm.*")
    with target.scope("after", "grey", budget=1) as scope:
        torch.testing.assert_close(scope.forward(ids=ids).logits, before)


def test_declared_capabilities_bind_within_a_larger_grant(target):
    ids = torch.tensor([[5, 6]])
    with target.scope("grey", "grey", budget=10) as scope:
        assert "weights" not in dir(scope)
        with pytest.raises(AccessDeniedError, match="act_write"):
            scope.forward(embeddings=torch.zeros(1, 2, 32))
        with pytest.raises(AccessDeniedError, match="act_write"):
            scope.forward(token_weights=torch.full((1, 2, 300), 1 / 300))
        with pytest.raises(AccessDeniedError, match="param_grad"):
            scope.forward(ids=ids, parameters=["*"])
        with pytest.raises(AccessDeniedError, match="input_grad"):
            scope.forward(token_weights=torch.eye(300)[None, :2].clone().requires_grad_())
    assert ledger_problems(target.ledger()) == []


def test_tokens_from_a_cache_count_in_proportion():
    assert generation_cost(10, 1) == 1
    assert generation_cost(10, 3) == pytest.approx(1 + 1 / 11 + 1 / 12)


def test_nothing_is_computed_beyond_the_budget(target):
    with target.scope("poor", "query", budget=2) as scope:
        scope.generate(["the river"], max_new_tokens=2)
        spent = scope.spent
        with pytest.raises(BudgetExhaustedError, match="forward-equivalents"):
            scope.generate(["the river", "the town"], max_new_tokens=2)
        assert scope.spent == spent and scope.left == pytest.approx(2 - spent)
    rows = target.ledger()
    assert [row["outcome"] for row in rows if row["verb"] == "generate"] == ["served", "refused"]
    with pytest.raises(AccessDeniedError, match="not open"):
        scope.generate(["the river"])


def test_outside_the_box_is_read_by_grant(tiny_model_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("trained on rivers")
    given = {"docs": [str(tmp_path / "notes.txt")]}
    opened = AuditTarget.open(str(tiny_model_dir), "black+docs", mode="in_process", outside=given)
    with opened as target, target.scope("read", "docs", budget=1) as scope:
        assert scope.outside("docs") == ["notes.txt"]
        assert scope.read_outside("docs", "notes.txt") == b"trained on rivers"
        with pytest.raises(AccessDeniedError):
            scope.outside("data")
        with pytest.raises(ValueError, match="no file 'other'"):
            scope.read_outside("docs", "other")
    with pytest.raises(ValueError, match="does not grant it"):
        AuditTarget.open(str(tiny_model_dir), "black", mode="in_process", outside=given)


@pytest.fixture
def picture():
    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_a_clip_with_labels_is_a_zero_shot_classifier(tiny_clip_dir, picture):
    clip = AutoModel.from_pretrained(tiny_clip_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip_dir)
    processor = AutoImageProcessor.from_pretrained(tiny_clip_dir, backend="pil")
    labels = ["Peru", "Kenya", "Japan"]
    parts = {"tokenizer": tokenizer, "image_processor": processor, "labels": labels}
    with AuditTarget.open(clip, "de_facto_white", **parts) as target, target.scope("x", "de_facto_white", budget=50) as scope:
        images = scope.prepare([picture, picture])
        assert images.shape == (2, 3, 28, 28) and scope.spent == 0
        texts = tokenizer([f"a photo of {label}." for label in labels], padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = clip(**texts, **processor([picture], return_tensors="pt")).logits_per_image.log_softmax(-1)
        torch.testing.assert_close(scope.forward(images[:1]).logits, expected, atol=1e-4, rtol=1e-4)
        best = labels[int(expected[0].argmax())]
        assert scope.answer(images) == [{"label": best}] * 2
        assert scope.ranked(images, k=2)[0][0]["label"] == best
        assert scope.candidates() == {"labels": labels}
        attacked = images.clone().requires_grad_()
        scope.forward(attacked).logits[:, 0].sum().backward()
        assert attacked.grad.abs().sum() > 0
        for wrong, message in ((images * 255, "between 0 and 1"), (images[:, :, :20], "must be")):
            with pytest.raises(ValueError, match=message):
                scope.answer(wrong)
    with pytest.raises(ValueError, match="labels"):
        AuditTarget.open(clip, "black", tokenizer=tokenizer, image_processor=processor)


def test_a_pigeon_model_answers_with_places(tiny_pigeon_dir, picture, one_gazetteer):
    with (
        AuditTarget.open(str(tiny_pigeon_dir), "grey", mode="in_process") as target,
        target.scope("x", "grey", budget=9) as scope,
    ):
        images = scope.prepare([picture])
        (answer,), (ranked,) = scope.answer(images), scope.ranked(images, k=3)
        assert answer.keys() >= {"latitude", "longitude", "country_code", "abstain"}
        assert "score" not in answer and answer["latitude"] == ranked[0]["latitude"]
        candidates = scope.candidates()
        assert candidates["coordinates"].shape == (6, 2) and candidates["country_codes"][:2] == ["SE", "FR"]
        assert scope.forward(images).logits.exp().sum() == pytest.approx(1, abs=1e-4)
        tuned_before = scope.spent
    assert tuned_before == 3


def test_models_that_cannot_be_audited_are_named(model):
    with pytest.raises(ValueError, match="cannot be audited as it is"):
        AuditTarget.open(model, "black")
    with pytest.raises(ValueError, match="needs the model by its name"):
        AuditTarget.open(model, "black", mode="isolated")
    with pytest.raises(ValueError, match="no folder of a saved model"):
        AuditTarget.open("a/b/c", "black", mode="in_process")
