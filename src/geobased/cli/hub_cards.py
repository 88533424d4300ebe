"""Model cards for `geobased push`: filled from config.json and from what training and evaluation wrote, and checked."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from .errors import CommandError, one_line
from .hub_files import CONFIG, PICTURES, Upload, read_json, weight_files

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard import RepoCard

TAGS = {
    "based": ["based", "linear-attention", "sliding-window-attention", "geobased"],
    "pigeon": ["image-geolocation", "geobased"],
    "streetclip": ["image-geolocation", "zero-shot-image-classification", "geobased"],
    "clip": ["image-geolocation", "zero-shot-image-classification", "geobased"],
}
TASKS = {"based": "text-generation", "pigeon": "image-classification"}
LM_TRAINING = ("steps", "tokens", "seconds", "seed", "versions")
GEOLOCATION_TRAINING = ("steps", "images_per_step", "split", "skipped_images", "metrics")
SPACE_SDKS = ("gradio", "docker", "static")
SPACE_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
MAX_SHORT_DESCRIPTION = 60
FRONT_MATTER = re.compile(r"---\s*\n(.*?\n)?---\s*(\n|$)", re.DOTALL)


def render_card(folder: Path, repo_id: str, license_id: str | None, evaluation_file: Path | None, old_card: str = "") -> str:
    """The text of a card for the model in `folder`.

    Args:
        folder: of the model, whole and as it will be uploaded.
        repo_id: where it will lie.
        license_id: such as "apache-2.0"; if None, that of `old_card`.
        evaluation_file: JSON of `geobased evaluate` or `geobased train pigeon`; if None, evaluation.json of the folder.
        old_card: a card whose licence, languages, base model, data sets and measured values are taken over.

    Raises `CommandError` for an evaluation that is none, and for models other than BASED, PIGEON, StreetCLIP and CLIP.
    """
    from geobased.model_cards import card_from_template

    config = read_json(folder / CONFIG)
    model_type = config["model_type"]
    if model_type not in TAGS:
        raise CommandError(f"no card can be written for a model of type {model_type}: give its folder a README.md")
    evaluation, evaluated_on = _evaluation(evaluation_file or folder / "evaluation.json", required=evaluation_file is not None)
    data = _card_data(model_type, repo_id, license_id, evaluation, old_card)
    log = read_json(folder / "training_log.json")
    pictures = {path.stem.replace("_", " "): path.name for path in sorted(folder.iterdir()) if path.suffix in PICTURES}
    shared = {"model_name": repo_id.rpartition("/")[2], "repo_id": repo_id, "config": config, "pictures": pictures}
    if model_type == "based":
        facts = _language_model_facts(folder, config)
        facts["remote_code"] = bool(config.get("auto_map"))
        training = log if _has(log, LM_TRAINING) else None
        return str(card_from_template("based", data, **shared, **facts, training=training))
    facts = {"parameters": count_parameters(folder), "evaluation": evaluation, "evaluated_on": evaluated_on}
    training = log if _has(log, GEOLOCATION_TRAINING) else None
    return str(card_from_template("geolocalization", data, **shared, **facts, training=training))


def _has(log: Any, keys: tuple[str, ...]) -> TypeGuard[dict[str, Any]]:
    return isinstance(log, dict) and all(key in log for key in keys)


def _card_data(
    model_type: str, repo_id: str, license_id: str | None, evaluation: dict[str, Any] | None, old_card: str
) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    old = ModelCard(old_card).data if FRONT_MATTER.match(old_card) else ModelCardData()
    kept = {name: value for name in ("language", "base_model", "datasets") if (value := old.get(name)) is not None}
    results = old.get("eval_results")
    if evaluation is not None:
        results = [
            EvalResult(
                task_type="image-classification",
                task_name="Image geolocalization",
                dataset_type="images",
                dataset_name="images of known places",
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=round(float(value["value"]), 4),
            )
            for name, value in evaluation["metrics"].items()
            if math.isfinite(value["value"])
        ]
    measured = {"model_name": repo_id.rpartition("/")[2], "eval_results": results} if results else {}
    return ModelCardData(
        license=license_id or old.get("license"),
        library_name="transformers",
        pipeline_tag=TASKS.get(model_type, "zero-shot-image-classification"),
        tags=TAGS[model_type],
        **kept,
        **measured,
    )


def _evaluation(path: Path, required: bool) -> tuple[dict[str, Any] | None, str | None]:
    """What was measured, in the form of `geobased evaluate --report`, and on what."""
    if not path.is_file():
        if required:
            raise CommandError(f"there is no file {path}")
        return None, None
    content = read_json(path)
    if _has(content, ("count", "metrics", "answered", "calibration")):
        return content, None
    # as the shipped models have it: several sets, of which the one that was not trained on counts
    held_out = content.get("sets", {}).get("held_out") if isinstance(content, dict) else None
    if _has(held_out, ("crops", "pigeon", "answered", "calibration")):
        answered = held_out["answered"]
        measured = {
            "count": held_out["crops"],
            "metrics": held_out["pigeon"],
            "answered": answered if _has(answered, ("count", "share", "metrics")) else None,
            "calibration": held_out["calibration"],
        }
        return measured, "Crops in held-out blocks"
    if required:
        raise CommandError(f"{path} is not what `geobased evaluate --report` or `geobased train pigeon` write")
    return None, None


def _language_model_facts(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "auto_map"})
    dtype = weights_dtype(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded, dtype=getattr(torch, dtype))
    return {"parameters": model.num_parameters(), "state_bytes": model.state_size_bytes(), "dtype": dtype}


def weights_dtype(folder: Path) -> str:
    """Name of the floating point dtype of most weights."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for name in weight_files(folder):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(key)
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    floating = {names[kind]: size for kind, size in sizes.items() if kind in names}
    return max(floating, key=floating.__getitem__, default="float32")


def count_parameters(folder: Path) -> int:
    """Parameters of the model in a folder, which is built without memory."""
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def name_repository(card: str, names: list[str], repo_id: str) -> str:
    """The card with examples that load `repo_id` where they loaded a folder or another name."""
    heading = re.search(r"^# (.+)$", card, re.MULTILINE)  # new cards call the model so in their examples too
    for name in dict.fromkeys([*names, heading.group(1).strip()] if heading else names):
        card = re.sub(rf'(from_pretrained\(|model=)"{re.escape(name)}"', lambda found: f'{found.group(1)}"{repo_id}"', card)
        card = re.sub(rf"--model {re.escape(name)}(?=[\s`])", lambda found: f"--model {repo_id}", card)
    return card


def card_problems(upload: Upload) -> list[str]:
    """What of the card the Hub would refuse or readers would miss, each with the fix; checked without the network."""
    from huggingface_hub import ModelCard, SpaceCard

    text, is_space = upload.card, upload.kind == "space"
    if not text:
        return ["README.md is missing"]
    if not FRONT_MATTER.match(text):
        return ["README.md does not begin with metadata between two lines of ---: give --card overwrite, or add them"]
    try:
        card: RepoCard = SpaceCard(text) if is_space else ModelCard(text)
    except Exception as error:  # YAML's own errors, and what the card's classes raise
        return [f"the metadata of README.md cannot be read: {one_line(error)}"]
    data = card.data.to_dict()
    found = []
    licence = data.get("license")
    if not licence or not isinstance(licence, str | list):
        found.append("README.md names no licence: give --license, such as apache-2.0")
    elif licence == "other" and not data.get("license_name"):
        found.append("README.md has license: other, which needs license_name and license_link")
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        found.append("tags in README.md is no list of words")
    if is_space:
        found += _space_problems(data, upload.folder)
    elif not data.get("pipeline_tag"):
        found.append("README.md names no pipeline_tag, such as text-generation or image-classification")
    if not card.text.strip():
        found.append("README.md says nothing below its metadata")
    return found


def _space_problems(data: dict[str, Any], folder: Path) -> list[str]:
    found = []
    if data.get("sdk") not in SPACE_SDKS:
        found.append(f"sdk: {data.get('sdk')} in README.md is not one of {', '.join(SPACE_SDKS)}")
    if (app := data.get("app_file")) and not (folder / str(app)).is_file():
        found.append(f"{app} is missing: README.md names it as the Space's program")
    if not data.get("title"):
        found.append("README.md names no title")
    for name in ("colorFrom", "colorTo"):
        if data.get(name, SPACE_COLORS[0]) not in SPACE_COLORS:
            found.append(f"{name}: {data[name]} in README.md is not one of {', '.join(SPACE_COLORS)}")
    if len(str(data.get("short_description", ""))) > MAX_SHORT_DESCRIPTION:
        found.append(f"short_description in README.md is longer than {MAX_SHORT_DESCRIPTION} characters")
    return found
