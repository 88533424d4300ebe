"""Exported folders load where geobased and Triton are not installed, and generate the same tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from geobased import BasedForCausalLM, BasedForSequenceClassification, BasedModel
from geobased.modeling_based.export import export_model

# a None entry makes `import geobased` raise ImportError, as where it is not installed
STRANGER = """
import json, sys
sys.modules["geobased"] = sys.modules["triton"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, prompt = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
pipe = pipeline("text-generation", folder, trust_remote_code=True)
print(json.dumps({
    "module": type(model).__module__,
    "classes": [type(auto.from_pretrained(folder, trust_remote_code=True)).__name__
                for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)],
    "tokens": model.generate(torch.tensor(prompt), max_new_tokens=12, do_sample=False).tolist(),
    "text": pipe("hello", max_new_tokens=4, do_sample=False)[0]["generated_text"],
}))
"""


@pytest.fixture(scope="module")
def exported(tiny_model_dir, tmp_path_factory) -> Path:
    return export_model(tiny_model_dir, tmp_path_factory.mktemp("export") / "my-based")


def test_loads_without_geobased(exported, tiny_model_dir, tmp_path):
    prompt = [[5, 6, 7, 8, 9, 10]]
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    run = subprocess.run(
        [sys.executable, str(script), str(exported), json.dumps(prompt)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["module"].startswith("transformers_modules.")
    assert result["classes"] == ["BasedConfig", "BasedModel", "BasedForCausalLM", "BasedForSequenceClassification"]
    ours = BasedForCausalLM.from_pretrained(tiny_model_dir)
    assert result["tokens"] == ours.generate(torch.tensor(prompt), max_new_tokens=12, do_sample=False).tolist()
    assert result["text"].startswith("hello")


def test_installed_class_wins(exported):
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert type(model) is BasedForCausalLM


def test_card_and_files(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "modeling_based.py"} <= names
    card = (exported / "README.md").read_text()
    header = card.split("---")[1]
    assert "library_name: transformers" in header and "pipeline_tag: text-generation" in header
    model = BasedForCausalLM.from_pretrained(exported)
    assert f"{model.num_parameters():,} parameters" in card and f"{model.state_size_bytes():,} bytes" in card
    # the tokenizer reads the configuration, whose code it would otherwise ask about
    assert card.count('from_pretrained("') == card.count(", trust_remote_code=True)") == 2


@pytest.mark.parametrize("model_class", [BasedModel, BasedForCausalLM, BasedForSequenceClassification])
def test_save_pretrained_carries_code(tiny_model_dir, tmp_path, model_class):
    model_class.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    for reference in auto_map.values():
        assert (tmp_path / f"{reference.split('.')[0]}.py").is_file()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "based"


def test_existing_card_is_kept_with_its_pictures(exported, tmp_path):
    (exported / "README.md").write_text("---\nlicense: mit\n---\n![loss](loss.png)\nmine\n")
    (exported / "loss.png").write_bytes(b"png")
    (exported / "other.png").write_bytes(b"png")
    again = export_model(exported, tmp_path / "again")
    assert (again / "README.md").read_text().endswith("mine\n")
    assert (again / "loss.png").read_bytes() == b"png" and not (again / "other.png").exists()


def test_bad_exports(exported, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        export_model(exported, exported)
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    other.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="'llama'"):
        export_model(tmp_path / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
