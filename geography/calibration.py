"""Calibration of what a model says of its own answers: probabilities, error radii, and when not to answer.

Everything is fitted on held-out images and judged on others; nothing here knows a model.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

DEFAULT_BINS = 15
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def reliability_table(
    confidences: "ArrayLike", correct: "ArrayLike", bins: int = DEFAULT_BINS, *, adaptive: bool = False
) -> list[dict[str, Any]]:
    """How often answers of each confidence are right.

    Args:
        confidences: [n] probabilities that the answers are right, by the model.
        correct: [n] whether they are.
        bins: number of bins of equal width over [0, 1].
        adaptive: bins that hold about equally many answers instead; equal confidences are never parted.

    Returns:
        A row {"low", "high", "count", "confidence", "accuracy"} per bin that is not empty; means over its answers.

    Raises:
        ValueError: different lengths, no answers, confidences outside [0, 1], no bins.
    """
    values, hits = _pair(confidences, correct, "confidences", "correct")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    if (values < 0).any() or (values > 1).any():
        raise ValueError(f"confidences must lie between 0 and 1, not {values.min():g} to {values.max():g}")
    # the upper edge belongs to the bin, as in Guo et al. 2017; 0 to the first one
    if adaptive:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1), method="lower"))
        edges = edges if len(edges) > 1 else np.array([0.0, edges[0]])
        index = np.clip(np.searchsorted(edges, values) - 1, 0, len(edges) - 2)
    else:
        edges = np.arange(bins + 1) / bins
        index = np.clip(np.ceil(values * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=len(edges) - 1)
    sums = [np.bincount(index, weights=column, minlength=len(counts)) for column in (values, hits)]
    return [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "count": int(counts[i]),
            "confidence": float(sums[0][i] / counts[i]),
            "accuracy": float(sums[1][i] / counts[i]),
        }
        for i in np.flatnonzero(counts)
    ]


def expected_calibration_error(
    confidences: "ArrayLike", correct: "ArrayLike", bins: int = DEFAULT_BINS, *, adaptive: bool = False
) -> float:
    """Mean distance between confidence and accuracy over bins, weighted by their counts (Guo et al. 2017, equation 3).

    Takes and raises what `reliability_table` does.

    Example:
        >>> round(expected_calibration_error([0.9, 0.9], [True, False]), 6)
        0.4
    """
    table = reliability_table(confidences, correct, bins, adaptive=adaptive)
    total = sum(row["count"] for row in table)
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table) / total


def fit_temperature(logits: "ArrayLike", labels: "ArrayLike") -> float:
    """The temperature that makes softmax(logits / temperature) likeliest for the labels (Guo et al. 2017, section 4.2).

    Args:
        logits: [n, classes] of held-out images.
        labels: [n] their classes.

    Returns:
        A number in [0.01, 100].

    Raises:
        ValueError: other shapes, logits that are not finite, labels that are no classes.
    """
    values, classes = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or not len(values) or classes.shape != values.shape[:1]:
        raise ValueError(f"logits must be [n, classes] and labels [n], n > 0, not of shapes {values.shape} and {classes.shape}")
    if not np.isfinite(values).all():
        raise ValueError("logits hold NaN or infinity")
    if classes.min() < 0 or classes.max() >= values.shape[1]:
        raise ValueError(f"labels go from {classes.min()} to {classes.max()} but there are {values.shape[1]} classes")
    # differences to the true class: the likelihood depends on nothing else
    values = values - np.take_along_axis(values, classes[:, None], axis=1)

    def mean_loss(log_temperature: float) -> float:
        scaled = values / np.exp(log_temperature)
        highest = scaled.max(axis=1)
        return float(np.mean(highest + np.log(np.exp(scaled - highest[:, None]).sum(axis=1))))

    # convex in 1 / temperature, so unimodal in its logarithm: golden section
    low, high, ratio = np.log(0.01), np.log(100.0), (np.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    loss_left, loss_right = mean_loss(left), mean_loss(right)
    while high - low > 1e-6:
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - ratio * (high - low)
            loss_left = mean_loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + ratio * (high - low)
            loss_right = mean_loss(right)
    return float(np.exp((low + high) / 2))


def fit_radius_scale(radii_km: "ArrayLike", errors_km: "ArrayLike", coverage: float) -> float:
    """The factor of radii with which a new image's true place lies inside with probability `coverage`, at least.

    Split conformal prediction: the factor is the ceil((n + 1) * coverage)-th smallest error / radius. The promise holds for
    images like the held-out ones (exchangeable with them), on average over them, whatever the model.

    Args:
        radii_km: [n] positive radii that the model gave before calibration.
        errors_km: [n] distances of its answers from the truth.
        coverage: between 0 and 1.

    Raises:
        ValueError: different lengths, radii that are not positive, and too few images for that coverage (0.9 needs 9).
    """
    radii, errors = _pair(radii_km, errors_km, "radii_km", "errors_km")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage={coverage} must lie between 0 and 1")
    if (radii <= 0).any():
        raise ValueError(f"radii_km must be positive; the least is {radii.min():g}")
    rank = int(np.ceil(round((len(radii) + 1) * coverage, 9)))
    if rank > len(radii):
        raise ValueError(f"{len(radii)} images are too few to calibrate a coverage of {coverage}: {_fewest(coverage)} are needed")
    return float(np.sort(errors / radii)[rank - 1])


def radius_coverage(radii_km: "ArrayLike", errors_km: "ArrayLike") -> float:
    """Share of answers whose true place lies within the radius. Raises `ValueError` for different lengths and no answers."""
    radii, errors = _pair(radii_km, errors_km, "radii_km", "errors_km")
    return float((errors <= radii).mean())


def fit_abstention_radius(radii_km: "ArrayLike", errors_km: "ArrayLike", *, within_km: float, rate: float) -> float | None:
    """The largest radius up to which answers are good enough: at least `rate` of those given lie within `within_km`.

    A model that abstains above it answers as many images as it can. None if no radius will do.

    Args:
        radii_km: [n] radii (or any other measure of uncertainty) of held-out images.
        errors_km: [n] distances of the answers from the truth.

    Raises:
        ValueError: different lengths, no answers, a rate outside (0, 1].
    """
    radii, errors = _pair(radii_km, errors_km, "radii_km", "errors_km")
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} must lie between 0 and 1")
    order = np.argsort(radii, kind="stable")
    ordered = radii[order]
    good = np.cumsum(errors[order] <= within_km) / np.arange(1, len(radii) + 1)
    # a threshold takes all answers of one radius or none
    last = np.append(ordered[1:] != ordered[:-1], True)
    possible = np.flatnonzero(last & (good >= rate))
    return float(ordered[possible[-1]]) if len(possible) else None


def risk_coverage_curve(uncertainty: "ArrayLike", errors_km: "ArrayLike", shares: "ArrayLike" = SHARES) -> list[dict[str, float]]:
    """Median and mean error of the most certain answers, for several shares of them.

    Returns:
        A row {"share", "median_km", "mean_km"} per share (rounded up to whole answers).

    Raises:
        ValueError: different lengths, no answers, shares outside (0, 1].
    """
    values, errors = _pair(uncertainty, errors_km, "uncertainty", "errors_km")
    fractions = np.asarray(shares, dtype=np.float64)
    if ((fractions <= 0) | (fractions > 1)).any():
        raise ValueError(f"shares must lie between 0 and 1, not {fractions.tolist()}")
    ordered = errors[np.argsort(values, kind="stable")]
    rows = []
    for share in fractions:
        kept = ordered[: int(np.ceil(round(share * len(ordered), 9)))]
        rows.append({"share": float(share), "median_km": float(np.median(kept)), "mean_km": float(kept.mean())})
    return rows


def _fewest(coverage: float) -> int:
    """The least n with ceil((n + 1) * coverage) <= n."""
    return int(np.ceil(round(coverage / (1 - coverage), 9)))


def _pair(first: "ArrayLike", second: "ArrayLike", first_name: str, second_name: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"{first_name} and {second_name} must be [n] each, n > 0, not of shapes {a.shape} and {b.shape}")
    for name, values in ((first_name, a), (second_name, b)):
        if np.isnan(values).any():
            raise ValueError(f"{name}[{int(np.isnan(values).argmax())}] is NaN")
    return a, b


__all__ = [
    "expected_calibration_error",
    "fit_abstention_radius",
    "fit_radius_scale",
    "fit_temperature",
    "radius_coverage",
    "reliability_table",
    "risk_coverage_curve",
]
