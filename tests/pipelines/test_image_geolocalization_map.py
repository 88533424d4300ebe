"""Maps of answers: whole, offline, and right at the date line and the poles."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.geography.coordinates import haversine_km
from geobased.pipelines.geolocalization_map import ZOOM_SCRIPT, LocatedImage, circle_around, country_outlines, save_map

pytest.importorskip("shapely", minversion="2.1")


def place(latitude: float, longitude: float, **changes) -> dict:
    names = {"country": "Sweden", "region": "Skane", "city": "Lund"}
    place = {"latitude": latitude, "longitude": longitude, "score": 0.5, "error_radius_km": 300.0, "abstain": False}
    return place | names | changes


IMAGES = [
    LocatedImage("lund<script>.jpg", [place(55.7, 13.2), place(59.3, 18.1, city="Stockholm")], thumbnail=b"\xff\xd8jpeg"),
    LocatedImage("fiji.jpg", [place(-17.7, 178.9, country="Fiji", region=None, city=None, error_radius_km=900.0, abstain=True)]),
    LocatedImage("arctic.jpg", [place(80.0, -150.0, country=None, region=None, city=None, error_radius_km=15_000.0)]),
    LocatedImage("bad.jpg", error="bad.jpg is no image"),
]


class Tags(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    VOID = ("meta", "img", "br", "path", "use", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_outlines_are_the_world():
    outlines = country_outlines()
    assert 500 < len(outlines) < 3000 and sum(map(len, outlines)) < 80_000
    points = np.concatenate(outlines)
    assert (np.abs(points) <= (180, 90)).all()
    low, high = points.min(axis=0), points.max(axis=0)
    assert low[0] < -179 and high[0] > 179 and low[1] < -50 and high[1] > 80


def test_html_is_whole_and_needs_no_network(tmp_path):
    save_map(tmp_path / "map.html", IMAGES)
    text = (tmp_path / "map.html").read_text(encoding="utf-8")
    tags = Tags(text)
    # the one that zooms
    assert tags.seen.count("script") == text.count("<script>") == 1 and ZOOM_SCRIPT in text and "link" not in tags.seen
    assert not re.search(r"fetch|XMLHttpRequest|import|eval", ZOOM_SCRIPT)
    assert all(link == "#land" or link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert "lund&lt;script&gt;.jpg" in text and "bad.jpg is no image" in text
    assert text.count("would rather not say") == text.count('class="radius unsure"') == 1  # dashed, and in words
    assert "Where 3 images may have been taken" in text
    assert text.count("<section>") == 3 and len(re.findall('class="radius[ "]', text)) == 2  # none of more than a hemisphere
    assert len(text) < 2_000_000
    assert list(tmp_path.iterdir()) == [tmp_path / "map.html"]


def test_places_stand_where_they_are(tmp_path):
    save_map(tmp_path / "map.html", IMAGES[:1])
    text = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert 'cx="13.200" cy="-55.700"' in text  # on the map of the world, which is in degrees
    close_up = text[text.index("<section>") :]
    left, top, width, height = map(float, re.search(r'viewBox="([^"]+)"', close_up)[1].split())
    marks = [(float(x), float(y)) for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', close_up)]
    assert marks[-1] == pytest.approx((left + width / 2, top + height / 2), abs=1e-3)  # the best one, drawn last
    assert all(left < x < left + width and top < y < top + height for x, y in marks)


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    save_map(tmp_path / "map.png", IMAGES)
    picture = Image.open(tmp_path / "map.png").convert("RGB")
    assert picture.width > 1000
    red = np.abs(np.asarray(picture).astype(int) - (209, 36, 47)).sum(axis=-1) < 10
    assert red.sum() > 100  # the best places and their radii
    save_map(tmp_path / "one.png", IMAGES[:1])
    assert {path.name for path in tmp_path.iterdir()} == {"map.png", "one.png"}


@settings(deadline=None, max_examples=60)
@given(st.floats(-89, 89), st.floats(-180, 180), st.floats(1, 9900))
def test_circle_has_its_radius(latitude, longitude, radius):
    ring = circle_around(latitude, longitude, radius)
    edge = ring[:91]
    wrapped = (edge[:, 0] + 180) % 360 - 180
    distance = haversine_km(latitude, longitude, edge[:, 1], wrapped, radius_km=6371.0)
    assert distance == pytest.approx(np.full(91, radius), rel=1e-3)
    # a circle with a pole in it is closed along the pole, and no other
    assert (len(ring) == 93) == (radius / 111.195 > 90 - abs(latitude))
    assert np.abs(np.diff(ring[:91, 0])).max() <= 180


@pytest.mark.parametrize(("name", "words"), [("map.pdf", "must end in .html or .png"), ("no/map.html", "there is no folder")])
def test_wrong_paths(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        save_map(tmp_path / name, IMAGES)
