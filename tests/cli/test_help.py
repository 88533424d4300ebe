"""Help, completion and the start of the command: what a user sees before any model is loaded."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import geobased as package

COMMANDS = (
    *("generate", "locate", "evaluate", "convert", "export", "push", "doctor", "recall gazetteer", "recall mqar"),
    *("recall gazetteer-benchmark", "recall repeated-bigrams", "recall lm-eval", "recall lm-eval-tasks", "recall twins"),
    *("recall calibration", "train preferences", "train reward"),
    *("audit run", "audit verify", "audit reproduce", "audit compare", "audit key"),
    *("audit train-organism", "audit measure-organisms", "audit bias", "audit outside", "audit card"),
    pytest.param("train superhf", marks=pytest.mark.skipif(find_spec("trl") is None, reason="its settings are those of TRL")),
    *("train lm", "train streetclip", "train pigeon", "train pigeon-embeddings", "demo generation", "demo geolocalization"),
)
START = (sys.executable, "-m", "geobased_command")


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([*START, *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_exit_codes_and_json(geobased, command):
    result = geobased(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"\n  geobased {command}" in result.stdout.replace("\n    ", "\n  ")
    assert "Exit codes: 0 done; 1 failed" in result.stdout
    assert ("--json" in result.stdout) is not command.startswith("demo")


def test_help_names_every_command_once_under_its_heading(geobased):
    text = geobased("--help").stdout
    sections = {part.partition(":\n")[0]: part for part in text.split("\n\n")}
    for heading, commands in {
        "Language models": ("generate", "convert", "export", "recall"),
        "Geolocalization": ("locate", "evaluate"),
        "Language models and geolocalization": ("train", "demo", "audit"),
        "Setup and sharing": ("doctor", "push"),
    }.items():
        assert tuple(line.split()[0] for line in sections[heading].splitlines()[1:] if line[2] != " ") == commands
    assert 'geobased generate "The population' in text and "Read on:" in text


def test_train_help_shows_the_options_of_the_training_module(geobased):
    text = geobased("train", "lm", "--help").stdout
    assert "usage: geobased train lm" in text
    assert "--context_length" in text and "--learning_rate" in text


@pytest.mark.parametrize("group", ["", "train", "recall", "demo", "audit"])
def test_without_a_command_the_help_is_shown(geobased, group):
    result = geobased(*group.split())
    assert result.exit_code == 2 and "Usage: geobased" in result.stdout and "Exit codes:" in result.stdout
    assert geobased(*group.split(), "--help").exit_code == 0


def test_version(geobased):
    assert geobased("--version").stdout == f"geobased {package.__version__}\n"


@pytest.mark.parametrize("arguments", [("--help",), ("push", "--help"), ("--version",), ("locate",), ("nonsense",)])
def test_help_and_wrong_usage_import_nothing_heavy(arguments):
    code = (
        "import sys, geobased_command\n"
        f"sys.argv = ['geobased', *{arguments!r}]\n"
        "try: geobased_command.main()\n"
        "except SystemExit: pass\n"
        "print('modules:', *{name.partition('.')[0] for name in sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "huggingface_hub", "PIL"}


def test_a_command_started_lightly_knows_the_models(tiny_model_dir):
    result = start("generate", "the river", "--model", str(tiny_model_dir), "-n", "3", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] <= 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--version",), 0),
        (("recall",), 2),
        (("generate", "hi", "--model", "./no-such-folder"), 2),
        (("generate", "hi", "--model", "acme/no-such-model", "--json"), 1),
    ],
)
def test_exit_codes_of_the_process(arguments, code):
    result = start(*arguments, HF_HUB_OFFLINE="1")
    assert result.returncode == code and "Traceback" not in result.stderr
    if "--json" in arguments:
        assert "acme/no-such-model" in json.loads(result.stdout)["error"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("gen",), {"generate"}),
        (("train", "pigeon"), {"pigeon", "pigeon-embeddings"}),
        (("generate", "--max"), {"--max-new-tokens"}),
        (("generate", "--model", "based"), {"based-mini"}),
        (("push", "x", "me/x", "--card", ""), {"keep", "overwrite"}),
        (("locate", "./"), set()),  # bash goes on with files
    ],
)
def test_bash_completes_commands_options_and_models(tmp_path, words, expected):
    program = tmp_path / "geobased"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m geobased_command "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = start(_GEOBASED_COMPLETE="source_bash").stdout
    assert "complete -o default -F _geobased_completion geobased" in script
    quoted = " ".join(f"'{word}'" for word in ("geobased", *words))
    script += f"\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words)}\n_geobased_completion geobased\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    result = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60, env=os.environ | {"PATH": path}
    )
    assert set(result.stdout.split()) == expected, result.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts(shell):
    assert "_GEOBASED_COMPLETE=complete_" + shell in start(_GEOBASED_COMPLETE=f"source_{shell}").stdout


def test_completion_can_be_installed(geobased):
    assert "--install-completion" in geobased("--help").stdout


def test_console_script_starts_lightly():
    setup = Path(__file__).parents[2] / "setup.cfg"
    assert "geobased = geobased_command:main" in setup.read_text(encoding="utf-8")
