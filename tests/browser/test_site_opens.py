"""The documentation's pages in a browser, opened as files: what a reader without a server and without a network sees."""

import pytest


@pytest.mark.parametrize("page", ["index", "mathematics", "tutorials/locate_photos", "reference/geobased", "performance"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_fits_its_window(site, open_page, page, width, scheme):
    opened = open_page((site / f"{page}.html").as_uri(), viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened.wait_for_selector("article h1")
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.evaluate("document.body.getAttribute('data-md-color-scheme')") == ("slate" if scheme == "dark" else "default")


def test_search_finds_a_page_without_a_server(site, open_page):
    opened = open_page((site / "index.html").as_uri(), viewport={"width": 1280, "height": 800})
    opened.fill("input[name=query]", "haversine smoothing")
    result = opened.wait_for_selector(".md-search-result__link[href*=mathematics]", timeout=20_000)
    result.click()
    opened.wait_for_url("**/mathematics.html*")


def test_formulas_are_drawn(site, open_page):
    opened = open_page((site / "mathematics.html").as_uri())
    heights = opened.eval_on_selector_all(".formula math", "formulas => formulas.map(one => one.getBoundingClientRect().height)")
    assert len(heights) > 10 and min(heights) > 10
