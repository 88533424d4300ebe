"""The Spaces that come with geobased, as folders to upload."""

import shutil
from pathlib import Path

from .errors import CommandError
from .hub_files import CARD
from .sources import DEFAULT_GEOLOCALIZER, DEFAULT_MODEL, GEOLOCALIZER_VARIABLE, MODEL_VARIABLE

FOLDER = Path(__file__).parent.parent / "space_templates"
# Space -> the variable that names its model, and the model it has without
VARIABLES = {
    "generation": (MODEL_VARIABLE, DEFAULT_MODEL),
    "geolocalization": (GEOLOCALIZER_VARIABLE, DEFAULT_GEOLOCALIZER),
}
START = "    main()\n"


def space_folder(name: str) -> Path:
    """Folder of a Space that comes with geobased."""
    folder = FOLDER / name
    if not (folder / "app.py").is_file():
        raise CommandError(f"the Space {name} is missing from this installation ({FOLDER}): give the folder of one")
    return folder


def write_space(name: str, destination: Path, model: str | None, package: str | None) -> None:
    """Writes a Space that comes with geobased into the empty folder `destination`.

    Args:
        name: "generation" or "geolocalization".
        destination: where to.
        model: Hub id, or name of a checkpoint that ships with geobased; None keeps the Space's own.
        package: address of a wheel or repository that geobased is installed from instead of the package index.
    """
    shutil.copytree(space_folder(name), destination, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    if package is not None:
        path = destination / "requirements.txt"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines = [f"{line} @ {package}" if line.startswith("geobased") else line for line in lines]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    variable, default = VARIABLES[name]
    if model is None or model == default:
        return
    app = destination / "app.py"
    text = app.read_text(encoding="utf-8")
    if not text.endswith(START):
        raise CommandError(f"{app.name} of the Space {name} does not end with main(): its model cannot be set")
    # the Space's own variable still goes first
    text = text.removesuffix(START) + f'    os.environ.setdefault("{variable}", "{model}")\n{START}'
    app.write_text(text.replace("\n\nfrom ", "\n\nimport os\n\nfrom ", 1), encoding="utf-8")
    _name_model(destination / CARD, model, default)


def _name_model(path: Path, model: str, default: str) -> None:
    from huggingface_hub import SpaceCard

    card = SpaceCard(path.read_text(encoding="utf-8"))
    on_hub = "/" in model
    if on_hub:
        card.data["models"] = [model]
    told = f"[{model}](https://huggingface.co/{model}), under its own licence" if on_hub else f"`{model}`"
    heading, line, rest = card.text.partition("\n\n")
    card.text = f"{heading}{line}This Space runs {told}, not `{default}`, which is described below.\n\n{rest}"
    path.write_text(str(card), encoding="utf-8")
