# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Where in and around a geocell an image lies, read off the probabilities of the cells around it.

Haversine smoothing teaches the cell head a function of the place: by the paper's rule, normalised, the target of cell i at place
x is softmax_i(-d_i(x) / tau), d_i being the distance to the cell's centroid. So the head's probabilities p say more than which
cell is likeliest. The place under which they are likeliest,

    argmax_x  sum_i p_i log softmax_i(-d_i(x) / tau),

is the exact inverse of the smoothing: probabilities that are a place's targets give the place back, between centroids and beyond
them. Only the cells around the best one have a say, so that a second guess on another continent does not pull; it is a place of
its own. This is not in the paper, whose places are those of images in the chosen cell.
"""

import math

import torch
import torch.nn.functional as F

from .geodesy_pigeon import EARTH_RADIUS_KM, unit_vectors, vector_coordinates
from .refinement_pigeon import Candidates

STEPS = 60
# of tau; it shrinks to nothing as a cosine
FIRST_STEP = 0.5


def likely_places(probabilities: torch.Tensor, centroids: torch.Tensor, top_k: int, tau_km: float, neighbors: int) -> Candidates:
    """The best places, each around a cell of its own: the likeliest cell and all around it, then the likeliest of the others.

    Args:
        probabilities: [batch, num_cells], of cells.
        centroids: [num_cells, 2], (latitude, longitude) in degrees.
        top_k: how many places.
        tau_km: the smoothing that the probabilities were trained for, times whatever temperature they were taken at.
        neighbors: how many cells count as around a cell, itself included.

    Returns:
        Places in the centroids' dtype, that of the likeliest cell first. The score is the probability of a cell and all around
        it, those apart that a better place has counted already; a later place may have a greater one, spread over more cells.
        (Ranked by sums, answers were farther off.) Where nothing is left for further places, scores are 0.
    """
    vectors = unit_vectors(centroids)
    neighbors = min(neighbors, len(vectors))
    left = probabilities.clone()
    cells, scores, around = [], [], []
    for _ in range(top_k):
        best = left.argmax(1)
        distinct, inverse = best.unique(return_inverse=True)
        near = torch.cdist(vectors[distinct], vectors).topk(neighbors, dim=1, largest=False).indices[inverse]
        cells.append(best)
        around.append(near)
        scores.append(left.gather(1, near).sum(1))
        left.scatter_(1, near, 0)
    found, near = torch.stack(cells, 1), torch.stack(around, 1)
    shares = probabilities.to(vectors.dtype).gather(1, near.flatten(1)).view(near.shape)
    return Candidates(found, torch.stack(scores, 1), _likeliest(shares, vectors[near], vectors[found], tau_km))


def _likeliest(shares: torch.Tensor, around: torch.Tensor, centre: torch.Tensor, tau_km: float) -> torch.Tensor:
    """The place of greatest likelihood of probabilities [batch, k, n] of cells at unit vectors [batch, k, n, 3], by gradient
    ascent on the sphere: [batch, k, 2] in degrees. Without any probability it is `centre` [batch, k, 3]."""
    total = shares.sum(-1, keepdim=True)
    known = total > 0
    shares = torch.where(known, shares / torch.where(known, total, 1), 0)
    place = torch.where(known, (shares[..., None] * around).sum(-2), centre)
    place = F.normalize(place, dim=-1)
    for step in range(STEPS):
        # differences, for a small angle's cosine has no digits left
        difference = place[..., None, :] - around
        distance = 2 * EARTH_RADIUS_KM * torch.asin((difference.norm(dim=-1) / 2).clamp(max=1))
        excess = torch.where(known, (-distance / tau_km).softmax(-1) - shares, 0)
        along = (difference * place[..., None, :]).sum(-1, keepdim=True)
        away = F.normalize(difference - along * place[..., None, :], dim=-1)  # from each centroid, tangential
        rate = FIRST_STEP * (1 + math.cos(math.pi * step / STEPS)) / 2 * tau_km / EARTH_RADIUS_KM
        place = F.normalize(place + rate * (excess[..., None] * away).sum(-2), dim=-1)
    return vector_coordinates(place)


__all__ = ["likely_places"]
