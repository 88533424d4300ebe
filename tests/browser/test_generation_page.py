"""The text generation page in a browser: what a person does there, what they see, and that it works on a phone in the dark."""

import io
import re

import pytest
from PIL import Image

PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
DESKTOP = {"viewport": {"width": 1000, "height": 900}, "color_scheme": "light"}
WAIT = 60_000


@pytest.fixture
def open_tab(start_demo, open_page):
    def opened(tab: str, **options):
        page = open_page(start_demo("generation"), **options)
        page.get_by_role("tab", name=tab, exact=True).click()
        return page

    return opened


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def textbox(page, label: str):
    # a field's hint is a part of its name
    return page.get_by_role("textbox", name=re.compile(rf"^{label}\b"))


def wait_for_value(page, label: str, pattern: str) -> str:
    box = textbox(page, label)
    page.wait_for_function("([box, pattern]) => new RegExp(pattern).test(box.value)", arg=[box.element_handle(), pattern])
    return box.input_value()


def set_number(page, label: str, value: int) -> None:
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.blur()


def kilobytes(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+) (kB|MB)", text).groups()
    return float(number) * (1000 if unit == "MB" else 1)


def picture(page, screenshots, name: str) -> None:
    if screenshots is not None:
        screenshots.mkdir(parents=True, exist_ok=True)
        page.mouse.move(0, 0)
        pixels = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        # few colours: the pictures of the documentation stay small
        pixels.quantize(64, dither=Image.Dither.NONE).save(screenshots / f"{name}.png", optimize=True)


def test_text_streams_and_stop_stops(open_tab):
    page = open_tab("Generate")
    set_number(page, "Most new tokens", 512)
    textbox(page, "Prompt").fill("Fellow citizens,")
    press(page, "Generate")
    first = wait_for_value(page, "Continuation", r".{20}")
    second = wait_for_value(page, "Continuation", rf"[^]{{{len(first) + 20}}}")
    assert second.startswith(first)
    press(page, "Stop")
    page.wait_for_timeout(500)
    stopped = textbox(page, "Continuation").input_value()
    page.wait_for_timeout(1000)
    assert textbox(page, "Continuation").input_value() == stopped
    # the next text does not wait for the rest of the one before
    textbox(page, "Prompt").fill("The population of Lund is 94,393. Question: What is the population of Lund? Answer:")
    set_number(page, "Most new tokens", 8)
    textbox(page, "Prompt").press("Shift+Enter")
    wait_for_value(page, "Continuation", "^ 94,393")


def test_generation_tab_as_a_picture(open_tab, screenshots):
    page = open_tab("Generate", **DESKTOP)
    press(page, "Generate")
    page.get_by_text("27 of the prompt, 32 new").wait_for()
    assert textbox(page, "Continuation").input_value().startswith(" 94,393")
    picture(page, screenshots, "demo_generation")


def test_attention_keeps_more_memory_of_a_long_context(open_tab, screenshots):
    page = open_tab("Compare", **DESKTOP)
    set_number(page, "Context, tokens", 2048)
    set_number(page, "Tokens to write", 32)
    press(page, "Compare")
    page.get_by_text("At 2,080 tokens Llama keeps").wait_for(timeout=WAIT)
    based, attention = (
        page.locator(f".card.{kind} dl div", has_text="Memory kept").locator("dd").inner_text() for kind in ("based", "attention")
    )
    assert kilobytes(attention) > 50 * kilobytes(based)
    assert page.locator(".card.attention").get_by_text("Untrained, with random weights").is_visible()
    charts = page.get_by_role("img", name=re.compile("Memory now|Tokens per second now"))
    assert charts.count() == 2 and page.locator(".comparison polyline").count() == 4
    picture(page, screenshots, "demo_comparison")


def test_comparison_can_be_stopped(open_tab):
    page = open_tab("Compare")
    set_number(page, "Context, tokens", 16_384)
    press(page, "Compare")
    page.get_by_text("Llama reads").wait_for(timeout=WAIT)
    press(page, "Stop")
    page.get_by_role("tab", name="Recall", exact=True).click()
    press(page, "Ask")
    # far sooner than the comparison would have ended
    page.locator(".recall mark").wait_for(timeout=10_000)


def test_recall_answers_and_marks_the_place(open_tab, screenshots):
    page = open_tab("Recall", **DESKTOP)
    page.get_by_label("Compare distances").check()
    textbox(page, "Question").press("Enter")
    page.locator(".recall tbody tr").nth(5).wait_for(timeout=WAIT)
    assert textbox(page, "Answer").input_value() == "humid subtropical"
    assert page.locator(".recall mark").inner_text() == "humid subtropical"
    assert page.get_by_text("Often wrong.").is_visible()
    picture(page, screenshots, "demo_recall")


@pytest.mark.parametrize(
    ("tab", "label", "button", "message"),
    [
        ("Generate", "Prompt", "Generate", "The prompt is empty"),
        ("Compare", "Text to read and continue", "Compare", "The prompt is empty"),
        ("Recall", "Document", "Ask", "The document is empty"),
    ],
)
def test_nothing_to_work_on_is_a_message(open_tab, tab, label, button, message):
    page = open_tab(tab)
    textbox(page, label).fill("")
    press(page, button)
    page.get_by_text(message).wait_for()


def test_fits_a_phone_in_the_dark(open_tab, screenshots):
    page = open_tab("Compare", **PHONE)
    set_number(page, "Context, tokens", 256)
    set_number(page, "Tokens to write", 4)
    press(page, "Compare")
    page.get_by_text("At 260 tokens Llama keeps").wait_for(timeout=WAIT)
    picture(page, screenshots, "demo_generation_phone")
    page.get_by_role("tab", name="Recall", exact=True).click()
    page.get_by_label("Compare distances").check()
    press(page, "Ask")
    page.locator(".recall tbody tr").nth(5).wait_for(timeout=WAIT)
    for tab in ("Generate", "Compare", "Recall"):
        page.get_by_role("tab", name=tab, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert max(brightness) < 80
