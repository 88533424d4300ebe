"""Which files of a folder go to the Hub, and what is wrong with them. Nothing here uses the network."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

CARD, CONFIG, WEIGHTS, WEIGHTS_INDEX = "README.md", "config.json", "model.safetensors", "model.safetensors.index.json"
# of these, strings that are paths on this machine are shortened, and answers about single images are left out
RECORDS = ("config.json", "training_log.json", "evaluation.json")
IMAGE_MODELS = ("pigeon", "streetclip", "clip")
PER_IMAGE = ("images", "left_out")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
KEPT_SUFFIXES = (
    *(".json", ".safetensors", ".md", ".txt", ".py", ".jinja", ".model", ".tiktoken", ".csv", ".yaml", ".yml", ".svg"),
    *PICTURES,
)
KEPT_NAMES = ("LICENSE", "NOTICE", "COPYING")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
TRAINING_STATE = re.compile(
    r"checkpoint-\d+|trainer_state\.json|training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state.*\.pth"
)
# vocabularies may hold anything
NOT_SCANNED = re.compile(r"(tokenizer|vocab|added_tokens|special_tokens_map).*\.json|merges\.txt|.*\.index\.json")
MAX_SCANNED_BYTES = 20_000_000
LOCAL_PATH = re.compile(
    r"""(?<![\w.~:/%-])/(?:home|Users|root|mnt|media|tmp|var|srv|scratch|work|workspace|private|Volumes)/[^\s"'`)>,;:]+"""
    r"""|(?<![\w/])[A-Za-z]:\\{1,2}[\w .-]+\\[^\s"'`)>,;:]*"""
)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")


@dataclass
class Upload:
    """What would be sent.

    Attributes:
        kind: "model", "pipeline" or "space".
        folder: holds exactly the files that are sent.
        left_out: file -> why it stays here.
        notes: what was changed on the way.
        problems: what must be mended before it is sent, each with the fix.
    """

    kind: str
    folder: Path
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def repo_type(self) -> str:
        return "space" if self.kind == "space" else "model"

    @property
    def card(self) -> str:
        """Text of README.md; empty where there is none."""
        path = self.folder / CARD
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def files(self) -> dict[str, int]:
        """Name -> size in bytes."""
        return {name: path.stat().st_size for name, path in _walk(self.folder)}


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def stage(source: Path, folder: Path, kind: str, records: Path | None = None) -> Upload:
    """Lays what is to be sent of `source` out in the empty `folder`, large files as links.

    Records of training and evaluation that `source` lacks are taken from the folder `records`.
    """
    upload = Upload(kind, folder)
    found = dict(_walk(source))
    for name in RECORDS:
        if records is not None and name not in found and (records / name).is_file():
            found[name] = records / name
    for name, path in found.items():
        if why := _why_not(name, kind):
            upload.left_out[name] = why
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in RECORDS:
            _write_record(path, target, upload.notes)
        else:
            _link(path, target)
    return upload


def _why_not(name: str, kind: str) -> str | None:
    parts, suffix = name.split("/"), Path(name).suffix.lower()
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if "__pycache__" in parts:
        return "compiled Python"
    if any(TRAINING_STATE.fullmatch(part) for part in parts):
        return "state of a training run"
    if kind == "space":
        return None  # programs bring all kinds of files
    if suffix in PICKLED:
        return "may run code when it is loaded; only safetensors are sent"
    if suffix in KEPT_SUFFIXES or parts[-1].partition(".")[0] in KEPT_NAMES:
        return None
    return "of a kind that loading a model does not read"


def _link(path: Path, target: Path) -> None:
    try:
        target.symlink_to(path.resolve())
    except OSError:  # Windows lets few users make links
        shutil.copyfile(path, target)


def _write_record(path: Path, target: Path, notes: list[str]) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        _link(path, target)  # the checks tell
        return
    cleaned = _without_paths(content)
    if cleaned != content:
        notes.append(f"{path.name}: paths on this machine are shortened to their last part")
    if isinstance(cleaned, dict) and path.name == "evaluation.json" and (found := [key for key in PER_IMAGE if key in cleaned]):
        cleaned = {key: value for key, value in cleaned.items() if key not in PER_IMAGE}
        notes.append(f"{path.name}: without {' and '.join(found)}, which name single images")
    if cleaned == content:
        _link(path, target)
    else:
        target.write_text(json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(item: Any) -> Any:
    if isinstance(item, dict):
        return {_without_paths(key): _without_paths(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_without_paths(value) for value in item]
    if isinstance(item, str) and LOCAL_PATH.match(item):
        return PureWindowsPath(item).name  # takes both separators
    return item


def read_json(path: Path) -> Any:
    """Content of a JSON file; None where there is none or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def local_paths(text: str) -> list[str]:
    """Paths of somebody's machine that a text names."""
    here = [place for place in (os.path.expanduser("~"), os.getcwd()) if len(Path(place).parts) > 2 and place in text]
    return [*dict.fromkeys([*here, *LOCAL_PATH.findall(text)])]


def content_problems(upload: Upload) -> list[str]:
    """What the files tell that they must not, each with the fix."""
    found: list[str] = []
    for name, path in _walk(upload.folder):
        if path.suffix.lower() in PICTURES:
            found += _picture_problems(name, path)
        elif not NOT_SCANNED.fullmatch(name) and path.suffix != ".safetensors" and path.stat().st_size < MAX_SCANNED_BYTES:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name} names {place}, a path on this machine: remove it" for place in local_paths(text)]
            if HUB_TOKEN.search(text):
                found.append(f"{name} holds a token of the Hub: remove it, and make a new one")
    return found


def _picture_problems(name: str, path: Path) -> list[str]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            has_exif = bool(image.getexif()) or "exif" in image.info
    except OSError as error:
        return [f"{name} is no picture that can be read: {error}"]
    return [f"{name} carries EXIF data, which may tell who took it and where: save it without"] if has_exif else []


def model_problems(upload: Upload) -> list[str]:
    """What keeps a model or pipeline from being loaded, each with the fix."""
    folder = upload.folder
    if not (folder / CONFIG).is_file():
        return ["config.json is missing: this is not the folder of a saved model"]
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not config.get("model_type"):
        return ["config.json is no JSON object with a model_type"]
    needed = [f"{module}.py" for module in _modules(config)]
    model_type = config["model_type"]
    if model_type != "pigeon":
        needed.append("tokenizer_config.json")
    if model_type in IMAGE_MODELS:
        needed.append("preprocessor_config.json")
    if upload.kind == "pipeline" and not config.get("custom_pipelines"):
        return ["config.json has no custom_pipelines: save the folder with the pipeline's save_pretrained"]
    found = [f"{name} is missing" for name in dict.fromkeys(needed) if not (folder / name).is_file()]
    return found + _weight_problems(folder)


def _modules(config: dict[str, Any]) -> list[str]:
    """Names of the Python modules that a folder's config says it brings."""
    entries: list[Any] = list((config.get("auto_map") or {}).values())
    entries += [task.get("impl") for task in (config.get("custom_pipelines") or {}).values()]
    flat = [part for entry in entries for part in (entry if isinstance(entry, list) else [entry]) if part]
    # "owner/name--module.Class" is code of another repository
    return [part.partition(".")[0] for part in flat if "--" not in part]


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights that a folder should hold."""
    index = read_json(folder / WEIGHTS_INDEX)
    return sorted(set(index["weight_map"].values())) if isinstance(index, dict) and "weight_map" in index else [WEIGHTS]


def _weight_problems(folder: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    found: list[str] = []
    for name in weight_files(folder):
        if not (folder / name).is_file():
            found.append(f"{name} is missing: save the weights as safetensors")
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                if not list(file.keys()):
                    found.append(f"{name} holds no weights")
        except SafetensorError as error:
            found.append(f"{name} is damaged or incomplete ({error})")
    return found
