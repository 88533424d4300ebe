"""Functions of sets that models are trained to approximate: each maps n points of [0, 1]^d to n numbers, equivariantly."""

import functools
import math
from collections.abc import Callable

import torch

BANDWIDTH = 0.05  # of the kernel density
RIDGE = 0.1  # what is added to the second moments
STANDARD_POINTS = 1 << 17  # of the sets that mean and deviation of a target are taken of

Target = Callable[[torch.Tensor], torch.Tensor]


def _centred(x: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> [-sqrt(3), sqrt(3)]: mean 0 and variance 1."""
    return (2 * x - 1) * math.sqrt(3)


def _squared_distances(x: torch.Tensor) -> torch.Tensor:
    # differences, not inner products: those lose the small distances
    return (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)


def polynomial(x: torch.Tensor) -> torch.Tensor:
    """Of degree 3: mean_k (z_i.z_k) (1.z_k) + |z_i|^2, with centred points z."""
    z = _centred(x)
    second = (z * z.sum(-1, keepdim=True)).mean(-2, keepdim=True)
    return (z * second).sum(-1) + z.square().sum(-1)


def kernel_density(x: torch.Tensor) -> torch.Tensor:
    """mean_k exp(-|x_i - x_k|^2 / 0.05)."""
    return (-_squared_distances(x) / BANDWIDTH).exp().mean(-1)


def rank(x: torch.Tensor) -> torch.Tensor:
    """Share of the points whose first coordinate is smaller; not continuous."""
    first = x[..., 0]
    return (first.unsqueeze(-1) > first.unsqueeze(-2)).to(x.dtype).mean(-1)


def maximum(x: torch.Tensor) -> torch.Tensor:
    """The largest first coordinate, for all points alike."""
    return x[..., 0].amax(-1, keepdim=True).expand(x.shape[:-1])


def nearest_neighbour(x: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest other point."""
    itself = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    return _squared_distances(x).masked_fill(itself, math.inf).amin(-1).sqrt()


def mean_field(x: torch.Tensor) -> torch.Tensor:
    """sin(2 z_i.m) + |z_i - m|^2 / 2 with the mean m: each point in the field of all; d'= d is enough."""
    z = _centred(x)
    mean = z.mean(-2, keepdim=True)
    return (2 * (z * mean).sum(-1)).sin() + (z - mean).square().sum(-1) / 2


def _log_determinant(matrix: torch.Tensor) -> torch.Tensor:
    """Of small symmetric positive matrices, by elimination: element by element, so that CUDA graphs can hold it."""
    total = torch.zeros_like(matrix[..., 0, 0])
    while matrix.shape[-1]:
        pivot, column = matrix[..., :1, :1], matrix[..., 1:, :1]
        total = total + pivot[..., 0, 0].log()
        matrix = matrix[..., 1:, 1:] - column * column.transpose(-1, -2) / pivot
    return total


def determinant(x: torch.Tensor) -> torch.Tensor:
    """log(det(A + z_i z_i^T) / det A) with A = 0.1 + mean_k z_k z_k^T: how far a point lies outside; d' = d (d + 1) / 2."""
    z = _centred(x)
    moments = z.transpose(-1, -2) @ z / z.shape[-2] + RIDGE * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    with_point = moments.unsqueeze(-3) + z.unsqueeze(-1) * z.unsqueeze(-2)
    return _log_determinant(with_point) - _log_determinant(moments).unsqueeze(-1)


TARGETS: dict[str, Target] = {
    "polynomial": polynomial,
    "kernel_density": kernel_density,
    "rank": rank,
    "maximum": maximum,
    "nearest_neighbour": nearest_neighbour,
    "mean_field": mean_field,
    "determinant": determinant,
}


def random_sets(num_sets: int, num_elements: int, num_coordinates: int, seed: int) -> torch.Tensor:
    """Sets of uniform points [num_sets, num_elements, num_coordinates], the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_sets, num_elements, num_coordinates, generator=generator)


@functools.cache
def mean_and_deviation(target: str, num_elements: int, num_coordinates: int) -> tuple[float, float]:
    """Of a target's values over many sets of this size.

    Raises `ValueError` for an unknown target, or one that does not vary.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is none of {', '.join(TARGETS)}")
    values = TARGETS[target](random_sets(-(-STANDARD_POINTS // num_elements), num_elements, num_coordinates, seed=0)).double()
    deviation = values.std().item()
    if not (math.isfinite(deviation) and deviation > 0):
        raise ValueError(f"target {target!r} does not vary over sets of {num_elements} points in {num_coordinates} dimensions")
    return values.mean().item(), deviation


def standardised(target: str, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The target's values [..., n] of sets x [..., n, d], shifted and scaled to mean 0 and variance 1 over sets of `size`.

    size: (n, d) of the sets that a model is trained on; x may hold other n.
    """
    mean, deviation = mean_and_deviation(target, *size)
    return (TARGETS[target](x) - mean) / deviation


__all__ = ["TARGETS", "mean_and_deviation", "random_sets", "standardised"]
