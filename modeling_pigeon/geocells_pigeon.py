# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""The geocells as the model keeps them: a centroid and a radius each, in buffers that no change of dtype rounds."""

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

from .geodesy_pigeon import UNSET, check_coordinates, from_e7, precise_dtype, to_e7


class GeocellTable(nn.Module):
    """Centroids and radii of the cells; not usable before `fill`."""

    centroids_e7: torch.Tensor
    radii_m: torch.Tensor

    def __init__(self, num_cells: int):
        super().__init__()
        self.register_buffer("centroids_e7", torch.full((num_cells, 2), UNSET, dtype=torch.int32))
        self.register_buffer("radii_m", torch.zeros(num_cells, dtype=torch.int32))

    @torch.no_grad()
    def fill(self, centroids: torch.Tensor, radii_km: torch.Tensor | None = None) -> None:
        """Writes centroids [num_cells, 2] in degrees and radii [num_cells] in km (0 if not given).

        Raises `ValueError` for another number of cells, centroids that are no places, and radii below 0.
        """
        count = len(self.radii_m)
        if len(centroids) != count:
            raise ValueError(f"there are {len(centroids)} centroids but num_cells={count}")
        check_coordinates(centroids, "centroids")
        if radii_km is None:
            radii_km = torch.zeros(count)
        if radii_km.shape != (count,) or not bool(((radii_km >= 0) & torch.isfinite(radii_km)).all()):
            raise ValueError(f"radii_km must be [{count}] lengths in km from 0 on, not of shape {tuple(radii_km.shape)}")
        self.centroids_e7.copy_(to_e7(centroids))
        self.radii_m.copy_((radii_km * 1000).round())

    @property
    def are_set(self) -> torch.Tensor:
        """Whether there are centroids, a tensor on the model's device."""
        return self.centroids_e7[0, 0] != UNSET

    def centroids(self) -> torch.Tensor:
        """[num_cells, 2], (latitude, longitude) in degrees. Raises `ValueError` before they were set."""
        if not is_torchdynamo_compiling() and not bool(self.are_set):
            raise ValueError("the model has no geocells yet: call model.set_geocells(centroids)")
        return from_e7(self.centroids_e7)

    def radii_km(self) -> torch.Tensor:
        """[num_cells], in km."""
        return self.radii_m.to(precise_dtype(self.radii_m.device)) / 1000


__all__ = ["GeocellTable"]
