"""The two trainings of earthclip-mini, each a plain loop: CLIP from scratch, then PIGEON on its tower.

Why no Trainer: batches are rendered on the GPU, in this process, so there is nothing that workers of a data loader could do
meanwhile; and a step of a model this small is short beside collating its thousand crops one by one.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from geobased.geography.boundaries import Boundaries
from geobased.geography.coordinates import grouped_spherical_means, haversine_km
from geobased.geography.geocell_collection import Geocells
from geobased.geography.geocells import RADIUS_SHARE, create_geocells, create_naive_geocells
from geobased.modeling_pigeon.modeling_pigeon import PigeonForImageGeolocalization
from geobased.modeling_streetclip.configuration_streetclip import StreetCLIPConfig
from geobased.modeling_streetclip.modeling_streetclip import StreetCLIPModel
from geobased.training.earthclip_data import CropSet, EarthData
from geobased.training.pigeon_labels import standardise_heads
from geobased.training.streetclip_loss import MAX_LOGIT_SCALE, contrastive_loss
from geobased.whole_file import whole_file

# "naive_cells" are rectangles; "world_cells" those of the package, whose sizes follow photos instead of crops
ABLATIONS = ("no_smoothing", "naive_cells", "world_cells", "no_pretraining", "no_multitask")
# borders of cells, in decimals of a degree and degrees: a crop's pixel is three times as wide
CELL_DECIMALS, CELL_SIMPLIFICATION = 3, 0.01
CHECKPOINT_SECONDS = 60.0
# steps that tell the speed; the first of them are slower
TRIAL_STEPS, TRIAL_SKIPPED = 25, 5
LOG_STEPS = 20


@dataclass(frozen=True)
class EarthclipPreset:
    """Sizes of everything.

    Args:
        image_size, patch_size: pixels.
        vision: width, layers, heads of the vision tower; its feed-forward layers are four times as wide.
        text: the same of the text tower.
        projection_dim: width in which images and texts are compared.
        vocab_size, max_length: tokens.
        train_places: places that training crops lie at.
        caption_draws: captions per place.
        cell_crops: training crops that geocells are made from.
        cell_sizes: least and most of these crops in a geocell.
        batch_size: crops per step.
        evaluation_crops: of each set that is measured or fitted on.
        prototype_crops: training crops that prototypes are made of.
        neighbour_crops: training crops that the nearest-neighbour baseline knows.
        bootstrap: resamples of the intervals.
        warmup: steps.
        clip_rate, pigeon_rate: peak learning rates.
        max_bytes: of the two folders together.
    """

    image_size: int = 64
    patch_size: int = 8
    # both folders hold the tower: 4 bytes per parameter, and 16 MB for all
    vision: tuple[int, int, int] = (192, 6, 3)
    text: tuple[int, int, int] = (128, 3, 2)
    projection_dim: int = 128
    vocab_size: int = 2048
    max_length: int = 64
    train_places: int = 300_000
    caption_draws: int = 4
    cell_crops: int = 100_000
    cell_sizes: tuple[int, int] = (25, 50)
    batch_size: int = 1024
    evaluation_crops: int = 5000
    prototype_crops: int = 12_000
    neighbour_crops: int = 50_000
    bootstrap: int = 200
    warmup: int = 300
    clip_rate: float = 1e-3
    pigeon_rate: float = 1e-3
    max_bytes: int = 16_000_000


PRESETS = {
    "mini": EarthclipPreset(),
    "tiny": EarthclipPreset(
        image_size=16,
        vision=(32, 1, 2),
        text=(32, 1, 2),
        projection_dim=16,
        vocab_size=270,
        train_places=192,
        caption_draws=2,
        cell_crops=192,
        cell_sizes=(4, 12),
        batch_size=16,
        evaluation_crops=24,
        prototype_crops=96,
        neighbour_crops=64,
        bootstrap=10,
        warmup=2,
    ),
}


def new_clip(preset: EarthclipPreset, pad: int, end: int) -> StreetCLIPModel:
    """An untrained CLIP; pad and end are ids of the tokenizer."""

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
        return {**sizes, "projection_dim": preset.projection_dim}

    tokens = {"pad_token_id": pad, "bos_token_id": end, "eos_token_id": end}
    text = {**tower(*preset.text), "vocab_size": preset.vocab_size, "max_position_embeddings": preset.max_length, **tokens}
    vision = {**tower(*preset.vision), "image_size": preset.image_size, "patch_size": preset.patch_size}
    return StreetCLIPModel(StreetCLIPConfig(text_config=text, vision_config=vision, projection_dim=preset.projection_dim))


def step_generator(seed: int, stage: str, step: int) -> np.random.Generator:
    """Random numbers of a step: a resumed run has the same without a state that would have to be kept."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(stage.encode()).digest()[:4], "big"), step])


def fit(
    stage: str,
    model: nn.Module,
    loss_of: Callable[[np.random.Generator], torch.Tensor],
    *,
    folder: Path,
    seed: int,
    learning_rate: float,
    warmup: int,
    steps: int | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a model; goes on from `folder/<stage>.checkpoint` if there is one.

    Args:
        stage: name, of the checkpoint and the progress bar.
        model: on its device.
        loss_of: generator of a step -> scalar loss.
        seed: of the steps' generators.
        learning_rate: peak; it rises over `warmup` steps and falls to 0 as a cosine.
        steps: how many; None takes as many as `seconds` allow, by the speed of the first ones.

    Returns:
        steps, seconds, losses [[step, mean loss since the one before]].

    Raises:
        ValueError: neither steps nor seconds.
        FloatingPointError: a loss that is not finite.
    """
    if steps is None and seconds is None:
        raise ValueError("give steps or seconds")
    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    path = folder / f"{stage}.checkpoint"
    step, spent, losses = 0, 0.0, []
    if path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        step, steps, spent, losses = state["step"], state["steps"], state["seconds"], state["losses"]
        model.load_state_dict(state["model"])
        if steps is not None and step >= steps:
            return {"steps": steps, "seconds": spent, "losses": losses}
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    begun = saved = time.monotonic()
    trial_begun = begun
    total, since = torch.zeros((), device=device), 0

    def save(done: bool) -> None:
        now = spent + time.monotonic() - begun
        # a finished stage needs no optimizer
        state = {"step": step, "steps": steps, "seconds": now, "losses": losses, "model": model.state_dict()}
        with whole_file(path) as temporary:
            torch.save(state if done else {**state, "optimizer": optimizer.state_dict()}, temporary)

    bar = tqdm(total=steps, initial=step, desc=stage, unit="step", disable=not progress)
    first = step
    while steps is None or step < steps:
        for group in optimizer.param_groups:
            falling = 1.0 if steps is None else 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * falling
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(step_generator(seed, stage, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.detach()
        step, since = step + 1, since + 1
        bar.update()
        if steps is None and step - first in (TRIAL_SKIPPED, TRIAL_STEPS):
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            if step - first == TRIAL_STEPS:
                pace = (now - trial_begun) / (TRIAL_STEPS - TRIAL_SKIPPED)
                assert seconds is not None
                steps = step + max(0, int((seconds - spent - (now - begun)) / pace))
                bar.total = steps
                bar.refresh()
            trial_begun = now
        if step % LOG_STEPS == 0 or step == steps:
            # the only wait for the device
            mean = (total / since).item()
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss of {stage} is {mean} at step {step}: lower the learning rate")
            losses.append([step, mean])
            total.zero_()
            since = 0
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if time.monotonic() - saved > CHECKPOINT_SECONDS and step != steps:
                save(done=False)
                saved = time.monotonic()
    bar.close()
    save(done=True)
    return {"steps": step, "seconds": spent + time.monotonic() - begun, "losses": losses}


def clip_loss(
    model: StreetCLIPModel, data: EarthData, train: CropSet, tokens: dict[str, torch.Tensor], batch_size: int
) -> Callable[[np.random.Generator], torch.Tensor]:
    """Contrastive loss of a batch of crops and their captions; all crops of one caption match it.

    Args:
        tokens: input_ids and attention_mask [captions, length], on the device.
    """
    device = data.image.device

    def loss(generator: np.random.Generator) -> torch.Tensor:
        rows = generator.integers(0, len(train), batch_size)
        draws = generator.integers(0, len(train.caption_ids), batch_size)
        ids = torch.from_numpy(train.caption_ids[draws, rows]).to(device)
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        pixels = data.training_pixels(train.places[rows], generator)
        outputs = model(pixel_values=pixels, input_ids=tokens["input_ids"][ids], attention_mask=tokens["attention_mask"][ids])
        # outside autocast: differences of cosines are smaller than bfloat16's steps
        with torch.autocast(device.type, enabled=False):
            # the towers normalised in bfloat16
            images, texts = (F.normalize(rows.float(), dim=1) for rows in (outputs.image_embeds, outputs.text_embeds))
            return contrastive_loss(images, texts, model.logit_scale.exp(), ids)

    return loss


@dataclass(frozen=True)
class CellTable:
    """Geocells as the head learns them: labels [n] of training places, centroids [cells, 2] in degrees, radii [cells] in km."""

    geocells: Geocells
    labels: np.ndarray
    centroids: np.ndarray
    radii_km: np.ndarray


def semantic_cells(boundaries: Boundaries, train: CropSet, preset: EarthclipPreset, *, seed: int, progress: bool) -> Geocells:
    """Semantic geocells of training crops: along borders, all of about the same area, for crops lie evenly over the land."""
    smallest, largest = preset.cell_sizes
    return create_geocells(
        train.places.coordinates[: preset.cell_crops],
        boundaries.cleaned(decimals=CELL_DECIMALS, simplify_degrees=CELL_SIMPLIFICATION),
        min_size=smallest,
        max_size=largest,
        seed=seed,
        progress=progress,
    )


def naive_cells(train: CropSet, count: int) -> Geocells:
    """About `count` rectangles with equal numbers of training crops (the ablation of PIGEON's paper)."""
    # halving leaves rectangles about three quarters full
    return create_naive_geocells(train.places.coordinates, max_size=max(1, round(len(train) / count / 0.7)))


def cell_table(cells: Geocells, train: CropSet) -> CellTable:
    """The cells with the middles and radii of the training crops in them; a cell without crops keeps its own."""
    places = train.places
    labels = np.asarray(cells.locate(places.latitude, places.longitude))
    middles = grouped_spherical_means(places.latitude, places.longitude, labels, len(cells))
    empty = np.isnan(middles[:, 0])
    centroids = np.where(empty[:, None], cells.centroids, middles)
    distances = np.asarray(haversine_km(places.latitude, places.longitude, *centroids[labels].T))
    radii = np.array(cells.radii_km, dtype=float)
    order = np.argsort(labels, kind="stable")
    numbers, starts = np.unique(labels[order], return_index=True)
    for number, members in zip(numbers, np.split(distances[order], starts[1:]), strict=True):
        radii[number] = np.quantile(members, RADIUS_SHARE)
    return CellTable(cells, labels, centroids, radii)


def new_pigeon(
    clip: StreetCLIPModel, table: CellTable, data: EarthData, train: CropSet, *, ablation: str | None, tau_km: float
) -> PigeonForImageGeolocalization:
    """An untrained PIGEON head on a CLIP's tower."""
    heads: list[dict[str, Any]] = []
    if ablation != "no_multitask":
        elevation = torch.from_numpy(train.places.elevation[:, None].astype(np.float32))
        heads = standardise_heads(data.heads(), {"elevation": elevation}, np.arange(len(train)))
    model = PigeonForImageGeolocalization.from_clip(
        clip,
        num_cells=len(table.geocells),
        heads=heads or None,
        smoothing_tau_km=None if ablation == "no_smoothing" else tau_km,
        # by the paper's rule a crop near the border of a large cell would weigh without bound
        smoothing_normalize=True,
        prototype_storage="int8",
    )
    model.set_geocells(torch.from_numpy(table.centroids), torch.from_numpy(table.radii_km))
    return model.to(device=data.image.device)  # type: ignore[call-arg]


def pigeon_loss(
    model: PigeonForImageGeolocalization, data: EarthData, train: CropSet, table: CellTable, batch_size: int
) -> Callable[[np.random.Generator], torch.Tensor]:
    """Loss of all heads for a batch of crops."""
    device, places = data.image.device, train.places
    labels = torch.from_numpy(table.labels).to(device)
    coordinates = torch.from_numpy(places.coordinates).to(device)
    truths = {
        "elevation": torch.from_numpy(places.elevation[:, None].astype(np.float32)).to(device),
        "climate": torch.from_numpy(places.climate).to(device),
    }
    names = [head["name"] for head in model.config.heads or []]

    def loss(generator: np.random.Generator) -> torch.Tensor:
        numbers = generator.integers(0, len(train), batch_size)
        pixels = data.training_pixels(places[numbers], generator)
        rows = torch.from_numpy(numbers).to(device)
        heads = {name: truths[name][rows] for name in names}
        return model(pixel_values=pixels, labels=labels[rows], coordinates=coordinates[rows], head_labels=heads or None).loss

    return loss


__all__ = [
    "ABLATIONS",
    "PRESETS",
    "CellTable",
    "EarthclipPreset",
    "cell_table",
    "clip_loss",
    "fit",
    "naive_cells",
    "new_clip",
    "new_pigeon",
    "pigeon_loss",
    "semantic_cells",
]
