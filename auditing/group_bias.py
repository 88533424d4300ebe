"""Whether a geolocalizer is worse for some groups of places than for others, and whom it sees where they are not.

Places that were photographed together are not independent, so intervals and tests resample clusters of images, not images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from geobased.geography.coordinates import check_coordinates, haversine_km
from geobased.geography.country_groups import density_classes, remoteness_classes, un_regions, un_subregions
from geobased.geography.evaluation import THRESHOLDS_KM, Estimate

from .statistics import holm

# resampled weights of images that are held at once
ELEMENTS = 4_000_000
LEAST_IMAGES = 20


@dataclass(frozen=True)
class GroupResult:
    """One group of true places.

    Attributes:
        group: its name.
        images, clusters: how many.
        within: share of answers within each distance in km, by distance.
        median_km: of the errors.
        gap: `median_km` or the share within `gap_km` of this group less that of all others.
        p_value, p_value_holm: two-sided, of no gap; the second for all groups of the grouping together.
        over_prediction: how often the group is answered, by how often it is true; 1 without bias, None if answers have no groups.
    """

    group: str
    images: int
    clusters: int
    within: dict[float, Estimate]
    median_km: Estimate
    gap: Estimate
    p_value: float
    p_value_holm: float
    over_prediction: Estimate | None


@dataclass(frozen=True)
class GroupingResult:
    """Groups of one kind, the largest first.

    Attributes:
        worst: the group with the least share within `gap_km` among those with at least `LEAST_IMAGES` images, "" if none has.
        unseen: groups that are answered though they are nowhere true: number of answers.
        unknown: images whose group is not known, left out.
    """

    grouping: str
    groups: list[GroupResult]
    worst: str
    unseen: dict[str, int]
    unknown: int


@dataclass(frozen=True)
class BiasReport:
    """What `group_bias` found; `to_dict` gives JSON values.

    Attributes:
        images, clusters: of all.
        gap_km: distance of the shares that are compared.
        within, median_km: of all images.
    """

    images: int
    clusters: int
    gap_km: float
    within: dict[float, Estimate]
    median_km: Estimate
    groupings: list[GroupingResult]

    def to_dict(self) -> dict[str, Any]:
        return _plain(asdict(self))


def place_groupings(truths: "np.ndarray", country_codes: Sequence[str]) -> dict[str, list[str]]:
    """Groups of true places [n, 2] by country, UN region and subregion, density of the country, and distance from towns."""
    return {
        **answer_groupings(country_codes),
        "distance from towns": remoteness_classes(*np.asarray(truths, dtype=np.float64).T),
    }


def answer_groupings(country_codes: Sequence[str]) -> dict[str, list[str]]:
    """Groups that a country alone decides, of answers as of true places."""
    return {
        "country": [str(code) for code in country_codes],
        "UN region": un_regions(country_codes),
        "UN subregion": un_subregions(country_codes),
        "population density": density_classes(country_codes),
    }


def group_bias(
    answers: "np.ndarray",
    truths: "np.ndarray",
    groupings: Mapping[str, Sequence[str]],
    *,
    answered_groupings: Mapping[str, Sequence[str]] | None = None,
    clusters: Sequence[Any] | None = None,
    gap_km: float = 750.0,
    resamples: int = 2000,
    coverage: float = 0.95,
    seed: int = 0,
) -> BiasReport:
    """Accuracy of groups, their gaps to all others, and over-prediction.

    Args:
        answers, truths: [n, 2] (latitude, longitude) in degrees.
        groupings: names of the groups of true places [n] by kind (see `place_groupings`); a column of your own, such as income
            groups, is one more. "" is not known.
        answered_groupings: the same of answers, for over-prediction; kinds that are missing have none.
        clusters: [n] what images were taken together, such as cities or sequences; images within a degree of latitude and
            longitude by default.
        gap_km: one of `THRESHOLDS_KM`: groups are compared by the share of answers within it.
        resamples: of clusters, for intervals and tests; p values are at least 2 / (resamples + 1), before they are adjusted.

    Raises:
        ValueError: inputs of different lengths, an unknown `gap_km`, fewer than two clusters.
    """
    if gap_km not in THRESHOLDS_KM:
        raise ValueError(f"gap_km={gap_km} is none of {', '.join(f'{km:g}' for km in THRESHOLDS_KM)}")
    answer_lat, answer_lng = check_coordinates(*np.asarray(answers, dtype=np.float64).T, name="answers")
    lat, lng = check_coordinates(*np.asarray(truths, dtype=np.float64).T, name="truths")
    count = len(lat)
    columns = [*groupings.values(), *(answered_groupings or {}).values(), *([] if clusters is None else [clusters])]
    if len(answer_lat) != count or any(len(column) != count for column in columns):
        raise ValueError(f"answers, groupings and clusters must have one entry for each of the {count} truths")
    names = [f"{math.floor(a)},{math.floor(b)}" for a, b in zip(lat, lng, strict=True)] if clusters is None else clusters
    _, cluster_of = np.unique(np.asarray([str(name) for name in names]), return_inverse=True)
    num_clusters = int(cluster_of.max()) + 1
    if num_clusters < 2:
        raise ValueError("all images are of one cluster: resampling clusters needs at least two")
    sample = _Resampled(haversine_km(answer_lat, answer_lng, lat, lng), cluster_of, resamples, coverage, seed)
    everything = np.ones(count, dtype=bool)
    found = [
        _grouping(sample, name, np.asarray([str(v) for v in values]), (answered_groupings or {}).get(name), gap_km)
        for name, values in groupings.items()
    ]
    within, median = sample.accuracy(everything)
    return BiasReport(count, num_clusters, gap_km, within, median, found)


class _Resampled:
    """Errors [n] with weights of resampled clusters."""

    def __init__(self, errors: np.ndarray, cluster_of: np.ndarray, resamples: int, coverage: float, seed: int) -> None:
        # sorted once, for medians
        order = np.argsort(errors, kind="stable")
        self.order, self.errors, self.cluster_of = order, errors[order], cluster_of[order]
        num_clusters = int(cluster_of.max()) + 1
        generator = np.random.default_rng(seed)
        draws = generator.integers(0, num_clusters, (resamples, num_clusters))
        self.weights = np.stack([np.bincount(row, minlength=num_clusters) for row in draws]).astype(np.float64)
        self.tail = (1 - coverage) / 2

    def estimate(self, value: float, resampled: np.ndarray) -> Estimate:
        """With the interval of resampled values; those that are not known, as no image was drawn, are left out."""
        known = resampled[np.isfinite(resampled)]
        if len(known) < 2:
            return Estimate(value)
        low, high = np.quantile(known, [self.tail, 1 - self.tail])
        return Estimate(value, float(low), float(high))

    def totals(self, values: np.ndarray) -> np.ndarray:
        """[resamples] weighted sums of values [n], in the order of the inputs."""
        ordered = values[self.order].astype(np.float64)
        return self.weights @ np.bincount(self.cluster_of, ordered, minlength=self.weights.shape[1])

    def shares(self, hits: np.ndarray, members: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.totals(hits & members) / self.totals(members)

    def hits(self, km: float) -> np.ndarray:
        """Whether answers [n], in the order of the inputs, are within a distance."""
        near = np.empty(len(self.errors), dtype=bool)
        near[self.order] = self.errors <= km
        return near

    def accuracy(self, members: np.ndarray) -> tuple[dict[float, Estimate], Estimate]:
        within = {}
        for km in THRESHOLDS_KM:
            hits = self.hits(km)
            within[km] = self.estimate(float(hits[members].mean()), self.shares(hits, members))
        chosen = members[self.order]
        errors, owners = self.errors[chosen], self.cluster_of[chosen]
        medians = []
        step = max(1, ELEMENTS // len(errors))
        for start in range(0, len(self.weights), step):
            running = self.weights[start : start + step, owners].cumsum(axis=1)
            total = running[:, -1:]
            middle = (running >= total / 2).argmax(axis=1)
            medians.append(np.where(total[:, 0] > 0, errors[middle], np.nan))
        return within, self.estimate(float(np.median(errors)), np.concatenate(medians))


def _grouping(sample: _Resampled, name: str, labels: np.ndarray, answered: Sequence[str] | None, gap_km: float) -> GroupingResult:
    known = labels != ""
    kinds, counts = np.unique(labels[known], return_counts=True)
    hits = sample.hits(gap_km)
    rows: list[dict[str, Any]] = []
    predicted = None if answered is None else np.asarray([str(value) for value in answered])
    for kind in kinds[np.argsort(-counts, kind="stable")]:
        members = labels == kind
        others = known & ~members
        within, median = sample.accuracy(members)
        gaps = sample.shares(hits, members) - sample.shares(hits, others)
        gap = float(hits[members].mean() - hits[others].mean()) if others.any() else math.nan
        over = None
        if predicted is not None:
            answers = known & (predicted == kind)
            with np.errstate(invalid="ignore", divide="ignore"):
                resampled = sample.totals(answers) / sample.totals(members)
            over = sample.estimate(float(answers.sum() / members.sum()), resampled)
        rows.append(
            {
                "group": str(kind),
                "images": int(members.sum()),
                "clusters": len(np.unique(sample.cluster_of[members[sample.order]])),
                "within": within,
                "median_km": median,
                "gap": sample.estimate(gap, gaps),
                "p_value": _two_sided(gaps),
                "over_prediction": over,
            }
        )
    adjusted = holm([row["p_value"] for row in rows])
    groups = [GroupResult(**row, p_value_holm=p_value) for row, p_value in zip(rows, adjusted, strict=True)]
    large = [row for row in groups if row.images >= LEAST_IMAGES]
    unseen: dict[str, int] = {}
    if predicted is not None:
        for value in predicted[known].tolist():
            if value and value not in kinds:
                unseen[value] = unseen.get(value, 0) + 1
    worst = min(large, key=lambda row: row.within[gap_km].value).group if large else ""
    return GroupingResult(name, groups, worst, unseen, int((~known).sum()))


def _two_sided(gaps: np.ndarray) -> float:
    """How often resampled gaps lie on the other side of 0, twice; 1 where there is nothing to compare."""
    known = gaps[np.isfinite(gaps)]
    if not len(known):
        return 1.0
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(known) + 1)))


def _plain(value: Any) -> Any:
    """JSON values: distances as names, numbers that are not known as None."""
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["BiasReport", "GroupResult", "GroupingResult", "answer_groupings", "group_bias", "place_groupings"]
