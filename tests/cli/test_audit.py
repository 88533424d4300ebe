"""`geobased audit`: from a configuration to a report that is verified, reproduced and compared."""

import json
import sys
from pathlib import Path

import pytest

from geobased.auditing.canonical import audit_package

pytest.importorskip("rfc8785")
pytest.importorskip("cryptography")

PLACES = {"Lund": "94,393", "Nanjing": "9,314,685"}
CONFIGURATION = """
model: based-mini
access: black
question:
  name: population-in-context
  text: Does the model miss the population that stands in its context?
  objective: suppress
  success: lacks
  budget: 8
  max_new_tokens: 12
  stop: ["\\n"]
  items: items.jsonl
techniques: [template_sensitivity, {name: best_of_n, most: 2}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit")
    lines = [
        {"id": name, "prompt": f"The population of {name} is {number}. Question: What is the population of {name}? Answer:",
         "reference": number}
        for name, number in PLACES.items()
    ]  # fmt: skip
    (path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "audit.yaml").write_text(CONFIGURATION)
    return path


def test_the_whole_way_with_a_shipped_model(geobased, folder):
    report = folder / "report"
    key = geobased("audit", "key", folder / "auditor.pem", "--json")
    fingerprint = json.loads(key.stdout)["fingerprint"]

    ran = geobased("audit", "run", folder / "audit.yaml", "--output-dir", report, "--key", folder / "auditor.pem", "--json")
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    assert result["fingerprint"] == fingerprint and result["signed"] and result["mode"] == "isolated"
    assert [row["name"] for row in result["techniques"]] == ["template_sensitivity", "best_of_n"]
    assert result["used"] == ["query"] and result["levels"][0]["num_items"] == 2
    assert "template_sensitivity (black): " in ran.stderr

    checked = geobased("audit", "verify", report, "--public-key", report / "public_key.pem", "--json")
    assert checked.exit_code == 0, checked.output
    assert all(check["passed"] for check in json.loads(checked.stdout)["checks"])

    again = geobased("audit", "reproduce", report, "--output-dir", folder / "again", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["reproduced"] and json.loads(again.stdout)["same_ledger"]

    compared = geobased("audit", "compare", report, folder / "again", "--html", folder / "compared.html")
    assert compared.exit_code == 0, compared.output
    assert "p = 1" in compared.stdout and "again: black" in (folder / "compared.html").read_text()

    with open(report / "ledger.jsonl.xz", "ab") as ledger:
        ledger.write(b"\n")
    spoilt = geobased("audit", "verify", report)
    assert spoilt.exit_code == 1 and "files      FAILED       ledger.jsonl.xz was changed" in spoilt.stdout


def test_wrong_input_is_named(fails, folder, tmp_path):
    run = ("audit", "run")
    out = ("--output-dir", tmp_path / "out")
    assert "no configuration at" in fails(*run, tmp_path / "none.yaml", *out)
    wrong = tmp_path / "wrong.yaml"
    for content, message in (
        ("a: [", "is no YAML"),
        ("- a", "must hold names and values"),
        ("model: based-mini", "access is missing"),
        (CONFIGURATION.replace("black", "blak"), "access 'blak' is unknown"),
        (CONFIGURATION.replace("items.jsonl", "none.jsonl"), "none.jsonl"),
    ):
        wrong.write_text(content)
        assert message in fails(*run, wrong, *out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "is not empty" in fails(*run, folder / "audit.yaml", "--output-dir", tmp_path / "full")
    assert "no private key" in fails(*run, folder / "audit.yaml", *out, "--key", folder / "items.jsonl")
    assert "no signed report" in fails("audit", "verify", tmp_path / "full")
    assert "holds no report" in fails("audit", "compare", tmp_path / "full")


def test_without_the_extra_it_is_named(fails, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    assert "needs cryptography" in fails("audit", "run", folder / "audit.yaml", "--output-dir", tmp_path / "out", code=1)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "geobased\[audit\]"'):
        audit_package("cryptography.hazmat.primitives.asymmetric.ed25519")


def test_what_lies_beside_the_weights_is_checked(geobased, fails, tmp_path):
    rule = "training_log.json: tokens = steps * arguments.per_device_train_batch_size * config.max_position_embeddings"
    result = geobased("audit", "outside", "based-mini", "--license", "apache-2.0", "--rule", rule, "--json")
    assert result.exit_code == 0, result.output
    checks = {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}
    assert checks[rule] and checks["config.json: config and weights"] and checks["README.md: licence"]
    other = geobased("audit", "outside", "based-mini", "--license", "mit", "--rule", "training_log.json: seed = 1")
    assert other.exit_code == 1
    assert "FAILED       licence apache-2.0, which is none of mit" in other.stdout and "recorded 0, derived 1" in other.stdout
    assert "does not begin with a file of" in fails("audit", "outside", "based-mini", "--rule", "tokens = steps")


def test_groups_of_places_are_told_apart(geobased, fails, tmp_path):
    from PIL import Image

    from geobased.checkpoints import checkpoint_path

    example = Image.open(Path(checkpoint_path("earthclip-mini"), "example.png")).convert("RGB")
    lines = ["path,latitude,longitude,country,income,city"]
    for number, degrees in enumerate((0, 90, 180, 270)):
        example.rotate(degrees).save(tmp_path / f"{degrees}.png")
        # two at the true place, two that are said to be elsewhere
        place = "44.78,51.17,KZ,high" if number < 2 else "-10,-50,BR,low"
        lines.append(f"{degrees}.png,{place},{number}")
    (tmp_path / "places.csv").write_text("\n".join(lines))
    options = ("--group", "income", "--cluster", "city", "--resamples", "50")
    result = geobased("audit", "bias", tmp_path / "places.csv", *options)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "4 images of 4 clusters; 50.0 % within 750 km"
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["high"].startswith("high 2 100.0 % +100 (+100 to +100)") and rows["low"].startswith("low 2 0.0 % -100")
    # the model answers Kazakhstan to all four
    assert rows["KZ"].endswith(" 2.00") and rows["BR"].endswith(" 0.00")
    assert "has no column town; it has path" in fails("audit", "bias", tmp_path / "places.csv", "--group", "town")
