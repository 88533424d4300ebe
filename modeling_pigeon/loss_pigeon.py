# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""The losses of PIGEON: cross entropy with haversine-smoothed cells, and those of the auxiliary heads."""

import torch
import torch.nn.functional as F

from .geodesy_pigeon import haversine_km, precise_dtype

IGNORE_INDEX = -100


def smoothed_cell_targets(
    distances_km: torch.Tensor, true_cells: torch.Tensor, tau_km: float, rule: str = "paper", normalize: bool = False
) -> torch.Tensor:
    """Soft targets [batch, num_cells] of the cell head (Haas et al. 2023, equation 2).

    distances_km [batch, num_cells] from each image to each cell's centroid, true_cells [batch]. A cell's target is
    exp(-(distance - reference) / tau_km); the reference is the true cell's distance by `rule="paper"`, the least distance by
    `"code"` (then the true cell's own target is below 1 where another centroid is nearer). Rows do not sum to 1 unless
    `normalize` divides them by their sum (after which the two rules agree).

    Raises `ValueError` for another rule.
    """
    if rule == "paper":
        reference = distances_km.gather(1, true_cells[:, None])
    elif rule == "code":
        reference = distances_km.amin(1, keepdim=True)
    else:
        raise ValueError(f"rule={rule!r} is unknown; choose from paper, code")
    exponents = (reference - distances_km) / tau_km
    return exponents.softmax(1) if normalize else exponents.exp()


def cell_loss(
    logits: torch.Tensor,
    true_cells: torch.Tensor,
    coordinates: torch.Tensor | None = None,
    centroids: torch.Tensor | None = None,
    tau_km: float | None = None,
    rule: str = "paper",
    normalize: bool = False,
) -> torch.Tensor:
    """Mean cross entropy of logits [batch, num_cells] with smoothed targets, or with true_cells [batch] alone without tau_km.

    coordinates [batch, 2] and centroids [num_cells, 2] are (latitude, longitude) in degrees.

    Raises `ValueError` if smoothing lacks coordinates or centroids.
    """
    if tau_km is None:
        return F.cross_entropy(logits.float(), true_cells)
    if coordinates is None or centroids is None:
        raise ValueError("smoothing by distance needs coordinates and centroids; tau_km=None is plain cross entropy")
    precise = precise_dtype(logits.device)
    distances = haversine_km(coordinates.to(logits.device, precise)[:, None], centroids.to(logits.device, precise)[None])
    targets = smoothed_cell_targets(distances, true_cells, tau_km, rule, normalize).to(torch.float32)
    return F.cross_entropy(logits.float(), targets)


def regression_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error of outputs and targets [batch, size]. A target that is NaN is not known and left out."""
    known = ~targets.isnan()
    difference = outputs.float() - torch.where(known, targets, 0).float()
    # zero, with gradients of zero, for a batch in which nothing is known
    return torch.where(known, difference.square(), 0).sum() / known.sum().clamp(min=1)


def classification_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of outputs [batch, size] with classes [batch] (-100: left out) or soft targets [batch, size]."""
    if targets.is_floating_point():
        return F.cross_entropy(outputs.float(), targets.float())
    total = F.cross_entropy(outputs.float(), targets.long(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


__all__ = ["cell_loss", "classification_loss", "regression_loss", "smoothed_cell_targets"]
