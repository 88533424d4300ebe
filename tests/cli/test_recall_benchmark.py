"""`geobased recall` at set lengths, on repeated bigrams, and where the harness's tasks are."""

import importlib.util
import json
from pathlib import Path

import pytest


def test_benchmark_of_a_model(geobased, tiny_model_dir, tmp_path):
    arguments = ("recall", "gazetteer-benchmark", "-m", tiny_model_dir, "--num-examples", 3, "--lengths", "1024,512")
    report = json.loads(geobased(*arguments, "--no-contains", "--output", tmp_path / "recall.json", "--json").stdout)
    assert report == json.loads((tmp_path / "recall.json").read_text())
    assert report["arguments"]["lengths"] == [512, 1024] and report["benchmark"]["num_examples"] == 6
    assert report["benchmark"]["contains"] is None and set(report["benchmark"]["exact"]["by_length"]) == {"512", "1024"}
    table = geobased(*arguments, "--layouts", "card,table").stdout
    assert "contains %" in table and "by depth" in table and "1,024" in table and "prose" not in table


def test_benchmark_errors(fails, tiny_model_dir, tmp_path):
    arguments = ("recall", "gazetteer-benchmark", "-m", tiny_model_dir)
    assert "--lengths 'long'" in fails(*arguments, "--lengths", "long")
    assert "not poem" in fails(*arguments, "--lengths", "512", "--layouts", "card,poem")
    assert "20 tokens do not hold two records" in fails(*arguments, "--lengths", 20)
    for option in ("--output", "--plot"):
        assert "there is no folder" in fails(*arguments, option, tmp_path / "no" / "x")


def test_repeated_bigrams_of_a_text(geobased, fails, tiny_model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Walvis Bay lies in Namibia. Walvis Bay has a lagoon.\n", encoding="utf-8")
    arguments = ("recall", "repeated-bigrams", text)
    split = json.loads(geobased(*arguments, "--json").stdout)["perplexity"]
    assert 0 < split["repeated"]["num_tokens"] < split["overall"]["num_tokens"]
    known = json.loads(geobased(*arguments, "--training-text", text, "--threshold", 0, "--json").stdout)["perplexity"]
    assert known["repeated"] == {"token_perplexity": None, "negative_log_likelihood": 0, "num_tokens": 0}
    assert known["overall"] == split["overall"] and known["num_frequent_bigrams"] > 0
    assert "repeated bigrams" in geobased(*arguments).stdout
    assert "no such text file" in fails("recall", "repeated-bigrams", tmp_path / "none.txt")
    assert "stride" in fails(*arguments, "--context-length", 8, "--stride", 8)
    assert "no beginning-of-text token" in fails(*arguments, "-m", tiny_model_dir)


def test_tasks_for_the_harness(geobased, fails, tmp_path):
    folder = Path(geobased("recall", "lm-eval-tasks").stdout.strip())
    report = json.loads(geobased("recall", "lm-eval-tasks", "--json").stdout)
    assert report["folder"] == str(folder) and (folder / "utils.py").is_file()
    assert {"geobased_gazetteer_256", "geobased_gazetteer_8192", "based_swde"} <= set(report["tasks"])
    assert "there is no folder" in fails("recall", "lm-eval", "--output", tmp_path / "no" / "x.json")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_without_the_harness_a_sentence_tells_what_is_missing(fails):
    assert "needs lm_eval" in fails("recall", "lm-eval", code=1)
