"""From what a user wants to push to the files that would be sent."""

import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from .errors import CommandError
from .hub_cards import FRONT_MATTER, card_problems, name_repository, render_card
from .hub_files import CARD, CONFIG, Upload, content_problems, model_problems, read_json, stage
from .hub_spaces import VARIABLES, write_space
from .sources import loading, resolve_model

WITH_CODE = ("based", "pigeon", "streetclip")  # save_pretrained writes their code beside the weights
DOWNLOADED = ("*.json", "*.safetensors", "*.md", "*.txt", "*.py", "*.png", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


class Kind(StrEnum):
    model = "model"
    pipeline = "pipeline"
    space = "space"


class Card(StrEnum):
    keep = "keep"
    overwrite = "overwrite"


@dataclass(frozen=True)
class Request:
    """What a user asked for; see the options of `geobased push`."""

    source: str
    repo_id: str
    kind: Kind | None
    card: Card
    license_id: str | None
    evaluation: Path | None
    model: str | None
    package: str | None

    @property
    def folder(self) -> Path:
        return Path(self.source).expanduser()

    @property
    def is_space(self) -> bool:
        if self.kind is not None:
            return self.kind is Kind.space
        return (self.folder / "app.py").is_file() or (self.source in VARIABLES and not self.folder.is_dir())


def prepare(request: Request, work: Path) -> Upload:
    """Everything that will be sent, laid out under the empty folder `work`; what is wrong with it is in its `problems`."""
    staged = work / "upload"
    staged.mkdir()
    if request.is_space:
        upload = _space(request, work, staged)
        upload.problems += content_problems(upload) + card_problems(upload)
        return upload
    if request.model is not None or request.package is not None:
        raise CommandError("--model and --package are for Spaces; SOURCE is the model that is pushed")
    upload, names = _model(request, work, staged)
    upload.problems += model_problems(upload)
    if not upload.problems:  # a card needs a whole model
        _write_card(upload, request, names)
        upload.problems += content_problems(upload) + card_problems(upload)
    return upload


def _space(request: Request, work: Path, staged: Path) -> Upload:
    if request.license_id or request.evaluation or request.card is not Card.keep:
        raise CommandError("--card, --license and --evaluation are for models; a Space is described by its own README.md")
    model, ships = request.model, ", ".join(VARIABLES)
    if request.folder.is_dir():
        if model is not None or request.package is not None:
            raise CommandError(f"--model and --package are for the Spaces that ship ({ships}), not for a folder")
        return stage(request.folder, staged, "space")
    if request.source not in VARIABLES:
        raise CommandError(f"there is no folder {request.source!r}, and no Space of that name ships; there are: {ships}")
    if model is not None:
        if Path(model).expanduser().is_dir():
            raise CommandError(f"a Space cannot read {model} on this machine: push that first, and give its Hub id as --model")
        resolve_model(model)  # refuses what is no name of a model
    written = work / request.source
    write_space(request.source, written, model, request.package)
    return stage(written, staged, "space")


def _model(request: Request, work: Path, staged: Path) -> tuple[Upload, list[str]]:
    """The files of a model without a card of ours, and the names by which a card may call it."""
    from geobased.training.run_control import FINAL_FOLDER

    folder = _local_folder(request.source, resolve_model(request.source))
    complete = _with_code(request.source, folder, work / request.repo_id.rpartition("/")[2], request.kind is Kind.pipeline)
    is_pipeline = bool((read_json(complete / CONFIG) or {}).get("custom_pipelines"))
    if request.kind is Kind.model and is_pipeline:
        raise CommandError(f"{request.source} is a saved pipeline: push it without --as, or with --as pipeline")
    # `geobased train` writes the model into a folder of that name, and what it measured beside it
    records = folder.resolve().parent if folder.resolve().name == FINAL_FOLDER else None
    upload = stage(complete, staged, "pipeline" if is_pipeline else "model", records)
    return upload, [folder.name, str(folder), complete.name]


def _local_folder(called: str, source: str) -> Path:
    """The folder of a model; one of the Hub is downloaded, or taken from the cache."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with loading(called, source):
        return Path(snapshot_download(source, allow_patterns=list(DOWNLOADED)))


def _with_code(called: str, folder: Path, destination: Path, as_pipeline: bool) -> Path:
    """A folder that holds the model with its code, and the pipeline's if wanted: `folder` itself if it does."""
    config = read_json(folder / CONFIG) or {}
    model_type = config.get("model_type")
    has_pipeline = bool(config.get("custom_pipelines"))
    if as_pipeline and model_type == "based":
        raise CommandError(f"{called} is a language model: --as pipeline is for image geolocalization")
    if has_pipeline or (not as_pipeline and (config.get("auto_map") or model_type not in WITH_CODE)):
        return folder
    with loading(called, str(folder)):
        _save_with_code(folder, destination, model_type, as_pipeline)
    # what the model does not write itself, such as the card, a tokenizer, an image processor and pictures
    for path in folder.iterdir():
        if path.is_file() and not (destination / path.name).exists() and path.suffix != ".safetensors":
            shutil.copyfile(path, destination / path.name)
    return destination


def _save_with_code(folder: Path, destination: Path, model_type: Any, as_pipeline: bool) -> None:
    from transformers import AutoModel, pipeline

    if as_pipeline:
        from geobased.pipelines import ImageGeolocalizationPipeline

        task: Any = "image-geolocalization"
        pipe = pipeline(task, model=str(folder), pipeline_class=ImageGeolocalizationPipeline, device="cpu", dtype="auto")
        pipe.save_pretrained(destination)
    elif model_type == "based":
        from geobased.modeling_based.export import export_model

        export_model(folder, destination)
        if not (folder / CARD).is_file():
            (destination / CARD).unlink()  # the one that comes next says more
    else:
        AutoModel.from_pretrained(folder, dtype="auto").save_pretrained(destination)


def _write_card(upload: Upload, request: Request, names: list[str]) -> None:
    from huggingface_hub import ModelCard

    path, text, repo_id, license_id = upload.folder / CARD, upload.card, request.repo_id, request.license_id
    if text and request.card is Card.keep:
        text = name_repository(text, names, repo_id)
        if license_id is not None and FRONT_MATTER.match(text):
            changed = ModelCard(text)
            changed.data["license"] = license_id
            text = str(changed)
        if request.evaluation is not None:
            upload.notes.append("--evaluation is for a new card: README.md is kept, give --card overwrite to use it")
    else:
        text = render_card(upload.folder, repo_id, license_id, request.evaluation, old_card=text)
    path.unlink(missing_ok=True)  # a link to the folder's own
    path.write_text(text, encoding="utf-8")
