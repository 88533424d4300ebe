# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""How narrow a sum can be: for every smooth phi that is too narrow, two sets that it cannot tell apart."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Phi = Callable[[torch.Tensor], torch.Tensor]


def power_sum_jacobian_determinant(x: torch.Tensor) -> torch.Tensor:
    """det of the derivative of (p_1, ..., p_n) at n numbers x [n]: n! times the product of x_j - x_i over i < j.

    It vanishes only where two numbers are equal: n power sums tell sets of n numbers apart, at least nearby, and
    `newton_decode` does so everywhere.
    """
    pairs = torch.combinations(x, 2)
    return math.factorial(x.shape[0]) * (pairs[:, 1] - pairs[:, 0]).prod()


@dataclass(frozen=True)
class Collision:
    """Two sets of n numbers with (nearly) the same sum of phi.

    `first`, `second`: [n], the fixed elements first and alike; `sum_difference`: the largest difference of the sums; `distance`:
    the largest difference of the sorted sets.
    """

    first: torch.Tensor
    second: torch.Tensor
    sum_difference: float
    distance: float

    def least_error(self, function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """What every psi errs by on one of the two sets at least, if function([n]) -> a number is to be read from the sum (and
        from the fixed elements)."""
        return (function(self.first) - function(self.second)).abs().item() / 2


def find_collision(
    phi: Phi, num_elements: int, *, num_fixed: int = 0, distance: float | None = None, max_steps: int = 400
) -> Collision:
    """Two different sets of numbers in [0, 1] whose sums of phi are the same: possible for every smooth phi too narrow.

    The sum of d' features of m free elements has a derivative of rank at most d'. If d' < m, there is a direction in which the
    sum does not change to first order; steps along it, each corrected by Newton's method, follow a curve on which the sum is
    constant and the set is not.

    Args:
        phi: [n] -> [n, d'], differentiable, applied to each number by itself, float64.
        num_elements: n.
        num_fixed: elements that both sets share (1: the element x_i that a Sumformer's psi knows).
        distance: how far apart the sorted sets shall be; by default a quarter of the spacing of evenly spread elements.
        max_steps: after which the search ends.

    Raises:
        ValueError: d' is not smaller than the number of free elements: then there need be no such sets.
        ArithmeticError: none was found within `max_steps` or within [0, 1].
    """
    free = num_elements - num_fixed
    fixed = torch.linspace(0.21, 0.79, num_fixed, dtype=torch.float64)
    first = torch.arange(1, free + 1, dtype=torch.float64) / (free + 1)
    with torch.no_grad():
        width = phi(first).shape[-1]
    if width >= free:
        raise ValueError(f"phi has {width} features for {free} free elements: sets need not collide unless it has fewer")
    distance = 0.25 / (free + 1) if distance is None else distance

    def total(x: torch.Tensor) -> torch.Tensor:
        return phi(x).sum(0)

    def derivative(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.jacobian(total, x)

    with torch.no_grad():
        target = total(first)
    scale = target.abs().max().clamp(min=1).item()
    # away from where the curve starts, in one of two senses; one of them may lead out of [0, 1]
    for sense in (1.0, -1.0):
        second, direction = first.clone(), None
        for _ in range(max_steps):
            tangent = torch.linalg.svd(derivative(second)).Vh[-1]
            if direction is None:
                direction = sense * tangent
            direction = tangent if tangent @ direction > 0 else -tangent
            second = second + 0.1 * distance * direction
            for _ in range(20):
                with torch.no_grad():
                    residual = target - total(second)
                if residual.abs().max() <= 1e-15 * scale:
                    break
                second = second + torch.linalg.pinv(derivative(second)) @ residual
            apart = (second.sort().values - first).abs().max().item()
            if not (second.min() >= 0 and second.max() <= 1):
                break
            if apart >= distance:
                with torch.no_grad():
                    difference = (total(second) - target).abs().max().item()
                if difference > 1e-9 * scale:
                    break
                return Collision(torch.cat([fixed, first]), torch.cat([fixed, second]), difference, apart)
    raise ArithmeticError(f"no collision at a distance of {distance} within {max_steps} steps and [0, 1]: try a smaller distance")
