# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Refinement of an answer within and across geocells by prototypes, which lie in the model's buffers."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .configuration_pigeon import PigeonConfig
from .geodesy_pigeon import from_e7, haversine_km, to_e7
from .prototypes_pigeon import PigeonPrototypes

# numbers compared at once, so that memory does not grow with the batch
CHUNK_ELEMENTS = 1 << 26


class EmbeddingTable(nn.Module):
    """Embeddings and places in buffers, grouped by an owner: row i of `offsets` is where owner i's rows begin.

    With `storage="int8"` each dimension is stored in 255 steps between its least and largest value.
    """

    embeddings: torch.Tensor
    scale: torch.Tensor
    middle: torch.Tensor
    coordinates: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, num_rows: int, hidden_size: int, num_owners: int, storage: str):
        super().__init__()
        self.quantized = storage == "int8"
        self.register_buffer("embeddings", torch.zeros(num_rows, hidden_size, dtype=torch.int8 if self.quantized else None))
        if self.quantized:
            self.register_buffer("scale", torch.ones(hidden_size))
            self.register_buffer("middle", torch.zeros(hidden_size))
        self.register_buffer("coordinates", torch.zeros(num_rows, 2, dtype=torch.int32))
        self.register_buffer("offsets", torch.zeros(num_owners + 1, dtype=torch.int64))

    @torch.no_grad()
    def fill(self, embeddings: torch.Tensor, coordinates: torch.Tensor, owners: torch.Tensor) -> None:
        """Writes embeddings [n, hidden_size], places [n, 2] and owners [n] (ascending) to the buffers."""
        if self.quantized:
            low, high = embeddings.float().aminmax(dim=0) if len(embeddings) else (self.middle, self.middle)
            middle, scale = (low + high) / 2, ((high - low) / 254).clamp(min=1e-12)
            embeddings = ((embeddings.float() - middle) / scale).round()
            self.middle.copy_(middle)
            self.scale.copy_(scale)
        self.embeddings.copy_(embeddings)
        self.coordinates.copy_(to_e7(coordinates))
        counts = torch.bincount(owners.cpu(), minlength=len(self.offsets) - 1)
        self.offsets[1:].copy_(counts.cumsum(0))

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Embeddings of rows `index`, float32."""
        rows = self.embeddings[index].float()
        return rows * self.scale.float() + self.middle.float() if self.quantized else rows

    def nearest(self, queries: torch.Tensor, owners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For queries [n, hidden_size] the nearest row (Euclidean) of each one's owner [n], and how far it is.

        Owners without rows: row -1, at an infinite distance.
        """
        starts, counts = self.offsets[owners], self.offsets[owners + 1] - self.offsets[owners]
        widest = int(counts.max()) if len(counts) else 0
        if not widest:
            return torch.full_like(owners, -1), torch.full(owners.shape, float("inf"), device=queries.device)
        steps = torch.arange(widest, device=queries.device)
        rows, distances = [], []
        chunk = max(1, CHUNK_ELEMENTS // (widest * queries.shape[1]))
        for query, start, count in zip(queries.split(chunk), starts.split(chunk), counts.split(chunk), strict=True):
            real = steps < count[:, None]
            index = torch.where(real, start[:, None] + steps, 0)
            distance = (self.rows(index) - query.float()[:, None]).norm(dim=-1).masked_fill(~real, float("inf"))
            least, step = distance.min(1)
            rows.append(torch.where(count > 0, start + step, -1))
            distances.append(least)
        return torch.cat(rows), torch.cat(distances)


@dataclass
class Candidates:
    """The candidates of each image, best first: cells [batch, k], scores [batch, k] and places [batch, k, 2] in degrees."""

    cells: torch.Tensor
    scores: torch.Tensor
    coordinates: torch.Tensor


class PrototypeRefinement(nn.Module):
    """Prototypes of all cells and the images behind them, and how they change an answer."""

    def __init__(self, config: PigeonConfig):
        super().__init__()
        self.config = config
        width, storage = config.vision_config.hidden_size, config.prototype_storage
        self.prototypes = EmbeddingTable(config.num_prototypes, width, config.num_cells, storage)
        self.images = EmbeddingTable(config.num_prototype_images, width, config.num_prototypes, storage)

    def fill(self, prototypes: PigeonPrototypes) -> None:
        """Writes the prototypes to the buffers, whose sizes are the configuration's."""
        self.prototypes.fill(prototypes.embeddings, prototypes.coordinates, prototypes.cells)
        self.images.fill(prototypes.image_embeddings, prototypes.image_coordinates, prototypes.image_prototypes)

    def forward(self, embeddings: torch.Tensor, probabilities: torch.Tensor, centroids: torch.Tensor, top_k: int) -> Candidates:
        """The `top_k` best cells of each image, reweighted, with a place in each.

        embeddings [batch, hidden_size], probabilities [batch, num_cells], centroids [num_cells, 2] in degrees.

        Among the `refinement_top_k` likeliest cells a cell's score is proportional to its probability times
        softmax(-d / refinement_temperature), d being the distance of the image to the cell's nearest prototype. A cell without
        prototypes gets the share 1/k: nothing speaks for it or against it. The scores of these cells sum to what their
        probabilities do, so that all scores together stay a distribution.

        The place in a cell is that of the image nearest to the query within the nearest prototype, the middle of the prototype
        if no images are kept, and the cell's centroid if it has no prototype. If the best place is farther than
        `refinement_max_km` from the likeliest cell's centroid, the scores are the probabilities, and the likeliest cell's place
        is its centroid if the place is as far.
        """
        config = self.config
        competing = min(config.refinement_top_k, probabilities.shape[1])
        scores, cells = probabilities.topk(max(competing, top_k), dim=1)
        shape = cells.shape
        queries = embeddings.repeat_interleave(shape[1], 0)
        rows, distances = (found.view(shape) for found in self.prototypes.nearest(queries, cells.reshape(-1)))
        coordinates = centroids[cells]
        has_prototype = rows >= 0
        if bool(has_prototype.any()):
            coordinates[has_prototype] = self._places(queries[has_prototype.view(-1)], rows[has_prototype])
        refined = scores.clone()
        refined[:, :competing] = self._reweighted(scores[:, :competing], distances[:, :competing])

        if config.refinement_max_km is not None:
            best = coordinates.gather(1, refined.argmax(1)[:, None, None].expand(-1, 1, 2))[:, 0]
            first = centroids[cells[:, 0]]
            too_far = haversine_km(best, first) > config.refinement_max_km
            refined = torch.where(too_far[:, None], scores, refined)
            first_too_far = too_far & (haversine_km(coordinates[:, 0], first) > config.refinement_max_km)
            coordinates[:, 0] = torch.where(first_too_far[:, None], first, coordinates[:, 0])
        refined, order = refined.sort(dim=1, descending=True, stable=True)
        refined, order = refined[:, :top_k], order[:, :top_k]
        return Candidates(cells.gather(1, order), refined, coordinates.gather(1, order[..., None].expand(-1, -1, 2)))

    def _places(self, queries: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """The place of the image nearest to each query [n, hidden_size] within its prototype [n]."""
        images, _ = self.images.nearest(queries, prototypes)
        places = self.prototypes.coordinates[prototypes]
        if len(self.images.coordinates):
            places = torch.where((images >= 0)[:, None], self.images.coordinates[images], places)
        return from_e7(places)

    def _reweighted(self, scores: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """Probabilities [batch, k] times what distances [batch, k] to prototypes (inf: none) say; the sum stays."""
        known = torch.isfinite(distances)
        # a row without any prototype would be NaN
        logits = torch.where(known.any(1, keepdim=True), -distances / self.config.refinement_temperature, 0)
        share = known.sum(1, keepdim=True) / scores.shape[1]
        weights = torch.where(known, logits.log_softmax(1) + share.log(), -math.log(scores.shape[1]))
        # in logarithms: far prototypes must not take a product to zero
        weighted = (scores.log() + weights).softmax(1)
        return weighted * scores.sum(1, keepdim=True)


__all__ = ["Candidates", "PrototypeRefinement"]
