# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""What a PIGEON model answers: places with scores, an error radius, and whether it would rather not say."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .configuration_pigeon import PigeonConfig
from .geodesy_pigeon import haversine_km

# an error radius of zero, as of a cell without extent that is certain, could not be calibrated by a factor
MIN_RADIUS_KM = 1.0


@dataclass
class PigeonAnswer(ModelOutput):
    """Answers to a batch of images.

    Attributes:
        coordinates: [batch, 2], (latitude, longitude) in degrees, float64: the best candidate's.
        error_radius_km: [batch], the distance within which the true place lies with probability `coverage` (calibrated if the
            configuration's radius_scales have that coverage).
        abstain: [batch] bool, whether the answer is too uncertain by the configuration's abstain_radius_km and
            abstain_probability.
        candidate_cells: [batch, top_k], the best geocells, best first.
        candidate_scores: [batch, top_k], their probabilities after refinement; with place_rule "likelihood" those of the cell and
            all around it, and 0 where there is no further place.
        candidate_coordinates: [batch, top_k, 2], a place in each, or around it.
        cell_probabilities: [batch, num_cells], before refinement, after cell_temperature.
        embeddings: [batch, hidden_size].
    """

    coordinates: torch.Tensor | None = None
    error_radius_km: torch.Tensor | None = None
    abstain: torch.Tensor | None = None
    candidate_cells: torch.Tensor | None = None
    candidate_scores: torch.Tensor | None = None
    candidate_coordinates: torch.Tensor | None = None
    cell_probabilities: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


def mass_radius_km(
    coordinates: torch.Tensor, probabilities: torch.Tensor, centroids: torch.Tensor, radii_km: torch.Tensor, mass: float
) -> torch.Tensor:
    """Radius [batch] of the smallest disc around each place [batch, 2] that holds `mass` of its probabilities [batch, num_cells].

    A cell counts as held where the disc reaches past its centroid [num_cells, 2] by its radius [num_cells]. At least 1 km.
    """
    reach = haversine_km(coordinates[:, None], centroids[None]) + radii_km
    reach, order = reach.sort(dim=1)
    held = probabilities.to(reach.dtype).gather(1, order).cumsum(1)
    # relative to what there is, which rounding keeps from being 1
    enough = held >= mass * held[:, -1:]
    return reach.gather(1, enough.to(torch.uint8).argmax(1, keepdim=True))[:, 0].clamp(min=MIN_RADIUS_KM)


def radius_scale(config: PigeonConfig, coverage: float) -> float:
    """The calibrated factor of radii at that coverage; 1 in a model that was never calibrated.

    Raises `ValueError`, listing those there are, if the model is calibrated for other coverages only.
    """
    if not config.radius_scales:
        return 1.0
    for known, scale in config.radius_scales.items():
        if abs(float(known) - coverage) < 1e-9:
            return scale
    raise ValueError(
        f"error radii are not calibrated for coverage={coverage}, only for {', '.join(config.radius_scales)}: choose one of them"
    )


def abstains(config: PigeonConfig, radius_km: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Whether answers with these radii (at the configuration's radius_coverage) and scores [batch] are too uncertain."""
    abstain = torch.zeros_like(radius_km, dtype=torch.bool)
    if config.abstain_radius_km is not None:
        abstain |= radius_km > config.abstain_radius_km
    if config.abstain_probability is not None:
        abstain |= score < config.abstain_probability
    return abstain


__all__ = ["PigeonAnswer", "mass_radius_km"]
