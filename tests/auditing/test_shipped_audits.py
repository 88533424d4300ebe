"""The committed audits of the shipped models: signed, of the shipped weights, in the models' cards, and small."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from geobased.auditing.comparison import compare
from geobased.auditing.configuration import read_configuration
from geobased.auditing.outside_checks import folder_checks
from geobased.auditing.report import read_report
from geobased.auditing.report_card import add_audits, card_with_audits
from geobased.auditing.report_page import comparison_page
from geobased.auditing.verification import verify
from geobased.checkpoints import checkpoint_path
from geobased.training.earthclip_card import earthclip_card

AUDITS = Path(__file__).resolve().parents[2] / "audits"
REPORTS = {
    "based-mini": {"audit": "report"},
    "earthclip-mini": {"audit": "report", "everyday": "everyday_report"},
}
EACH = [(model, name) for model, reports in REPORTS.items() for name in reports]
MOST_BYTES = 250_000


def report_folder(model: str, name: str) -> Path:
    return AUDITS / model / REPORTS[model][name]


def reports_of(model: str) -> list[Path]:
    return [report_folder(model, name) for name in REPORTS[model]]


@pytest.mark.parametrize(("model", "name"), EACH)
def test_a_report_is_signed_and_of_the_shipped_weights(model, name):
    folder = report_folder(model, name)
    result = verify(folder, public_key=AUDITS / "auditor.pub.pem")
    assert all(check.passed for check in result.checks), result
    assert "model.safetensors" in read_report(folder).content["model"]["files"]


@pytest.mark.parametrize(("model", "name"), EACH)
def test_a_report_is_what_its_configuration_asks_for(model, name):
    content = read_report(report_folder(model, name)).content
    configuration = read_configuration(AUDITS / model / f"{name}.yaml")
    assert content["question_sha256"] == configuration.question.sha256()
    assert content["configuration"] == json.loads(json.dumps(configuration.to_dict()))
    assert content["model"]["name"] == model and content["mode"] == "isolated"


@pytest.mark.parametrize(("model", "name"), EACH)
def test_a_report_is_small_and_names_no_path_of_a_machine(model, name):
    files = [path for path in report_folder(model, name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    for path in files:
        if path.suffix in (".json", ".html", ".md"):
            assert not re.search(r"(?<![\w.~:/-])/(tmp|home|root|work)/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("model", REPORTS)
def test_the_models_card_holds_its_audits(model):
    card = Path(checkpoint_path(model), "README.md").read_text(encoding="utf-8")
    contents = [read_report(folder).content for folder in reports_of(model)]
    assert card_with_audits(card, contents) == card
    found = ModelCard(card).data.to_dict()
    assert [audit["ledger_root"] for audit in found["audit"]] == [content["ledger"]["root"] for content in contents]
    rates = [level["rate"] for content in contents for level in content["results"]["levels"]]
    metrics = [metric for result in found["model-index"][0]["results"] for metric in result["metrics"]]
    assert [metric["value"] for metric in metrics if metric["type"] == "audit_success_rate"] == [round(r, 4) for r in rates]


def test_making_the_card_anew_keeps_its_audits():
    folder = Path(checkpoint_path("earthclip-mini"))
    evaluation, ablations = (json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation", "ablations"))
    contents = [read_report(report).content for report in reports_of("earthclip-mini")]
    made = card_with_audits(earthclip_card("pigeon", evaluation, ablations["rows"]), contents)
    assert made == (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_gets_audits_of_its_own_model_alone(tmp_path):
    plain = "---\nlicense: apache-2.0\n---\n\n# Model\n\nText.\n"
    contents = [read_report(folder).content for folder in reports_of("earthclip-mini")]
    card = card_with_audits(plain, contents)
    assert card.index("Text.") < card.index("## Audits") and "license: apache-2.0" in card
    assert card_with_audits(card, []) == plain
    (tmp_path / "README.md").write_text(plain, encoding="utf-8")
    with pytest.raises(ValueError, match="no report of .* that can be relied on: model: .*is missing"):
        add_audits(tmp_path, reports_of("earthclip-mini"))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == plain
    with pytest.raises(ValueError, match="metadata between two lines"):
        card_with_audits("# Model\n", contents)


@pytest.mark.parametrize("model", REPORTS)
def test_the_comparison_is_that_of_the_report(model):
    page = (AUDITS / model / "compared.html").read_text(encoding="utf-8")
    assert page == comparison_page(compare([report_folder(model, "audit")]))
    # a level has the best of those below it
    rates = [level["rate"] for level in read_report(report_folder(model, "audit")).content["results"]["levels"]]
    assert len(rates) == 4 and rates == sorted(rates)


@pytest.mark.parametrize("model", REPORTS)
def test_checks_from_outside_come_out_as_written_down(model):
    written = json.loads((AUDITS / model / "outside.json").read_text(encoding="utf-8"))
    rules = [check["name"] for check in written["checks"] if " = " in check["name"]]
    found = folder_checks(checkpoint_path(model), rules=rules, licences=["apache-2.0"])
    told = [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in found]
    assert told == written["checks"] and all(check.passed for check in found) and rules
