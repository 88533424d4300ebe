"""Help, version, doctor, and the commands that hand over to other packages."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import geobased as package
from geobased.cli import conversion, doctor, sources

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "based" / "tiny_a"


@pytest.mark.parametrize("command", ["generate", "convert", "export", "push", "doctor", "train lm", "recall gazetteer"])
def test_help_has_examples_and_exit_codes(geobased, command):
    result = geobased(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"\n  geobased {command}" in result.stdout.replace("\n    ", "\n  ")
    assert "Exit codes: 0 done; 1 failed" in result.stdout


def test_train_help_shows_the_options_of_the_training_module(geobased):
    text = geobased("train", "lm", "--help").stdout
    assert "usage: geobased train lm" in text
    assert "--context_length" in text and "--learning_rate" in text


@pytest.mark.parametrize("group", ["", "train", "recall"])
def test_without_a_command_the_help_is_shown(geobased, group):
    result = geobased(*group.split())
    assert result.exit_code == 2 and "Commands:" in result.stdout
    assert geobased(*group.split(), "--help").exit_code == 0


def test_version(geobased):
    assert geobased("--version").stdout == f"geobased {package.__version__}\n"


def test_doctor_json(geobased):
    result = geobased("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == (1 if report["problems"] else 0)
    assert report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert report["kernel_backend"] == ("triton" if torch.cuda.is_available() and report["versions"]["triton"] else "torch")
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert set(report["extras"]) >= {"triton", "demo", "geo", "train", "audit", "dev"}
    assert report["offline"] is True and report["cpu_threads"] >= 1
    assert isinstance(report["checkpoints"], list) and report["hf_cache"]


def test_doctor_text(geobased):
    result = geobased("doctor")
    for word in ("versions:", "kernels:", "extras:", "HF cache:", "problems:"):
        assert word in result.stdout


def test_doctor_fails_where_a_requirement_is_missing(geobased, monkeypatch):
    monkeypatch.setattr(doctor, "unmet", lambda requirement: f"{requirement.name} is not installed")
    result = geobased("doctor")
    assert result.exit_code == 1 and "torch is not installed" in result.stdout


def test_convert(geobased, tmp_path):
    result = geobased("convert", OFFICIAL, tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert geobased("convert", OFFICIAL, tmp_path / "out", "--overwrite").exit_code == 0


def test_export(geobased, tiny_model_dir, tmp_path):
    result = geobased("export", tiny_model_dir, tmp_path / "out")
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "out")
    assert {"modeling_based.py", "tokenizer.json", "README.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
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

    seen = []
    monkeypatch.setattr(language_modeling, "train", lambda arguments: seen.append(arguments) or {"steps": 3, "history": []})
    result = geobased(
        "train", "lm", "--output_dir", tmp_path, "--text", "a.txt", "b.txt", "--max-steps", 3, "--use_cpu", "--seed", 5
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"steps": 3}
    (arguments,) = seen
    assert (arguments.text, arguments.max_steps, arguments.seed) == (["a.txt", "b.txt"], 3, 5)


def test_push_uploads_an_export(geobased, tiny_model_dir, monkeypatch):
    uploads = []

    class FakeApi:
        def create_repo(self, repo_id, *, private, exist_ok):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            names = {path.name for path in folder_path.iterdir()}
            uploads.append((repo_id, names, (folder_path / "README.md").read_text(encoding="utf-8")))
            return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(conversion, "hub_is_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "not logged in" in geobased("push", tiny_model_dir, "me/tiny").stderr
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    result = geobased("push", tiny_model_dir, "me/tiny", "--private")
    assert result.exit_code == 0 and result.stdout == "https://huggingface.co/me/tiny\n"
    ((repo_id, names, card),) = uploads
    assert repo_id == "me/tiny" and {"model.safetensors", "tokenizer.json", "modeling_based.py"} <= names
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)' in card


def test_shipped_checkpoint_by_name(geobased, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(sources, "shipped_checkpoints", lambda: ["tiny"])
    monkeypatch.setattr(package, "checkpoint_path", lambda name: str(tiny_model_dir))
    report = json.loads(geobased("generate", "the river", "--model", "tiny", "-n", 3, "--json").stdout)
    assert report["model"] == "tiny"


def test_default_model(geobased, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = json.loads(geobased("generate", "The weather", "-n", 20, "--json").stdout)
    assert report["model"] == "based-mini" and report["new_tokens"] > 0
