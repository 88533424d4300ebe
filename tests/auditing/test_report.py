"""Reports: what is in them, that any change shows, and that audits come out the same again."""

import copy
import json
import random
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from geobased.auditing.access import Capability
from geobased.auditing.comparison import compare
from geobased.auditing.report import LEDGER, PUBLIC_KEY, REPORT, STATEMENT, AuditReport, read_report
from geobased.auditing.report_page import comparison_page
from geobased.auditing.report_pictures import picture_png
from geobased.auditing.statement import create_key, open_envelope, public_pem, read_private_key, read_public_key
from geobased.auditing.technique import Picture
from geobased.auditing.verification import reproduce, verify

CHANGES = 1000


@pytest.fixture
def saved(report, tmp_path):
    report.save(tmp_path / "report")
    return tmp_path / "report"


def failed(folder, **options) -> list[str]:
    return [check.name for check in verify(folder, **options).checks if check.passed is False]


def test_a_report_is_verified(saved):
    result = verify(saved)
    assert result.verified, result
    assert [check.name for check in result.checks] == ["signature", "files", "statement", "model", "ledger", "access", "costs"]
    assert all(check.passed for check in result.checks)


def test_every_changed_byte_shows(saved):
    files = sorted(path for path in saved.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {REPORT, LEDGER, STATEMENT, PUBLIC_KEY, "report.html", "model_card.md"}
    generator = random.Random(0)
    # each file is changed as often as the others, whatever its size
    for number in range(CHANGES):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place = generator.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= generator.randrange(1, 256)
        path.write_bytes(changed)
        assert failed(saved), f"{path.name}, byte {place}: {whole[place]} to {changed[place]}"
        path.write_bytes(whole)
    assert not failed(saved)


def test_missing_additional_and_shortened_files_show(saved):
    for name in (REPORT, LEDGER, "report.html"):
        kept = (saved / name).read_bytes()
        (saved / name).write_bytes(kept[:-1])
        assert failed(saved) == ["files"]
        (saved / name).unlink()
        assert failed(saved) == ["files"]
        (saved / name).write_bytes(kept)
    (saved / "more.txt").write_text("x")
    assert failed(saved) == ["files"]


def test_a_forger_with_another_key_is_found_by_the_auditors_key(report, tmp_path):
    create_key(tmp_path / "auditor.pem")
    key = read_private_key(tmp_path / "auditor.pem")
    assert (tmp_path / "auditor.pem").stat().st_mode & 0o077 == 0
    (tmp_path / "auditor.pub.pem").write_bytes(public_pem(key.public_key()))
    report.save(tmp_path / "genuine", private_key=key)
    report.save(tmp_path / "forged")
    assert not failed(tmp_path / "genuine", public_key=tmp_path / "auditor.pub.pem")
    assert not failed(tmp_path / "forged")
    assert failed(tmp_path / "forged", public_key=tmp_path / "auditor.pub.pem") == ["signature"]
    with pytest.raises(FileExistsError, match="never replaced"):
        create_key(tmp_path / "auditor.pem")
    with pytest.raises(ValueError, match="no private key"):
        read_private_key(tmp_path / "auditor.pub.pem")


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda content, rows: content["granted"].remove("logits"), "access"),
        (lambda content, rows: content["used"].append("weights"), "access"),
        (lambda content, rows: content["results"]["techniques"][0]["items"][0].update(spent=0.5), "costs"),
        (lambda content, rows: content["ledger"].update(rows=3), "ledger"),
        (lambda content, rows: rows.pop(), "ledger"),
        (lambda content, rows: rows[3].update(forward=0.0), "ledger"),
    ],
)
def test_a_signed_report_must_still_say_what_its_ledger_does(report, tmp_path, change, check):
    content, rows = copy.deepcopy(report.content), copy.deepcopy(report.rows)
    change(content, rows)
    AuditReport(content, rows).save(tmp_path / "report")
    assert failed(tmp_path / "report") == [check]


def test_another_model_is_noticed(saved, tiny_model_dir, tmp_path):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    assert not failed(saved, model=other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert failed(saved, model=other) == ["model"]
    unknown = next(check for check in verify(saved, model=tmp_path / "nowhere").checks if check.name == "model")
    assert unknown.passed is False


def test_the_statement_names_the_models_files_and_the_findings(saved, tiny_model_dir):
    statement = open_envelope((saved / STATEMENT).read_bytes(), read_public_key((saved / PUBLIC_KEY).read_bytes()))
    names = {entry["name"] for entry in statement["subject"]}
    assert names == {REPORT, *(path.name for path in tiny_model_dir.iterdir())}
    assert statement["predicate"]["used"] == ["query"]
    assert statement["predicate"]["findings"][0]["finding"] == "found on 1 of 2 items within a budget of 6"


def test_an_audit_is_reproduced_to_the_bit_and_differences_are_told(report, saved, tmp_path):
    again = reproduce(saved)
    assert again.differences == () and again.same_ledger
    content = copy.deepcopy(report.content)
    content["results"]["techniques"][0]["items"][0]["answer"] = "something else"
    content["results"]["levels"][0]["rate"] = 0.75
    AuditReport(content, report.rows).save(tmp_path / "claimed")
    found = reproduce(tmp_path / "claimed").differences
    assert any(line.startswith("results.levels[0].rate: 0.75 before, 0.5 now") for line in found)
    assert any('answer: "something else" before' in line for line in found)


def test_the_page_needs_no_network_and_escapes_what_models_say(saved):
    page = (saved / "report.html").read_text()
    assert "Does &lt;the&gt; model leave the reference out?" in page and "<the>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert "prefers-color-scheme: dark" in page and page.count("<svg") == 3


def test_pictures_are_drawn_into_the_report(report, tmp_path):
    import numpy as np

    png = picture_png(Picture("heat", np.zeros((8, 8, 3), dtype=np.uint8), np.linspace(-1, 1, 64).reshape(8, 8)))
    assert png.startswith(b"\x89PNG") and b"eXIf" not in png
    content = copy.deepcopy(report.content)
    content["pictures"] = [{"file": "pictures/0000.png", "technique": "t", "item": "first", "caption": "heat"}]
    AuditReport(content, report.rows, {"pictures/0000.png": png}).save(tmp_path / "report")
    assert 'src="data:image/png;base64,' in (tmp_path / "report" / "report.html").read_text()
    assert not failed(tmp_path / "report")
    assert read_report(tmp_path / "report").pictures == {"pictures/0000.png": png}
    with pytest.raises(ValueError, match="uint8"):
        picture_png(Picture("wrong", np.zeros((8, 8), dtype=np.uint8)))


def test_a_model_card_holds_a_result_for_each_level(saved):
    card = ModelCard.load(saved / "model_card.md")
    results = card.data.eval_results
    assert [result.metric_args["access"] for result in results] == ["black", "grey"]
    assert results[0].metric_value == 0.5 and card.data.audit["used"] == ["query"]
    assert "What was not found within a budget may still be there." in card.text


def test_results_for_a_data_set_of_the_hub_are_written_where_there_is_one(report, tmp_path):
    content = copy.deepcopy(report.content)
    content["configuration"]["hub_dataset"] = {"id": "owner/questions", "task": "rivers"}
    AuditReport(content, report.rows).save(tmp_path / "report")
    first = yaml.safe_load((tmp_path / "report" / ".eval_results" / "audit.yaml").read_text())[0]
    assert first["dataset"] == {"id": "owner/questions", "task_id": "rivers"} and first["value"] == 50.0
    assert not failed(tmp_path / "report")


def test_reports_of_one_question_are_compared_and_of_others_not(report, saved, tmp_path):
    content = copy.deepcopy(report.content)
    content["results"]["levels"] = content["results"]["levels"][:1]
    AuditReport(content, report.rows).save(tmp_path / "black")
    result = compare([tmp_path / "black", saved])
    assert len(result["levels"]) == 3 and len(result["tests"]) == 3
    assert result["tests"][0]["p_value"] == 1
    assert [level["access"] for level in result["levels"]] == ["black: black", "report: black", "report: grey"]
    assert "Audits compared" in comparison_page(result)
    content["question_sha256"] = "0" * 64
    AuditReport(content, report.rows).save(tmp_path / "other")
    with pytest.raises(ValueError, match="another question"):
        compare([saved, tmp_path / "other"])
    with pytest.raises(ValueError, match="one level of access"):
        compare([tmp_path / "black"])


def test_a_folder_that_holds_something_else_is_kept(report, saved, tmp_path):
    with pytest.raises(ValueError, match="not empty"):
        report.save(saved)
    report.save(saved, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        report.save(tmp_path / "mine", overwrite=True)
    with pytest.raises(FileNotFoundError, match="no signed report"):
        verify(tmp_path / "mine")


def test_reports_hold_plain_json(report):
    assert json.loads(json.dumps(report.content)) == report.content
    assert all(name == name.lower() for name in report.content["granted"])
    assert Capability.QUERY.name.lower() in report.content["used"]
