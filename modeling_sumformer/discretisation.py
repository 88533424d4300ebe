# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""The discontinuous construction: one number, d' = 1, holds a whole set of cells."""

import math
from collections.abc import Callable, Sequence

import torch


def exact_float64_cells(num_elements: int) -> int:
    """How many cells one float64 can count exactly: codes up to (n + 1)^cells must stay within 53 bits.

    Example:
        >>> exact_float64_cells(8), exact_float64_cells(64)
        (16, 8)
    """
    return int(53 / math.log2(num_elements + 1))


class DiscreteSumformer:
    """A piecewise constant Sumformer with d' = 1, in exact integers.

    [0, 1]^d is cut into equal cells. phi(x) = (n + 1)^(number of x's cell), so the digits of the sum in base n + 1 are the
    numbers of elements in the cells. psi decodes them, puts the elements in the centres of their cells, and evaluates the
    function there. phi and psi are not continuous; the sum has num_cells * log2(n + 1) bits, which is why Python's integers
    are used and why this is no layer.

    Args:
        function: [n, d] -> [n, ...], permutation equivariant: the function to approximate.
        num_elements: the largest size of a set.
        num_coordinates: d.
        cells_per_axis: the centre of a cell is at most sqrt(d) / (2 * cells_per_axis) away.

    Raises:
        ValueError: sizes below 1.
    """

    latent_size = 1

    def __init__(
        self, function: Callable[[torch.Tensor], torch.Tensor], num_elements: int, num_coordinates: int, cells_per_axis: int
    ):
        if min(num_elements, num_coordinates, cells_per_axis) < 1:
            raise ValueError(f"{num_elements=}, {num_coordinates=} and {cells_per_axis=} must be at least 1")
        self.function, self.num_elements = function, num_elements
        self.num_coordinates, self.cells_per_axis = num_coordinates, cells_per_axis

    @property
    def num_cells(self) -> int:
        return self.cells_per_axis**self.num_coordinates

    def cell(self, x: Sequence[float]) -> int:
        """The number of the cell that a point of [0, 1]^d lies in."""
        if len(x) != self.num_coordinates or not all(0 <= coordinate <= 1 for coordinate in x):
            raise ValueError(f"{list(x)} is no point of [0, 1]^{self.num_coordinates}")
        number = 0
        for coordinate in x:
            number = number * self.cells_per_axis + min(int(coordinate * self.cells_per_axis), self.cells_per_axis - 1)
        return number

    def centre(self, cell: int) -> list[float]:
        digits = []
        for _ in range(self.num_coordinates):
            cell, digit = divmod(cell, self.cells_per_axis)
            digits.append((digit + 0.5) / self.cells_per_axis)
        return digits[::-1]

    def phi(self, x: Sequence[float]) -> int:
        return (self.num_elements + 1) ** self.cell(x)

    def decode(self, total: int) -> list[int]:
        """The sum of phi -> the cells of all elements, in ascending order, one entry for each element.

        Raises:
            ValueError: no sum of at most `num_elements` codes.
        """
        cells, rest = [], total
        for cell in range(self.num_cells):
            rest, count = divmod(rest, self.num_elements + 1)
            cells += [cell] * count
        if rest or total < 0 or len(cells) > self.num_elements:
            raise ValueError(f"{total} is not the sum of the codes of at most {self.num_elements} elements")
        return cells

    def psi(self, x: Sequence[float], total: int) -> torch.Tensor:
        """What the function gives for x's cell in the set that the sum tells: [...]."""
        own, cells = self.cell(x), self.decode(total)
        cells.remove(own)
        points = [self.centre(cell) for cell in (own, *cells)]
        return self.function(torch.tensor(points, dtype=torch.float64))[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, d] in [0, 1] -> [n, ...].

        Raises:
            ValueError: more elements than `num_elements`, or points outside [0, 1]^d.
        """
        points = x.tolist()
        if len(points) > self.num_elements:
            raise ValueError(f"a set of {len(points)} elements, but the codes are for at most {self.num_elements}")
        total = sum(self.phi(point) for point in points)
        return torch.stack([self.psi(point, total) for point in points])
