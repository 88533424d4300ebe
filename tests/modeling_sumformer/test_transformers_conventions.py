"""What users of transformers expect to work: auto classes, saving, checkpointing, compiling, Trainer; and Performer's redraws."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from geobased import (
    SumformerForCausalLM,
    SumformerForSequenceClassification,
    SumformerForTokenClassification,
    SumformerModel,
)

from .conftest import CAUSAL_MIXERS, MIXERS

CLASSES = {
    AutoModel: SumformerModel,
    AutoModelForCausalLM: SumformerForCausalLM,
    AutoModelForSequenceClassification: SumformerForSequenceClassification,
    AutoModelForTokenClassification: SumformerForTokenClassification,
}


@pytest.mark.parametrize(
    ("auto", "mixer"),
    # there is no causal Linformer
    [(auto, mixer) for auto in CLASSES for mixer in (CAUSAL_MIXERS if auto is AutoModelForCausalLM else MIXERS)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_auto_classes_round_trip(make_model, make_ids, tmp_path, auto, mixer):
    config = make_model(mixer, num_labels=3).config
    assert type(AutoConfig.for_model("sumformer", mixer=mixer)) is type(config)
    model = auto.from_config(config).eval()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is CLASSES[auto]
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)
    assert torch.equal(loaded(make_ids(2, 12))[0], model(make_ids(2, 12))[0])
    assert auto.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_base_model_is_shared_between_heads(make_model, make_ids, tmp_path):
    model = make_model("performer", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = SumformerForTokenClassification.from_pretrained(tmp_path, num_labels=2)
    assert torch.equal(loaded.model(make_ids(1, 9))[0], model(make_ids(1, 9))[0])


def test_a_saved_model_loads_without_geobased(make_model, tmp_path):
    model = make_model("performer", SumformerForCausalLM, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "stranger.py"
    script.write_text(
        "import json, sys\n"
        "sys.modules['geobased'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(json.dumps(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).tolist()))\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "model")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    ours = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
    assert json.loads(run.stdout.splitlines()[-1]) == ours.tolist()


def test_the_head_is_tied(make_model):
    tied, untied = (make_model(model_class=SumformerForCausalLM, tie_word_embeddings=tie) for tie in (True, False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_ids, mixer):
    model = make_model(mixer, SumformerForTokenClassification, num_labels=3).train()
    ids, labels = make_ids(2, 9), torch.randint(0, 3, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients()
    assert all(gradient is not None for gradient in plain)
    model.gradient_checkpointing_enable()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients(), plain, strict=True))


def test_hidden_states(make_model, make_ids):
    output = make_model(num_hidden_layers=3)(make_ids(1, 5), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_model_is_one_graph(make_model, make_ids, mixer):
    causal = mixer in CAUSAL_MIXERS
    model = make_model(mixer, SumformerForCausalLM if causal else SumformerModel)
    ids, mask = make_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ids, attention_mask=mask)[0], model(ids, attention_mask=mask)[0], atol=1e-12)


def test_causal_language_model_loss_is_that_of_the_next_token(make_model, make_ids):
    model, ids = make_model(model_class=SumformerForCausalLM), make_ids(2, 8)
    output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(model(ids, logits_to_keep=1).logits, output.logits[:, -1:])


def test_trainer_trains_a_classifier_of_sets(tmp_path):
    config = AutoConfig.for_model("sumformer", feature_size=2, hidden_size=16, latent_size=8, num_labels=2)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    x = torch.randn(64, 5, 2)
    data = [{"input_features": row, "labels": int(row[:, 0].sum() > 0)} for row in x]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    predicted = model.eval()(input_features=x).logits.argmax(-1)
    assert (predicted == torch.tensor([row["labels"] for row in data])).float().mean() > 0.9


# Performer's random features


def test_random_features_are_drawn_anew_in_training(make_model, make_ids, tmp_path):
    model = make_model("performer", dtype=torch.float32, performer_redraw_interval=3)
    mixer = model.layers[0].mixer
    first = mixer.projection.clone()
    assert not torch.equal(first, model.layers[1].mixer.projection)
    for _ in range(4):
        model(make_ids(1, 4))
    assert torch.equal(mixer.projection, first), "not in evaluation"
    model.train()
    drawn = []
    for _ in range(7):
        model(make_ids(1, 4))
        drawn.append(mixer.projection.clone())
    assert [torch.equal(a, b) for a, b in zip(drawn, drawn[1:], strict=False)] == [True, True, False, True, True, False]
    assert int(mixer.num_draws) == 2
    model.save_pretrained(tmp_path)
    loaded = SumformerModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.layers[0].mixer.projection, mixer.projection)
    loaded.redraw_projections()
    assert int(loaded.layers[0].mixer.num_draws) == 3
    assert not any(torch.equal(loaded.layers[0].mixer.projection, earlier) for earlier in (first, *drawn))


def test_the_seed_decides_the_random_features(make_model):
    projections = [make_model("performer", performer_seed=seed).layers[0].mixer.projection for seed in (0, 0, 1)]
    assert torch.equal(projections[0], projections[1])
    assert not torch.equal(projections[0], projections[2])
