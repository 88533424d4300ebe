"""Summary, frontiers, comparison with the published figure, tables and figures of a sweep over MQAR.

The accuracies here are invented by a formula, to know what must come out; they say nothing about any model.
"""

import csv
import math

import pytest

from geobased.recall import pareto, pareto_paper, pareto_plots


def row(family, label, state_bytes, accuracy, *, rate=1e-3, seed=0, chosen=True, **changes):
    return {
        "family": family,
        "label": label,
        "mixers": ["conv", family],
        "hidden_size": 64,
        "feature_dim": None,
        "sliding_window": None,
        "state_size": None,
        "learning_rate": rate,
        "seed": seed,
        "num_parameters": 1_000_000,
        "state_bytes": state_bytes,
        "validation_accuracy": accuracy,
        "accuracy": accuracy,
        "accuracy_by_test": dict.fromkeys(pareto_paper.FIGURE2_TESTS, accuracy) | {"1024/256": max(0.0, accuracy - 0.1)},
        "epochs": 2,
        "seconds": 1.0,
        "chosen_learning_rate": chosen,
    } | changes


def results(*rows, **changes):
    return {
        "preset": "smoke",
        "device": "cpu",
        "versions": {"torch": "2"},
        "date": "2026-01-01",
        "seconds": 5.0,
        "settings": {"epochs": 2},
        "absent": {},
        "rows": list(rows),
    } | changes


@pytest.fixture
def sweep():
    """BASED rises from 2^12.5, where Mamba-2 stays 0.1 below; the sliding window needs much more."""
    rows = []
    for exponent, accuracy in ((12.5, 0.54), (13.5, 0.76), (14.5, 0.80), (16.3, 0.98), (17.3, 0.985)):
        rows += [row("based", f"b{exponent}", round(2**exponent) - 1, accuracy + e, seed=s) for s, e in ((0, 0.005), (1, -0.005))]
    rows.append(row("based", "b16.3", round(2**16.3) - 1, 0.2, rate=1e-2, chosen=False))
    rows += [row("mamba2", f"m{n}", 2**n, 0.1 * n - 0.9) for n in (14, 16, 18)]
    rows += [row("sliding_window", f"w{n}", 2**n, 0.2 * n - 2.9) for n in (16, 18)]
    rows.append(row("based", "b15", 2**15, 0.3))  # dominated
    return results(*rows, absent={"performer": "no room"})


def entries_of(sweep):
    return pareto.summarise(pareto.read_runs(sweep))


def test_summary_takes_the_seeds_of_the_chosen_rate_and_keeps_the_rates_tried(sweep):
    (entry,) = [entry for entry in entries_of(sweep) if entry.label == "b16.3"]
    assert (entry.learning_rate, entry.accuracy.n) == (1e-3, 2)
    assert entry.accuracy.mean == pytest.approx(0.98) and entry.accuracy.std == pytest.approx(0.01 / math.sqrt(2))
    assert entry.accuracy_by_test["1024/256"].mean == pytest.approx(0.88)
    assert [(rate.learning_rate, rate.accuracy) for rate in entry.tried] == [(1e-3, 0.985), (1e-2, 0.2)]
    (single,) = [entry for entry in entries_of(sweep) if entry.label == "m14"]
    assert single.accuracy.std is None and str(single.accuracy) == "0.500"


def test_a_configuration_without_a_chosen_rate_is_named_not_summarised():
    runs = pareto.read_runs(results(row("based", "one", 4096, 0.5), row("based", "two", 8192, 0.6, chosen=False)))
    assert [entry.label for entry in pareto.summarise(runs)] == ["one"]
    assert pareto.unfinished(runs) == ["two (based)"]


@pytest.mark.parametrize(
    ("second", "message"),
    [({"rate": 1e-2, "seed": 1}, "2 chosen learning rates"), ({}, "a seed occurs twice")],
)
def test_contradicting_rows_are_refused(second, message):
    runs = pareto.read_runs(results(row("based", "b", 4096, 0.5), row("based", "b", 4096, 0.6, **second)))
    with pytest.raises(ValueError, match=message):
        pareto.summarise(runs)


def test_incomplete_or_impossible_rows_are_refused():
    broken = row("based", "b", 4096, 0.5)
    del broken["state_bytes"]
    with pytest.raises(ValueError, match=r"row 0 \(b\) lacks state_bytes"):
        pareto.read_runs(results(broken))
    with pytest.raises(ValueError, match="not a share in"):
        pareto.read_runs(results(row("based", "b", 4096, 51.0)))
    with pytest.raises(ValueError, match="not a share in"):
        pareto.read_runs(results(row("based", "b", 4096, float("nan"))))


def test_frontier_rises_strictly_and_holds_no_dominated_configuration(sweep):
    entries = entries_of(sweep)
    assert [entry.label for entry in pareto.pareto_frontier(entries)] == ["b12.5", "b13.5", "b14.5", "b16.3", "b17.3"]
    assert [entry.label for entry in pareto.family_frontiers(entries)["mamba2"]] == ["m14", "m16", "m18"]
    equal = pareto.summarise(pareto.read_runs(results(row("based", "a", 64, 0.5), row("based", "b", 128, 0.5))))
    assert [entry.label for entry in pareto.pareto_frontier(equal)] == ["a"]


def test_parts_of_a_sweep_are_merged(sweep):
    halves = [
        {**sweep, "rows": sweep["rows"][i::2], "device": d, "settings": {"epochs": 2, "families": [i]}}
        for i, d in ((0, "A"), (1, "B"))
    ]
    whole = pareto.merge_results(halves)
    assert entries_of(whole) == entries_of(sweep)
    assert (whole["device"], whole["seconds"], whole["absent"]) == ("A, B", 10.0, {"performer": "no room"})
    measured_elsewhere = results(row("performer", "p", 64, 0.1))
    assert pareto.merge_results([sweep, measured_elsewhere])["absent"] == {}


def test_results_that_do_not_belong_together_are_not_merged(sweep):
    for change, message in (
        ({"preset": "figure2"}, "presets 'smoke' and 'figure2'"),
        ({"settings": {"epochs": 3}}, "epochs: 2 and 3"),
        ({"rows": [sweep["rows"][0] | {"accuracy": 0.1}]}, "two results of b12.5"),
    ):
        with pytest.raises(ValueError, match=message):
            pareto.merge_results([sweep, sweep | change])
    with pytest.raises(ValueError, match="no results"):
        pareto.merge_results([])


def test_verdicts_are_computed_for_the_nearest_size(sweep):
    comparison = pareto_paper.compare_with_figure(entries_of(sweep))
    verdicts = {(line.point.model, line.point.log2_bytes): line.verdict for line in comparison.lines}
    assert verdicts[("BASED", 12.5)] == "reproduced"
    assert verdicts[("BASED", 13.5)] == "higher by 0.050"
    assert verdicts[("BASED", 14.5)] == "reproduced"
    assert verdicts[("BASED", 15.3)] == "lower by 0.590"  # the nearest is the dominated one
    assert verdicts[("BASED", 17.3)] == "lower by 0.005"  # a lower bound has no allowance
    assert verdicts[("Mamba", 16.0)] == "lower by 0.100"
    assert verdicts[("sliding window", 16.0)] == "lower by 0.210"
    assert verdicts[("sliding window", 20.0)] == "not measured: no configuration of that size"
    assert verdicts[("H3", None)] == "not measured: the sweep has no H3"


def test_statements_are_computed_from_the_entries(sweep):
    def holds(entries):
        return [statement.holds for statement in pareto_paper.compare_with_figure(entries).statements]

    entries = entries_of(sweep)
    # 0.97 at 2^16.3; above Mamba-2; above Gated DeltaNet (absent); above the sliding window; the frontier
    assert holds(entries) == [True, True, None, True, True]
    better = entries_of(sweep | {"rows": sweep["rows"] + [row("mamba2", "m15", 2**15, 0.95)]})
    assert holds(better) == [True, False, None, True, False]
    evidence = pareto_paper.compare_with_figure(better).statements[4].evidence
    assert "the others: m15" in evidence
    assert holds([entry for entry in entries if entry.family == "based"]) == [True, None, None, None, None]
    assert holds([]) == [None] * 5
    assert holds([entry for entry in entries if entry.label in ("b12.5", "m14")])[0] is None  # nothing near the claimed size


def test_a_sweep_over_other_segments_is_not_laid_beside_the_figure():
    entries = pareto.summarise(pareto.read_runs(results(row("based", "b", 4096, 0.5, accuracy_by_test={"32/2": 0.5}))))
    comparison = pareto_paper.compare_with_figure(entries)
    assert comparison.lines == [] and comparison.statements == []
    assert "32/2" in comparison.to_dict()["not_compared"]
    assert pareto_paper.verdict_table(comparison).startswith("Not compared: the test segments are not those")


def test_accuracy_between_sizes_is_interpolated_along_the_frontier(sweep):
    based = [entry for entry in entries_of(sweep) if entry.family == "based"]
    assert pareto_paper.interpolated_accuracy(based, 15.4) == pytest.approx(0.89, abs=1e-4)  # dominated b15 does not count
    level = [entry for entry in based if entry.label in ("b14.5", "b15")]
    assert pareto_paper.interpolated_accuracy(level, 15.0) == pytest.approx(0.80)
    with pytest.raises(ValueError, match="nothing was measured"):
        pareto_paper.interpolated_accuracy(based, 18.0)


def test_tables_show_frontier_segments_and_what_is_missing(sweep):
    text = pareto.summary_tables(sweep)
    assert "| BASED | b16.3 | 1,000,000 | 78.8 KiB | 16.3 | **0.980 ± 0.007** | 2 |" in text
    assert "1.0e-03 (of 1.0e-03: 0.98, 1.0e-02: 0.20)" in text
    assert "| family | configuration | 64/4 | 64/8 | 64/16 | 128/32 | 256/64 | 512/128 | 1024/256 |" in text
    assert "- performer: no room." in text
    assert "No configuration" in pareto.summary_tables(results())
    verdicts = pareto_paper.verdict_table(pareto_paper.compare_with_figure(entries_of(sweep)))
    assert "| BASED | 2^17.3 | ≥ 0.99 | b17.3 | 2^17.3 | 0.985 ± 0.007 | lower by 0.005 |" in verdicts
    assert "| **not measured** | the sweep has no Gated DeltaNet |" in verdicts


def test_csv_has_a_line_per_run(sweep, tmp_path):
    runs = pareto.read_runs(sweep)
    pareto.write_csv(runs, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(runs)
    assert float(read[0]["accuracy_1024_256"]) == pytest.approx(runs[0].accuracy_by_test["1024/256"])
    assert read[0]["mixers"] == "conv+based" and read[0]["feature_dim"] == ""


def test_figures_are_drawn_the_same_twice(sweep, tmp_path):
    pytest.importorskip("matplotlib")
    for draw in (pareto_plots.plot_pareto, pareto_plots.plot_by_test):
        draw(sweep, tmp_path / "a.png")
        draw(sweep, tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(results(row("based", "b", 64, 0.1, chosen=False)), tmp_path / "c.png")


def test_results_are_read_from_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="geobased recall mqar"):
        pareto.load_results(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="not the results.json"):
        pareto.load_results(tmp_path)
