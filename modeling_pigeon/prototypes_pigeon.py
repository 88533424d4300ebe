# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Prototypes of PIGEON's refinement: clusters of training images within each geocell, made once after training."""

import warnings
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .geodesy_pigeon import check_coordinates, haversine_km, spherical_mean

# the matrix of distances between a cell's images takes 8 bytes for each pair
MAX_IMAGES_PER_CELL = 20_000
# OPTICS compares ratios of distances: images of one place must not be 0 km apart
LEAST_DISTANCE_KM = 1e-5
NOISE = ("drop", "single")


@dataclass
class PigeonPrototypes:
    """Clusters of images, sorted by cell; `PigeonForImageGeolocalization.set_prototypes` takes them.

    Attributes:
        embeddings: [num_prototypes, hidden_size], the mean embedding of each cluster.
        coordinates: [num_prototypes, 2], the middle of its images' places, (latitude, longitude) in degrees.
        cells: [num_prototypes], its geocell, in ascending order.
        image_embeddings: [num_images, hidden_size], embeddings of the images, cluster by cluster; empty if they are not kept.
        image_coordinates: [num_images, 2], their places.
        image_prototypes: [num_images], the cluster of each, in ascending order.
    """

    embeddings: torch.Tensor
    coordinates: torch.Tensor
    cells: torch.Tensor
    image_embeddings: torch.Tensor
    image_coordinates: torch.Tensor
    image_prototypes: torch.Tensor

    def __post_init__(self) -> None:
        for name, rows in (("prototypes", (self.embeddings, self.coordinates, self.cells)), ("images", self._images())):
            lengths = [len(row) for row in rows]
            if len(set(lengths)) > 1:
                raise ValueError(f"embeddings, coordinates and numbers of {name} have different lengths: {lengths}")
        for name, groups in (("cells", self.cells), ("image_prototypes", self.image_prototypes)):
            if bool((groups.diff() < 0).any()):
                raise ValueError(f"{name} must be in ascending order: sort the rows by it")
        if not bool(torch.isfinite(self.embeddings).all() and torch.isfinite(self.image_embeddings).all()):
            raise ValueError("an embedding is NaN or infinite")
        check_coordinates(self.coordinates, "coordinates")
        check_coordinates(self.image_coordinates, "image_coordinates")
        if len(self.image_prototypes) and not 0 <= self.image_prototypes[0] <= self.image_prototypes[-1] < len(self):
            raise ValueError(f"image_prototypes goes to {self.image_prototypes[-1].item()}, but there are {len(self)} prototypes")

    def _images(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.image_embeddings, self.image_coordinates, self.image_prototypes

    def __len__(self) -> int:
        return len(self.cells)


def build_prototypes(
    embeddings: torch.Tensor,
    coordinates: torch.Tensor,
    cells: torch.Tensor,
    *,
    min_samples: int = 3,
    xi: float = 0.15,
    noise: str = "drop",
    max_images_per_prototype: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PigeonPrototypes:
    """Clusters the training images of each geocell by place (OPTICS on great-circle distances) and averages their embeddings.

    Args:
        embeddings: [n, hidden_size], of training images, as the model's output has them (panoramas averaged).
        coordinates: [n, 2], (latitude, longitude) in degrees.
        cells: [n], the geocell of each.
        min_samples, xi: of OPTICS; PIGEON takes 3 and 0.15, PIGEOTTO 100 and 0.1. A cell of fewer images is one cluster.
        noise: what becomes of images in no cluster: `"drop"` as published, or `"single"`, each a cluster of its own. A cell
            in which OPTICS finds no cluster has none by `"drop"`; the model then answers with its centroid.
        max_images_per_prototype: keeps at most so many images of a cluster (a random choice by `seed`), 0 none: the model
            then answers with the middle of the cluster. The cluster's mean is over all images in any case. `None`: all.
        progress: whether a progress bar is shown.

    Raises `ValueError` for coordinates that are no places, embeddings that are not finite, different lengths, and a cell of
    more than 20,000 images; `ImportError` where scikit-learn is not installed.
    """
    embeddings, coordinates, cells = embeddings.detach().cpu(), coordinates.detach().cpu().double(), cells.detach().cpu()
    if embeddings.dim() != 2 or not len(embeddings) == len(coordinates) == len(cells):
        raise ValueError(
            f"embeddings [n, hidden_size], coordinates [n, 2] and cells [n] must be of one length, not of shapes"
            f" {tuple(embeddings.shape)}, {tuple(coordinates.shape)} and {tuple(cells.shape)}"
        )
    check_coordinates(coordinates)
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError("embeddings hold a value that is NaN or infinite")
    if len(cells) and int(cells.min()) < 0:
        raise ValueError(f"cells holds {int(cells.min())}: cells are numbered from 0")
    if noise not in NOISE:
        raise ValueError(f"noise={noise!r} is unknown; choose from {', '.join(NOISE)}")
    if min_samples < 2 or not 0 < xi < 1:
        raise ValueError(f"min_samples={min_samples} must be at least 2 and xi={xi} between 0 and 1")

    generator = torch.Generator().manual_seed(seed)
    order = torch.argsort(cells, stable=True)
    numbers, counts = torch.unique_consecutive(cells[order], return_counts=True)
    means, places, kept, kept_by = [], [], [], []
    owners: list[int] = []
    groups = zip(numbers.tolist(), order.split(counts.tolist()), strict=True)
    for cell, rows in tqdm(groups, total=len(numbers), desc="prototypes", unit="cell", disable=not progress):
        for members in _clusters(coordinates[rows], cell, min_samples, xi, noise):
            images = rows[members]
            means.append(embeddings[images].double().mean(0).to(embeddings.dtype))
            places.append(spherical_mean(coordinates[images]))
            if max_images_per_prototype is not None and len(images) > max_images_per_prototype:
                images = images[torch.randperm(len(images), generator=generator)[:max_images_per_prototype].sort().values]
            kept.append(images)
            kept_by.append(torch.full_like(images, len(owners)))
            owners.append(cell)
    images = torch.cat(kept) if kept else order[:0]
    return PigeonPrototypes(
        embeddings=torch.stack(means) if means else embeddings[:0],
        coordinates=torch.stack(places) if places else coordinates[:0],
        cells=torch.tensor(owners, dtype=torch.int64),
        image_embeddings=embeddings[images],
        image_coordinates=coordinates[images],
        image_prototypes=torch.cat(kept_by) if kept_by else order[:0],
    )


def _clusters(coordinates: torch.Tensor, cell: int, min_samples: int, xi: float, noise: str) -> list[torch.Tensor]:
    """Rows of each cluster among one cell's places [n, 2]."""
    count = len(coordinates)
    if count < min_samples:
        return [torch.arange(count)]
    if count > MAX_IMAGES_PER_CELL:
        raise ValueError(
            f"cell {cell} holds {count} images, more than {MAX_IMAGES_PER_CELL}, whose distances would fill the memory:"
            " use smaller geocells or fewer images"
        )
    try:
        from sklearn.cluster import OPTICS
    except ImportError as error:
        raise ImportError('clustering needs scikit-learn: pip install "geobased[geo]"') from error

    distances = haversine_km(coordinates[:, None], coordinates[None]).clamp(min=LEAST_DISTANCE_KM).fill_diagonal_(0).numpy()
    with warnings.catch_warnings():
        # images that no neighbour reaches have an infinite distance, of which scikit-learn warns
        warnings.simplefilter("ignore", RuntimeWarning)
        labels = torch.from_numpy(OPTICS(min_samples=min_samples, xi=xi, metric="precomputed").fit_predict(distances))
    clusters = [(labels == label).nonzero()[:, 0] for label in range(int(labels.max()) + 1)]
    if noise == "single":
        clusters += list((labels == -1).nonzero())
    return clusters


__all__ = ["PigeonPrototypes", "build_prototypes"]
