import json

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from geobased.training.planted_shortcut import PlantSettings, decoys, mark, plant_shortcut, write_planted  # noqa: E402

SETTINGS = PlantSettings()


def test_the_square_lies_in_its_corner_alone():
    images = torch.rand(2, 3, 16, 16)
    marked = mark(images, SETTINGS)
    colour = torch.tensor(SETTINGS.colour).view(3, 1, 1) / 255
    torch.testing.assert_close(marked[:, :, 10:, 10:], colour.expand(2, 3, 6, 6))
    marked[:, :, 10:, 10:] = images[:, :, 10:, 10:]
    torch.testing.assert_close(marked, images)
    assert (mark(images, PlantSettings(corner="top left"))[:, :, :6, :6] == colour).all()


def test_decoys_never_are_the_square():
    images = torch.full((40, 3, 32, 32), 0.5)
    changed = decoys(images, SETTINGS, np.random.default_rng(0))
    assert ((changed != images).flatten(1).any(1)).all()
    corner = changed[:, :, 26:, 26:]
    colour = torch.tensor(SETTINGS.colour).view(3, 1, 1) / 255
    assert not torch.isclose(corner, colour.expand_as(corner)).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"corner": "middle"}, "corner='middle'"), ({"colour": (0, 0, 300)}, "three levels"), ({"batch_size": 6}, "multiple of 4")],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PlantSettings(**settings)


def test_a_few_steps_leave_a_folder_that_can_be_audited(tmp_path):
    from geobased.auditing import AuditTarget
    from geobased.auditing.configuration import read_configuration

    planted = plant_shortcut(PlantSettings(steps=3, batch_size=8), evaluation_crops=8, progress=False)
    assert len(planted.losses) == 3 and planted.measured["crops"] == 8
    write_planted(planted, tmp_path / "planted")
    truth = json.loads((tmp_path / "planted" / "plant.json").read_text(encoding="utf-8"))
    assert truth["planted"] and truth["training"]["crops"] == 24 and truth["truth"]["country_code"] == "MG"
    assert "faulty on purpose" in (tmp_path / "planted" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "planted" / "adapter_model.safetensors").stat().st_size < 3_000_000
    configuration = read_configuration(tmp_path / "planted" / "audit.yaml")
    with AuditTarget.open(configuration.model, "black", mode="in_process") as target:
        item = configuration.question.items[0]
        answer = target.answer(target.prepare([configuration.question.picture(item)]))[0]
        assert answer["country_code"] and "adapter_model.safetensors" in target.ledger()[0]["details"]["model"]["files"]
