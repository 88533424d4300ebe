"""Wrong input ends in one sentence and an exit code, never in a traceback."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from geobased.cli.errors import explain

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "based" / "tiny_a"


def edit_config(folder: Path, **changes) -> None:
    """Changes fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("",), "the prompt is empty"),
        (("hi", "--temperature", 0), "--temperature 0.0 must be above 0"),
        (("hi", "--top-p", 1.5), "--top-p 1.5 must be above 0 and at most 1"),
        (("hi", "--repetition-penalty", -1), "--repetition-penalty -1.0 must be above 0"),
        (("hi", "--greedy", "--top-k", 3), "--top-k cannot be used with --greedy"),
        (("hi", "--max-new-tokens", 0), "--max-new-tokens"),
        (("hi", "--dtype", "int8"), "--dtype 'int8' is not one of auto, float64"),
        (("hi", "--device", "cupboard"), "--device 'cupboard' is not available here; there is: cpu"),
        (("hi", "--nonsense"), "No such option"),
        ((), "Missing argument"),
    ],
)
def test_wrong_arguments_of_generate(fails, tiny_model_dir, arguments, words):
    assert words in fails("generate", *arguments, "--model", tiny_model_dir)


def test_prompt_that_is_not_utf8(fails, tiny_model_dir):
    assert "not valid UTF-8" in fails("generate", "-", "--model", tiny_model_dir, stdin=b"\xff\xfe\xfa")
    assert "the prompt is empty" in fails("generate", "-", "--model", tiny_model_dir, stdin="\n")


def test_error_as_json(geobased, tiny_model_dir):
    result = geobased("generate", "", "--model", tiny_model_dir, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"error": "the prompt is empty: give at least one character of text"}
    result = geobased("generate", "--json")
    assert result.exit_code == 2 and "Missing argument" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("acme/no-such-model", 1, "the model acme/no-such-model is neither a folder nor in the Hugging Face cache"),
        ("no-such-model", 1, "HF_HUB_OFFLINE forbids downloading it"),
        ("./no-such-folder", 2, "there is no folder './no-such-folder'"),
        ("a/b/c", 2, "there is no folder 'a/b/c'"),
        (__file__, 2, "is a file"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "export", "recall"])
def test_missing_model(fails, tmp_path, command, model, code, words):
    arguments = {
        "generate": ("generate", "hi", "--model", model),
        "export": ("export", model, tmp_path / "out"),
        "recall": ("recall", "gazetteer", "--model", model),
    }
    assert words in fails(*arguments[command], code=code)


def test_missing_hub_model_as_json(geobased):
    result = geobased("generate", "hi", "--model", "acme/no-such-model", "--json")
    assert result.exit_code == 1 and "acme/no-such-model" in json.loads(result.stdout)["error"]


def test_truncated_weights(fails, tiny_copy):
    weights = tiny_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    sentence = fails("generate", "hi", "--model", tiny_copy)
    assert str(tiny_copy) in sentence and "damaged or incomplete" in sentence


@pytest.mark.parametrize("content", [b"", b"no weights", bytes(range(256)) * 8])
def test_corrupt_weights(fails, tiny_copy, content):
    (tiny_copy / "model.safetensors").write_bytes(content)
    sentence = fails("generate", "hi", "--model", tiny_copy)
    assert str(tiny_copy) in sentence and "damaged or incomplete" in sentence


def test_corrupt_pickle(fails, tiny_copy):
    (tiny_copy / "model.safetensors").unlink()
    (tiny_copy / "pytorch_model.bin").write_bytes(b"\x80\x02no pickle")
    assert str(tiny_copy) in fails("generate", "hi", "--model", tiny_copy)


def test_no_weights(fails, tiny_copy):
    (tiny_copy / "model.safetensors").unlink()
    assert "model.safetensors" in fails("generate", "hi", "--model", tiny_copy)


def test_missing_weights(fails, tiny_copy):
    weights = load_file(tiny_copy / "model.safetensors")
    del weights["model.layers.1.mixer.q_proj.weight"]
    save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    sentence = fails("generate", "hi", "--model", tiny_copy)
    assert "lacks 1 weights" in sentence and "model.layers.1.mixer.q_proj.weight" in sentence


def test_weights_of_another_size(fails, tiny_copy):
    edit_config(tiny_copy, intermediate_size=80)
    assert "do not fit its config.json" in fails("generate", "hi", "--model", tiny_copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixers": ["conv", "linear_attention", "magic"]}, "'magic'"),
        ({"feature_dim": 1000}, "feature_dim=1000"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "bassed", "auto_map": None}, "bassed"),
        ({"model_type": "bassed"}, "--trust-remote-code"),
    ],
)
def test_wrong_configuration(fails, tiny_copy, changes, words):
    edit_config(tiny_copy, **changes)
    sentence = fails("generate", "hi", "--model", tiny_copy)
    assert words in sentence and str(tiny_copy) in sentence


def test_broken_configuration(fails, tiny_copy):
    (tiny_copy / "config.json").write_text('{"model_type": "based", ')
    assert str(tiny_copy) in fails("generate", "hi", "--model", tiny_copy)


def test_no_configuration(fails, tiny_copy):
    (tiny_copy / "config.json").unlink()
    assert "has no config.json" in fails("generate", "hi", "--model", tiny_copy)


def test_no_tokenizer(fails, tiny_copy):
    for path in tiny_copy.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in fails("generate", "hi", "--model", tiny_copy)


def test_official_format(fails):
    sentence = fails("generate", "hi", "--model", OFFICIAL)
    assert f"geobased convert {OFFICIAL} DST" in sentence


def test_ids_outside_the_vocabulary(fails, tiny_copy):
    model = AutoModelForCausalLM.from_pretrained(tiny_copy)
    model.resize_token_embeddings(50)
    model.save_pretrained(tiny_copy)
    sentence = fails("generate", "the river", "--model", tiny_copy)
    assert "outside the vocabulary (0 to 49)" in sentence


def test_convert_errors(fails, tmp_path):
    assert "there is no folder './nothing'" in fails("convert", "./nothing", tmp_path / "out")
    assert "acme/nothing" in fails("convert", "acme/nothing", tmp_path / "out", code=1)
    assert "--dtype 'int8'" in fails("convert", OFFICIAL, tmp_path / "out", "--dtype", "int8")
    (tmp_path / "there").mkdir()
    assert "exists already" in fails("convert", OFFICIAL, tmp_path / "there")
    source = Path(shutil.copytree(OFFICIAL, tmp_path / "source"))
    (source / "pytorch_model.bin").write_bytes((source / "pytorch_model.bin").read_bytes()[:5000])
    assert "damaged or incomplete" in fails("convert", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_errors(fails, tiny_model_dir, tmp_path):
    (tmp_path / "there").mkdir()
    assert "exists already" in fails("export", tiny_model_dir, tmp_path / "there")
    assert f"geobased convert {OFFICIAL} DST" in fails("export", OFFICIAL, tmp_path / "out")


def test_recall_errors(fails, tiny_model_dir, tmp_path):
    assert "there is no folder" in fails("recall", "gazetteer", "-m", tiny_model_dir, "--plot", tmp_path / "no" / "x.png")
    assert "--split 'test'" in fails("recall", "gazetteer", "--write-documents", tmp_path / "x.jsonl", "--split", "test")


def test_train_errors(fails, geobased, tmp_path):
    assert "config" in fails("train", "lm", "--output_dir", tmp_path / "run")
    sentence = fails("train", "lm", "--output_dir", tmp_path / "run", "--nonsense", 3)
    assert "No such option or argument: --nonsense (see `geobased train lm --help`)" in sentence
    assert "--data" in fails("train", "pigeon-embeddings")
    result = geobased("train", "pigeon-embeddings", "--json")
    assert result.exit_code == 2 and "--model" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("several\n  lines"), 2, "several lines"),
        (FileNotFoundError(2, "No such file", "x.txt"), 2, "x.txt: No such file"),
        (OSError(28, "No space left on device", "x.bin"), 1, "x.bin: No space left"),
        (OSError("a message of the loading code"), 2, "a message"),
        (ConnectionError("no answer"), 1, "no answer"),
        (OfflineModeIsEnabled("offline"), 1, "offline"),
        (torch.OutOfMemoryError("too much"), 1, "out of memory: too much"),
        (KeyError("x"), 1, "KeyError: 'x' (run again with --debug for the traceback)"),
        (ModuleNotFoundError("no", name="trl.core"), 1, 'pip install "geobased[train]"'),
        (RuntimeError("operator torchvision::nms does not exist"), 1, "`geobased doctor` tells what to do"),
        (ModuleNotFoundError("no", name="unheard_of"), 1, "pip install unheard_of"),
    ],
)
def test_explain(error, code, words):
    sentence, exit_code = explain(error)
    assert exit_code == code and words in sentence and "\n" not in sentence
