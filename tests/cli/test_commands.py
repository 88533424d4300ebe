"""The commands that hand over to other packages."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from geobased.cli import sources

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "based" / "tiny_a"


def test_convert(geobased, tmp_path):
    result = geobased("convert", OFFICIAL, tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    report = json.loads(geobased("convert", OFFICIAL, tmp_path / "out", "--overwrite", "--json").stdout)
    assert report["folder"] == str(tmp_path / "out") and report["files"]["model.safetensors"] > 0


def test_export(geobased, tiny_model_dir, tmp_path):
    result = geobased("export", tiny_model_dir, tmp_path / "out")
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "out")
    assert {"modeling_based.py", "tokenizer.json", "README.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
    report = json.loads(geobased("export", tiny_model_dir, tmp_path / "out", "--overwrite", "--json").stdout)
    assert set(report["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads(geobased("generate", "hi", "-m", tmp_path / "out", "-n", 3, "--json").stdout)["new_tokens"] <= 3


def test_recall_of_a_model(geobased, tiny_model_dir):
    arguments = ("recall", "gazetteer", "--model", tiny_model_dir, "--num-documents", 2, "--max-words", 60)
    report = json.loads(geobased(*arguments, "--max-tokens", 4096, "--json").stdout)
    assert report["arguments"]["num_documents"] == 2 and 0 <= report["recall"]["overall"]["accuracy"] <= 1
    assert report["recall"]["by_distance"]["0-64"]["accuracy"] is None or report["recall"]["by_distance"]["0-64"]["num_questions"]
    table = geobased(*arguments, "--max-tokens", 4096).stdout
    assert "overall" in table and "population" in table


def test_recall_writes_documents(geobased, tmp_path):
    path = tmp_path / "documents.jsonl"
    result = geobased("recall", "gazetteer", "--write-documents", path, "--num-documents", 5, "--max-words", 60, "--json")
    assert result.exit_code == 0
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(documents) == 5 and documents[0]["answers"]


def test_train_hands_its_arguments_over(geobased, monkeypatch, tmp_path):
    from geobased.training import language_modeling

    seen, log = [], {"steps": 3, "history": [{"eval_loss": 2.0}, {"eval_loss": 1.5, "epoch": 1}]}
    monkeypatch.setattr(language_modeling, "train", lambda arguments: seen.append(arguments) or print("noise") or log)
    result = geobased(
        "train", "lm", "--output_dir", tmp_path, "--text", "a.txt", "b.txt", "--max-steps", 3, "--use_cpu", "--seed", 5
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "steps: 3\nmetrics.eval_loss: 1.5\n"
    (arguments,) = seen
    assert (arguments.text, arguments.max_steps, arguments.seed) == (["a.txt", "b.txt"], 3, 5)
    result = geobased("train", "lm", "--output_dir", tmp_path, "--use_cpu", "--json")
    # what the training prints goes to standard error
    assert json.loads(result.stdout) == {"steps": 3, "metrics": {"eval_loss": 1.5}} and "noise" in result.stderr


def test_shipped_checkpoint_by_name(geobased, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(sources, "shipped_checkpoints", lambda: ["tiny"])
    monkeypatch.setattr(sources, "checkpoint_path", lambda name: str(tiny_model_dir))
    report = json.loads(geobased("generate", "the river", "--model", "tiny", "-n", 3, "--json").stdout)
    assert report["model"] == "tiny"


def test_default_model(geobased, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = json.loads(geobased("generate", "The weather", "-n", 20, "--json").stdout)
    assert report["model"] == "based-mini" and report["new_tokens"] > 0
