"""Runs the code blocks of a Markdown page as a reader would: in order, in one folder.

Python blocks share one namespace, bash blocks run in a shell with `geobased` on its path. A block `text title="Output"` is what
the block before it prints, `...` standing for anything; `text title="Output, for example"` is not compared, and a code block
whose title begins with "Needs" (the network, a GPU) is not run.
"""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
OUTPUT, EXAMPLE = "Output", "Output, for example"
COMPARISON = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    code: str
    line: int

    @property
    def runs(self) -> bool:
        return self.language in ("python", "bash") and not self.title.startswith("Needs")


def page_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    fences = len(re.findall(r"^ *```", text, re.MULTILINE))
    blocks = [Block(m[1], m[2] or "", m[3], text[: m.start()].count("\n") + 1) for m in FENCE.finditer(text)]
    assert fences == 2 * len(blocks), f"{page.name} has a code block without a language, indented, or not closed"
    return blocks


def run_page(page: Path, folder: Path) -> int:
    """Runs a page's blocks in `folder`, the current one, and returns how many were run.

    Raises `AssertionError` with page and line if a block fails or prints something else than the page shows.
    """
    names: dict[str, Any] = {"__name__": "__page__"}
    printed, count = None, 0
    for block in page_blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.runs:
            printed = _python(block, names, where) if block.language == "python" else _bash(block, folder, where)
            count += 1
        elif block.language == "text" and block.title == OUTPUT:
            assert printed is not None, f"{where}: shows the output of no block"
            checker = doctest.OutputChecker()
            assert checker.check_output(block.code, printed, COMPARISON), (
                f"{where} shows\n{block.code}\nbut the block before it printed\n{printed}"
            )
    return count


def _python(block: Block, names: dict[str, Any], where: str) -> str:
    printed = io.StringIO()
    # as many lines before it as on the page: a traceback then has the page's line numbers
    code = compile("\n" * block.line + block.code, where, "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def _bash(block: Block, folder: Path, where: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{where}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout
