import json
import shutil
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from geobased.training import language_modeling
from geobased.training.artifacts import plot_losses, write_json
from geobased.training.language_modeling import LanguageModelingArguments, load_config, train


def arguments(corpus, output_dir, **changes):
    options = {
        "config": str(corpus / "config.json"),
        "tokenizer": str(corpus / "tokenizer"),
        "text": [str(corpus / "text.txt")],
        "documents": [str(corpus / "documents.jsonl")],
        "context_length": 256,
        "cache_dir": str(corpus / "cache"),
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "answer_weight": 4.0,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return LanguageModelingArguments(**(options | changes))


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "straight"
    log = train(arguments(corpus, folder, validation_documents=[str(corpus / "validation.jsonl")]))
    return folder, log


def test_resumed_run_repeats_the_losses(corpus, straight, tmp_path):
    folder, log = straight
    shutil.copytree(folder / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    resumed = train(arguments(corpus, tmp_path / "run", resume=True))
    assert [step for step, _ in resumed["losses"]] == [1, 2, 3, 4, 5, 6]
    for (_, first), (_, second) in zip(log["losses"], resumed["losses"], strict=True):
        assert first == pytest.approx(second, abs=1e-6)
    one = AutoModelForCausalLM.from_pretrained(folder / "final")
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_what_a_run_leaves_behind(corpus, straight):
    folder, log = straight
    written = json.loads((folder / "training_log.json").read_text())
    assert written["losses"] == log["losses"] and written["steps"] == 6 and not written["stopped_early"]
    assert written["tokens"] == 6 * 2 * 256 and written["tokens_per_second"] > 0
    assert written["arguments"]["answer_weight"] == 4.0 and written["seed"] == 42
    assert {"torch", "transformers", "geobased"} <= set(written["versions"])
    assert [source["kind"] for source in written["sources"]] == ["text", "documents"]
    evaluations = {key for entry in written["history"] for key in entry if key.endswith("loss") and key != "train_loss"}
    assert evaluations == {"loss", "eval_documents_loss", "eval_answers_loss"}
    model = AutoModelForCausalLM.from_pretrained(folder / "final", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == 400
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    assert len(AutoTokenizer.from_pretrained(folder / "final")) == 400
    assert not list(folder.glob(".final*"))


def test_training_learns(corpus, tmp_path):
    log = train(arguments(corpus, tmp_path, max_steps=40, save_strategy="no", learning_rate=1e-2, answer_weight=1.0))
    losses = [loss for _, loss in log["losses"]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_weighted_loss_equals_the_mean_by_hand(corpus, tmp_path):
    options = arguments(corpus, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_config(options.config, tokenizer, 256))
    trainer = language_modeling.LanguageModelingTrainer(model=model, args=options)
    ids = torch.randint(2, 400, (2, 9))
    labels, weights = ids.clone(), torch.ones(2, 9)
    labels[0, 5:] = -100
    weights[1, 3:6] = 7.0
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": labels, "loss_weights": weights})
    total = weight = 0.0
    log_probabilities = model(input_ids=ids).logits.log_softmax(-1)
    for row in range(2):
        for position in range(1, 9):
            if labels[row, position] != -100:
                total -= weights[row, position] * log_probabilities[row, position - 1, ids[row, position]]
                weight += weights[row, position]
    torch.testing.assert_close(loss, total / weight)
    plain = {"input_ids": ids, "labels": labels}
    uniform = trainer.compute_loss(model, {**plain, "loss_weights": torch.ones(2, 9)})
    torch.testing.assert_close(uniform, trainer.compute_loss(model, plain))


def test_only_matrices_outside_embeddings_decay(corpus, tmp_path):
    options = arguments(corpus, tmp_path)
    config = load_config(options.config, AutoTokenizer.from_pretrained(options.tokenizer), 256)
    model = AutoModelForCausalLM.from_config(config)
    trainer = language_modeling.LanguageModelingTrainer(model=model, args=options)
    decayed = trainer.get_decay_parameter_names(model)
    assert all(name.endswith("proj.weight") for name in decayed) and len(decayed) == 7


def test_time_limit_stops_and_saves(corpus, tmp_path):
    log = train(arguments(corpus, tmp_path / "run", max_seconds=0.0, save_strategy="steps", save_steps=500))
    assert log["stopped_early"] and log["steps"] == 1
    assert (tmp_path / "run" / "final" / "config.json").is_file() and (tmp_path / "run" / "checkpoint-1").is_dir()
    resumed = train(arguments(corpus, tmp_path / "run", resume=True))
    assert resumed["steps"] == 6 and not resumed["stopped_early"]


def test_prepare_only_trains_nothing(corpus, tmp_path):
    report = train(arguments(corpus, tmp_path / "run", prepare_only=True, cache_dir=None))
    assert [source["kind"] for source in report["sources"]] == ["text", "documents"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["tokens"]


def test_based_model_trains(corpus, tmp_path):
    config = {
        "model_type": "based",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "feature_dim": 4,
        "sliding_window": 16,
        "mixers": ["conv", "linear_attention", "sliding_attention"],
    }
    log = train(arguments(corpus, tmp_path, config=json.dumps(config), max_steps=2, save_strategy="no"))
    assert log["steps"] == 2 and all(loss > 0 for _, loss in log["losses"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": ["missing.txt"]}, FileNotFoundError, "missing.txt"),
        ({"documents": ["missing.jsonl"]}, FileNotFoundError, "missing.jsonl"),
        ({"config": "missing.json"}, FileNotFoundError, "neither a JSON object nor"),
        ({"config": "{}"}, ValueError, "model_type"),
        ({"config": '{"model_type": "llama", "vocab_size": 300}'}, ValueError, "smaller than the tokenizer's 400"),
        ({"config": None}, ValueError, "--config is required"),
        ({"context_length": 1024}, ValueError, "max_position_embeddings=512"),
        ({"text": [], "documents": []}, ValueError, "nothing to train on"),
        ({"mixture_weights": [1.0]}, ValueError, "2 sources but 1 mixture weights"),
        ({"max_steps": -1}, ValueError, "max_steps must be positive"),
        ({"save_dtype": "int8"}, ValueError, "save_dtype"),
        ({"resume": True}, FileNotFoundError, "nothing to resume"),
    ],
)
def test_argument_errors(corpus, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(arguments(corpus, tmp_path / "run", **changes))


def test_earlier_run_is_not_overwritten(corpus, straight):
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        train(arguments(corpus, straight[0]))


def test_context_longer_than_the_text(corpus, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words only.\n")
    with pytest.raises(ValueError, match="longer than the text"):
        train(arguments(corpus, tmp_path / "run", text=[str(short)]))
    with pytest.raises(ValueError, match="longer than the validation text"):
        train(arguments(corpus, tmp_path / "run", validation_text=[str(short)]))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {("not", "a key"): 1})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["log.json"]


def test_loss_curve(tmp_path):
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_text_loss": 2.5}]
    with warnings.catch_warnings(record=True):
        drawn = plot_losses(history, tmp_path / "loss.png")
    assert drawn == (tmp_path / "loss.png").is_file()
