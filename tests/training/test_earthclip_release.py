"""The ablation table and the release of a finished run; and the folders that ship are what a release makes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from geobased import checkpoint_path
from geobased.training import earthclip_ablations, earthclip_release

METRICS = ("median_km", "within_200km", "country_accuracy")
PARTS = ("pigeon", "pigeon_without_refinement", "pigeon_prototype_places", "pigeon_centroids")


def write_run(folder, first: float) -> None:
    """An evaluation whose numbers tell what they are of."""
    sets = {
        name: {part: {m: {"value": first + 100 * s + 10 * p + i} for i, m in enumerate(METRICS)} for p, part in enumerate(PARTS)}
        for s, name in enumerate(("seen", "held_out"))
    }
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"sets": sets}))


def test_table_of_ablations(tmp_path, capsys):
    for seed, first in enumerate((1.0, 3.0)):
        write_run(tmp_path / f"whole-{seed}", first)
        write_run(tmp_path / f"naive_cells-{seed}", first + 1)
        write_run(tmp_path / f"no_multitask-{seed}", first - 50)
    write_run(tmp_path / "no_smoothing-0", 5.0)
    earthclip_ablations.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| all parts | 2 | 2.0 ± 1.4 | 3.0 ± 1.4 | 4.0 ± 1.4 | 102.0 ± 1.4 | 103.0 ± 1.4 | 104.0 ± 1.4 |"
    assert lines[3].startswith("| without prototype refinement | 2 | 12.0 ± 1.4 |")
    assert lines[6] == "| without haversine smoothing | 1 | 5.0 | 6.0 | 7.0 | 105.0 | 106.0 | 107.0 |"
    assert lines[10] == (
        "The median error of held-out places is larger: without prototype refinement (+10 km), places by prototypes, not by"
        " likelihood (+20 km), places at centroids, without prototypes (+30 km). It is the same within twice the spread:"
        " rectangles for semantic geocells. It is smaller: without elevation and climate heads (-50 km)."
    )
    assert len(lines) == 11
    rows = json.loads((tmp_path / "ablations.json").read_text())["rows"]
    assert rows[0]["held_out/median_km"]["mean"] == 102.0


def test_without_runs(tmp_path):
    with pytest.raises(SystemExit, match="has no whole-"):
        earthclip_ablations.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="the run is not finished"):
        earthclip_release.main([str(tmp_path), str(tmp_path / "checkpoints")])


@pytest.mark.parametrize(("name", "most"), [("earthclip-mini", 8_200_000), ("earthclip-mini-clip", 7_500_000)])
def test_shipped_folders_load_and_have_no_code_of_their_own(name, most):
    folder = Path(checkpoint_path(name))
    assert not list(folder.glob("*.py"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < most
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Overhead imagery, not street photos" in card and "### Ablations" in card
    model = AutoModel.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and "auto_map" not in json.loads((folder / "config.json").read_text())
    if name.endswith("clip"):
        ids = AutoTokenizer.from_pretrained(folder)("A satellite photo in Chile.").input_ids
        assert ids[-1] == model.config.text_config.eos_token_id


def test_the_card_tells_the_measured_numbers():
    folder = Path(checkpoint_path("earthclip-mini"))
    sets = json.loads((folder / "evaluation.json").read_text())["sets"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name in ("seen", "held_out"):
        assert f"| {sets[name]['pigeon']['median_km']['value']:.1f} (" in card
    # what the shipped model was made for
    assert sets["seen"]["pigeon"]["median_km"]["value"] <= 60 and sets["held_out"]["pigeon"]["median_km"]["value"] <= 250
