"""Pages of the committed audits fit a phone and a desk, light and dark, and ask no machine for anything."""

from pathlib import Path

import pytest
from PIL import Image

AUDITS = Path(__file__).resolve().parents[2] / "audits"
PAGES = ("earthclip-mini/compared.html", "earthclip-mini/report/report.html", "based-mini/report/report.html")
SIZES = ((1100, 800), (390, 844))


@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_and_stays_on_this_machine(open_page, screenshots, path):
    backgrounds = set()
    for width, height in SIZES:
        for scheme in ("light", "dark"):
            viewport = {"width": width, "height": height}
            page = open_page((AUDITS / path).as_uri(), viewport=viewport, color_scheme=scheme)
            assert page.locator("h1").inner_text().endswith("?")
            assert page.locator(".rates svg .bar").count() == 4
            for summary in page.locator("details > summary").all():
                summary.click()
            assert page.evaluate("document.documentElement.scrollWidth") == width
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    if screenshots and path.endswith("compared.html"):
        page = open_page((AUDITS / path).as_uri(), viewport={"width": 1100, "height": 800})
        page.screenshot(path=screenshots / "audit_compared.png", full_page=True)
        with Image.open(screenshots / "audit_compared.png") as picture:
            picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(screenshots / "audit_compared.png", optimize=True)
