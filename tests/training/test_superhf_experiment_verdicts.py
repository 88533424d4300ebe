"""Which claims hold, and what the pages and plots say, on made-up runs."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from geobased.training.bootstrap import difference_interval, mean_interval
from geobased.training.superhf_experiment_plots import plot_experiment
from geobased.training.superhf_experiment_settings import (
    BASED,
    CHOSEN_BY,
    LLAMA,
    PRESETS,
    VALIDATION,
    candidates,
    num_runs,
    planned_runs,
)
from geobased.training.superhf_experiment_verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    comparisons,
    marked_rows,
    runs_of,
    summary,
    verdicts,
)

ROOT = Path(__file__).parents[2]
SETTINGS = replace(PRESETS["standard"], kl_sweep=(0.0, 1.0))
PROMPTS = 40
# reward, held-out reward, rules, similarity after training
LEVELS = {
    "base": (0.0, 0.0, 0.5, 0.05),
    "best_of_n": (0.8, 0.6, 0.55, 0.05),
    "superhf": (1.0, 0.9, 0.7, 0.1),
    "rloo": (1.0, 0.9, 0.7, 0.1),
    "dpo": (0.9, 0.8, 0.9, 0.1),
    "sft": (0.7, 0.7, 0.6, 0.0),
    "kl_sweep": (1.5, 0.2, 0.3, 0.6),
}


def row(policy, arm, seed, options, extra=0.0, **more):
    noise = torch.rand(PROMPTS, generator=torch.Generator().manual_seed(seed)) - 0.5
    levels = dict(zip(("reward", "held_out_reward", "rule_reward", "similarity"), LEVELS[arm], strict=True))
    each = {name: (level + extra + 0.2 * noise).tolist() for name, level in levels.items() if name != "similarity"}
    each["answers_from_record"] = each["rule_reward"]
    end = {name: sum(values) / PROMPTS for name, values in each.items()}
    end |= {"similarity": levels["similarity"] + 0.01 * seed, "distinct_2": 0.5, "mean_length": 6.0, "kl": 0.1}
    end["perplexity"] = {"held_out_documents": 5.0}
    curve = [{**end, "step": step} for step in ([0] if arm in ("base", "best_of_n") else [0, SETTINGS.steps])]
    facts = {"completions": 7680, "tokens": 90_000, "training_seconds": 30.0}
    facts |= {name: levels[key] + extra for key, name in VALIDATION.items()}
    names = {"policy": policy, "arm": arm, "seed": seed, "options": options, "completions_per_answer": 1}
    return {**names, **facts, "curve": curve, "each": each, **more}


@pytest.fixture(scope="module")
def rows():
    """All runs of the first policy: the second candidate is the best, and the last diverges."""
    found = []
    for arm in LEVELS:
        if arm == "kl_sweep":
            best = candidates(SETTINGS, "superhf")[1]
            found += [row(BASED, arm, seed, best | {"beta": weight}) for weight in SETTINGS.kl_sweep for seed in range(3)]
            continue
        tried = candidates(SETTINGS, arm)
        for number, options in enumerate(tried):
            diverged = number and number == len(tried) - 1
            more = {"diverged": "diverged at step 3", **dict.fromkeys(VALIDATION.values())} if diverged else {}
            found.append(row(BASED, arm, 0, options, 0.0 if number == len(tried[:2]) - 1 else -0.3, **more))
        found += [row(BASED, arm, seed, tried[len(tried[:2]) - 1]) for seed in (1, 2)]
    return marked_rows(SETTINGS, found)


def test_runs_begin_in_the_order_of_their_importance_and_wait_for_choices(rows):
    first = planned_runs(SETTINGS, [])
    assert {run.seed for run in first} == {0} and first[0].arm == "superhf" and first[-1].policy == LLAMA
    assert "kl_sweep" not in {run.arm for run in first}, "its learning rate is not chosen yet"
    names = {"policy": BASED, "arm": "superhf", "seed": 0}
    tried = [names | {"options": options, CHOSEN_BY: i} for i, options in enumerate(candidates(SETTINGS, "superhf"))]
    then = planned_runs(SETTINGS, tried)
    assert {run.options[0][1] for run in then if run.arm == "kl_sweep"} == {SETTINGS.superhf_learning_rates[-1]}
    assert [run.arm for run in planned_runs(SETTINGS, rows, policies=[BASED])] == []
    assert num_runs(SETTINGS, policies=[BASED]) == len(rows)
    assert 40 <= num_runs(PRESETS["standard"]) <= 75


def test_chosen_settings_are_the_best_on_validation_prompts(rows):
    assert {r["options"]["learning_rate"] for r in runs_of(rows, BASED, "sft")} == {SETTINGS.sft_learning_rates[1]}
    assert len(runs_of(rows, BASED, "superhf")) == 3 and len(runs_of(rows, BASED, "superhf_without_prior")) == 3
    entry = next(entry for entry in summary(rows) if entry["name"] == "SuperHF")
    assert entry["seeds"] == 3 and entry["means"]["reward"] == pytest.approx(1.0, abs=0.1)


def test_verdicts_follow_from_the_intervals(rows):
    judged = {entry["claim"]: entry for entry in verdicts(comparisons(rows))}
    assert judged["SuperHF raises the training reward"]["verdict"] == HOLDS
    assert judged["SuperHF reaches a higher training reward than RLOO"]["verdict"] == OPEN
    assert judged["SuperHF is better than DPO by the rules"]["verdict"] == FAILS
    assert judged["SuperHF is better than SFT by the rules"]["verdict"] == HOLDS
    gap = judged["The prior narrows the gap to the held-out reward"]
    assert gap["verdict"] == HOLDS and gap["difference"] == pytest.approx(1.3 - 0.1, abs=1e-4) and gap["seeds"] == [3, 3]
    varied = judged["The prior keeps completions varied"]
    assert varied["verdict"] == HOLDS and varied["low"] == pytest.approx(0.48, abs=0.01)
    assert not verdicts(comparisons([r for r in rows if r["arm"] == "rloo"]))


def test_intervals_are_about_runs_and_prompts():
    prompts = torch.linspace(-1, 1, 100)
    low, high = mean_interval(prompts)
    assert -0.15 < low < -0.08 and 0.08 < high < 0.15
    paired = difference_interval(torch.stack([prompts + 1] * 3), torch.stack([prompts] * 2))
    assert paired == pytest.approx((1, 1, 1)), "what differs between prompts alone is no uncertainty"
    spread = difference_interval(torch.tensor([[0.0], [1.0], [2.0]]).expand(3, 50), torch.zeros(3, 50))
    assert spread[0] == 1 and spread[1] < 0.4 and spread[2] > 1.6
    with pytest.raises(ValueError, match="same prompts"):
        difference_interval(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no values"):
        mean_interval(torch.zeros(0))


@pytest.fixture(scope="module")
def results(rows):
    stage = {"accuracy": 0.81, "low": 0.78, "high": 0.84, "num_pairs": 500, "by_corruption": {"other_value": {"accuracy": 0.7}}}
    found = comparisons(rows)
    settings = {"steps": 60, "prompts_per_step": 8, "num_generations": 16, "num_test_prompts": PROMPTS}
    return {
        **{"device": "NVIDIA H200", "date": "2026-01-01", "num_devices": 2, "num_workers": 14, "seconds": 540.0},
        **{"versions": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}, "complete": False},
        **{"settings": settings, "similarity": "meteor_exact_stem", "stages": {"reward": stage, "held_out_reward": stage}},
        **{"rows": rows, "comparisons": found, "verdicts": verdicts(found)},
    }


def test_plots_are_small_pictures(results, tmp_path):
    from PIL import Image

    drawn = plot_experiment(results, tmp_path)
    assert [path.name for path in drawn] == ["rewards-based-mini.png", "kl_sweep.png"]
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.mode == "P" and picture.width >= 1200
        assert path.stat().st_size < 80_000
    with pytest.raises(ValueError, match="no finished run"):
        plot_experiment({**results, "rows": []}, tmp_path)


@pytest.fixture
def tables(monkeypatch):
    """The script as Python would run it: with its own folder on the path."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("superhf_tables", ROOT / "scripts" / "superhf_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("performance_tables", "page_sections"):
        sys.modules.pop(name, None)


def test_the_page_holds_what_the_script_prints(tables):
    page = (ROOT / "docs" / "superhf.md").read_text(encoding="utf-8")
    texts, _ = tables.sections()
    for marker, text in texts.items():
        assert f"<!-- {marker}:start -->\n{text}\n<!-- {marker}:end -->" in page, "run scripts/superhf_tables.py --write"
    assert page.count(":start -->") == len(texts)


def test_missing_results_leave_no_number(tables, tmp_path):
    texts, missing = tables.sections(tmp_path)
    assert missing == [str(tmp_path / "superhf_experiment" / "results.json")]
    (text,) = texts.values()
    assert text.startswith("No results are stored here yet") and "|" not in text


def test_tables_come_from_the_results(tables, results, tmp_path):
    text = tables.comparison("superhf_experiment", tmp_path, results)
    assert "NVIDIA H200, torch 2.11.0" in text and "Not all runs are done." in text
    assert "The reward model tells 81.0 % of 500 held-out pairs apart (78.0 to 84.0), wrong values 70.0 %" in text
    assert "| SuperHF, β = 0 | 3 | 1.5" in text and "| RLOO | 3 |" in text and "| 7,680 ± 0 | 30 ± 0 |" in text
    assert "| SuperHF is better than DPO by the rules (based-mini) | reward of the rules | -0.200 |" in text
    assert "| SuperHF, based-mini | **rate 0.0001, β 0.35** | 1.00 | 0.90 |" in text
    assert "| rate 0.001, β 0.35 | diverged |" in text
    assert "- based-mini, SFT, rate 0.0003, seed 0: diverged at step 3" in text and "exact and stem matches" in text
