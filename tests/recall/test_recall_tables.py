"""docs/recall.md holds what scripts/recall_tables.py makes of the stored results, and no number without them.

The results here are invented, to see where each number goes.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from geobased.recall.pareto_paper import FIGURE2_TESTS

ROOT = Path(__file__).parents[2]
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}


@pytest.fixture
def tables(monkeypatch):
    """The script as Python would run it: with its own folder on the path."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    shared = ("performance_tables", "page_sections")
    for name in shared:
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("recall_tables", ROOT / "scripts" / "recall_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in shared:
        sys.modules.pop(name, None)


def store(folder, name, **content):
    (folder / name).mkdir()
    report = {"device": "NVIDIA H200", "versions": VERSIONS, "date": "2026-01-01", **content}
    (folder / name / "results.json").write_text(json.dumps(report))


def mqar_row(label, state_bytes, accuracy, seed):
    return {
        **{"family": "based", "label": label, "mixers": ["conv", "linear_attention"], "hidden_size": 64, "feature_dim": 16},
        **{"sliding_window": None, "state_size": None, "learning_rate": 3e-3, "seed": seed, "num_parameters": 500_000},
        **{"state_bytes": state_bytes, "validation_accuracy": accuracy, "accuracy": accuracy, "epochs": 8, "seconds": 9.0},
        **{"accuracy_by_test": dict.fromkeys(FIGURE2_TESTS, accuracy), "chosen_learning_rate": True},
    }


def twin_row(model, seed, length, accuracy):
    perplexity = {"held_out_documents": {"repeated": {"token_perplexity": 2.0 + seed}, "other": {"token_perplexity": 20.0}}}
    return {
        **{"model": model, "seed": seed, "num_parameters": 12_000_000, "length": length, "accuracy": accuracy},
        **{"training_places_accuracy": accuracy - 0.1, "closed_book": 0.01, "perplexity": perplexity},
    }


def speed(model, length, tokens_per_second):
    return {
        **{"model": model, "length": length, "way": "CUDA graphs", "batch_size": 128, "state_bytes": 1 << 20},
        **{"tokens_per_second": tokens_per_second, "end_to_end_tokens_per_second": tokens_per_second / 2},
    }


def test_the_page_holds_what_the_script_prints(tables):
    page = (ROOT / "docs" / "recall.md").read_text(encoding="utf-8")
    texts, _ = tables.sections()
    for marker, text in texts.items():
        assert f"<!-- {marker}:start -->\n{text}\n<!-- {marker}:end -->" in page, (
            f"run scripts/recall_tables.py --write ({marker})"
        )
    assert page.count(":start -->") == len(texts)


def test_missing_results_are_named_and_leave_no_number(tables, tmp_path):
    texts, missing = tables.sections(tmp_path)
    folders = ("mqar_figure2", "mqar_figure2_quick", "recall_twins")
    assert missing == [str(tmp_path / name / "results.json") for name in folders]
    assert all(text.startswith("No results are stored here yet") and "|" not in text for text in texts.values())


def test_numbers_come_from_the_stored_results(tables, tmp_path):
    rows = [mqar_row("based d64 f16", round(2**15.3), accuracy, seed) for seed, accuracy in enumerate((0.88, 0.90))]
    settings = {"epochs": 8, "batch_size": 256, "precision": "bf16", "learning_rates": [1e-3, 3e-3]}
    store(tmp_path, "mqar_figure2", preset="figure2", settings=settings, seconds=1500.0, absent={"performer": "none"}, rows=rows)
    twins = [twin_row("based", seed, length, 0.5 + 0.1 * seed) for seed in (0, 1) for length in (256, 512)]
    speeds = [speed("attention", 256, 900.0), speed("transformers_llama", 256, 200.0)]
    absent = [{"model": "attention", "length": 8192, "way": "CUDA graphs", "reason": "OutOfMemoryError: too large"}]
    store(tmp_path, "recall_twins", rows=[*twins, twin_row("attention", 0, 256, 0.9)], throughput=speeds, absent=absent)
    texts, missing = tables.sections(tmp_path)
    assert missing == [str(tmp_path / "mqar_figure2_quick" / "results.json")]
    assert "2 trainings on NVIDIA H200, torch 2.11.0" in texts["recall_figure2"]
    assert (
        "8 epochs at most, batches of 256, bf16; learning rates 1.0e-03, 3.0e-03; 25 minutes in all." in texts["recall_figure2"]
    )
    assert "**0.890 ± 0.014**" in texts["recall_figure2"] and "- performer: none." in texts["recall_figure2"]
    assert "| BASED | 2^15.3 | 0.89 | based d64 f16 | 2^15.3 | 0.890 ± 0.014 | reproduced |" in texts["recall_verdicts"]
    assert "3 trainings on NVIDIA H200" in texts["recall_twins"]
    assert "| BASED | 12,000,000 | 2 | 55.0 ± 7.1 | 55.0 ± 7.1 | 1.0 ± 0.0 |" in texts["recall_twins"]
    assert "| full attention | 12,000,000 | 1 | 90.0 |  | 1.0 |" in texts["recall_twins"]
    assert "| BASED | 45.0 ± 7.1 | 45.0 ± 7.1 |" in texts["recall_twins"]
    assert "| model | held out documents: repeated | held out documents: all others |" in texts["recall_twins"]
    assert "| BASED | 2.50 ± 0.71 | 20.00 ± 0.00 |" in texts["recall_twins"]
    assert "| 256 | full attention | CUDA graphs | 1 MiB | 900 | 450 | 90.0 |" in texts["recall_throughput"]
    assert "| 256 | Llama of transformers | CUDA graphs | 1 MiB | 200 | 100 |  |" in texts["recall_throughput"]
    assert "- full attention at 8,192 tokens, CUDA graphs: OutOfMemoryError: too large" in texts["recall_throughput"]
