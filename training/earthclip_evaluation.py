"""Prototypes, calibration and evaluation of earthclip-mini, with the baselines that its card compares it with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from geobased.geography.calibration import fit_radius_scale, fit_temperature
from geobased.geography.coordinates import haversine_km, unit_vectors
from geobased.geography.evaluation import EvaluationResult, evaluate
from geobased.geography.gazetteer import countries
from geobased.geography.geocell_collection import Geocells
from geobased.modeling_pigeon.modeling_pigeon import PigeonForImageGeolocalization
from geobased.modeling_pigeon.prototypes_pigeon import PigeonPrototypes, build_prototypes
from geobased.modeling_streetclip.captions import CaptionMixture, PlaceDescription, make_captions
from geobased.modeling_streetclip.modeling_streetclip import StreetCLIPModel
from geobased.training.earth_baselines import LabelledCrops, evaluate_baselines
from geobased.training.earth_crops import SATELLITE, crop_picture
from geobased.training.earthclip_data import CropSet, EarthData
from geobased.training.streetclip_captions import token_table
from geobased.whole_file import whole_file

CROPS_PER_PASS = 512
NEIGHBOUR_SIDE = 16
# images kept of a prototype, the first that fits
IMAGES_PER_PROTOTYPE = (8, 4, 2, 1, 0)
TUNING_CROPS = 2000
TUNED_TOP_K = (1, 5, 20)
# of the embeddings' spread; the last one leaves the probabilities as they are
TUNED_TEMPERATURES = (0.02, 0.05, 0.1, 0.3, 1000.0)
# of the smoothing's length; None are places of prototypes
TUNED_PLACES = (None, 0.35, 0.5, 0.7, 1.0, 1.4)
UNSMOOTHED_TAU_KM = 100.0
# an answer that may be farther off says nothing
ABSTAIN_RADIUS_KM = 1000.0
# held-out crops of which the example is the most colourful
EXAMPLE_CROPS = 200
# what the answer is without one of its last steps, and without both
PARTS: dict[str, dict[str, Any]] = {
    "pigeon_without_refinement": {"refine": False},
    "pigeon_prototype_places": {"place_rule": "prototype"},
    "pigeon_centroids": {"refine": False, "place_rule": "prototype"},
}
REGRESSION_STEPS, REGRESSION_BATCH, REGRESSION_WIDTH = 2000, 1024, 512


@torch.no_grad()
def embed(model: PigeonForImageGeolocalization, data: EarthData, crops: CropSet, *, progress: bool = True) -> torch.Tensor:
    """Embeddings [n, hidden_size] of a set's crops, float32 on the device."""
    model.eval()
    parts = []
    for rows in _passes(len(crops), "embeddings", progress):
        pixels = data.normalised(data.pixels(crops.places[rows]))
        parts.append(model.get_embeddings(pixels)[0])
    return torch.cat(parts)


@torch.no_grad()
def locate(
    model: PigeonForImageGeolocalization, embeddings: torch.Tensor, *, refine: bool = True, place_rule: str | None = None
) -> dict[str, np.ndarray]:
    """coordinates [n, 2], radius_km, score, cell and abstain, [n] each, of the model's answers to embeddings [n, hidden_size].

    place_rule takes the place of the model's own.
    """
    parts: dict[str, list[torch.Tensor]] = {"coordinates": [], "radius_km": [], "score": [], "cell": [], "abstain": []}
    own_rule = model.config.place_rule
    model.config.place_rule = place_rule or own_rule
    try:
        passes = [model.locate(embeddings=part, refine=refine, top_k=1) for part in embeddings.split(CROPS_PER_PASS)]
    finally:
        model.config.place_rule = own_rule
    for answer in passes:
        assert answer.candidate_cells is not None
        assert answer.cell_probabilities is not None
        cell = answer.candidate_cells[:, :1]
        # of the cell alone, whatever is around it
        score = answer.cell_probabilities.gather(1, cell)[:, 0]
        values = (answer.coordinates, answer.error_radius_km, score, cell[:, 0], answer.abstain)
        for found, value in zip(parts.values(), values, strict=True):
            assert value is not None
            found.append(value.cpu())
    whole = {name: torch.cat(found) for name, found in parts.items()}
    return {name: (values.double() if values.is_floating_point() else values).numpy() for name, values in whole.items()}


def compact_prototypes(prototypes: PigeonPrototypes, max_bytes: int) -> PigeonPrototypes:
    """Prototypes that take at most so many bytes in 8 bits: fewer images of each, and then fewer prototypes, evenly.

    A prototype of one image keeps none: the image's place and embedding are its own.

    Raises:
        ValueError: no room even for one.
    """
    width = prototypes.embeddings.shape[1]
    # a row of 8 bits, two 32-bit coordinates, and the prototype's 64-bit offset
    row, owner = width + 8, 8
    count = len(prototypes)
    owners = prototypes.image_prototypes
    sizes = torch.bincount(owners, minlength=count)
    rank = torch.arange(len(owners)) - (sizes.cumsum(0) - sizes)[owners]
    kept = torch.arange(count)
    for most in IMAGES_PER_PROTOTYPE:
        images = (rank < most) & (sizes[owners] > 1)
        if count * (row + owner) + int(images.sum()) * row <= max_bytes:
            break
    else:
        room = max_bytes // (row + owner)
        if room < 1:
            raise ValueError(f"prototypes have {max_bytes} bytes, fewer than one takes: make the model smaller")
        kept = (torch.arange(room) * count) // room
    return PigeonPrototypes(
        embeddings=prototypes.embeddings[kept],
        coordinates=prototypes.coordinates[kept],
        cells=prototypes.cells[kept],
        image_embeddings=prototypes.image_embeddings[images],
        image_coordinates=prototypes.image_coordinates[images],
        image_prototypes=owners[images],
    )


def add_prototypes(
    model: PigeonForImageGeolocalization,
    embeddings: torch.Tensor,
    coordinates: np.ndarray,
    cells: np.ndarray,
    *,
    max_bytes: int,
    seed: int,
    progress: bool = True,
) -> dict[str, int]:
    """Gives the model prototypes of training crops (embeddings [n, hidden_size], coordinates [n, 2], cells [n]).

    Returns:
        How many prototypes and images of them it keeps.
    """
    prototypes = build_prototypes(
        embeddings.float().cpu(),
        torch.from_numpy(coordinates),
        torch.from_numpy(cells),
        # crops lie evenly: most are in no cluster, and say as much about where they are
        noise="single",
        seed=seed,
        progress=progress,
    )
    model.set_prototypes(compact_prototypes(prototypes, max_bytes))
    # as they come back from the file
    model.refinement.to(torch.bfloat16).float()
    return {"prototypes": model.config.num_prototypes, "images": model.config.num_prototype_images}


def calibrate(
    model: PigeonForImageGeolocalization,
    held_out: tuple[torch.Tensor, np.ndarray, np.ndarray],
    seen: tuple[torch.Tensor, np.ndarray],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fits the temperature of cells, refinement, the rule of places and the error radius, above which answers abstain.

    Args:
        held_out: embeddings [n, hidden_size], coordinates [n, 2] and cells [n] of crops in blocks that neither training nor the
            test knows: temperature and radius are right for places that were never seen, and cautious for others.
        seen: embeddings and coordinates of new crops of seen areas. Refinement and places take the temperature, number of cells
            and smoothing with the least sum of both medians, in logarithms, so that neither kind of place pays for the other.

    Returns:
        What was chosen.
    """
    embeddings, places, cells = held_out
    config = model.config
    with torch.no_grad():
        logits = torch.cat([model.cell_head(part) for part in embeddings.split(CROPS_PER_PASS)])
    config.cell_temperature = fit_temperature(logits.float().cpu().numpy(), cells)
    spread = float(embeddings.std(0).norm())
    refinements = [(k, spread * factor) for k in TUNED_TOP_K for factor in TUNED_TEMPERATURES if k > 1 or factor == 1000.0]
    options = [
        {
            "refinement_top_k": min(top_k, config.num_cells),
            "refinement_temperature": temperature,
            "place_rule": "prototype" if factor is None else "likelihood",
            "place_tau_km": None if factor is None else factor * (config.smoothing_tau_km or UNSMOOTHED_TAU_KM),
        }
        for top_k, temperature in refinements
        for factor in TUNED_PLACES
    ]
    tried: list[tuple[float, float, dict[str, Any]]] = []
    for option in tqdm(options, desc="refinement and places", disable=not progress):
        config.update(option)
        medians = []
        for rows, truths in ((embeddings, places), seen):
            found = locate(model, rows[:TUNING_CROPS])["coordinates"]
            medians.append(float(np.median(haversine_km(*found.T, *truths[:TUNING_CROPS].T))))
        tried.append((medians[0], medians[1], option))
    best = min(tried, key=lambda entry: entry[0] * entry[1])[2]
    config.update(best)
    answers = locate(model, embeddings)
    errors = np.asarray(haversine_km(*answers["coordinates"].T, *places.T))
    coverage = config.radius_coverage
    config.radius_scales = {str(coverage): fit_radius_scale(answers["radius_km"], errors, coverage)}
    config.abstain_radius_km = ABSTAIN_RADIUS_KM
    return {
        "cell_temperature": config.cell_temperature,
        **best,
        "radius_scales": config.radius_scales,
        "abstain_radius_km": config.abstain_radius_km,
        "tried": [{"held_out_km": held_out_km, "seen_km": seen_km, **option} for held_out_km, seen_km, option in tried],
    }


def country_prompts(codes: Sequence[str]) -> list[str]:
    """The caption of each country alone. Raises `KeyError` for a code that is no country's."""
    names = {country.code: country.name for country in countries()}
    bare = CaptionMixture(SATELLITE.opening, region=0.0, town=0.0)
    return make_captions([PlaceDescription(names[code]) for code in codes], bare)


@torch.no_grad()
def zero_shot(
    model: StreetCLIPModel, tokenizer: Any, data: EarthData, crops: CropSet, max_length: int, *, progress: bool = True
) -> np.ndarray:
    """Code of the country whose caption is most like each crop, of all countries with geocells: [n]."""
    model.eval()
    codes = np.unique(data.cells.country_codes.astype(str))
    table = token_table(tokenizer, country_prompts(codes.tolist()), max_length)
    tokens = {name: values.to(data.image.device) for name, values in table.items()}
    texts = F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=1)
    found = []
    for rows in _passes(len(crops), "zero-shot", progress):
        pixels = data.normalised(data.pixels(crops.places[rows]))
        images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=1)
        found.append((images @ texts.T).argmax(1).cpu().numpy())
    return codes[np.concatenate(found)]


def regression_head(
    train: tuple[torch.Tensor, np.ndarray], tests: Sequence[torch.Tensor], *, seed: int, progress: bool = True
) -> list[np.ndarray]:
    """The baseline that regresses places: a head of two layers on the tower's embeddings, which gives a direction in space.

    Args:
        train: embeddings [n, hidden_size] and coordinates [n, 2] of training crops.
        tests: embeddings [m, hidden_size].

    Returns:
        For each test, coordinates [m, 2] in degrees.
    """
    features, places = train
    device = features.device
    targets = torch.from_numpy(unit_vectors(*places.T)).to(device, torch.float32)
    mean, std = features.mean(0), features.std(0) + 1e-6
    generator = torch.Generator().manual_seed(seed)
    head = nn.Sequential(nn.Linear(features.shape[1], REGRESSION_WIDTH), nn.GELU(), nn.Linear(REGRESSION_WIDTH, 3))
    with torch.no_grad():
        for parameter in head.parameters():
            bound = parameter.shape[-1] ** -0.5
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
    head.to(device)
    steps = min(REGRESSION_STEPS, len(features))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="regression head", disable=not progress):
        rows = torch.randint(len(features), (REGRESSION_BATCH,), generator=generator).to(device)
        loss = F.mse_loss(head((features[rows] - mean) / std), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    answers = []
    with torch.no_grad():
        for rows in tests:
            x, y, z = head((rows - mean) / std).double().cpu().numpy().T
            answers.append(np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], axis=1)))
    return answers


def labelled(data: EarthData, crops: CropSet) -> LabelledCrops:
    """Crops as the baselines take them, no larger than these compare them."""
    side = min(NEIGHBOUR_SIDE, data.size)
    pixels = [
        F.adaptive_avg_pool2d(data.pixels(crops.places[rows]), side) for rows in _passes(len(crops), "crops to compare", False)
    ]
    return LabelledCrops(torch.cat(pixels), crops.places.coordinates, crops.countries.tolist())


def evaluate_set(
    model: PigeonForImageGeolocalization,
    cells: np.ndarray,
    data: EarthData,
    crops: CropSet,
    embeddings: torch.Tensor,
    *,
    zero_shot_codes: np.ndarray,
    regressed: np.ndarray | None,
    neighbours: LabelledCrops | None,
    bootstrap: int,
    seed: int,
    report: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Metrics of everything on one set.

    Args:
        cells: [n] true cells of the model's own.
        zero_shot_codes: [n] countries by CLIP.
        regressed: [n, 2] places by the regression head; None leaves it out.
        neighbours: training crops of the baselines; None leaves them out.
        report: where an HTML report of the model's answers is written.

    Returns:
        {"crops", "pigeon", "pigeon_without_refinement", "pigeon_prototype_places", "pigeon_centroids", "zero_shot",
        "regression", "chance", "mean", "nearest"}: metrics with their intervals; "answered": the model's for the crops that it
        does not abstain from, and their share; "calibration" of its answers.
    """
    truths, codes = crops.places.coordinates, crops.countries.tolist()

    def measured(found: np.ndarray, predicted: Sequence[str], **options: Any) -> EvaluationResult:
        places = {"predicted_countries": list(predicted), "countries": codes}
        return evaluate(found, truths, bootstrap=bootstrap, seed=seed, **places, **options)

    answers = locate(model, embeddings)
    located = measured(
        answers["coordinates"],
        country_at(data.cells, answers["coordinates"]),
        confidences=np.clip(answers["score"], 0, 1),
        correct=answers["cell"] == cells,
        error_radii_km={model.config.radius_coverage: answers["radius_km"]},
        abstained=answers["abstain"],
        progress=progress,
    )
    if report is not None:
        located.save_html(report, title=f"earthclip-mini: {report.stem.replace('_', ' ')}")
    middles = {country.code: (country.latitude, country.longitude) for country in countries()}
    results = {
        "pigeon": located,
        "zero_shot": measured(np.array([middles[code] for code in zero_shot_codes]), zero_shot_codes.tolist()),
    }
    for name, options in PARTS.items():
        found = locate(model, embeddings, **options)["coordinates"]
        results[name] = measured(found, country_at(data.cells, found))
    if regressed is not None:
        results["regression"] = measured(regressed, country_at(data.cells, regressed))
    if neighbours is not None:
        side = neighbours.pixels.shape[-1]
        results |= evaluate_baselines(neighbours, labelled(data, crops), side=side, seed=seed, bootstrap=bootstrap)
    plain = {name: result.to_dict() for name, result in results.items()}
    metrics = {name: result["metrics"] for name, result in plain.items()}
    answered = plain["pigeon"]["answered"]
    return {"crops": len(crops), **metrics, "answered": answered, "calibration": plain["pigeon"]["calibration"]}


def save_example(data: EarthData, crops: CropSet, path: Path) -> dict[str, float]:
    """Writes a crop as PNG, and returns its place: of the first ones the most colourful, however well it is located."""
    few = crops.places[:EXAMPLE_CROPS]
    pixels = data.pixels(few)
    row = int((pixels[:, 0] - pixels[:, 2]).flatten(1).std(1).argmax())
    with whole_file(path) as temporary:
        crop_picture(pixels[row]).save(temporary, "PNG")
    names = ("latitude", "longitude", "degrees", "rotation")
    return {name: round(float(getattr(few, name)[row]), 4) for name in names}


def country_at(cells: Geocells, coordinates: np.ndarray) -> list[str]:
    """Codes of the countries that places [n, 2] lie in, or next to."""
    return cells.country_codes[cells.locate(*coordinates.T)].astype(str).tolist()


def _passes(count: int, what: str, progress: bool) -> Any:
    starts = range(0, count, CROPS_PER_PASS)
    slices = [slice(start, min(start + CROPS_PER_PASS, count)) for start in starts]
    return tqdm(slices, desc=what, disable=not progress)


__all__ = [
    "add_prototypes",
    "calibrate",
    "compact_prototypes",
    "country_at",
    "country_prompts",
    "embed",
    "evaluate_set",
    "labelled",
    "locate",
    "regression_head",
    "save_example",
    "zero_shot",
]
