# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Where in and around a geocell an image lies, read off the probabilities of the cells around it.

Haversine smoothing teaches the cell head a function of the place: by the paper's rule, normalised, the target of cell i at place
x is softmax_i(-d_i(x) / tau), d_i being the distance to the cell's centroid. So the head's probabilities p say more than which
cell is likeliest. The place under which they are likeliest,

    argmax_x  sum_i p_i log softmax_i(-d_i(x) / tau),

is the exact inverse of the smoothing: probabilities that are a place's targets give the place back, between centroids and beyond
them. This is not in the paper, whose places are those of images in the chosen cell.
"""

import math

import torch
import torch.nn.functional as F

from .geodesy_pigeon import EARTH_RADIUS_KM

STEPS = 60
# of tau; it shrinks to nothing as a cosine
FIRST_STEP = 0.5


def likeliest_places(
    probabilities: torch.Tensor, cells: torch.Tensor, centroids: torch.Tensor, tau_km: float, neighbors: int
) -> torch.Tensor:
    """The place of greatest likelihood around each candidate cell, by gradient ascent on the sphere.

    Only the cells nearest to a candidate have a say, so that a second guess on another continent does not pull.

    Args:
        probabilities: [batch, num_cells], of cells.
        cells: [batch, k], candidates.
        centroids: [num_cells, 2], (latitude, longitude) in degrees.
        tau_km: the smoothing that the probabilities were trained for, times whatever temperature they were taken at.
        neighbors: how many cells around a candidate, itself included.

    Returns:
        [batch, k, 2], (latitude, longitude) in degrees, in the centroids' dtype. A candidate around which no cell has any
        probability keeps its centroid.
    """
    vectors = _unit_vectors(centroids)
    distinct, inverse = cells.unique(return_inverse=True)
    neighbors = min(neighbors, len(vectors))
    near = torch.cdist(vectors[distinct], vectors).topk(neighbors, dim=1, largest=False).indices[inverse]
    around = vectors[near]  # [batch, k, neighbors, 3]
    shares = probabilities.to(vectors.dtype).gather(1, near.flatten(1)).view(near.shape)
    total = shares.sum(-1, keepdim=True)
    known = total > 0
    shares = torch.where(known, shares / torch.where(known, total, 1), 0)
    place = torch.where(known, (shares[..., None] * around).sum(-2), vectors[cells])
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
    x, y, z = place.unbind(-1)
    return torch.rad2deg(torch.stack([torch.atan2(z, torch.hypot(x, y)), torch.atan2(y, x)], dim=-1))


def _unit_vectors(coordinates: torch.Tensor) -> torch.Tensor:
    latitude, longitude = torch.deg2rad(coordinates).unbind(-1)
    return torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], dim=-1)


__all__ = ["likeliest_places"]
