"""Both demos open in a browser and name what they do."""

import pytest


@pytest.mark.parametrize(("demo", "heading"), [("geolocalization", "Where was this taken?"), ("generation", "BASED")])
def test_page_opens(start_demo, open_page, demo, heading):
    page = open_page(start_demo(demo))
    found = page.locator("h1")
    found.wait_for()
    assert heading in found.inner_text()
