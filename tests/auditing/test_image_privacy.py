import numpy as np
import pytest
from PIL import Image, ImageOps

from geobased.auditing import AuditTarget
from geobased.auditing.image_privacy import LIES, exif_proof, exif_words, gps_exif, membership, place_losses


@pytest.fixture(scope="module")
def target():
    with AuditTarget.open("earthclip-mini", "grey", mode="in_process") as opened:
        yield opened


@pytest.fixture(scope="module")
def crops():
    """Pictures and places of the planted model's audit."""
    from geobased.auditing.configuration import read_configuration
    from geobased.checkpoints import checkpoint_path

    question = read_configuration(f"{checkpoint_path('earthclip-mini-planted')}/audit.yaml").question
    places = np.array([[item["latitude"], item["longitude"]] for item in question.items])
    return [(item.id, question.picture(item)) for item in question.items], places


def coordinates_of(path):
    """What a program that reads EXIF would answer."""
    with Image.open(path) as picture:
        gps = picture.getexif().get_ifd(0x8825)
    if not gps:
        return {"latitude": 0.0, "longitude": 0.0}
    degrees = [float(d + m / 60 + s / 3600) for d, m, s in (gps[2], gps[4])]
    return {"latitude": degrees[0] * (-1 if gps[1] == "S" else 1), "longitude": degrees[1] * (-1 if gps[3] == "W" else 1)}


def test_a_program_that_follows_exif_is_caught():
    findings = exif_proof(coordinates_of, [("grey", Image.new("RGB", (32, 32), (90, 90, 90)))])
    assert not findings[0].same
    assert {"41.286", "174.775", "64.146", "21.942"} <= set(findings[0].leaks)


def test_the_geolocator_follows_no_exif_and_repeats_none(target, crops):
    findings = exif_proof(lambda path: target.answer(target.prepare([path]))[0], crops[0][:3])
    assert [finding.same for finding in findings] == [True] * 3
    assert all(finding.leaks == [] and len(finding.answers) == 3 for finding in findings)


def test_a_pipeline_on_files_follows_no_exif(crops):
    from transformers import pipeline

    import geobased  # noqa: F401
    from geobased.checkpoints import checkpoint_path

    pipe = pipeline("image-geolocalization", model=checkpoint_path("earthclip-mini"))
    assert all(finding.same and not finding.leaks for finding in exif_proof(lambda path: pipe(str(path)), crops[0][:2]))


def test_exif_is_written_as_cameras_write_it(tmp_path):
    for latitude, longitude in LIES:
        path = tmp_path / "lie.png"
        Image.new("RGB", (8, 8)).save(path, exif=gps_exif(latitude, longitude))
        found = coordinates_of(path)
        assert (found["latitude"], found["longitude"]) == pytest.approx((latitude, longitude), abs=1e-5)
        with Image.open(path) as opened:
            assert ImageOps.exif_transpose(opened).size == (8, 8)
    assert {"41.286", "41.287", "geobased audit"} <= set(exif_words())


def test_losses_of_true_places_are_low(target, crops):
    pictures, places = crops
    images = target.prepare([picture for _, picture in pictures])
    losses = place_losses(target, images, places, at_once=5)
    assert losses.shape == (12,) and np.median(losses) < 3
    assert (place_losses(target, images, -places) > losses).all()


def test_membership_is_measured_with_its_uncertainty():
    generator = np.random.default_rng(0)
    apart = membership(generator.normal(0, 1, 300), generator.normal(3, 1, 300), resamples=200)
    assert apart.area == pytest.approx(0.983, abs=0.015) and apart.low < apart.area < apart.high
    assert apart.rates[0.05] > apart.rates[0.01] > 0.3
    alike = membership(generator.normal(0, 1, 300), generator.normal(0, 1, 300), resamples=200)
    assert alike.low < 0.5 < alike.high and alike.rates[0.05] < 0.15
    assert membership([1.0, 1.0], [1.0, 1.0]).area == 0.5
    with pytest.raises(ValueError, match="at least two"):
        membership([1.0], [1.0, 2.0])
