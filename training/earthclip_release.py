"""Makes checkpoints/earthclip-mini and checkpoints/earthclip-mini-clip of a finished run.

    python -m geobased.training.earthclip_release runs/earthclip-mini/full checkpoints --ablations runs/earthclip-mini/ablations

Copies the two models without the code that saved models carry (the package has it), and writes beside them the evaluation, the
example crop, the curves of the losses, and a card each. Each folder is replaced as a whole or not at all. Audits stay in the card
of earthclip-mini if --audits names their reports, which must be of the released files.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geobased.auditing.report_card import add_audits
from geobased.modeling_based.whole_folder import whole_folder
from geobased.training.artifacts import write_json
from geobased.training.earthclip import EVALUATION_FILE, EXAMPLE_FILE
from geobased.training.earthclip_ablations import summarize
from geobased.training.earthclip_card import earthclip_card

# folder of the run -> folder of the checkpoint
FOLDERS = {"pigeon": "earthclip-mini", "streetclip": "earthclip-mini-clip"}
LOSS_FILE, ABLATIONS_FILE = "loss.png", "ablations.json"
TITLES = {"clip": "CLIP: contrastive loss", "pigeon": "PIGEON: smoothed loss of cells, elevation, climate"}


def release(run: Path, checkpoints: Path, ablations: Path | None = None, audits: Sequence[Path] = ()) -> list[Path]:
    """Writes the two folders, and returns them.

    Args:
        run: output folder of `geobased.training.earthclip`.
        checkpoints: folder that gets the two.
        ablations: folder of runs for the table (see `earthclip_ablations`).
        audits: folders of reports for the card of earthclip-mini.

    Raises:
        FileNotFoundError: a run that is not finished.
        ValueError: an audit of other files than the released ones.
    """
    if not (run / EVALUATION_FILE).is_file():
        raise FileNotFoundError(f"{run} has no {EVALUATION_FILE}: the run is not finished")
    evaluation = json.loads((run / EVALUATION_FILE).read_text(encoding="utf-8"))
    rows = None if ablations is None else summarize(ablations)
    folders = []
    for part, name in FOLDERS.items():
        with whole_folder(checkpoints / name) as temporary:
            for path in sorted((run / part).iterdir()):
                if path.suffix != ".py":
                    shutil.copyfile(path, temporary / path.name)
            config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
            config.pop("auto_map", None)
            write_json(temporary / "config.json", config)
            card = earthclip_card(part, evaluation, rows)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            if part == "pigeon":
                shutil.copyfile(run / EXAMPLE_FILE, temporary / EXAMPLE_FILE)
                write_json(temporary / EVALUATION_FILE, evaluation)
                plot_stages(evaluation["stages"], temporary / LOSS_FILE)
                if rows is not None:
                    write_json(temporary / ABLATIONS_FILE, {"rows": rows})
                if audits:
                    add_audits(temporary, audits)
        folders.append(checkpoints / name)
    return folders


def plot_stages(stages: dict[str, Any], path: Path) -> None:
    """The losses of the stages, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = {name: stage for name, stage in stages.items() if stage is not None}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, stage) in zip(figure.subplots(1, len(trained), squeeze=False)[0], trained.items(), strict=True):
        axes.plot(*zip(*stage["losses"], strict=True), linewidth=1.2)
        axes.set_title(TITLES[name], fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of the training")
    parser.add_argument("checkpoints", type=Path, help="folder that gets earthclip-mini and earthclip-mini-clip")
    parser.add_argument("--ablations", type=Path, help="folder of the ablations' runs")
    parser.add_argument("--audits", type=Path, nargs="+", default=(), help="reports of audits of the very same files")
    given = parser.parse_args(arguments)
    try:
        folders = release(given.run, given.checkpoints, given.ablations, given.audits)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"earthclip_release: {error}")
    print("\n".join(map(str, folders)))


__all__ = ["main", "plot_stages", "release"]


if __name__ == "__main__":
    main()
