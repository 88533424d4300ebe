import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from geobased.auditing import AuditTarget
from geobased.auditing.canonical import sha256
from geobased.auditing.outside_checks import (
    check_card,
    check_config,
    check_digests,
    check_records,
    contamination,
    count_parameters,
    coverage_against_error,
    lineage,
    outside_checks,
    safetensors_shapes,
)
from geobased.checkpoints import checkpoint_path

EARTH = Path(checkpoint_path("earthclip-mini"))
EMPTY_CARD = "---\ntags: [x]\n---\n\n# Model\n\n[More Information Needed]\n"


def passed(checks):
    return {check.name: check.passed for check in checks}


@pytest.mark.parametrize("name", ["earthclip-mini", "earthclip-mini-clip", "earthclip-mini-planted"])
def test_shipped_cards_are_complete(name):
    checks = check_card((Path(checkpoint_path(name)) / "README.md").read_text(encoding="utf-8"), ["apache-2.0"])
    assert passed(checks) == {"licence": True, "card": True, "placeholders": True}


def test_what_a_card_lacks_is_named():
    licence, card, placeholders = check_card(EMPTY_CARD)
    assert (licence.passed, card.passed, placeholders.passed) == (False, False, False)
    assert "no licence" in licence.detail and "limits" in card.detail
    assert not check_card("---\nlicense: wtfpl\n---\n", ["mit"])[0].passed
    assert check_card("---\n: [\n---\n")[0].passed is False


@pytest.mark.parametrize("name", ["earthclip-mini", "based-mini"])
def test_weights_are_those_of_the_configuration(name):
    folder = Path(checkpoint_path(name))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = safetensors_shapes((folder / "model.safetensors").read_bytes())
    assert check_config(config, shapes)[0].passed
    some = next(iter(shapes))
    wrong = check_config(config, {**shapes, some: [7], "stowaway": [1]})[0]
    assert wrong.passed is False and "stowaway is not of the configuration" in wrong.detail
    assert check_config(config, {key: value for key, value in shapes.items() if key != some})[0].passed is False
    assert check_config({"model_type": "no such thing"}, shapes)[0].passed is None
    with pytest.raises(ValueError, match="no safetensors"):
        safetensors_shapes(b"nothing of the kind")


def test_recorded_numbers_are_derived_again():
    record = json.loads((Path(checkpoint_path("based-mini")) / "training_log.json").read_text(encoding="utf-8"))
    rule = "tokens = steps * arguments.per_device_train_batch_size * arguments.context_length"
    shapes = safetensors_shapes((Path(checkpoint_path("based-mini")) / "model.safetensors").read_bytes())
    rules = [rule, f"parameters = {count_parameters(shapes)}", "sources.1.tokens = tokens * 2", "tokens = unheard * 2"]
    assert [check.passed for check in check_records(record, rules)] == [True, True, False, None]
    with pytest.raises(ValueError, match="is not of the form"):
        check_records(record, ["tokens"])


def test_little_data_and_large_errors_go_together():
    counts = {f"{number}": 2.0**number for number in range(12)}
    errors = {name: 1000 / (count + 1) for name, count in counts.items()}
    found = coverage_against_error(counts, {**errors, "nowhere": 5000.0}, permutations=500)
    assert found.correlation == pytest.approx(-1) and found.p_value < 0.01 and found.uncovered == ["nowhere"]
    generator = np.random.default_rng(0)
    assert coverage_against_error(counts, {n: generator.random() for n in counts}, permutations=500).p_value > 0.05
    with pytest.raises(ValueError, match="needs four"):
        coverage_against_error(counts, {"0": 1.0})


def test_test_texts_in_training_texts_are_found():
    training = ["It was the best of times, it was the worst of times, it was the age of wisdom", "Nothing else."]
    tests = ["IT WAS the best of times; it was the worst of TIMES.", "It was a dark and stormy night", "nothing else", ""]
    found = contamination(tests, iter(training), n=5)
    assert found.shares[0] == 1 and found.shares[1:] == [0, 1, 0]
    assert found.contaminated == [0, 2]
    with pytest.raises(ValueError, match="n=0"):
        contamination(tests, training, n=0)


def test_lineage_tells_what_was_changed(tmp_path):
    weights = load_file(EARTH / "model.safetensors")
    changed = {**weights, "cell_head.bias": weights["cell_head.bias"] + 1, "added": torch.zeros(2)}
    save_file(changed, tmp_path / "model.safetensors")
    found = lineage(tmp_path, EARTH)
    assert found.changed == ["cell_head.bias"] and found.new == ["added"] and len(found.same) == len(weights) - 1
    assert 0 < found.change < 1 and list(found.files) == ["model.safetensors"]
    same = lineage(EARTH, EARTH)
    assert same.change == 0 and same.changed == []
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        lineage(tmp_path / "none", EARTH)


def test_digests_tell_changed_and_missing_files():
    files = {"a": b"1", "b": b"2"}
    recorded = {"a": sha256(b"1"), "b": sha256(b"3"), "c": sha256(b"4")}
    assert list(passed(check_digests(files, recorded)).values()) == [True, False, None]


def test_granted_files_are_checked_through_the_ledger(tmp_path):
    (tmp_path / "README.md").write_text(EMPTY_CARD, encoding="utf-8")
    (tmp_path / "record.json").write_text('{"steps": 10, "batch": 4, "crops": 41}', encoding="utf-8")
    (tmp_path / "config.json").write_text((EARTH / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(save({"stray": torch.zeros(1)}))
    checkpoints = [str(tmp_path / "config.json"), str(tmp_path / "model.safetensors")]
    outside = {"docs": [str(tmp_path / "README.md")], "hparams": [str(tmp_path / "record.json")], "checkpoints": checkpoints}
    with AuditTarget.open("earthclip-mini", "black+docs+hparams+checkpoints", mode="in_process", outside=outside) as target:
        checks = outside_checks(target, rules=["crops = steps * batch"])
        verbs = [row["verb"] for row in target.ledger()]
    assert [check.passed for check in checks] == [False, False, False, False, False]
    assert verbs.count("outside") >= 6
    with AuditTarget.open("earthclip-mini", "black", mode="in_process") as target:
        assert outside_checks(target) == []
