"""From pixels to ranked places, for the models that the image geolocalization pipeline serves."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from geobased.geography.gazetteer import Gazetteer
from geobased.modeling_pigeon.answers_pigeon import abstains, mass_radius_km, radius_scale
from geobased.modeling_streetclip.label_embeddings import LabelEmbedder
from geobased.modeling_streetclip.zero_shot import (
    STREETCLIP_LEVELS,
    CandidateSource,
    HierarchicalZeroShot,
    PlacePath,
    SearchLevel,
)

DEFAULT_COVERAGE = 0.9
# farther from any city than this, a place has no city's name, and beyond the second distance no country's: it lies at sea
CITY_KM, COUNTRY_KM = 100.0, 500.0
LEVELS = {
    **{level.name: level for level in STREETCLIP_LEVELS},
    "region": SearchLevel("region", ("A Street View photo in the region of {region}.",)),
}
NOWHERE = "at sea or far from any city"
NO_NAMES: dict[str, str | None] = {"country": None, "country_code": None, "region": None, "city": None}


@dataclass(frozen=True)
class AnswerOptions:
    """What a call may ask for; the thresholds are those of `PigeonConfig`, None being the model's own."""

    top_k: int = 5
    coverage: float | None = None
    refine: bool = True
    abstain_radius_km: float | None = None
    abstain_probability: float | None = None
    cells: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.cells < 0:
            raise ValueError(f"cells={self.cells} must be at least 0")
        if self.coverage is not None and not 0 < self.coverage < 1:
            raise ValueError(f"coverage={self.coverage} must lie between 0 and 1, 0.9 say")
        if self.abstain_radius_km is not None and not self.abstain_radius_km > 0:
            raise ValueError(f"abstain_radius_km={self.abstain_radius_km} must be a positive number")
        if self.abstain_probability is not None and not 0 <= self.abstain_probability <= 1:
            raise ValueError(f"abstain_probability={self.abstain_probability} must lie between 0 and 1")

    @property
    def asks_to_abstain(self) -> bool:
        return self.abstain_radius_km is not None or self.abstain_probability is not None


@dataclass
class Ranking:
    """Candidates of a batch, best first: scores, radii_km [batch, k], coordinates [batch, k, 2] and abstain [batch], on the CPU.

    geocells is [batch, k] or None; names has for each image the names of its candidates, as many as there are. cells holds the
    likeliest geocells, whatever the places are, and their probabilities, [batch, n] each, if they were asked for.
    """

    scores: torch.Tensor
    coordinates: torch.Tensor
    radii_km: torch.Tensor
    abstain: torch.Tensor
    geocells: torch.Tensor | None
    names: list[list[dict[str, str | None]]]
    cells: tuple[torch.Tensor, torch.Tensor] | None = None

    def predictions(self, row: int) -> list[dict[str, Any]]:
        """The ranked list of one image."""
        columns = (self.scores[row], self.coordinates[row], self.radii_km[row])
        scores, coordinates, radii = (column.tolist() for column in columns)
        cells = [None] * len(scores) if self.geocells is None else self.geocells[row].tolist()
        abstain = bool(self.abstain[row])
        places: list[dict[str, Any]] = [
            {
                "latitude": latitude,
                "longitude": longitude,
                "score": score,
                **names,
                "geocell": cell,
                "error_radius_km": radius,
                "abstain": abstain,
            }
            # an image may have fewer candidates than the batch's others
            for names, score, (latitude, longitude), radius, cell in zip(self.names[row], scores, coordinates, radii, cells)  # noqa: B905
        ]
        if self.cells is not None:
            numbers, probabilities = (column[row].tolist() for column in self.cells)
            pairs = zip(numbers, probabilities, strict=True)
            places[0]["cells"] = [{"geocell": number, "probability": probability} for number, probability in pairs]
        return places


class Locator(Protocol):
    """A model that ranks places."""

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of preprocessed images, by the image tower alone."""
        ...

    def __call__(self, features: torch.Tensor, options: AnswerOptions) -> Ranking: ...

    def candidate_places(self) -> np.ndarray:
        """[candidates, 2], (latitude, longitude) in degrees of everything that the model can answer with before refinement."""
        ...

    def log_probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """[batch, candidates], of all candidate places before refinement, with gradients to the features."""
        ...


class PigeonLocator:
    """Geocells by a PIGEON model, named by the nearest city."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._names: dict[tuple[float, float], dict[str, str | None]] = {}

    @cached_property
    def gazetteer(self) -> Gazetteer:
        return Gazetteer()

    def candidate_places(self) -> np.ndarray:
        return self.model.geocells.centroids().double().cpu().numpy()

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_embeddings(pixel_values)[0]

    def log_probabilities(self, features: torch.Tensor) -> torch.Tensor:
        return (self.model.cell_head(features).float() / self.model.config.cell_temperature).log_softmax(1)

    def __call__(self, features: torch.Tensor, options: AnswerOptions) -> Ranking:
        model, config = self.model, self.model.config
        coverage = config.radius_coverage if options.coverage is None else options.coverage
        answer = model.locate(embeddings=features, top_k=options.top_k, refine=options.refine, coverage=coverage)
        centroids, cell_radii = model.geocells.centroids(), model.geocells.radii_km()
        scale = radius_scale(config, coverage)
        others = [
            scale * mass_radius_km(places, answer.cell_probabilities, centroids, cell_radii, coverage)
            for places in answer.candidate_coordinates.unbind(1)[1:]
        ]
        abstain = answer.abstain
        if options.asks_to_abstain:
            abstain = _abstain(options, answer.error_radius_km, answer.candidate_scores[:, 0])
        coordinates = answer.candidate_coordinates.double().cpu()
        counts = (answer.candidate_scores > 0).sum(1).tolist()
        cells = None
        if options.cells:
            probabilities, numbers = answer.cell_probabilities.topk(min(options.cells, config.num_cells), dim=1)
            cells = numbers.cpu(), probabilities.cpu()
        return Ranking(
            scores=answer.candidate_scores.cpu(),
            coordinates=coordinates,
            radii_km=torch.stack([answer.error_radius_km, *others], dim=1).cpu(),
            abstain=abstain.cpu(),
            geocells=answer.candidate_cells.cpu(),
            # a score of 0: nothing is left for a further place
            names=[names[: max(1, count)] for names, count in zip(self._named(coordinates), counts, strict=True)],
            cells=cells,
        )

    def _named(self, coordinates: torch.Tensor) -> list[list[dict[str, str | None]]]:
        """Names of places [batch, k, 2]; those seen before are not looked up again."""
        keys = [[(latitude, longitude) for latitude, longitude in row] for row in coordinates.tolist()]
        new = [key for key in dict.fromkeys(key for row in keys for key in row) if key not in self._names]
        if new:
            cities, distances = self.gazetteer.nearest(*np.array(new).T)
            for key, city, distance in zip(new, cities, distances.tolist(), strict=True):
                names = {name: text or None for name, text in self.gazetteer.describe(city).items()}
                if distance > CITY_KM:
                    names["city"] = None
                self._names[key] = NO_NAMES if distance > COUNTRY_KM else names
        return [[self._names[key] for key in row] for row in keys]


class ZeroShotLocator:
    """Candidates of a gazetteer, compared as texts by a CLIP.

    Args:
        model, tokenizer: a CLIP's.
        candidates: source of the places; the package's gazetteer by default, read when the first image comes.
        levels: names of levels ("country", "region", "city") or `SearchLevel`s.
        beam: places of each level that are gone on from; all if None.
        cache_dir: folder of label embeddings; None keeps none on disk.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        candidates: CandidateSource | None,
        levels: Sequence[str | SearchLevel],
        beam: int | None,
        cache_dir: str | os.PathLike | None,
    ) -> None:
        self.model = model
        self.embedder = LabelEmbedder(model, tokenizer, cache_dir=cache_dir)
        self._candidates = candidates
        self._levels, self._beam = [_search_level(level) for level in levels], beam

    @cached_property
    def candidates(self) -> CandidateSource:
        return Gazetteer() if self._candidates is None else self._candidates

    @cached_property
    def search(self) -> HierarchicalZeroShot:
        return HierarchicalZeroShot(self.candidates, self.embedder, self._levels, beam=self._beam)

    @cached_property
    def _joint_search(self) -> HierarchicalZeroShot:
        return HierarchicalZeroShot(self.candidates, self.embedder, self._levels)

    def candidate_places(self) -> np.ndarray:
        return np.array([(path[-1].latitude, path[-1].longitude) for path in self.search.leaves()])

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output

    def log_probabilities(self, features: torch.Tensor) -> torch.Tensor:
        # greedy search gives up candidates, whose probability is then not known
        search = self.search if self._beam is None else self._joint_search
        return search.differentiable(features).log_probabilities

    def __call__(self, features: torch.Tensor, options: AnswerOptions) -> Ranking:
        result = self.search(features)
        logs = result.log_probabilities
        # float64 because distances need it, on the device where that is possible: radii of thousands of candidates take sorting
        probabilities = (logs.cpu() if logs.device.type == "mps" else logs).double().exp()
        places = torch.tensor([(path[-1].latitude, path[-1].longitude) for path in result.paths], dtype=torch.float64)
        places = places.to(probabilities.device)
        scores, columns = probabilities.topk(min(options.top_k, len(result.paths)), dim=1)
        coordinates = places[columns]
        coverage = DEFAULT_COVERAGE if options.coverage is None else options.coverage
        extent = torch.zeros_like(places[:, 0])
        radii = [mass_radius_km(best, probabilities, places, extent, coverage) for best in coordinates.unbind(1)]
        abstain = _abstain(options, radii[0], scores[:, 0])
        rows = zip(columns.tolist(), scores.tolist(), strict=True)
        return Ranking(
            scores=scores.cpu(),
            coordinates=coordinates.cpu(),
            radii_km=torch.stack(radii, dim=1).cpu(),
            abstain=abstain.cpu(),
            geocells=None,
            # a place whose probability is zero was not reached: its country was given up
            names=[[self._describe(result.paths[i]) for i, score in zip(*row, strict=True) if score > 0] for row in rows],
        )

    def _describe(self, path: PlacePath) -> dict[str, str | None]:
        leaf: Any = path[-1]
        # the package's gazetteer knows the region of a city even where the search skips regions
        if (describe := getattr(self.candidates, "describe", None)) is not None:
            return {name: text or None for name, text in describe(leaf).items()}
        # a place that stands for itself where it has no candidates below is not named twice
        names = {level.name: place.name for level, place in zip(self._levels, dict.fromkeys(path), strict=False)}
        return {**NO_NAMES, **names, "country_code": getattr(leaf, "country_code", None)}


def make_locator(
    model: Any,
    tokenizer: Any,
    candidates: CandidateSource | None,
    levels: Sequence[str | SearchLevel] | None,
    beam: int | None,
    cache_dir: str | os.PathLike | None,
) -> Locator:
    """The locator for a model. See `ZeroShotLocator` for the arguments, which are a CLIP's alone.

    Raises `ValueError` for a model that is neither PIGEON nor CLIP, a CLIP without a tokenizer, and arguments of zero-shot search
    for PIGEON.
    """
    # by what they can do: a model whose code came with it is of a class of its own
    if hasattr(model, "locate") and hasattr(model, "geocells"):
        given = {"candidates": candidates, "levels": levels, "beam": beam}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{unused[0]} is for zero-shot search with a CLIP; {type(model).__name__} has geocells of its own")
        return PigeonLocator(model)
    if not hasattr(model, "get_text_features") or not hasattr(model.config, "projection_dim"):
        raise ValueError(f"{type(model).__name__} is neither a PIGEON model nor a CLIP: image geolocalization needs one of these")
    if tokenizer is None:
        raise ValueError(f"{type(model).__name__} finds places by their names and needs its tokenizer: pass tokenizer=")
    return ZeroShotLocator(model, tokenizer, candidates, STREETCLIP_LEVELS if levels is None else levels, beam, cache_dir)


def place_title(prediction: dict[str, Any]) -> str:
    """A prediction's city, region and country as people write them, `NOWHERE` where it has none."""
    names = [prediction[name] for name in ("city", "region", "country") if prediction.get(name)]
    # Luxembourg, Luxembourg
    return ", ".join(dict.fromkeys(names)) or NOWHERE


def _search_level(level: str | SearchLevel) -> SearchLevel:
    if isinstance(level, SearchLevel):
        return level
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is unknown: choose from country, region, city, or give a SearchLevel")
    return LEVELS[level]


def _abstain(options: AnswerOptions, radius_km: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    rule: Any = SimpleNamespace(abstain_radius_km=options.abstain_radius_km, abstain_probability=options.abstain_probability)
    return abstains(rule, radius_km, score)


__all__ = [
    "NOWHERE",
    "AnswerOptions",
    "Locator",
    "PigeonLocator",
    "Ranking",
    "ZeroShotLocator",
    "make_locator",
    "place_title",
]
