import json

import numpy as np
import pytest

from geobased.auditing.group_bias import answer_groupings, group_bias, place_groupings
from geobased.geography.country_groups import density_classes, remoteness_classes, un_regions, un_subregions
from geobased.geography.gazetteer import countries


@pytest.fixture(scope="module")
def sample():
    """400 images of 100 clusters, half in group A; answers in A are 50 km off, those in B 2,000 km for every second cluster."""
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(100), 4)
    truths = np.stack([generator.uniform(-40, 40, 100)[clusters], generator.uniform(-170, 170, 100)[clusters]], 1)
    group = np.where(clusters < 50, "A", "B")
    north = np.where((group == "B") & (clusters % 2 == 0), 2000, 50) / 111.0
    answers = truths + np.stack([north, np.zeros(400)], 1)
    return answers, truths, group, clusters


def test_gaps_are_found_with_their_sign_and_survive_correction(sample):
    answers, truths, group, clusters = sample
    report = group_bias(answers, truths, {"group": group}, clusters=clusters, resamples=500)
    a, b = report.groupings[0].groups
    assert (a.group, a.images, a.clusters) == ("A", 200, 50)
    assert a.within[200.0].value == 1 and b.within[200.0].value == 0.5
    assert a.gap.value == pytest.approx(0.5) and b.gap.value == pytest.approx(-0.5)
    assert a.gap.low > 0.3 and b.gap.high < -0.3
    assert a.p_value < 0.01 and a.p_value_holm == pytest.approx(2 * a.p_value)
    assert a.median_km.value == pytest.approx(50, rel=0.01) and a.over_prediction is None
    assert report.groupings[0].worst == "B" and report.within[2500.0].value == 1
    assert json.loads(json.dumps(report.to_dict()))["groupings"][0]["groups"][0]["within"]["200"]["value"] == 1


def test_clusters_widen_intervals(sample):
    answers, truths, group, clusters = sample
    by_cluster = group_bias(answers, truths, {"group": group}, clusters=clusters, resamples=500)
    by_image = group_bias(answers, truths, {"group": group}, clusters=np.arange(400), resamples=500)

    def width(report):
        share = report.groupings[0].groups[1].within[750.0]
        return share.high - share.low

    # four images to a cluster, all alike: twice as wide
    assert width(by_cluster) == pytest.approx(2 * width(by_image), rel=0.25)


def test_equal_groups_have_no_gap():
    generator = np.random.default_rng(1)
    truths = np.stack([generator.uniform(-60, 60, 600), generator.uniform(-180, 180, 600)], 1)
    answers = truths + np.stack([generator.exponential(8, 600) * generator.choice([-1, 1], 600), np.zeros(600)], 1).clip(-20, 20)
    report = group_bias(answers, truths, {"group": generator.choice(list("abcd"), 600)}, resamples=500)
    assert all(row.p_value_holm > 0.05 for row in report.groupings[0].groups)
    assert all(row.gap.low <= row.gap.value <= row.gap.high for row in report.groupings[0].groups)


def test_over_prediction_and_unseen_groups():
    truths = np.array([[50.0, 4.0], [51.0, 10.0], [40.0, -3.0], [41.0, 2.0]] * 10)
    true, answered = ["BE", "DE", "ES", "ES"] * 10, ["DE", "DE", "DE", "FR"] * 10
    report = group_bias(
        truths, truths, {"country": true}, answered_groupings=answer_groupings(answered), clusters=range(40), resamples=200
    )
    rows = {row.group: row.over_prediction.value for row in report.groupings[0].groups}
    assert rows == {"BE": 0, "DE": 3, "ES": 0}
    assert report.groupings[0].unseen == {"FR": 10}


def test_images_of_unknown_groups_are_counted_and_left_out(sample):
    answers, truths, group, clusters = sample
    mixed = np.where(np.arange(400) % 4 == 0, "", group)
    report = group_bias(answers, truths, {"income": mixed}, clusters=clusters, resamples=100)
    assert report.groupings[0].unknown == 100
    assert sum(row.images for row in report.groupings[0].groups) == 300


def test_bad_input_is_named(sample):
    answers, truths, group, _ = sample
    with pytest.raises(ValueError, match="one entry for each of the 400"):
        group_bias(answers, truths, {"group": group[:5]})
    with pytest.raises(ValueError, match="gap_km=100"):
        group_bias(answers, truths, {"group": group}, gap_km=100)
    with pytest.raises(ValueError, match="at least two"):
        group_bias(answers, truths, {"group": group}, clusters=["one"] * 400)


def test_groups_of_places():
    assert un_regions(["FR", "NA", "US", "XX", None]) == ["Europe", "Africa", "Americas", "", ""]
    assert un_subregions(["FR", "NG", "NA", "ID"]) == [
        "Western Europe",
        "Western Africa",
        "Southern Africa",
        "South-eastern Asia",
    ]
    codes = [country.code for country in countries()]
    assert all(un_regions(codes)) and len(set(un_regions(codes)) - {"Antarctica"}) == 5
    assert len(set(un_subregions(codes)) - {"Antarctica"}) == 22
    assert density_classes(["MN", "NL", "XX"]) == ["below 25 per km²", "from 300 per km²", ""]
    assert remoteness_classes([48.8566, 23.0], [2.3522, 10.0]) == ["within 10 km of a town", "over 50 km from a town"]
    groupings = place_groupings(np.array([[48.8566, 2.3522]]), ["FR"])
    assert groupings["UN region"] == ["Europe"] and groupings["distance from towns"] == ["within 10 km of a town"]
