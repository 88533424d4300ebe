"""Evaluation and calibration: reference values, real answers, intervals, groups, reports, bad input."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.geography.calibration import (
    expected_calibration_error,
    fit_abstention_radius,
    fit_radius_scale,
    fit_temperature,
    radius_coverage,
    reliability_table,
    risk_coverage_curve,
)
from geobased.geography.coordinates import PIGEON_EARTH_RADIUS_KM
from geobased.geography.evaluation import distance_metrics, evaluate, geoscore

FIXTURES = Path(__file__).parents[1] / "fixtures" / "geo"


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads((FIXTURES / "geoscore.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def game() -> dict[str, np.ndarray]:
    """50 real answers of two models of OSV-5M's game, with published distances and scores."""
    with (FIXTURES / "osv5m_game.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {
        "truths": ("true_lat", "true_lon"),
        "predictions": ("pred_lat", "pred_lon"),
        "distances": ("distance",),
        "scores": ("score",),
        "base_predictions": ("pred_lat_base", "pred_lon_base"),
        "base_distances": ("distance_base",),
    }
    columns = {name: np.array([[float(row[key]) for key in keys] for row in rows]).squeeze() for name, keys in numbers.items()}
    columns["countries"] = np.array([row["country"] for row in rows])
    columns["predicted_countries"] = np.array([row["pred_country"] for row in rows])
    return columns


def scattered(count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truths = np.stack([generator.uniform(-60, 70, count), generator.uniform(-180, 180, count)], axis=1)
    answers = np.stack([truths[:, 0] + generator.normal(0, 3, count), truths[:, 1] + generator.normal(0, 3, count)], axis=1)
    answers[:, 1] = (answers[:, 1] + 180) % 360 - 180
    return answers, truths


# metrics


def test_metrics_match_the_reference(reference):
    distances = reference["distances_km"]
    assert geoscore(distances).tolist() == reference["score_rounded"]
    np.testing.assert_allclose(geoscore(distances, rounded=False), reference["score_unrounded"], rtol=1e-12)
    for inclusive, key in ((False, "pct_within"), (True, "pct_within_le")):
        metrics = distance_metrics(distances, inclusive=inclusive)
        assert metrics["geoscore"] == pytest.approx(reference["mean_rounded"], rel=1e-12)
        for threshold, share in reference[key].items():
            assert metrics[f"within_{threshold}km"] == pytest.approx(100 * share, rel=1e-12)
        assert metrics["median_km"] == pytest.approx(np.median(distances))
        assert metrics["mean_km"] == pytest.approx(np.mean(distances))


def test_distances_match_the_reference_with_pigeons_radius():
    places = json.loads((FIXTURES / "haversine.json").read_text(encoding="utf-8"))
    coordinates = np.array(places["coords"])[:, ::-1]
    for row, expected in zip(coordinates, places["matrix_km"], strict=True):
        repeated = np.repeat(row[None], len(coordinates), axis=0)
        result = evaluate(repeated, coordinates, radius_km=PIGEON_EARTH_RADIUS_KM, bootstrap=0)
        np.testing.assert_allclose(result.distances_km, expected, rtol=1e-9, atol=1e-6)


def test_real_answers_get_their_published_distances_and_scores(game):
    for predictions, distances in (("predictions", "distances"), ("base_predictions", "base_distances")):
        result = evaluate(game[predictions], game["truths"], bootstrap=0)
        np.testing.assert_allclose(result.distances_km, game[distances], rtol=2e-3)
    result = evaluate(
        game["predictions"], game["truths"], countries=game["countries"], predicted_countries=game["predicted_countries"]
    )
    assert result.metrics["geoscore"].value == pytest.approx(game["scores"].mean(), rel=2e-3)
    right = (game["countries"] == game["predicted_countries"]).mean()
    assert result.metrics["country_accuracy"].value == pytest.approx(100 * right)
    for estimate in result.metrics.values():
        assert estimate.low <= estimate.value <= estimate.high
    assert sum(group["count"] for group in result.groups["country"].values()) == 50


def test_perfect_answers():
    _, truths = scattered()
    metrics = evaluate(truths, truths).metrics
    for name, estimate in metrics.items():
        expected = {"median_km": 0.0, "mean_km": 0.0, "geoscore": 5000.0}.get(name, 100.0)
        assert (estimate.value, estimate.low, estimate.high) == (expected, expected, expected), name


def test_thresholds_can_be_chosen():
    answers, truths = scattered()
    metrics = evaluate(answers, truths, thresholds_km=[0.5, 300], bootstrap=0).metrics
    assert [name for name in metrics if name.startswith("within")] == ["within_0.5km", "within_300km"]


def test_countries_that_are_not_known_do_not_count():
    answers, truths = scattered(4)
    result = evaluate(
        answers, truths, countries=["FR", "", None, "NA"], predicted_countries=["FR", "FR", "FR", None], bootstrap=0
    )
    assert result.metrics["country_accuracy"].value == 50.0
    assert list(result.groups["country"]) == ["FR", "NA"]


# intervals


def test_intervals_depend_on_the_seed_alone():
    answers, truths = scattered()
    first, second, other = (evaluate(answers, truths, seed=seed, bootstrap=200).metrics for seed in (1, 1, 2))
    assert first == second
    assert first["mean_km"] != other["mean_km"]


def test_intervals_of_a_group_do_not_depend_on_other_groups():
    answers, truths = scattered()
    halves = ["a"] * 100 + ["b"] * 100
    both = evaluate(answers, truths, groups={"half": halves}, bootstrap=100)
    one = evaluate(answers, truths, groups={"half": ["a"] * 100 + [None] * 100}, bootstrap=100)
    assert both.groups["half"]["a"] == one.groups["half"]["a"]
    alone = evaluate(answers[:100], truths[:100], bootstrap=0).metrics
    assert both.groups["half"]["a"]["metrics"]["median_km"].value == alone["median_km"].value


def test_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    answers, truths = scattered(2000)
    result = evaluate(answers, truths, bootstrap=2000)
    estimate = result.metrics["mean_km"]
    width = 2 * 1.96 * result.distances_km.std() / math.sqrt(2000)
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.1)
    narrow = evaluate(answers, truths, bootstrap=2000, level=0.5).metrics["mean_km"]
    assert narrow.high - narrow.low == pytest.approx(width * 0.6745 / 1.96, rel=0.1)


def test_one_image_has_no_interval():
    estimate = evaluate([[0.0, 0.0]], [[0.0, 1.0]]).metrics["median_km"]
    assert estimate.value == pytest.approx(111.195, rel=1e-4) and estimate.low is None


# calibration


def test_calibration_error_by_hand():
    confidences, correct = [0.95, 0.85, 0.85, 0.2], [True, True, False, False]
    table = reliability_table(confidences, correct, bins=10)
    assert [(row["count"], row["accuracy"]) for row in table] == [(1, 0.0), (2, 0.5), (1, 1.0)]
    assert expected_calibration_error(confidences, correct, bins=10) == pytest.approx((0.2 + 2 * 0.35 + 0.05) / 4)
    # edges belong to the bin below, 0 to the first
    assert [row["low"] for row in reliability_table([0.0, 0.1, 0.5, 1.0], [1, 1, 1, 1], bins=10)] == [0.0, 0.4, 0.9]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50), st.integers(1, 30))
def test_calibration_error_is_a_share(answers, bins):
    confidences, correct = zip(*answers, strict=True)
    error = expected_calibration_error(confidences, correct, bins)
    assert 0 <= error <= 1
    total = abs(np.mean(confidences) - np.mean(correct))
    assert error >= total - 1e-12, "bins cannot cancel more than all answers together"
    assert sum(row["count"] for row in reliability_table(confidences, correct, bins)) == len(answers)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature_is_found(temperature):
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (20000, 6))
    gumbel = -np.log(-np.log(generator.uniform(size=logits.shape)))
    labels = (logits + gumbel).argmax(axis=1)  # drawn from softmax(logits)
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.05)


def test_radii_cover_what_they_promise():
    generator = np.random.default_rng(0)
    radii = generator.uniform(10, 500, 4000)
    errors = radii * generator.lognormal(0, 1, 4000)
    for coverage in (0.5, 0.9):
        scale = fit_radius_scale(radii[:2000], errors[:2000], coverage)
        assert radius_coverage(scale * radii[2000:], errors[2000:]) == pytest.approx(coverage, abs=0.03)
        assert radius_coverage(scale * radii[:2000], errors[:2000]) >= coverage


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=9, max_size=60), st.sampled_from([0.25, 0.5, 0.8, 0.9]))
def test_scale_is_the_conformal_quantile(errors, coverage):
    scale = fit_radius_scale(np.ones(len(errors)), errors, coverage)
    inside = sum(error <= scale for error in errors)
    assert inside >= coverage * (len(errors) + 1) - 1e-9
    assert sum(error < scale for error in errors) < coverage * (len(errors) + 1)


def test_too_few_images_for_a_coverage():
    assert fit_radius_scale(np.ones(9), np.arange(9.0), 0.9) == 8.0
    with pytest.raises(ValueError, match="8 images are too few to calibrate a coverage of 0.9: 9 are needed"):
        fit_radius_scale(np.ones(8), np.ones(8), 0.9)


def test_abstention_radius_lets_the_most_answers_through():
    radii, errors = [10, 20, 30, 30, 40, 50], [1, 1, 900, 1, 1, 900]
    assert fit_abstention_radius(radii, errors, within_km=25, rate=0.8) == 40
    assert fit_abstention_radius(radii, errors, within_km=25, rate=1.0) == 20
    assert fit_abstention_radius(radii, errors, within_km=25, rate=0.6) == 50
    assert fit_abstention_radius([1.0, 2.0], [900, 900], within_km=25, rate=0.5) is None


def test_certain_answers_have_smaller_errors():
    errors = np.arange(1.0, 101.0)
    rows = risk_coverage_curve(errors, errors, shares=[0.1, 1.0])
    assert rows == [
        {"share": 0.1, "median_km": 5.5, "mean_km": 5.5},
        {"share": 1.0, "median_km": 50.5, "mean_km": 50.5},
    ]


def test_calibration_of_an_evaluation():
    answers, truths = scattered()
    confidences = np.linspace(0, 1, 200)
    correct = np.random.default_rng(0).uniform(size=200) < confidences
    radii = {0.5: np.full(200, 400.0), 0.9: np.full(200, 900.0)}
    abstained = confidences < 0.25
    result = evaluate(
        answers, truths, confidences=confidences, correct=correct, error_radii_km=radii, abstained=abstained, bootstrap=100
    )
    calibration = result.calibration
    assert calibration["expected_calibration_error"] == expected_calibration_error(confidences, correct)
    for row in calibration["radius"]:
        share = radius_coverage(radii[row["nominal"]], result.distances_km)
        assert row["coverage"].value == share
        assert row["coverage"].low <= share <= row["coverage"].high
    assert result.answered["count"] == 150 and result.answered["share"] == 0.75
    kept = evaluate(answers[~abstained], truths[~abstained], bootstrap=0).metrics
    assert result.answered["metrics"]["mean_km"].value == pytest.approx(kept["mean_km"].value)
    everyone = evaluate(answers, truths, abstained=np.ones(200, dtype=bool), bootstrap=0)
    assert everyone.answered == {"count": 0, "share": 0.0, "metrics": {}}


# reports


@pytest.fixture(scope="module")
def full_result():
    answers, truths = scattered()
    confidences = np.linspace(0, 1, 200)
    return evaluate(
        answers,
        truths,
        countries=[f"<b>{i % 7}" for i in range(200)],
        predicted_countries=[f"<b>{i % 5}" for i in range(200)],
        groups={"continent": ["Europe"] * 150 + ["Oceania"] * 50},
        confidences=confidences,
        correct=confidences > 0.4,
        error_radii_km={0.9: np.full(200, 900.0)},
        abstained=confidences < 0.1,
        bootstrap=50,
    )


def test_json_holds_everything(full_result, tmp_path):
    full_result.save_json(tmp_path / "result.json", images=True)
    read = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert read == full_result.to_dict(images=True)
    assert read["metrics"]["median_km"]["value"] == full_result.metrics["median_km"].value
    assert set(read["groups"]) == {"country", "continent"} and len(read["images"]) == 200
    assert "images" not in full_result.to_dict()
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]


class Checked(HTMLParser):
    """Collects the tags; fails where one closes that was not opened last."""

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_file_that_needs_no_network(full_result, tmp_path):
    square = [(10.0, 50.0), (20.0, 50.0), (20.0, 60.0)]
    full_result.save_html(tmp_path / "report.html", title="A & B", outlines=[square], max_groups=3)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    parser = Checked()
    parser.feed(text)
    assert parser.open == [] and parser.tags.count("svg") == 3 and parser.tags.count("circle") >= 200
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert not re.search(r"https?:|url\(|src=", text)
    assert "A &amp; B" in text and "&lt;b&gt;0" in text and "<b>" not in text
    assert "4 smaller groups are not shown" in text
    assert '<polygon points="475.0,100.0 500.0,100.0 500.0,75.0"' in text


def test_report_without_anything_optional(tmp_path):
    answers, truths = scattered(3)
    evaluate(answers, truths, bootstrap=0).save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Calibration" not in text and "Intervals" not in text and "within 25 km" in text


def test_map_leaves_out_images_it_says_so(tmp_path):
    answers, truths = scattered(4000)
    evaluate(answers, truths, bootstrap=0).save_html(tmp_path / "report.html")
    assert "3,000 of 4,000 images are shown" in (tmp_path / "report.html").read_text(encoding="utf-8")


# bad input


@pytest.mark.parametrize(
    ("predictions", "truths", "message"),
    [
        ([], [], "n > 0"),
        ([[0, 0]], [[0, 0], [1, 1]], "predictions has 1 rows but truths has 2"),
        ([[0, 0, 0]], [[0, 0, 0]], r"not of shape \(1, 3\)"),
        ([[math.nan, 0]], [[0, 0]], "predictions.*not finite"),
        ([[0, 0]], [[0, math.inf]], "truths.*not finite"),
        ([[0, 0]], [[151.2, -33.9]], "truths.*swapped"),
        ([[0, 181]], [[0, 0]], "predictions.*longitude"),
    ],
)
def test_bad_places(predictions, truths, message):
    with pytest.raises(ValueError, match=message):
        evaluate(predictions, truths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"countries": ["FR"]}, "countries has 1 rows but truths has 2"),
        ({"predicted_countries": ["FR", "FR"]}, "needs countries"),
        ({"groups": {"region": ["a"]}}, r"groups\['region'\] has 1 rows"),
        ({"confidences": [0.5, 0.5]}, "confidences and correct together"),
        ({"confidences": [0.5, 1.5], "correct": [True, True]}, "between 0 and 1"),
        ({"error_radii_km": {0.9: [1.0, -1.0]}}, "must be radii from 0 on"),
        ({"error_radii_km": {90: [1.0, 1.0]}}, "90 a coverage between 0 and 1"),
        ({"bootstrap": -1}, "bootstrap=-1"),
        ({"level": 95}, "level=95"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate([[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]], **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geoscore([-1.0]), "negative or NaN"),
        (lambda: geoscore([math.nan]), "negative or NaN"),
        (lambda: distance_metrics([]), "n > 0"),
        (lambda: reliability_table([0.5], [True], bins=0), "bins=0"),
        (lambda: reliability_table([0.5], [True, False]), r"not of shapes \(1,\) and \(2,\)"),
        (lambda: fit_temperature(np.zeros((2, 3)), [0, 3]), "there are 3 classes"),
        (lambda: fit_temperature(np.full((2, 3), np.nan), [0, 1]), "NaN or infinity"),
        (lambda: fit_temperature(np.zeros(3), [0]), r"must be \[n, classes\]"),
        (lambda: fit_radius_scale([0.0], [1.0], 0.5), "must be positive"),
        (lambda: fit_radius_scale([1.0], [math.nan], 0.5), r"errors_km\[0\] is NaN"),
        (lambda: fit_radius_scale([1.0], [1.0], 1.0), "coverage=1.0"),
        (lambda: fit_abstention_radius([1.0], [1.0], within_km=1, rate=0), "rate=0"),
        (lambda: risk_coverage_curve([1.0], [1.0], shares=[0.0]), "shares must lie"),
    ],
)
def test_bad_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
