"""A real browser, which sees this machine alone, and the demos as a person starts them.

Needs Playwright and a Chromium or Chrome: where they are missing the tests are skipped, or fail with GEOBASED_REQUIRE_BROWSER=1.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
STOP_SECONDS = 60
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
LOCAL = ("127.0.0.1", "localhost")


def _missing(what: str) -> None:
    reason = f"the browser tests need {what}"
    if os.environ.get("GEOBASED_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _missing("Playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        _missing("Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """`open_page(address, **options of a context)` -> a page. Requests to other machines and errors of scripts fail the test."""
    contexts, elsewhere, errors = [], [], []

    def asked(request: Any) -> None:
        if urlsplit(request.url).hostname not in (None, "", *LOCAL):
            elsewhere.append(request.url)

    def opened(address: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.on("request", asked)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert elsewhere == [], "the page asked other machines for these"
    assert errors == [], "scripts of the page failed"


@pytest.fixture(scope="session")
def start_demo() -> Iterator[Callable[..., str]]:
    """`start_demo("generation", ...)` starts `geobased demo generation ...` in a process and gives the page's address; a demo
    with the same arguments is started once."""
    running: dict[tuple[str, ...], tuple[subprocess.Popen, str]] = {}

    def started(*arguments: str) -> str:
        if arguments not in running:
            command = [sys.executable, "-c", "from geobased.cli.main import main; main()", "demo", *arguments]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            assert process.stdout is not None
            address = next((line.strip() for line in process.stdout if re.match(r"https?://", line)), None)
            assert address is not None, f"geobased demo {' '.join(arguments)} ended with {process.wait()}"
            running[arguments] = process, address
        return running[arguments][1]

    yield started
    for process, _ in running.values():
        process.terminate()
    for process, _ in running.values():
        process.wait(STOP_SECONDS)


@pytest.fixture
def screenshots() -> Path | None:
    """Folder for pictures of the documentation, if GEOBASED_SCREENSHOTS names one."""
    folder = os.environ.get("GEOBASED_SCREENSHOTS")
    return Path(folder) if folder else None
