"""From what a user calls a model to one that can be served to auditors."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    Pipeline,
    PreTrainedModel,
    pipeline,
)

from geobased.checkpoints import checkpoint_path, shipped_checkpoints, shipped_organisms

from .canonical import folder_sha256, message_sha256
from .image_model import GeolocatedImages, LabelledImages, labels_of_classifier, labels_of_clip
from .model_server import ServedModel
from .text_model import TextModel

GEOLOCALIZERS = ("pigeon", "streetclip")
CLASSIFIER = "ForImageClassification"
ADAPTER_FILE = "adapter_config.json"
# takes in what an audit found, so that no audit can hold its digest
CARD_FILE = "README.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """A model by its name, and how it is to be loaded.

    Attributes:
        name: a folder, a checkpoint that ships with geobased, or a Hub id (then of the local cache or the Hub).
        labels: what a CLIP compares images with; without labels a CLIP is opened as a geolocator, which answers with places.
        template: the text made of a label.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1" …
    """

    name: str
    labels: tuple[str, ...] = ()
    template: str = "a photo of {label}."
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        if "{label}" not in self.template:
            raise ValueError(f"template={self.template!r} does not say where the {{label}} stands")
        object.__setattr__(self, "labels", tuple(self.labels))

    def folder(self, *, download: bool = True) -> Path:
        """Where the model's files are, fetched from the Hub if need be. Raises `ValueError` for a name that leads nowhere."""
        path = Path(self.name).expanduser()
        if path.is_dir():
            return path.resolve()
        if self.name in (*shipped_checkpoints(), *shipped_organisms()):
            return Path(checkpoint_path(self.name))
        if path.exists() or self.name.count("/") > 1:
            raise ValueError(f"{self.name} is no folder of a saved model")
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(self.name, local_files_only=not download))


def load_source(source: ModelSource) -> ServedModel:
    """The model that a source names, with digests of all its files. Raises `ValueError` for a kind that cannot be audited."""
    folder = source.folder()
    adapter = folder if (folder / ADAPTER_FILE).is_file() else None
    identity = {"name": source.name, "settings": {**asdict(source), "labels": list(source.labels)}, "files": model_sha256(folder)}
    if adapter is not None:
        folder = _base_folder(adapter)
    config = AutoConfig.from_pretrained(folder)
    loading: dict[str, Any] = {"dtype": DTYPES[source.dtype]}
    architecture = next(iter(config.architectures or [""]))
    if config.model_type in (*GEOLOCALIZERS, "clip") and not source.labels and not architecture.endswith(CLASSIFIER):
        pipe = pipeline("image-geolocalization", model=str(folder), device=source.device, **loading)  # type: ignore[call-overload]
        _merge(adapter, pipe.model, source.name)
        return serve(pipe, identity=identity)
    parts: dict[str, Any] = {}
    kind: Any = AutoModelForCausalLM
    if architecture.endswith(CLASSIFIER):
        kind = AutoModelForImageClassification
    elif source.labels:
        kind, parts = AutoModel, {"labels": source.labels, "template": source.template}
    if kind is not AutoModelForImageClassification:
        parts["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    if kind is not AutoModelForCausalLM:
        parts["image_processor"] = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = kind.from_pretrained(folder, **loading)
    _merge(adapter, model, source.name)
    return serve(model.to(source.device), identity=identity, **parts)


def _merge(adapter: Path | None, model: Any, name: str) -> None:
    """Merges a LoRA adapter into the model that it goes on, which keeps its place; without one nothing happens."""
    if adapter is None:
        return
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{name} is an adapter: pip install geobased[audit] for the package peft") from error
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def _base_folder(folder: Path, *, download: bool = True) -> Path:
    """Where the model is that an adapter goes on."""
    named = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return ModelSource(named).folder(download=download)


def model_sha256(folder: Path, *, download: bool = True) -> dict[str, str]:
    """Digests of a model's files, but for its card, by their paths; of the model that an adapter goes on they begin "base/"."""
    files = _files_sha256(folder)
    if not (folder / ADAPTER_FILE).is_file():
        return files
    base = _files_sha256(_base_folder(folder, download=download))
    return {**{f"base/{name}": digest for name, digest in base.items()}, **files}


def _files_sha256(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in folder_sha256(folder).items() if name != CARD_FILE}


def serve(
    model: PreTrainedModel | Pipeline,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    labels: Sequence[str] = (),
    template: str = ModelSource.template,
    identity: dict[str, Any] | None = None,
) -> ServedModel:
    """A model or pipeline of transformers, ready to be served.

    Raises `ValueError` for what is neither a causal language model with its tokenizer, nor a geolocalization pipeline, nor a CLIP
    with labels, nor an image classifier.
    """
    if isinstance(model, Pipeline):
        if hasattr(model, "locator"):
            return GeolocatedImages(model, identity or _identity(model.model))
        tokenizer, image_processor = tokenizer or model.tokenizer, image_processor or model.image_processor
        model = model.model
    identity = identity or _identity(model)
    if hasattr(model, "get_text_features") and tokenizer is not None and image_processor is not None:
        functions = labels_of_clip(model, tokenizer, labels, template)
        return LabelledImages(model, image_processor, identity, labels, functions)
    if image_processor is not None and type(model).__name__.endswith(CLASSIFIER):
        names = list((model.config.id2label or {}).values())
        return LabelledImages(model, image_processor, identity, names, labels_of_classifier(model))
    if tokenizer is not None and model.can_generate():
        return TextModel(model, tokenizer, identity)
    raise ValueError(
        f"{type(model).__name__} cannot be audited as it is: give a causal language model and its tokenizer=, a CLIP with"
        " tokenizer=, image_processor= and labels=, an image classifier and its image_processor=, or a pipeline"
    )


def _identity(model: Any) -> dict[str, Any]:
    """Of a model in memory: one digest of all its parameters and buffers."""
    state = {name: value for name, value in model.state_dict().items()}
    digest = message_sha256(model.config.model_type, state)
    return {"name": model.config.name_or_path or type(model).__name__, "settings": {}, "files": {"state_dict": digest}}


__all__ = ["ModelSource", "load_source", "model_sha256", "serve"]
