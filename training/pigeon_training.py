"""Train PIGEON's heads (Haas et al. 2023) on a frozen or fine-tuned tower, from images or their embeddings, by the Trainer.

- All losses come from `PigeonForImageGeolocalization`: smoothed geocells, and any auxiliary heads that columns have labels for.
- Embeddings computed once (`geobased train pigeon-embeddings`) make a step as cheap as the heads are.
- Blocks of the Earth are held out; distances, GeoScore, countries and cells are measured on them while training goes on.
- Afterwards prototypes for refinement can be made from the training images.
- A row is a function of seed and number: a resumed run repeats the uninterrupted one loss by loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from geobased.geography.geocell_collection import Geocells
from geobased.modeling_pigeon import PigeonForImageGeolocalization, build_prototypes
from geobased.modeling_streetclip.image_processing_gpu import GpuImagePreprocessor
from geobased.training.artifacts import save_model_folder, write_json
from geobased.training.geolocation_card import model_card
from geobased.training.geolocation_dataset import (
    GeolocationRows,
    SkippedImages,
    Split,
    split_by_blocks,
    stack_places,
)
from geobased.training.geolocation_runs import (
    LOG_FILE,
    PLOT_FILE,
    CurveClock,
    GeolocationArguments,
    OrderedTrainer,
    plot_curve,
    skipped_images,
    training_data,
    training_log,
)
from geobased.training.geolocation_sources import GeolocationSource, RecordStream, open_sources
from geobased.training.pigeon_embeddings import EmbeddingStore, JoinedEmbeddings, tower_fingerprint
from geobased.training.pigeon_evaluation import PigeonMetrics, prediction_rows, truth_rows
from geobased.training.pigeon_labels import head_labels, load_geocells, load_heads, standardise_heads
from geobased.training.pigeon_models import load_pigeon
from geobased.training.run_control import FINAL_FOLDER, check_run_arguments, checkpoint_to_resume

EVALUATION_FILE, EVALUATION_REPORT = "evaluation.json", "evaluation.html"


@dataclass
class PigeonArguments(GeolocationArguments):
    """Arguments of `train`. Defaults are PIGEON's where they are published."""

    model: str | None = field(
        default=None, metadata={"help": "CLIP (or StreetCLIP) for new heads, or a PIGEON to go on with: a folder or Hub id"}
    )
    processor: str | None = field(default=None, metadata={"help": "folder or Hub id of the image processor; the model's"})
    embeddings: list[str] = field(
        default_factory=list, metadata={"help": "folders of precomputed embeddings, in place of data; the tower stays frozen"}
    )
    geocells: str = field(default="world", metadata={"help": "file of geocells, or world: those that ship with the package"})
    heads: str | None = field(
        default=None, metadata={"help": "JSON list (or its file) of auxiliary heads; their labels are columns of the data"}
    )
    embedding: str = field(default="token_mean", metadata={"help": "what new heads read: token_mean or cls"})
    smoothing_tau_km: float = field(default=75.0, metadata={"help": "distance of the smoothed cell loss; 0: not smoothed"})
    smoothing_rule: str = field(default="paper", metadata={"help": "paper or code"})
    smoothing_normalize: bool = field(default=False, metadata={"help": "targets sum to 1"})
    trainable_layers: int = field(
        default=0, metadata={"help": "last layers of the tower that are trained; 0: none, -1: the whole tower"}
    )
    prototypes: bool = field(default=False, metadata={"help": "make prototypes of the training images afterwards"})
    prototype_min_samples: int = field(default=3, metadata={"help": "OPTICS: images that make a cluster"})
    prototype_xi: float = field(default=0.15, metadata={"help": "OPTICS: steepness of a cluster's border"})
    bootstrap: int = field(default=1000, metadata={"help": "resamples for the intervals of the final evaluation"})

    per_device_train_batch_size: int = field(default=256, metadata={"help": "images per device and step"})
    num_train_epochs: float = field(default=20.0, metadata={"help": "passes over the training images, without max_steps"})
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.01, metadata={"help": "on matrices; norms and biases have none"})


class PigeonCollator:
    """Items of the data sets -> a batch for `PigeonForImageGeolocalization`.

    Args:
        cells, labels: of all rows of a source, by row number.
        embeddings: [n, width] of all rows, in place of pixels.
        geocells, heads: to label a stream's items, which bring their columns along.
    """

    def __init__(
        self,
        geocells: Geocells,
        heads: Sequence[dict[str, Any]],
        cells: torch.Tensor | None = None,
        labels: dict[str, torch.Tensor] | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> None:
        self.geocells, self.heads, self.cells, self.labels, self.embeddings = geocells, heads, cells, labels, embeddings

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = stack_places(items)
        rows = torch.tensor([item["row"] for item in items])
        if self.cells is not None and self.labels is not None:
            batch["labels"] = self.cells[rows]
            labels = {name: values[rows] for name, values in self.labels.items()}
        else:
            latitude, longitude = batch["coordinates"].T.numpy()
            batch["labels"] = torch.from_numpy(self.geocells.locate(latitude, longitude))
            names = dict.fromkeys(name for item in items for name in item["columns"])
            columns = {name: [item["columns"].get(name) for item in items] for name in names}
            labels = head_labels(columns, self.heads, len(items))
        if labels:
            batch["head_labels"] = labels
        if self.embeddings is not None:
            batch["embeddings"] = self.embeddings[rows].float()
        return batch


class PigeonTrainer(OrderedTrainer):
    """Trainer whose evaluation gathers places: predictions as `prediction_rows`, truths as `truth_rows`."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(loss, predictions, truths) of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        if prediction_loss_only:
            return output.loss.detach(), None, None
        pigeon = self.accelerator.unwrap_model(model)
        answer = pigeon.locate(embeddings=output.embeddings)
        device = output.loss.device if output.loss.device.type != "mps" else "cpu"
        truths = truth_rows(inputs["coordinates"], inputs["labels"])
        return output.loss.detach(), prediction_rows(answer).to(device), truths.to(device)


def train(
    arguments: PigeonArguments, source: GeolocationSource | None = None, stream: RecordStream | None = None
) -> dict[str, Any]:
    """Train, and leave in the output folder `final/` (model, image processor, card), `training_log.json`, the learning curve and
    `evaluation.json` and `.html`.

    Args:
        source, stream: images in place of `arguments.data`. A stream needs `max_steps`, heads with means and stds, and is read
            again from its start by a resumed run.

    Returns:
        the content of `training_log.json`.

    Raises:
        FileNotFoundError, FileExistsError: the output folder does not fit `resume`.
        ValueError: arguments that do not fit each other, the model or the data.

    Example:
        >>> train(PigeonArguments(output_dir="runs/pigeon", model="geolocal/StreetCLIP", embeddings=["runs/embeddings"],
        ...     prototypes=True))  # doctest: +SKIP
    """
    _check(arguments, source, stream)
    checkpoint = checkpoint_to_resume(arguments.output_dir, arguments.resume)  # type: ignore[arg-type]
    geocells, heads = load_geocells(arguments.geocells), load_heads(arguments.heads)
    store = _open_embeddings(arguments.embeddings)
    split, cells, labels = None, None, None
    if stream is None:
        found = store if store is not None else open_sources(arguments.data) if source is None else source
        source = found
        split = split_by_blocks(source, arguments.holdout())
        cells = torch.from_numpy(geocells.locate(*source.coordinates.T))
    set_seed(arguments.seed)
    model, heads, labels = _model(arguments, geocells, heads, source, split)
    if store is not None and store.manifest["tower"] != tower_fingerprint(model):
        raise ValueError(f"the embeddings in {arguments.embeddings[0]} are not of the tower of {arguments.model}")
    if arguments.trainable_layers < 0:
        model.unfreeze_tower()
    else:
        model.freeze_tower(arguments.trainable_layers)
    image_processor = CLIPImageProcessorPil.from_pretrained(str(arguments.processor or arguments.model))
    preprocess = None if store is not None else GpuImagePreprocessor.from_image_processor(image_processor)
    folder = Path(arguments.output_dir)  # type: ignore[arg-type]
    skipped = skipped_images(arguments)
    skipped.reasons.update({} if store is None else store.skipped)
    training, evaluation = training_data(arguments, preprocess, skipped, source=source, split=split, stream=stream)
    metrics_of = PigeonMetrics(geocells.country_codes, model.config.radius_coverage)
    clock = CurveClock(arguments.max_seconds)
    collator = PigeonCollator(geocells, heads, cells, labels, None if store is None else store.embeddings)
    trainer = PigeonTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=training,
        eval_dataset=evaluation,
        compute_metrics=metrics_of,
        callbacks=[clock],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    final = trainer.accelerator.unwrap_model(trainer.model)
    if arguments.prototypes:
        assert source is not None and split is not None and cells is not None
        rows, embeddings = _training_embeddings(final, source, split, preprocess, store, skipped, arguments)
        places = torch.from_numpy(source.coordinates[rows])
        # in the dtype of the model: stored embeddings may be narrower
        prototypes = build_prototypes(
            embeddings.float(),
            places,
            cells[rows],
            min_samples=arguments.prototype_min_samples,
            xi=arguments.prototype_xi,
            seed=arguments.seed,
            progress=not arguments.disable_tqdm,
        )
        final.set_prototypes(prototypes)
    metrics: dict[str, float] = {}
    if evaluation is not None:
        predicted = trainer.predict(evaluation, metric_key_prefix="eval")
        measured = predicted.metrics or {}
        trainer.log(dict(measured))
        metrics = {name: value for name, value in measured.items() if not name.endswith(("second", "runtime", "time"))}
        result = metrics_of.result(predicted.predictions, predicted.label_ids, arguments.bootstrap, arguments.seed)  # type: ignore[arg-type]
    log = training_log(
        arguments,
        final,
        trainer.state,
        clock,
        split,
        skipped,
        trained_parameters=sum(p.numel() for p in final.parameters() if p.requires_grad),
        geocells={"file": arguments.geocells, "cells": len(geocells)},
        prototypes=final.config.num_prototypes,
        metrics=metrics,
    )
    if trainer.is_world_process_zero():
        about = (
            f"A PIGEON of {len(geocells):,} geocells, trained by `geobased train pigeon` from {arguments.model},"
            f" with {final.config.num_prototypes or 'no'} prototypes for refinement."
        )
        card = model_card(
            title=folder.name,
            about=about,
            task="image-classification",
            config=final.config.to_dict(),
            log=log,
            evaluation=None if evaluation is None else result.to_dict(),
        )
        save_model_folder(final, [image_processor], folder / FINAL_FOLDER, arguments.save_dtype, card)
        write_json(folder / LOG_FILE, log)
        plot_curve(trainer.state.log_history, folder / PLOT_FILE)
        if evaluation is not None:
            result.save_json(folder / EVALUATION_FILE)
            result.save_html(folder / EVALUATION_REPORT, title=f"{folder.name}: held-out blocks")
    return log


def _check(arguments: PigeonArguments, source: GeolocationSource | None, stream: RecordStream | None) -> None:
    check_run_arguments(arguments, ["model", "output_dir"])
    if sum((bool(arguments.data), bool(arguments.embeddings), source is not None, stream is not None)) != 1:
        raise ValueError("give the images once: by --data or --embeddings, or as a source or a stream")
    if arguments.embeddings and arguments.trainable_layers != 0:
        raise ValueError(
            f"trainable_layers={arguments.trainable_layers} needs images: embeddings are of a tower that stays as it is"
        )
    if arguments.prototypes and stream is not None:
        raise ValueError("prototypes need images that can be read again by number: not those of a stream")


def _open_embeddings(folders: Sequence[str]) -> EmbeddingStore | JoinedEmbeddings | None:
    stores = [EmbeddingStore(folder) for folder in folders]
    return None if not stores else stores[0] if len(stores) == 1 else JoinedEmbeddings(stores)


def _model(
    arguments: PigeonArguments,
    geocells: Geocells,
    heads: list[dict[str, Any]],
    source: GeolocationSource | None,
    split: Split | None,
) -> tuple[PigeonForImageGeolocalization, list[dict[str, Any]], dict[str, torch.Tensor] | None]:
    """The model, its heads, and the auxiliary labels of all rows (None of a stream)."""
    if source is None and any(head["kind"] == "regression" and head.get("means") is None for head in heads):
        raise ValueError("a stream cannot be read ahead: give the regression heads their means and stds")
    labels = None
    if heads and source is not None and split is not None:
        labels = head_labels(source.columns, heads, len(source))
        heads = standardise_heads(heads, labels, split.training)
    model = load_pigeon(
        str(arguments.model),
        num_cells=len(geocells),
        embedding=arguments.embedding,
        heads=heads,
        smoothing_tau_km=arguments.smoothing_tau_km or None,
        smoothing_rule=arguments.smoothing_rule,
        smoothing_normalize=arguments.smoothing_normalize,
    )
    if model.config.num_cells != len(geocells):
        raise ValueError(
            f"{arguments.model} has {model.config.num_cells} cells but there are {len(geocells)} geocells: give its own"
            " --geocells"
        )
    if [head["name"] for head in model.config.heads or []] != [head["name"] for head in heads]:
        if heads:
            raise ValueError(f"{arguments.model} has heads of its own already: leave --heads out")
        heads = list(model.config.heads or [])
        labels = None if source is None else head_labels(source.columns, heads, len(source))
    if source is not None and labels is None:
        labels = {}
    centroids, radii = torch.from_numpy(geocells.centroids), torch.from_numpy(geocells.radii_km)
    model.set_geocells(centroids, radii)
    return model, heads, labels


@torch.no_grad()
def _training_embeddings(
    model: PigeonForImageGeolocalization,
    source: GeolocationSource,
    split: Split,
    preprocess: GpuImagePreprocessor | None,
    store: EmbeddingStore | JoinedEmbeddings | None,
    skipped: SkippedImages,
    arguments: PigeonArguments,
) -> tuple[np.ndarray, torch.Tensor]:
    """Row numbers and embeddings of the readable training images, by the trained tower."""
    if store is not None:
        return split.training, store.embeddings[torch.from_numpy(split.training)]
    assert preprocess is not None
    # an unreadable row gives its neighbour instead; told apart by the row that comes back
    rows = GeolocationRows(source, split.training, preprocess, skipped=skipped)
    model.eval()
    size = arguments.per_device_eval_batch_size
    kept, parts = [], []
    bar = tqdm(range(0, len(rows), size), desc="embeddings for prototypes", disable=arguments.disable_tqdm)
    for start in bar:
        numbers = range(start, min(start + size, len(rows)))
        items = [item for number in numbers if (item := rows[number])["row"] == split.training[number]]
        if items:
            kept += [item["row"] for item in items]
            pixels = torch.stack([item["pixel_values"] for item in items]).to(model.device, model.dtype)
            parts.append(model.get_embeddings(pixels)[0].cpu())
    return np.array(kept), torch.cat(parts)


__all__ = ["PigeonArguments", "PigeonCollator", "PigeonTrainer", "train"]
