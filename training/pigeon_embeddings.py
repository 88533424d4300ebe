"""Embeddings of images computed once: files that each appear whole, so that an interrupted run goes on where it was.

A folder holds `manifest.json`, which says what was embedded by which weights, and `embeddings-00000.safetensors` and so on with
`embeddings` [n, width], `rows` [n] (numbers in the source) and `coordinates` [n, 2]; names, columns and unreadable images of
each file are JSON in its metadata.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from geobased.modeling_pigeon import PigeonForImageGeolocalization
from geobased.modeling_streetclip.image_decoding import ImageSource, UnreadableImageError, decode_images
from geobased.training.artifacts import write_json
from geobased.training.geolocation_dataset import Preprocessor
from geobased.training.geolocation_sources import GeolocationSource, JoinedSources, Value, open_sources
from geobased.whole_file import whole_file

MANIFEST = "manifest.json"
STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def precompute_embeddings(
    model: PigeonForImageGeolocalization,
    source: GeolocationSource,
    preprocess: Preprocessor,
    folder: str | Path,
    *,
    batch_size: int = 64,
    images_per_file: int = 8192,
    dtype: str = "float16",
    num_threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Embeds all images of a source by the model's tower. Files that are there already are not computed again.

    Several processes (started by `accelerate launch`) share the files among them.

    Args:
        model: on its device, in the dtype to compute in.
        preprocess: list of uint8 images -> pixel values.
        folder: where files appear.
        batch_size: images in a forward pass.
        images_per_file: what an interruption may lose.
        dtype: of the stored embeddings: float32, float16 or bfloat16.
        num_threads: threads that decode; the number of cores if None.

    Returns:
        {"images", "embedded", "skipped" (name: reason), "files"} of the whole folder.

    Raises:
        ValueError: values that cannot be, or a folder of other images or weights.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose from {', '.join(STORED_DTYPES)}")
    if batch_size < 1 or images_per_file < 1:
        raise ValueError(f"batch_size={batch_size} and images_per_file={images_per_file} must be at least 1")
    folder, state = Path(folder), PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "images": len(source),
        "images_per_file": images_per_file,
        "dtype": dtype,
        "width": model.cell_head.in_features,
        "embedding": model.config.embedding,
        "tower": tower_fingerprint(model),
        "source": source_fingerprint(source),
    }
    with state.main_process_first():
        _check_manifest(folder, manifest)
    starts = range(0, len(source), images_per_file)
    model = model.eval()
    with tqdm(total=len(source), unit="image", desc="embeddings", disable=not progress or not state.is_main_process) as bar:
        for number, start in enumerate(starts):
            rows = range(start, min(start + images_per_file, len(source)))
            path = folder / f"embeddings-{number:05d}.safetensors"
            if number % state.num_processes == state.process_index and not path.is_file():
                _write_file(path, *_embed(model, source, rows, preprocess, batch_size, dtype, num_threads))
            bar.update(len(rows))
    state.wait_for_everyone()
    store = EmbeddingStore(folder)
    return {"images": len(source), "embedded": len(store), "skipped": store.skipped, "files": len(starts)}


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if not path.is_file():
        if any(folder.glob("embeddings-*.safetensors")):
            raise ValueError(f"{folder} holds embeddings without {MANIFEST}: choose another folder")
        write_json(path, manifest)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    for name, value in manifest.items():
        if there.get(name) != value:
            raise ValueError(
                f"{folder} holds embeddings of another run: its {name} is {there.get(name)!r}, not {value!r};"
                " choose another folder"
            )


@torch.no_grad()
def _embed(
    model: PigeonForImageGeolocalization,
    source: GeolocationSource,
    rows: range,
    preprocess: Preprocessor,
    batch_size: int,
    dtype: str,
    num_threads: int | None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of one file."""
    kept: list[int] = []
    parts: list[torch.Tensor] = []
    waiting: list[torch.Tensor] = []
    skipped: dict[str, str] = {}

    def flush() -> None:
        if waiting:
            pixels = preprocess(waiting).to(model.device, model.dtype)
            parts.append(model.get_embeddings(pixels)[0].to("cpu", STORED_DTYPES[dtype]))
            waiting.clear()

    # threads decode while the model computes
    for row, image in zip(rows, decode_images((source.image(row) for row in rows), num_threads=num_threads), strict=True):
        if isinstance(image, UnreadableImageError):
            skipped[source.name(row)] = str(image)
            continue
        kept.append(row)
        waiting.append(image)
        if len(waiting) == batch_size:
            flush()
    flush()
    embeddings = torch.cat(parts) if parts else torch.zeros(0, model.cell_head.in_features, dtype=STORED_DTYPES[dtype])
    if not bool(torch.isfinite(embeddings).all()):
        row = kept[int((~torch.isfinite(embeddings).all(1)).nonzero()[0])]
        raise ValueError(f"the embedding of {source.name(row)} is not finite in {dtype}: choose another dtype")
    tensors = {
        "embeddings": embeddings,
        "rows": torch.tensor(kept, dtype=torch.int64),
        "coordinates": torch.from_numpy(source.coordinates[kept].reshape(-1, 2)),
    }
    facts = {
        "names": [source.name(row) for row in kept],
        "columns": {name: [values[row] for row in kept] for name, values in source.columns.items()},
        "skipped": skipped,
    }
    # one entry: safetensors writes several in any order, and the same images should give the same bytes
    return tensors, {"images": json.dumps(facts, ensure_ascii=False)}


def _write_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata)
        # safetensors leaves what only its owner can read
        temporary.chmod(0o644)


@dataclass
class EmbeddingStore:
    """The embeddings of a folder, as a source: rows are those of the readable images, in the order of the images' source.

    Raises:
        ValueError: no such folder, one that is not complete, or a damaged file.
    """

    folder: str | Path
    manifest: dict[str, Any] = field(init=False)
    embeddings: torch.Tensor = field(init=False, repr=False)
    coordinates: np.ndarray = field(init=False, repr=False)
    columns: dict[str, list[Value]] = field(init=False, repr=False)
    skipped: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        folder = Path(self.folder)
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds no embeddings: `geobased train pigeon-embeddings` makes them")
        self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        count = -(-self.manifest["images"] // self.manifest["images_per_file"])
        paths = [folder / f"embeddings-{number:05d}.safetensors" for number in range(count)]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {count} files of embeddings, {missing[0].name} first: run the command again"
            )
        tensors, facts = zip(*map(_read_file, paths), strict=True)
        self.embeddings = torch.cat([part["embeddings"] for part in tensors])
        self.coordinates = torch.cat([part["coordinates"] for part in tensors]).numpy()
        self.columns = {name: [v for part in facts for v in part["columns"][name]] for name in facts[0]["columns"]}
        self.skipped = {name: reason for part in facts for name, reason in part["skipped"].items()}
        self._names = [name for part in facts for name in part["names"]]

    def __len__(self) -> int:
        return len(self.embeddings)

    def name(self, row: int) -> str:
        return self._names[row]

    def image(self, row: int) -> ImageSource:
        raise ValueError(f"{self.folder} holds embeddings, not the image {self._names[row]}")


class JoinedEmbeddings(JoinedSources):
    """Several stores as one, with their embeddings [n, width]. Raises `ValueError` for stores of different towers."""

    def __init__(self, stores: list[EmbeddingStore]) -> None:
        super().__init__(stores)
        first = stores[0].manifest
        for store in stores[1:]:
            if any(store.manifest[name] != first[name] for name in ("tower", "embedding")):
                raise ValueError(f"{store.folder} and {stores[0].folder} hold embeddings of different towers")
        self.manifest = first
        self.embeddings = torch.cat([store.embeddings for store in stores])
        self.skipped = {name: reason for store in stores for name, reason in store.skipped.items()}


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["images"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run the command again") from error


def tower_fingerprint(model: PigeonForImageGeolocalization) -> str:
    """A hash of what embeddings depend on: the tower's weights, whatever dtype they are loaded in, and the kind of embedding."""
    digest = hashlib.blake2b(model.config.embedding.encode(), digest_size=16)
    for name, value in sorted(model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        # bfloat16 is the coarsest dtype that a tower runs in
        digest.update(value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_fingerprint(source: GeolocationSource) -> str:
    """A hash of names and places of all images, in order."""
    digest = hashlib.blake2b(np.ascontiguousarray(source.coordinates).tobytes(), digest_size=16)
    for row in range(len(source)):
        digest.update(source.name(row).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


@dataclass
class PigeonEmbeddingArguments:
    """Arguments of `geobased train pigeon-embeddings`."""

    model: str = field(metadata={"help": "CLIP or PIGEON checkpoint whose tower embeds: a folder or Hub id"})
    data: list[str] = field(metadata={"help": "csv files, tar shards, or folders (also of `datasets`)"})
    output_dir: str = field(metadata={"help": "folder for the embeddings; an interrupted run goes on in it"})
    processor: str | None = field(default=None, metadata={"help": "folder or Hub id of the image processor; the model's"})
    embedding: str = field(default="token_mean", metadata={"help": "token_mean (PIGEON's) or cls"})
    batch_size: int = field(default=64, metadata={"help": "images in a forward pass"})
    images_per_file: int = field(default=8192, metadata={"help": "images in a file: what an interruption may lose"})
    dtype: str = field(default="float16", metadata={"help": "of the stored embeddings: float32, float16 or bfloat16"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; what there is by default"})
    num_threads: int | None = field(default=None, metadata={"help": "threads that decode images"})
    disable_tqdm: bool = field(default=False, metadata={"help": "no progress bar"})


def embed(arguments: PigeonEmbeddingArguments) -> dict[str, Any]:
    """Runs `precompute_embeddings` as the arguments say, and returns its result. Raises as it, and as loading a model."""
    from geobased.modeling_streetclip.image_processing_gpu import GpuImagePreprocessor
    from geobased.training.pigeon_models import load_pigeon

    device = torch.device(arguments.device) if arguments.device else PartialState().device
    # the heads do not matter here
    model = load_pigeon(arguments.model, num_cells=2, embedding=arguments.embedding)
    model.to(device)  # type: ignore[arg-type]
    preprocess = GpuImagePreprocessor.from_pretrained(arguments.processor or arguments.model)
    return precompute_embeddings(
        model,
        open_sources(arguments.data, not arguments.disable_tqdm),
        lambda images: preprocess(images, device=device),
        arguments.output_dir,
        batch_size=arguments.batch_size,
        images_per_file=arguments.images_per_file,
        dtype=arguments.dtype,
        num_threads=arguments.num_threads,
        progress=not arguments.disable_tqdm,
    )


__all__ = [
    "EmbeddingStore",
    "JoinedEmbeddings",
    "PigeonEmbeddingArguments",
    "embed",
    "precompute_embeddings",
    "source_fingerprint",
    "tower_fingerprint",
]
