"""The documentation's pages: complete, and asking no other machine for anything."""

import importlib
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import geobased
import geobased.kernels

# attributes by which a browser fetches something without being asked
FETCHED = {
    ("script", "src"),
    ("img", "src"),
    ("img", "srcset"),
    ("iframe", "src"),
    ("source", "src"),
    ("link", "href"),
    ("video", "src"),
    ("object", "data"),
}
SUBPACKAGES = ("modeling_based", "modeling_streetclip", "modeling_pigeon", "modeling_sumformer", "pipelines", "model_cards")


class Fetches(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if (tag, name) in FETCHED and value]


def test_no_page_fetches_anything_from_another_machine(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        parser = Fetches()
        parser.feed(text)
        assert parser.addresses and not [address for address in parser.addresses if re.match(r"(?:https?:)?//", address)], page
        assert "url(http" not in text and "@import" not in text, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


def test_pages_that_documents_refer_to_are_there(site):
    pages = [
        "index",
        "installation",
        "geolocalization",
        "mathematics",
        "performance",
        "paper_index",
        "responsible_use",
        "changelog",
    ]
    for name in (*pages, "based", "command_line", "tutorials/index", "model_cards/index", "model_cards/earthclip-mini"):
        assert (site / f"{name}.html").is_file(), name
    # links out of docs/ lead to the pages made of those files
    text = (site / "geolocalization.html").read_text(encoding="utf-8")
    assert 'href="model_cards/earthclip-mini.html"' in text and "../checkpoints" not in text


def test_formulas_are_mathml(site):
    text = (site / "mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math") > 100 and "arithmatex" not in text
    assert not re.search(r"\\(?:frac|sum|varphi|mathrm)", text), "a formula was left as LaTeX"


@pytest.mark.parametrize("package", ["", *SUBPACKAGES])
def test_every_public_name_is_in_the_reference_and_documented(site, package):
    module = importlib.import_module(f"geobased.{package}".rstrip("."))
    page = (site / "reference" / f"{package or 'geobased'}.html").read_text(encoding="utf-8")
    for name in module.__all__:
        assert f'id="{module.__name__}.{name}"' in page, name
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            # a class inherits its base's docstring, which says nothing about it
            assert value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("package", ["geography", "recall", "training"])
def test_functions_and_classes_of_a_packages_modules_are_in_the_reference(site, package):
    page = (site / "reference" / f"{package}.html").read_text(encoding="utf-8")
    folder = Path(importlib.import_module(f"geobased.{package}").__file__).parent
    for path in folder.glob("[a-z]*.py"):
        module = importlib.import_module(f"geobased.{package}.{path.stem}")
        for name in getattr(module, "__all__", []):
            if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name)):
                assert f'id="{module.__name__}.{name}"' in page, f"{module.__name__}.{name}"


def test_every_kernel_is_in_the_reference(site):
    page = (site / "reference" / "kernels.html").read_text(encoding="utf-8")
    for name in geobased.kernels.__all__:
        operator = getattr(getattr(geobased.kernels, name), name, None)
        assert operator is None or f'id="geobased.kernels.{name}.{name}"' in page, name
    assert 'id="geobased.kernels.taylor_linear_attention.taylor_linear_attention_step"' in page


def test_overview_of_the_reference_links_to_every_name(site):
    overview = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in geobased.__all__:
        assert f'href="geobased.html#geobased.{name}"' in overview, name
