"""The README is true: its Python runs in order, its commands exist, its table is what the script computes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import geobased
from geobased.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def geobased_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from geobased.cli.main import main; sys.argv[0] = 'geobased'; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__readme__"}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, Python block {number + 1}", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "finetuned" / "model" / "model.safetensors").is_file()


def test_batch_with_padding_gives_what_its_rows_give():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = geobased.checkpoint_path("based-mini")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    tokenizer.padding_side = "left"
    prompts = ["Liberty", "We the people of the United States, in order to"]
    batch = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=10, do_sample=False)
    for row, prompt in zip(batch, prompts, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=10, do_sample=False)[0]
        assert row[-10:].tolist() == alone[-10:].tolist()


def test_generate_command_works_without_a_network(tmp_path):
    result = geobased_command(
        "generate", "Fellow citizens, the Congress of the United States", "--max-new-tokens", "5", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_commands_exist():
    text = "\n".join(blocks("bash")) + "\n" + "\n".join(re.findall(r"`(geobased [^`]+)`", README))
    commands = {tuple(re.match(r"geobased ((?:[a-z]+ )*?[a-z]+)(?= |$)", line).group(1).split()) for line in geobased_lines(text)}
    assert {("generate",), ("convert",), ("export",)} <= commands
    for command in commands:
        result = CliRunner().invoke(app, [*command, "--help"])
        assert result.exit_code == 0, f"{command}: {result.output}"


def geobased_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.match(r"\s*geobased [a-z]", line)]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_memory_table_is_what_the_script_prints():
    shown = re.search(r"<!-- memory table -->\n(.*?)\n<!-- end of memory table -->", README, re.DOTALL).group(1)
    result = subprocess.run([sys.executable, ROOT / "scripts" / "memory_table.py"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == shown.strip()


@pytest.mark.parametrize(
    ("document", "name", "options"),
    [("docs/performance.md", "tables", []), ("README.md", "speed table", ["--headlines"])],
)
def test_measured_times_are_what_the_script_prints(document, name, options):
    text = (ROOT / document).read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL).group(1)
    script = ROOT / "scripts" / "performance_tables.py"
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == shown.strip()
