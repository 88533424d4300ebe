"""The comparison of SuperHF in small, with random weights."""

import os
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("nltk")

from geobased.training import superhf_experiment
from geobased.training.superhf_experiment import load_results, run_experiment
from geobased.training.superhf_experiment_settings import ARMS, BASED, CHOSEN_BY, LLAMA, PRESETS, LlamaTwin, num_runs

SMALL = replace(
    PRESETS["smoke"],
    num_pairs=8,
    num_held_out_pairs=4,
    reward_batch_size=4,
    num_validation_prompts=2,
    num_test_prompts=4,
    num_perplexity_documents=1,
    llama=LlamaTwin(16, 1, 2, num_parameters=10_000, steps=1, batch_size=1, context_length=3072, num_short=4, num_long=4),
)


@pytest.fixture(scope="module")
def based(tiny_model_dir, tmp_path_factory):
    """Folder of a random model whose tokenizer begins texts, as perplexity needs it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("based") / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(based, tmp_path_factory):
    """A whole experiment, interrupted once."""
    folder = tmp_path_factory.mktemp("experiment")
    do_part, done = superhf_experiment.do_part, []

    def interrupted(job, part):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(part)
        return do_part(job, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superhf_experiment, "do_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(SMALL, folder, based=based, workers=1, report=lambda line: None)
    before = load_results(folder)
    assert not before["complete"] and set(before["stages"]) == {LLAMA, "reward", "held_out_reward"} and len(before["rows"]) == 2
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    lines = []
    results = run_experiment(SMALL, folder, based=based, workers=1, report=lines.append)
    assert len(lines) == num_runs(SMALL) - 2, "what was done is not done again"
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    return folder, results


def test_all_arms_run_and_see_equally_many_completions(finished):
    folder, results = finished
    assert results["complete"] and results == load_results(folder)
    rows = results["rows"]
    assert len(rows) == num_runs(SMALL) == 11
    assert [row["arm"] for row in rows if row["policy"] == BASED] == list(ARMS[:-1]) + ["kl_sweep"]
    sampled = {(row["policy"], row["arm"]): row["completions"] for row in rows}
    for key, number in sampled.items():
        assert number == (SMALL.num_completions if key[1] in ("superhf", "rloo", "dpo", "kl_sweep") else 0), key
    for row in rows:
        assert row["completions_per_answer"] == (SMALL.num_generations if row["arm"] == "best_of_n" else 1)
        assert [point["step"] for point in row["curve"]] == ([0] if row["arm"] in ("base", "best_of_n") else [0, SMALL.steps])
        point = row["curve"][-1]
        assert 0 <= point["rule_reward"] <= 1 and point["perplexity"]["held_out_documents"] > 1
        assert point["kl"] is None if row["arm"] == "best_of_n" else point["kl"] >= -1e-6
        assert "each" not in row and row["chosen"]
    start = [row["curve"][0]["kl"] for row in rows if row["arm"] != "best_of_n"]
    assert start == pytest.approx([0.0] * len(start), abs=1e-6)
    # the prior has no say before the first step, nor in what is sampled for it
    first, second = (next(row for row in rows if row["arm"] == arm) for arm in ("superhf", "kl_sweep"))
    assert first["curve"][0] | {"evaluation_seconds": 0} == second["curve"][0] | {"evaluation_seconds": 0}
    assert results["verdicts"] and (folder / "runs").is_dir()


def test_another_call_does_nothing_and_other_settings_are_refused(finished, based):
    folder, results = finished
    again = run_experiment(SMALL, folder, based=based, workers=1, report=pytest.fail)
    assert again["rows"] == results["rows"]
    with pytest.raises(ValueError, match=r"other settings \(steps\): choose another folder"):
        run_experiment(replace(SMALL, steps=3), folder, based=based, workers=1)


def test_the_fast_path_serves_every_arm_that_samples(based, finished, monkeypatch):
    from geobased.modeling_based import modeling_based
    from geobased.training import superhf_experiment_worker as worker
    from geobased.training.superhf_experiment_settings import Run
    from geobased.training.superhf_experiment_stages import Job

    served, missed = [], []
    fast_sample, plan = modeling_based.fast_sample, modeling_based.plan_generation

    def planned(*arguments):
        try:
            return plan(*arguments)
        except modeling_based.NotServed as reason:
            missed.append(str(reason))
            raise

    monkeypatch.setattr(modeling_based, "fast_sample", lambda *args, **kw: served.append(1) or fast_sample(*args, **kw))
    monkeypatch.setattr(modeling_based, "plan_generation", planned)
    # whole steps, as CUDA graphs capture them, but run on the CPU
    monkeypatch.setattr(modeling_based.BasedForCausalLM, "fast_generation", "eager")
    job = Job(SMALL, str(finished[0]), "cpu", based=based)
    for arm, calls in (("superhf", 5), ("rloo", 5), ("dpo", 4)):
        served.clear()
        worker.do_run(job, Run(BASED, arm, 1, (("learning_rate", 1e-4), ("beta", 0.1))))
        # two evaluations, the validation, and a batch for each step or for all pairs
        assert (len(served), missed) == (calls, []), arm


def test_divergence_is_a_result(based, finished):
    from geobased.training.superhf_experiment_settings import Run, chosen_options
    from geobased.training.superhf_experiment_stages import Job
    from geobased.training.superhf_experiment_worker import do_run

    job = Job(SMALL, str(finished[0]), "cpu", based=based)
    row = do_run(job, Run(BASED, "sft", 0, (("learning_rate", float("inf")),)))
    assert row["diverged"] == "diverged at step 1"
    settings = replace(SMALL, sft_learning_rates=(float("inf"), 1e-4))
    other = {"policy": BASED, "arm": "sft", "seed": 0, "options": {"learning_rate": 1e-4}, CHOSEN_BY: -5.0}
    assert chosen_options(settings, [row, other], BASED, "sft") == {"learning_rate": 1e-4}


def test_time_that_is_over_leaves_the_rest_to_the_next_call(based, tmp_path):
    results = run_experiment(SMALL, tmp_path, based=based, workers=1, max_seconds=0)
    assert not results["complete"] and not results["rows"] and not results["stages"]


def test_a_process_of_its_own_sees_one_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    slots = superhf_experiment._slots(torch.device("cuda"), 4)
    assert [slot.gpu for slot in slots] == ["4", "7", "4", "7"]
    assert [slot.gpu for slot in superhf_experiment._slots(torch.device("cuda:1"), 1)] == ["7"]
    monkeypatch.setattr(superhf_experiment, "do_part", os.getenv)
    try:
        futures = [slot.submit("CUDA_VISIBLE_DEVICES", "unset") for slot in slots[:2]]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"
        assert [future.result(timeout=240) for future in futures] == ["4", "7"]
    finally:
        for slot in slots:
            slot.close()


def test_wrong_input_is_named(tmp_path):
    for changes, options, message in (
        ({}, {"arms": ("ppo",)}, "arms: ppo is none of base"),
        ({}, {"arms": ()}, "arms: nothing is none of"),
        ({}, {"arms": ("kl_sweep",)}, "add superhf"),
        ({}, {"policies": ("gpt",)}, "policies: gpt is none of based-mini, llama"),
        ({}, {"workers": 0}, "workers=0 must be at least 1"),
        ({"num_seeds": 0}, {}, "num_seeds=0 must be at least 1"),
        ({"num_evaluations": 9}, {}, "num_evaluations=9 exceeds steps=2"),
    ):
        with pytest.raises(ValueError, match=message):
            run_experiment(replace(SMALL, **changes), tmp_path / "new", **options)
    with pytest.raises(FileNotFoundError, match=r"no such text file: .*none\.txt"):
        run_experiment(SMALL, tmp_path / "new", text=[tmp_path / "none.txt"])
    with pytest.raises(FileNotFoundError, match="run the experiment first"):
        load_results(tmp_path)
    assert not (tmp_path / "new").exists()
