"""What a model of crops must beat: a random training place, the middle of all training places, and the most similar crop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from geobased.geography.coordinates import check_coordinates, spherical_mean
from geobased.geography.evaluation import EvaluationResult, evaluate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

QUERIES_PER_BLOCK = 512


@dataclass(frozen=True)
class LabelledCrops:
    """Crops whose places are known.

    Args:
        pixels: float [n, 3, height, width].
        coordinates: [n, 2] (latitude, longitude) in degrees.
        countries: [n] codes.

    Raises:
        ValueError: no crops, lengths that differ, coordinates that are none.
    """

    pixels: torch.Tensor
    coordinates: np.ndarray
    countries: Sequence[str]

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or not len(self.pixels):
            raise ValueError(f"pixels must be [n, 3, height, width], n > 0, not of shape {tuple(self.pixels.shape)}")
        shape = (len(self.pixels), 2)
        if self.coordinates.shape != shape or len(self.countries) != shape[0]:
            raise ValueError(
                f"there are {shape[0]} crops, but coordinates of shape {self.coordinates.shape} and"
                f" {len(self.countries)} countries"
            )
        check_coordinates(self.coordinates[:, 0], self.coordinates[:, 1], name="places of crops")


class NearestPixels:
    """The training crop whose pixels are most like a query's, by the sum of squared differences of small pictures.

    Args:
        pixels: float [n, 3, height, width] training crops; they are kept on their device.
        side: edge of the small pictures that are compared, averages of the crop's pixels.

    Raises:
        ValueError: no crops, or a side larger than theirs.
    """

    def __init__(self, pixels: torch.Tensor, side: int = 16) -> None:
        if pixels.ndim != 4 or not len(pixels) or not 1 <= side <= min(pixels.shape[2:]):
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} must be [n, 3, height, width] of at least side={side} pixels"
            )
        self.side = side
        self._train = self._small(pixels)
        self._norms = (self._train**2).sum(dim=1)

    def __call__(self, pixels: torch.Tensor, *, progress: bool = False) -> torch.Tensor:
        """Number of the nearest training crop of each query [m, 3, height, width], the first of equally near ones: int64 [m]."""
        queries = self._small(pixels.to(self._train.device))
        starts = range(0, len(queries), QUERIES_PER_BLOCK)
        found = []
        for start in tqdm(starts, desc="nearest pixels", disable=not progress):
            # the query's own norm is the same for all
            scores = self._norms - 2 * queries[start : start + QUERIES_PER_BLOCK] @ self._train.T
            found.append(scores.argmin(dim=1))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    def _small(self, pixels: torch.Tensor) -> torch.Tensor:
        # centred: differences of large squares lose digits
        return F.adaptive_avg_pool2d(pixels.float(), self.side).flatten(1) - 0.5


def chance(train: "ArrayLike", count: int, *, seed: int = 0) -> np.ndarray:
    """Rows [count] of training places [n, 2] drawn at random with replacement: the guess of who knows where crops come from.

    Raises:
        ValueError: no training places.
    """
    places = np.asarray(train)
    if not len(places):
        raise ValueError("there are no training places to draw from")
    return np.random.default_rng(seed).integers(0, len(places), count)


def evaluate_baselines(
    train: LabelledCrops, test: LabelledCrops, *, side: int = 16, seed: int = 0, progress: bool = False, **options: Any
) -> dict[str, EvaluationResult]:
    """Baselines by the metrics of `geobased.geography.evaluation`.

    Args:
        train: what they know.
        test: what they are measured on.
        side: see `NearestPixels`.
        seed: of the random places.
        progress: whether a progress bar is shown.
        options: of `geobased.geography.evaluation.evaluate` (thresholds_km, bootstrap, groups, ...).

    Returns:
        "chance": a random training place, and its country. "mean": the spherical mean of the training places, and the
        country that most of them lie in. "nearest": place and country of the training crop with the most similar pixels.

    Raises:
        ValueError: training places that cancel each other, and what `evaluate` refuses.
    """
    count = len(test.coordinates)
    codes = np.asarray(train.countries)
    names, sizes = np.unique(codes, return_counts=True)
    middle = np.tile(spherical_mean(train.coordinates[:, 0], train.coordinates[:, 1]), (count, 1))
    guesses = {"mean": (middle, [str(names[sizes.argmax()])] * count)}
    for name, rows in (
        ("chance", chance(train.coordinates, count, seed=seed)),
        ("nearest", NearestPixels(train.pixels, side)(test.pixels, progress=progress).cpu().numpy()),
    ):
        guesses[name] = (train.coordinates[rows], codes[rows].tolist())
    return {
        name: evaluate(places, test.coordinates, predicted_countries=predicted, countries=test.countries, seed=seed, **options)
        for name, (places, predicted) in ((name, guesses[name]) for name in ("chance", "mean", "nearest"))
    }


__all__ = ["LabelledCrops", "NearestPixels", "chance", "evaluate_baselines"]
