# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Hierarchical zero-shot geolocalization: country, then region, then city, by texts alone (Haas et al. 2023)."""

import string
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .captions import in_country
from .label_embeddings import LabelEmbedder

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .candidate_ceiling import CandidateCeiling


class Place(Hashable, Protocol):
    """A candidate; coordinates are degrees. Places are told apart by being unequal."""

    @property
    def name(self) -> str: ...
    @property
    def latitude(self) -> float: ...
    @property
    def longitude(self) -> float: ...


class CandidateSource(Protocol):
    """Where candidates come from; `geobased.geography.gazetteer.Gazetteer` is one."""

    def candidates(self, level: Any, *, within: Any = None, k: int | None = None) -> Sequence[Place]:
        """Places of a level that lie within a place of a level above (everywhere if None); the k most important if k is given."""
        ...


@dataclass(frozen=True)
class SearchLevel:
    """One step down.

    Args:
        name: level of the candidates, as their source calls it: "country", "region", "city" or any other.
        prompts: templates of the texts that stand for a candidate; the embeddings of several are averaged. `{name}` is the
            candidate's name. A level's name in braces is the name of the place at that level, `{country}` with "the" where
            English has it ("in the Netherlands").
        k: number of candidates within each place of the level above; all if None.

    Raises `ValueError` if there is no prompt, or k is below 1.
    """

    name: str
    prompts: tuple[str, ...]
    k: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts or isinstance(self.prompts, str):
            raise ValueError(f"prompts={self.prompts!r} of level {self.name!r} must be a tuple of at least one template")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k} of level {self.name!r} must be at least 1, or None for all candidates")


# as published: all countries, then the 30 most populous cities
STREETCLIP_LEVELS = (
    SearchLevel("country", ("A Street View photo in {country}.",)),
    SearchLevel("city", ("A Street View photo from {city}.",), k=30),
)

PlacePath = tuple[Place, ...]


@dataclass(frozen=True)
class ZeroShotPrediction:
    """path holds a place for each level, the largest first; score is the probability of the last."""

    path: PlacePath
    score: float

    @property
    def latitude(self) -> float:
        return self.path[-1].latitude

    @property
    def longitude(self) -> float:
        return self.path[-1].longitude


@dataclass(frozen=True)
class ZeroShotResult:
    """paths of the candidates that any image reached, and log_probabilities float32 [images, paths], -inf where one did not."""

    paths: list[PlacePath]
    log_probabilities: torch.Tensor

    def top(self, k: int = 1) -> list[list[ZeroShotPrediction]]:
        """For each image its at most k best candidates, best first. Raises `ValueError` for k below 1."""
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        values, columns = self.log_probabilities.topk(min(k, len(self.paths)), dim=1)
        return [
            [ZeroShotPrediction(self.paths[i], score) for i, score, reached in zip(*row, strict=True) if reached]
            for row in zip(columns.tolist(), values.exp().tolist(), values.isfinite().tolist(), strict=True)
        ]

    def at_level(self, depth: int) -> "ZeroShotResult":
        """The same probabilities, summed up for the places at a depth: 0 for the first level, countries say."""
        number = {path: i for i, path in enumerate(dict.fromkeys(path[: depth + 1] for path in self.paths))}
        columns = [number[path[: depth + 1]] for path in self.paths]
        group = torch.tensor(columns, device=self.log_probabilities.device)
        return ZeroShotResult(list(number), _logsumexp_within(self.log_probabilities, group, len(number)))


class HierarchicalZeroShot:
    """Finds the place of an image by going down from the whole world, choosing among texts at each level.

    The probability of a candidate is that of the place it lies in, times the softmax of its similarity (scaled as the model was
    trained) among the candidates within that place.

    Args:
        candidates: source of the places.
        embedder: embeds the texts; its model's logit_scale is used.
        levels: the way down, of any depth. A place that has no candidates at a level stands for itself there.
        beam: places of each level that are gone on from. 1 is greedy search, as StreetCLIP was evaluated: the best country first,
            then a city in it. None is joint search: the best city of all, however likely its country; the sum over all cities is
            then 1. Joint search embeds the candidates of all places once.

    Raises `ValueError` for no levels, a repeated level, a beam below 1, and prompts that name a level further down or do not name
    the candidate; when searching, if the source has no candidates at the first level.

    Example:

    ```python
    from geobased.geography.gazetteer import Gazetteer

    search = HierarchicalZeroShot(Gazetteer(), LabelEmbedder(model, tokenizer))
    best = search(model.get_image_embeddings(pixel_values).projected).top(5)
    ```
    """

    def __init__(
        self,
        candidates: CandidateSource,
        embedder: LabelEmbedder,
        levels: Sequence[SearchLevel] = STREETCLIP_LEVELS,
        *,
        beam: int | None = None,
    ) -> None:
        names = [level.name for level in levels]
        if not levels or len(set(names)) != len(names):
            raise ValueError(f"levels {names} must be at least one, and each only once")
        if beam is not None and beam < 1:
            raise ValueError(f"beam={beam} must be at least 1 (greedy search), or None for joint search")
        for depth, level in enumerate(levels):
            _check_prompts(level, names[: depth + 1])
        self.candidates = candidates
        self.embedder = embedder
        self.levels = tuple(levels)
        self.beam = beam
        self._families: dict[tuple[int, PlacePath], list[PlacePath]] = {}
        self._embedded: dict[tuple[int, PlacePath | None], torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, image_embeddings: torch.Tensor) -> ZeroShotResult:
        """image_embeddings [images, projection_dim], the projected ones, of any length -> where each image may be from."""
        return self.differentiable(image_embeddings)

    def differentiable(self, image_embeddings: torch.Tensor) -> ZeroShotResult:
        """As a call, with log probabilities that have gradients to `image_embeddings`."""
        if image_embeddings.dim() != 2 or not len(image_embeddings):
            raise ValueError(f"image_embeddings must be [images, projection_dim], not {tuple(image_embeddings.shape)}")
        if not image_embeddings.isfinite().all():
            bad = (~image_embeddings.isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise ValueError(
                f"the embeddings of images {bad[:10]} are not finite: is the model's dtype too small for its weights?"
            )
        scale = self.embedder.model.logit_scale.float().exp()
        images = nn.functional.normalize(image_embeddings.to(scale.device).float(), dim=-1) * scale
        paths: list[PlacePath] = [()]
        scores = images.new_zeros(len(images), 1)
        for depth in range(len(self.levels)):
            if self.beam is not None and len(paths) > self.beam:
                best = scores.topk(self.beam, dim=1)
                scores = torch.full_like(scores, -torch.inf).scatter(1, best.indices, best.values)
                kept = scores.isfinite().any(dim=0).nonzero().flatten()
                paths, scores = [paths[i] for i in kept.tolist()], scores[:, kept]
            families = [self._family(depth, path) for path in paths]
            with torch.no_grad():
                embeddings = self._embeddings(depth, paths, families)
            sizes = torch.tensor([len(family) for family in families], device=images.device)
            parent = torch.arange(len(families), device=images.device).repeat_interleave(sizes)
            with torch.autocast(images.device.type, enabled=False):  # logits reach 100: bfloat16 would round them to 0.5
                logits = images @ embeddings.T
            scores = scores[:, parent] + logits - _logsumexp_within(logits, parent, len(families))[:, parent]
            paths = [path for family in families for path in family]
        return ZeroShotResult(paths, scores)

    def leaves(self) -> list[PlacePath]:
        """All paths that a search can end with."""
        paths: list[PlacePath] = [()]
        for depth in range(len(self.levels)):
            paths = [path for parent in paths for path in self._family(depth, parent)]
        return paths

    def ceiling(self, latitude: "ArrayLike", longitude: "ArrayLike") -> "CandidateCeiling":
        """The best distances that a choice among the leaves can reach for photos taken at these places (degrees, [points])."""
        from .candidate_ceiling import candidate_ceiling

        places = [path[-1] for path in self.leaves()]
        return candidate_ceiling([p.latitude for p in places], [p.longitude for p in places], latitude, longitude)

    # --- candidates and their embeddings ------------------------------------------------------------------------------

    def _family(self, depth: int, parent: PlacePath) -> list[PlacePath]:
        """The paths one level down from parent."""
        if (depth, parent) not in self._families:
            level = self.levels[depth]
            within = parent[-1] if parent else None
            places = list(self.candidates.candidates(level.name, within=within, k=level.k)) or list(parent[-1:])
            if not places:
                raise ValueError(f"the source has no candidates of level {level.name!r}")
            self._families[depth, parent] = [(*parent, place) for place in places]
        return self._families[depth, parent]

    def _embeddings(self, depth: int, parents: list[PlacePath], families: list[list[PlacePath]]) -> torch.Tensor:
        """float32 [paths of all families, projection_dim] of length one."""
        groups: dict[tuple[int, PlacePath | None], list[PlacePath]]
        if self.beam is None:
            # all families are asked for together, always: one entry, and one file
            groups = {(depth, None): [path for family in families for path in family]}
        else:
            groups = {(depth, parent): family for parent, family in zip(parents, families, strict=True)}
        missing = {key: paths for key, paths in groups.items() if key not in self._embedded}
        texts = [[text for path in paths for text in self._texts(depth, path)] for paths in missing.values()]
        for key, embeddings in zip(missing, self.embedder.embed_sets(texts), strict=True):
            mean = embeddings.unflatten(0, (-1, len(self.levels[depth].prompts))).mean(dim=1)
            directions = nn.functional.normalize(mean, dim=-1)
            if directions.is_cuda:  # finished before a search in another stream finds it
                torch.cuda.current_stream(directions.device).synchronize()
            self._embedded[key] = directions
        return torch.cat([self._embedded[key] for key in groups])

    def _texts(self, depth: int, path: PlacePath) -> list[str]:
        names = {level.name: place.name for level, place in zip(self.levels, path, strict=False)}
        if "country" in names:
            names["country"] = in_country(names["country"])
        return [prompt.format_map({**names, "name": path[-1].name}) for prompt in self.levels[depth].prompts]


def _check_prompts(level: SearchLevel, above: list[str]) -> None:
    for prompt in level.prompts:
        fields = {field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None}
        if unknown := fields - {"name", *above}:
            raise ValueError(
                f"prompt {prompt!r} of level {level.name!r} has the field {{{unknown.pop()}}}: use {{name}} or"
                f" {', '.join(f'{{{name}}}' for name in above)}"
            )
        if not fields & {"name", level.name}:
            raise ValueError(f"prompt {prompt!r} of level {level.name!r} does not name the candidate: use {{{level.name}}}")


def _logsumexp_within(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """values [images, candidates] -> [images, groups], where group [candidates] holds the number of each one's group."""
    index = group.expand_as(values)
    highest = values.new_full((len(values), groups), -torch.inf).scatter_reduce(1, index, values, "amax")
    highest = highest.nan_to_num(neginf=0.0)  # a group that an image did not reach: its sum is zero, not NaN
    sums = torch.zeros_like(highest).scatter_add(1, index, (values - highest[:, group]).exp())
    return highest + sums.log()


__all__ = [
    "STREETCLIP_LEVELS",
    "CandidateSource",
    "HierarchicalZeroShot",
    "Place",
    "SearchLevel",
    "ZeroShotPrediction",
    "ZeroShotResult",
]
