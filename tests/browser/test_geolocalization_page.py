"""The geolocalization page in a browser: uploads, maps that zoom, stopping, squares of the Blue Marble, keys, phones."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geobased import checkpoint_path

EXAMPLE = Path(checkpoint_path("earthclip-mini"), "example.png")
PHONE = {"width": 390, "height": 844}
SECONDS = 1000
TABS = ("Locate", "Blue Marble", "Batch", "Compare two models", "Evaluate")


@pytest.fixture
def open_demo(start_demo, open_page):
    def opened(path: str = "", **options):
        page = open_page(start_demo("geolocalization") + path, **options)
        page.set_default_timeout(60 * SECONDS)
        page.locator("#locate").wait_for()
        # the countries' outlines, which come after the page
        page.locator("#land").wait_for(state="attached")
        return page

    return opened


def located(page) -> None:
    page.locator("#example").click()
    page.locator(".places section svg").wait_for()


def overflow(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def save(page, path: Path, **options) -> None:
    """A picture of the page with few colours, so that it is small."""
    picture = Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def test_uploads_are_placed_on_a_map_that_zooms(open_demo, tmp_path, screenshots):
    other = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(other)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    page = open_demo(viewport={"width": 1100, "height": 900})
    page.locator("#files input[type=file]").set_input_files([EXAMPLE, other, bad])
    page.locator("#files").get_by_text("bad").wait_for()
    page.locator("#locate").click()
    page.locator(".places section svg").first.wait_for()
    assert page.get_by_text("1 of 3 located; 1 too uncertain to say; 1 not readable.").is_visible()
    assert page.get_by_text("bad.png is no image that Pillow can read").is_visible()
    assert page.locator(".abstains").count() == page.locator("section .radius.unsure").count() == 1
    assert page.locator("section .cell").count() > 3
    world = page.locator(".places svg[role=img]").first
    whole = world.get_attribute("viewBox")
    page.locator(".zoom button").first.click()
    near = world.get_attribute("viewBox")
    assert float(near.split()[2]) < float(whole.split()[2])
    world.focus()
    page.keyboard.press("+")
    assert float(world.get_attribute("viewBox").split()[2]) < float(near.split()[2])
    page.keyboard.press("0")
    assert [float(n) for n in world.get_attribute("viewBox").split()] == [float(n) for n in whole.split()]
    if screenshots is not None:
        page = open_demo(viewport={"width": 1100, "height": 900})
        located(page)
        save(page, screenshots / "demo_geolocalization.png", full_page=True)


def test_heat_map_is_drawn_on_request(open_demo):
    pytest.importorskip("captum")
    page = open_demo()
    located(page)
    page.get_by_text("What did the model look at?").click()
    page.locator("#explain").click()
    page.locator(".heat img").first.wait_for()
    assert all(page.locator(".heat img").nth(n).get_attribute("alt") for n in range(2))
    assert page.get_by_text("It does not tell whether the answer is right").is_visible()


def test_batch_stops(open_demo, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    paths = []
    for number in range(200):
        paths.append(tmp_path / f"{number}.jpg")
        Image.fromarray(np.roll(pixels, number, axis=0)).save(paths[-1], quality=40)
    page = open_demo()
    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch-files input[type=file]").set_input_files(paths)
    page.locator("#batch-files").get_by_text("199").wait_for()
    status = page.locator("#batch-status")
    page.locator("#locate-all").click()
    status.get_by_text("to go").wait_for()
    page.locator("#stop-batch").click()
    page.wait_for_timeout(1.5 * SECONDS)
    told = status.inner_text()
    assert "to go" in told
    page.wait_for_timeout(1.5 * SECONDS)
    assert status.inner_text() == told
    # and the model is free
    page.get_by_role("tab", name="Locate").first.click()
    located(page)


@pytest.mark.parametrize("way", ["click", "keys"])
def test_square_of_the_blue_marble_is_located(open_demo, way):
    page = open_demo()
    page.get_by_role("tab", name="Blue Marble").click()
    globe = page.locator("#globe svg")
    globe.wait_for()
    before = globe.locator("path").first.get_attribute("d")
    if way == "click":
        area = globe.bounding_box()
        # the middle of Italy
        x, y = (12.5 + 180) / 360, (84 - 42.5) / 144
        globe.click(position={"x": area["width"] * x, "y": area["height"] * y})
    else:
        page.get_by_label("Latitude, degrees").fill("42.5")
        page.get_by_label("Longitude, degrees").fill("12.5")
        page.keyboard.press("Enter")
    status = page.locator("#crop-status")
    status.get_by_text("from the true one").wait_for()
    distance = re.search(r"is ([\d,]+) km from the true one", status.inner_text())
    assert distance and int(distance[1].replace(",", "")) < 200
    assert page.locator("section .truth").count() == 1
    assert globe.locator("path").first.get_attribute("d") != before


def test_keys_reach_the_button(open_demo):
    page = open_demo()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "example":
            break
    else:
        pytest.fail("no number of tab keys reaches the button")
    page.keyboard.press("Enter")
    page.locator(".places section svg").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(open_demo, screenshots, theme):
    page = open_demo(f"?__theme={theme}", viewport=PHONE, color_scheme=theme)
    located(page)
    for name in TABS:
        page.get_by_role("tab", name=name).first.click()
        page.wait_for_timeout(0.3 * SECONDS)
        assert overflow(page) <= 0, name
    page.get_by_role("tab", name="Locate").first.click()
    if screenshots is not None and theme == "dark":
        page.wait_for_timeout(0.5 * SECONDS)
        save(
            page,
            screenshots / "demo_geolocalization_phone.png",
            full_page=True,
            clip={"x": 0, "y": 0, "width": 390, "height": 1900},
        )


def test_two_models_stand_side_by_side(open_demo):
    page = open_demo(viewport={"width": 1100, "height": 900})
    page.get_by_role("tab", name="Compare two models").click()
    page.locator("#compare-files input[type=file]").set_input_files([EXAMPLE])
    page.locator("#compare-files").get_by_text("example").wait_for()
    page.locator("#compare").click()
    page.locator(".places.wide td").first.wait_for()
    maps = page.locator(".places section svg")
    left, right = (maps.nth(n).bounding_box() for n in range(2))
    assert left["x"] + left["width"] <= right["x"]
    assert re.search(r"[\d,]+ km", page.locator(".places.wide").inner_text())
