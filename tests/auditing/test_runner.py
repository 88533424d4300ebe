"""Questions, techniques at equal budgets, and what is reported of them."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from geobased.auditing import GREY, AuditQuestion, AuditTarget, Capability, Item, Technique, smallest_perturbation
from geobased.auditing.configuration import AuditConfiguration
from geobased.auditing.objectives import OBJECTIVES, SUCCESSES
from geobased.auditing.report import run_audit
from geobased.auditing.runner import run_question
from geobased.auditing.statistics import holm, loss_curve, mcnemar, solved_curve, wilson_interval
from geobased.auditing.technique import make_technique
from geobased.auditing.verification import reproduce


@dataclass(frozen=True)
class Scored(Technique):
    """Goes on scoring until the budget is spent."""

    name: ClassVar[str] = "scored"
    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = Capability.LOGITS
    reachable: ClassVar[bool] = False
    perturbation_unit: ClassVar[str] = "tries"

    def attempt(self, target, question, item, progress, seed):
        for number in range(1000):
            loss = question.objective.score_loss(target.score([item["prompt"]], [" the"])[0])
            progress.tried("nothing", loss=float(loss), perturbation=5 - number % 3)
            progress.show("noise", np.zeros((8, 8, 3)), np.linspace(-1, 1, 64).reshape(8, 8))


@dataclass(frozen=True)
class Gradients(Technique):
    """Needs what is not granted."""

    name: ClassVar[str] = "gradients"
    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = Capability.INPUT_GRAD

    def attempt(self, target, question, item, progress, seed):
        raise AssertionError("never run")


@dataclass(frozen=True)
class Whole(Technique):
    """Takes all items at once."""

    name: ClassVar[str] = "whole"
    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = Capability.QUERY
    whole_set: ClassVar[bool] = True

    def attempt(self, target, question, item, progress, seed):
        raise AssertionError("never run")

    def attempt_all(self, target, question, progress, seed):
        answers = target.generate([one.item["prompt"] for one in progress], max_new_tokens=2)
        for one, answer in zip(progress, answers, strict=True):
            one.tried(answer[0])


@pytest.fixture
def findings(target, configuration):
    techniques = (*configuration.techniques, Scored(), Whole(), Gradients())
    return run_question(target, configuration.question, techniques, configuration.levels).results


def test_every_permitted_technique_runs_within_the_budget_at_its_lowest_level(findings):
    rows = {row["name"]: row for row in findings["techniques"]}
    assert {name: row["level"] for name, row in rows.items()} == {
        "template_sensitivity": "black",
        "best_of_n": "black",
        "scored": "grey",
        "whole": "black",
    }
    assert findings["not_permitted"] == [{"name": "gradients", "why": "it needs input_grad"}]
    for row in rows.values():
        assert all(item["spent"] <= 6 for item in row["items"])
    assert [item["ended"] for item in rows["scored"]["items"]] == ["budget spent"] * 2
    assert rows["scored"]["items"][0]["spent"] == 6 and rows["scored"]["items"][0]["perturbation"] == 3
    assert rows["whole"]["items"][0]["spent"] == rows["whole"]["items"][1]["spent"]


def test_nothing_found_is_never_called_absent(findings, target, configuration):
    black, grey = findings["levels"]
    # the second item's reference is in every answer
    assert [item["success"] for item in black["items"]] == [True, False]
    assert black["rate"] == grey["rate"] == 0.5 and black["low"] < 0.5 < black["high"]
    assert "scored" not in grey["techniques"], "no user could do it: it is no part of the level's best"
    question = replace(configuration.question, items=configuration.question.items[1:])
    (level,) = run_question(target, question, configuration.techniques, {"black": configuration.levels["black"]}).results[
        "levels"
    ]
    assert level["finding"] == "not found within a budget of 6 on any of 1 items"
    assert "absent" not in str(level)


def test_the_ledger_shows_each_attempt_within_its_level(target, findings):
    scopes = [row["details"] for row in target.ledger() if row["verb"] == "open_scope"]
    assert {(scope["technique"], tuple(scope["granted"])[-1]) for scope in scopes} >= {("scored", "act_read"), ("whole", "query")}
    assert [scope["item"] for scope in scopes if scope["technique"] == "whole"] == ["*"]


def test_an_audit_repeats_itself(target, tiny_model_dir, configuration):
    arguments = (configuration.question, configuration.techniques, configuration.levels)
    with AuditTarget.open(str(tiny_model_dir), "white", mode="in_process") as other:
        assert run_question(target, *arguments).results == run_question(other, *arguments).results
        assert target.ledger()[-1]["hash"] == other.ledger()[-1]["hash"]
        assert run_question(other, *arguments, seed=1).results["techniques"][1]["items"]


def test_what_cannot_be_asked_is_told(target, configuration):
    with pytest.raises(ValueError, match="no technique is permitted: gradients: it needs input_grad"):
        run_question(target, configuration.question, [Gradients()], {"grey": GREY})
    with pytest.raises(ValueError, match="same name"):
        run_question(target, configuration.question, [Whole(), Whole()], {"grey": GREY})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "nothing"}, "objective 'nothing' is unknown; there are: elicit"),
        ({"success": {"type": "lacks", "fild": "a"}}, "success lacks"),
        ({"success": "displaced"}, "objective is for texts, the success for images"),
        ({"success": "contains"}, "item 'first' has no field 'target'"),
        ({"budget": 0}, "budget=0.0 must be a positive number"),
        ({"items": []}, "needs items"),
        ({"items": [{"id": 1, "reference": "a"}]}, "item '1' has no field 'prompt'"),
        ({"colour": 1}, "'colour' is unknown"),
    ],
)
def test_malformed_questions_are_named(configuration, change, message):
    with pytest.raises(ValueError, match=message):
        AuditQuestion.from_dict({**configuration.question.to_dict(), **change})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("nothing", "technique 'nothing' is unknown; there are: template_sensitivity"),
        ("geobased.auditing.technique:Nothing", "cannot be found"),
        ("geobased.auditing.technique:Picture", "is no Technique"),
        ({"name": "best_of_n", "temprature": 1}, "has no setting 'temprature'; it has temperature"),
        ({"name": "best_of_n", "temperature": 0}, "temperature above 0"),
        ({"name": "template_sensitivity", "templates": ["a"]}, "must say once where"),
    ],
)
def test_wrong_techniques_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_technique(settings)


def test_configurations_are_read_back(configuration):
    again = AuditConfiguration.from_dict(configuration.to_dict())
    assert again == configuration and again.question.sha256() == configuration.question.sha256()
    for change, message in (
        ({"model": None, "endpoint": {}}, "either model or endpoint"),
        ({"mode": "near"}, "mode='near'"),
        ({"modle": 1}, "'modle' is unknown"),
        ({"model": {"name": "x", "dtyp": 1}}, "dtyp"),
    ):
        with pytest.raises(ValueError, match=message):
            AuditConfiguration.from_dict({**configuration.to_dict(), **change})


def test_objectives_of_images_measure_kilometres_and_probability():
    values = {"latitude": 55.7, "longitude": 13.2, "reference": "SE", "target": "PE"}
    lund, lima = (
        {"latitude": 55.7, "longitude": 13.2, "country_code": "SE"},
        {"latitude": -12, "longitude": -77, "country_code": "PE"},
    )
    candidates = {"coordinates": torch.tensor([[55.0, 13.0], [-12.0, -77.0]]).double(), "country_codes": ["SE", "PE"]}
    logs = torch.tensor([[0.9, 0.1]]).log()
    displace, lead_to, away = OBJECTIVES["displace"](), OBJECTIVES["lead_to"](), OBJECTIVES["lead_away"]()
    assert displace.loss(values, lund) == 0 and displace.loss(values, lima) == pytest.approx(-11_120, abs=1)
    assert displace.score_loss(values, logs, candidates).exp().item() == pytest.approx(0.9)
    assert lead_to.score_loss(values, logs, candidates).item() == pytest.approx(-np.log(0.1), rel=1e-5)
    assert away.loss(values, lund) == 1 and away.loss(values, lima) == 0 and lead_to.loss(values, lima) == 0
    assert SUCCESSES["displaced"](km=500)(values, lima) and not SUCCESSES["displaced"](km=500)(values, lund)
    assert SUCCESSES["is"]()(values, lima) and SUCCESSES["is_not"]()(values, lima)
    with pytest.raises(ValueError, match="labels, not with places"):
        displace.loss(values, {"label": "Peru"})


def test_questions_are_made_in_python_too():
    items = [Item("a", {"prompt": "x", "target": "y"})]
    question = AuditQuestion(OBJECTIVES["elicit"](), SUCCESSES["contains"](), items, budget=3)
    assert question.kind == "text" and question.success(items[0].values, "say y")
    assert question.objective.loss(items[0].values, "n") == 1 and question.objective.loss(items[0].values, "y") == 0


def test_intervals_and_tests_have_their_known_values():
    # Wilson 1927's interval, as tabulated for 8 of 10; McNemar's exact test of 1 against 8 discordant pairs
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1
    assert mcnemar([True] * 8 + [False], [False] * 8 + [True]) == (8, 1, pytest.approx(0.0390625))
    assert mcnemar([True, False], [True, False]) == (0, 0, 1)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match="make no rate"):
        wilson_interval(1, 0)


def test_curves_end_where_the_budget_does():
    assert solved_curve([None, 5.0], 10.0)[::20] == [0, 0.5, 0.5]
    curve = loss_curve([[(0.0, 4.0), (5.0, 2.0)], [(2.5, 2.0)]], 10.0)
    assert curve[0] is None and curve[10] == 3 and curve[-1] == 2


def test_the_smallest_perturbation_is_found_by_bisection():
    assert smallest_perturbation(lambda size: size >= 0.3, 0, 1, steps=12) == pytest.approx(0.3, abs=1e-3)
    assert smallest_perturbation(lambda size: size >= 5, 0, 16, integral=True) == 5
    assert smallest_perturbation(lambda size: False, 0, 1) is None


@dataclass(frozen=True)
class Grey(Technique):
    """Blends the image into grey, by bisection."""

    name: ClassVar[str] = "grey"
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.QUERY
    perturbation_unit: ClassVar[str] = "share of grey"

    def attempt(self, target, question, item, progress, seed):
        image = target.prepare([question.picture(item)])
        progress.show("the image", (image[0].permute(1, 2, 0) * 255).byte().numpy())

        def succeeds(share):
            blended = image * (1 - share) + 0.5 * share
            return progress.tried(target.answer(blended)[0], candidate={"share": share}, perturbation=share)

        smallest_perturbation(succeeds, 0, 1, steps=4)


def test_images_are_asked_about_and_the_same_images_again(tiny_clip_dir, tmp_path):
    generator = np.random.default_rng(0)
    items = []
    for number in range(3):
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        items.append({"image": f"{number}.png", "reference": "Peru"})
    content = {
        "model": {"name": str(tiny_clip_dir), "labels": ["Peru", "Kenya", "Japan"]},
        "mode": "in_process",
        "access": "black",
        "question": {
            "objective": {"type": "lead_away", "answer": "label"},
            "success": {"type": "is_not", "answer": "label"},
            "budget": 4,
            "items": items,
        },
        "techniques": [f"{__name__}:Grey"],
    }
    report = run_audit(AuditConfiguration.from_dict(content, tmp_path))
    (row,) = report.content["results"]["techniques"]
    assert [item["spent"] for item in row["items"]] == [1 if not item["success"] else 4 for item in row["items"]]
    assert len(report.pictures) == 3 and row["settings"] == {"name": f"{Grey.__module__}:Grey"}
    report.save(tmp_path / "report")
    assert reproduce(tmp_path / "report", data=tmp_path).same_ledger
    Image.new("RGB", (40, 60)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="another image"):
        reproduce(tmp_path / "report", data=tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match="no image at"):
        AuditConfiguration.from_dict(content, tmp_path)
