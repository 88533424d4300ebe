"""Hold-out by blocks of the Earth: an image is kept for evaluation because of where it was taken, never by a draw of its own.

Photos of one street end up on both sides of a random split, and a model is then praised for what it has seen. Here the sphere is
cut into blocks, and a block is held out as a whole. Which ones are is a function of the seed and the block alone, so a stream
needs no look ahead, and more data do not move a block to the other side.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geobased.geography.coordinates import check_coordinates

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

KILOMETRES_PER_DEGREE = 111.195


@dataclass(frozen=True)
class BlockHoldout:
    """Which places are held out.

    Args:
        degrees: height of a block; its width is about as many kilometres at any latitude (a row of blocks has fewer near the
            poles), so no block is a sliver, and blocks meet at the dateline.
        fraction: share of the blocks that are held out. The share of images follows from where they lie; 0 holds out none.
        seed: which blocks they are.
        margin_km: training leaves out images nearer than this to a held-out block, so that no image of evaluation has a
            neighbour in training just across a border. It may not exceed half a block.

    Raises:
        ValueError: values outside their ranges.

    Example:
        >>> holdout = BlockHoldout(degrees=4, fraction=0.2)
        >>> holdout.held_out([55.70, 55.71], [13.19, 13.20]).tolist()  # neighbours go together
        [True, True]
    """

    degrees: float = 4.0
    fraction: float = 0.1
    seed: int = 0
    margin_km: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.degrees <= 90:
            raise ValueError(f"degrees={self.degrees} must be above 0 and at most 90: the height of a block")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be at least 0 and below 1: the share of blocks held out")
        if not 0 <= self.margin_km <= self.degrees * KILOMETRES_PER_DEGREE / 2:
            raise ValueError(
                f"margin_km={self.margin_km} must lie between 0 and half a block,"
                f" {self.degrees * KILOMETRES_PER_DEGREE / 2:.0f} km"
            )

    def blocks(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Number of the block that each point [n] lies in, int64 [n].

        Raises:
            ValueError: NaN, coordinates out of range or swapped.
        """
        lat, lng = check_coordinates(latitude, longitude, name="places to split")
        return self._blocks(lat, lng)

    def held_out(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Whether each point [n] lies in a block that is held out, bool [n]. Raises as `blocks`."""
        return self._is_held_out(self.blocks(latitude, longitude))

    def in_training(self, latitude: "ArrayLike", longitude: "ArrayLike") -> np.ndarray:
        """Whether each point [n] may be trained on: not held out, and no held-out block within the margin. Raises as `blocks`."""
        lat, lng = check_coordinates(latitude, longitude, name="places to split")
        training = ~self._is_held_out(self._blocks(lat, lng))
        if not self.margin_km:
            return training
        # sixteen compass points at the margin's distance; one no wider than half a block cannot step over one
        step = np.radians(self.margin_km / KILOMETRES_PER_DEGREE)
        phi, lam = np.radians(lat), np.radians(lng)
        for bearing in np.arange(16) * np.pi / 8:
            sine = np.sin(phi) * np.cos(step) + np.cos(phi) * np.sin(step) * np.cos(bearing)
            east = np.arctan2(np.sin(bearing) * np.sin(step) * np.cos(phi), np.cos(step) - np.sin(phi) * sine)
            there = np.degrees(np.arcsin(np.clip(sine, -1, 1))), (np.degrees(lam + east) + 180) % 360 - 180
            training &= ~self._is_held_out(self._blocks(*there))
        return training

    def _blocks(self, lat: np.ndarray, lng: np.ndarray) -> np.ndarray:
        rows = int(np.ceil(180 / self.degrees))
        row = np.minimum(((lat + 90) / self.degrees).astype(np.int64), rows - 1)
        middle = np.radians(np.minimum((row + 0.5) * self.degrees, 180) - 90)
        columns = np.maximum(np.rint(360 * np.cos(middle) / self.degrees).astype(np.int64), 1)
        # longitudes 180 and -180 are one
        column = ((lng + 180) % 360 / 360 * columns).astype(np.int64)
        return row * 1_000_000 + np.minimum(column, columns - 1)

    def _is_held_out(self, blocks: np.ndarray) -> np.ndarray:
        return _uniform(blocks, self.seed) < self.fraction


def _uniform(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each integer, the same on every machine: SplitMix64's finaliser over the integer and the seed."""
    with np.errstate(over="ignore"):
        state = numbers.astype(np.uint64) + np.uint64(1) + np.uint64(seed % 2**32) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


__all__ = ["BlockHoldout"]
