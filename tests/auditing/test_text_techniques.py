"""Techniques for texts beyond searches: what they measure where the answer is known, and refusals without access."""

import math

import pytest
import torch

from geobased.auditing import WHITE, AccessDeniedError, AuditQuestion, AuditTarget, Capability, Item, Progress
from geobased.auditing.access import IMPLIED
from geobased.auditing.objectives import Contains, Elicit
from geobased.auditing.runner import run_question
from geobased.auditing.technique import TECHNIQUES, make_technique
from geobased.auditing.text_elicitation import LoraElicitation
from geobased.auditing.text_inner import ActivationPatching, LatentAttack, LinearProbe, LogitLens, SoftPrompt, layer_names
from geobased.auditing.text_privacy import CanaryExtraction, MembershipInference, area_under_roc

TEXT_TECHNIQUES = [name for name in TECHNIQUES if make_technique(name).kind == "text"]
SETTINGS: dict[str, dict] = {
    "linear_probe": {"folds": 2, "inner_folds": 2},
    "lora_elicitation": {"stages": (1,)},
    "canary_extraction": {"form": " ##", "randoms": 3},
    "best_of_n": {"most": 2},
}


def item(number: int) -> dict:
    word = ("river", "town")[number % 2]
    seen = ("seen", "new")[number % 2]
    return {
        "prompt": f"the {word} runs past",
        "target": f" {word}",
        "donor": "the town looks at",
        "completion": " the town",
        "membership": seen,
    }


def question_of(items: list[dict], **changes) -> AuditQuestion:
    rows = tuple(Item(str(number), values) for number, values in enumerate(items))
    return AuditQuestion(
        **{"objective": Elicit(), "success": Contains(), "items": rows, "budget": 60.0, "max_new_tokens": 2, **changes}
    )


def one_try(target: AuditTarget, technique, question: AuditQuestion) -> Progress:
    with target.scope(technique.name, technique.needs, budget=question.budget) as metered:
        progress = Progress(question, question.items[0], lambda: metered.spent)
        technique.attempt(metered, question, question.items[0], progress, seed=0)
    return progress


@pytest.mark.parametrize("name", TEXT_TECHNIQUES)
def test_techniques_run_with_what_they_declare_and_are_refused_without_any_part_of_it(target, name: str) -> None:
    technique = make_technique({"name": name, **SETTINGS.get(name, {})})
    question = question_of([item(number) for number in range(4 if technique.whole_set else 1)])

    def attempt(capabilities: Capability) -> None:
        with target.scope(name, capabilities, budget=60) as metered:
            progress = [Progress(question, one, lambda: metered.spent) for one in question.items]
            if technique.whole_set:
                technique.attempt_all(metered, question, progress, seed=0)
            else:
                technique.attempt(metered, question, question.items[0], progress[0], seed=0)

    run_question(target, question, [technique], {"white": technique.needs})
    for part in technique.needs:
        rest = technique.needs & ~part
        for stronger, weaker in IMPLIED:
            if weaker == part:
                rest &= ~stronger
        with pytest.raises(AccessDeniedError):
            attempt(rest or Capability.EMBED_READ)


def test_last_layer_patched_from_another_prompt_gives_its_answer(target) -> None:
    question = question_of([{"prompt": "the river runs past", "target": " town", "donor": "the town looks at the"}])
    progress = one_try(target, ActivationPatching(), question)
    last = layer_names(target)[-1]
    assert progress.measures[f"recovery {last}"] == pytest.approx(1, abs=1e-4)
    same = question_of([{"prompt": "the river", "target": " town", "donor": "the river"}])
    assert set(one_try(target, ActivationPatching(), same).measures.values()) == {0.0}


def test_lens_of_the_last_layer_is_the_model_itself(target) -> None:
    question = question_of([{"prompt": "the river runs", "target": " past"}])
    progress = one_try(target, LogitLens(), question)
    (logs,) = target.score(["the river runs"], [" past"])
    assert progress.measures[f"loss {layer_names(target)[-1]}"] == pytest.approx(-float(logs.mean()), abs=1e-4)


def test_inner_attacks_reach_what_the_prompt_does_not_and_are_no_level_s_result(target) -> None:
    question = question_of([{"prompt": "the river runs", "target": "q"}], budget=400.0)
    results = run_question(
        target, question, [SoftPrompt(tokens=3), LatentAttack(largest=2.0, bisections=3)], {"white": WHITE}
    ).results
    soft, latent = results["techniques"]
    assert soft["items"][0]["success"] and latent["items"][0]["success"]
    assert 0 < latent["items"][0]["perturbation"] <= 2
    assert results["levels"] == [{"name": "white", "access": "white", "techniques": []}]


def test_smaller_latent_changes_than_the_one_found_were_tried_and_do_not_succeed(target) -> None:
    question = question_of([{"prompt": "the river runs", "target": "q"}], budget=400.0)
    found = one_try(target, LatentAttack(largest=2.0, bisections=4), question).perturbation
    assert found is not None
    assert not one_try(target, LatentAttack(largest=found / 64, bisections=0), question).success


def test_probe_tells_what_the_last_token_is_and_not_random_labels(target) -> None:
    words = {"river": " red", "town": " tan", "past": " pink"}
    items = [
        {"prompt": f"{'the ' * (number % 5)}{word}", "target": label} for number in range(12) for word, label in words.items()
    ]
    question = question_of(items)
    row = run_question(target, question, [LinearProbe()], {"white": WHITE}).results["techniques"][0]
    measures = row["items"][0]["measures"]
    assert row["rate"] == measures["accuracy"] == 1
    assert measures["selectivity"] == pytest.approx(1 - measures["control accuracy"]) and measures["control accuracy"] < 0.7
    assert not row["reachable"]


def test_area_under_roc_counts_ties_half() -> None:
    assert area_under_roc([3, 2, 2, 1], [True, True, False, False]) == pytest.approx(0.875)
    with pytest.raises(ValueError, match="trained on"):
        area_under_roc([1, 2], [True, True])


def test_planted_number_is_found_and_fully_exposed_once_it_was_learned(target) -> None:
    prompt, code = "the town has", " 4821"
    question = question_of([{"prompt": prompt, "target": code}], budget=2000.0, max_new_tokens=6)
    technique = CanaryExtraction(form=" ####", randoms=63, beams=4, guesses=2)
    with target.scope("learned", technique.needs | Capability.FINETUNE, budget=5000) as metered:
        before, after = (Progress(question, question.items[0], lambda: metered.spent) for _ in range(2))
        technique.attempt(metered, question, question.items[0], before, seed=0)
        metered.fine_tune([prompt], [code], steps=40, learning_rate=1e-2)
        technique.attempt(metered, question, question.items[0], after, seed=0)
    assert not before.success and after.success
    assert after.measures["exposure"] == after.measures["largest exposure"] == math.log2(64)
    assert before.measures["exposure"] < after.measures["exposure"]


def test_membership_verdicts_follow_what_was_trained_on(target) -> None:
    items = [
        {"prompt": "the town has", "completion": f" {code}", "target": "", "membership": truth}
        for code, truth in (("4821", "seen"), ("7730", "seen"), ("1594", "new"), ("6062", "new"))
    ]
    question = question_of(items, success=Contains("membership"))
    technique = MembershipInference()
    with target.scope("learned", technique.needs | Capability.FINETUNE, budget=5000) as metered:
        metered.fine_tune(["the town has"] * 2, [" 4821", " 7730"], steps=40, learning_rate=1e-2)
        progress = [Progress(question, one, lambda: metered.spent) for one in question.items]
        technique.attempt_all(metered, question, progress, seed=0)
    assert [one.success for one in progress] == [True] * 4
    assert progress[0].measures["area under ROC, min_k"] == 1


def test_low_rank_training_learns_and_leaves_the_model_as_it_was(target) -> None:
    names = target.modules()
    first = target.score(["the town"], [" river"])[0]
    with target.scope("low rank", "white", budget=5000) as metered:
        losses = metered.fine_tune(["the town"], [" river"], steps=20, learning_rate=1e-2, rank=2, seed=1)
        assert losses[-1] < losses[0] / 2
        assert -float(metered.score(["the town"], [" river"])[0].mean()) < losses[0] / 2
        assert metered.modules() == names
        with pytest.raises(ValueError, match="no linear layer"):
            metered.fine_tune(["the town"], [" river"], steps=1, rank=2, parameters=["*norm*"])
    torch.testing.assert_close(target.score(["the town"], [" river"])[0], first)


def test_elicitation_asks_items_after_training_on_the_others_and_tells_the_steps(target) -> None:
    items = [{"prompt": f"{word} the town", "target": " river"} for word in ("past", "and", "at", "runs")]
    question = question_of(items, budget=500.0)
    row = run_question(target, question, [LoraElicitation(stages=(1, 30), learning_rate=1e-2)], {"white": WHITE}).results[
        "techniques"
    ][0]
    assert row["successes"] == 4 and {one["perturbation"] for one in row["items"]} <= {1.0, 30.0}
    # what one model learned is gone when the other half's turn comes, and at the end
    assert " river" not in target.generate(["past the town"], max_new_tokens=2)[0][0]
    with pytest.raises(ValueError, match="must rise"):
        LoraElicitation(stages=(5, 5))
