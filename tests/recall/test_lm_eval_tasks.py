"""Task files for lm-evaluation-harness: what they say, what their functions do, and what the harness makes of them."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import geobased.recall
from geobased.checkpoints import checkpoint_path
from geobased.cli.main import app
from geobased.recall.gazetteer_benchmark import (
    LENGTHS,
    MAX_NEW_TOKENS,
    benchmark_examples,
    contains_answer,
    generate_answers,
    is_exact_answer,
)
from geobased.recall.places import load_places

FOLDER = Path(geobased.recall.__path__[0]) / "lm_eval_tasks"
PAPERS = {"based_swde": "based-swde-v2", "based_fda": "based-fda", "based_squad": "based-squad"}


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as the name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def load_task(path: Path) -> dict:
    task = yaml.load(path.read_text(encoding="utf-8"), Loader)
    return (load_task(path.parent / task.pop("include")) if "include" in task else {}) | task


@pytest.fixture(scope="module")
def tasks():
    return {path.stem: load_task(path) for path in FOLDER.glob("*.yaml")}


@pytest.fixture(scope="module")
def utils():
    spec = importlib.util.spec_from_file_location("lm_eval_task_functions", FOLDER / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_task_decodes_greedily_to_the_end_of_the_line(tasks, utils):
    assert set(tasks) == {f"geobased_gazetteer_{length}" for length in LENGTHS} | set(PAPERS)
    for name, task in tasks.items():
        assert task["task"] == name and task["output_type"] == "generate_until" and task["num_fewshot"] == 0
        assert task["generation_kwargs"] == {"until": ["\n"], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False}
        functions = [task["process_results"], *([task["custom_dataset"]] if "custom_dataset" in task else [])]
        assert all(callable(getattr(utils, re.fullmatch(r"utils\.(\w+)", function)[1])) for function in functions)
        metrics = getattr(utils, task["process_results"].removeprefix("utils."))({"value": "a", "ending": ""}, ["b"])
        assert [item["metric"] for item in task["metric_list"]] == list(metrics)
    for length in LENGTHS:
        task = tasks[f"geobased_gazetteer_{length}"]
        assert task["dataset_kwargs"] == {"length": length} and task["tag"] == "geobased_gazetteer"
    for name, dataset in PAPERS.items():
        assert tasks[name]["dataset_path"] == f"hazyresearch/{dataset}" and tasks[name]["validation_split"] == "validation"


def test_dataset_holds_the_examples_of_the_benchmark(utils, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = utils.gazetteer(length=1024, num_examples=4, seed=3, pretrained=str(tiny_model_dir), version=1.0)["test"]
    examples = benchmark_examples(load_places("held_out"), tokenizer, [1024], 4, 3)
    assert [row["text"] for row in rows] == [(tokenizer.bos_token or "") + example.prompt for example in examples]
    assert [(row["value"], row["key"]) for row in rows] == [(example.answer, example.field) for example in examples]
    with pytest.raises(ValueError, match="name it in --model_args"):
        utils.gazetteer(length=1024, version=1.0)


def test_metrics(utils):
    doc = {"value": "48.9° N", "ending": "."}
    assert utils.contains_and_exact(doc, [" about 48.9° n, they say"]) == {"contains": 1.0, "exact": 0.0}
    assert utils.contains_and_exact(doc, [" 48.9° N."]) == {"contains": 1.0, "exact": 1.0}
    assert utils.contains({"value": "Skåne "}, [" Scania"]) == {"contains": 0.0}


@pytest.mark.slow
def test_the_harness_finds_what_the_benchmark_finds(tmp_path):
    harness_tasks = pytest.importorskip("lm_eval.tasks")
    manager = harness_tasks.TaskManager(include_path=str(FOLDER))
    assert set(manager.match_tasks(["based_*"])) >= set(PAPERS) and manager.match_tasks(["geobased_gazetteer"])
    options = ("--limit", "6", "--batch-size", "4", "--device", "cpu", "--output", str(tmp_path / "report.json"))
    result = CliRunner().invoke(app, ["recall", "lm-eval", "--tasks", "geobased_gazetteer_256", *options, "--json"])
    assert result.exit_code == 0, result.output
    answers = json.loads((tmp_path / "report.json").read_text())["samples"]["geobased_gazetteer_256"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("based-mini"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path("based-mini"), dtype=torch.float32)
    examples = benchmark_examples(load_places("held_out"), tokenizer, [256], 6)
    lines = generate_answers(model, tokenizer, [example.prompt for example in examples])
    for answer, line, example in zip(sorted(answers, key=lambda item: item["doc_id"]), lines, examples, strict=True):
        assert answer["resps"][0][0].partition("\n")[0] == line
        assert answer["contains"] == contains_answer(line, example.answer)
        assert answer["exact"] == is_exact_answer(line, example.answer, example.ending)
