"""A tiny random PIGEON model, its reference heads, and images in clusters."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from geobased.modeling_pigeon import PigeonConfig, PigeonForImageGeolocalization, PigeonPrototypes, register_pigeon

FIXTURES = Path(__file__).parents[1] / "fixtures" / "geo"
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_factor": 5.0,
}
HEADS = [
    {"name": "environment", "kind": "regression", "size": 6, "weight": 8.0},
    {"name": "climate", "kind": "classification", "size": 28, "weight": 2.0},
    {"name": "month", "kind": "classification", "size": 12},
]


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    register_pigeon()


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Weights, inputs and outputs of PIGEON's heads."""
    return json.loads((FIXTURES / "pigeon_heads.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def centroids() -> torch.Tensor:
    """[100, 2] of real cells in Italy, Switzerland, Austria and Slovenia."""
    with (FIXTURES / "pigeon_geocells.csv").open(encoding="utf-8") as file:
        return torch.tensor([[float(row["lat"]), float(row["lng"])] for row in csv.DictReader(file)], dtype=torch.float64)


@pytest.fixture
def make_model(centroids) -> Callable[..., PigeonForImageGeolocalization]:
    """A model of 100 cells, changed by configuration keywords."""

    def make(**changes: Any) -> PigeonForImageGeolocalization:
        torch.manual_seed(0)
        defaults = {"vision_config": TOWER, "num_cells": 100, "heads": HEADS, "initializer_range": 0.5}
        model = PigeonForImageGeolocalization(PigeonConfig(**(defaults | changes))).eval()
        if model.config.num_cells == len(centroids):
            model.set_geocells(centroids)
        return model

    return make


@pytest.fixture
def make_prototypes(centroids) -> Callable[..., PigeonPrototypes]:
    """One to four prototypes of one to three images in most cells; none in every seventh."""

    def make(seed: int = 1, empty: tuple[int, ...] = tuple(range(0, 100, 7)), keep_images: bool = True) -> PigeonPrototypes:
        generator = torch.Generator().manual_seed(seed)
        cells = torch.arange(100).repeat_interleave(torch.randint(1, 5, (100,), generator=generator))
        cells = cells[~torch.isin(cells, torch.tensor(empty, dtype=torch.int64))]
        owners = torch.arange(len(cells)).repeat_interleave(torch.randint(1, 4, (len(cells),), generator=generator))
        images = torch.randn(len(owners), 32, generator=generator)
        places = centroids[cells[owners]] + 0.2 * torch.randn(len(owners), 2, generator=generator, dtype=torch.float64)
        means = torch.stack([images[owners == i].mean(0) for i in range(len(cells))])
        middles = torch.stack([places[owners == i].mean(0) for i in range(len(cells))])
        kept = slice(None) if keep_images else slice(0)
        return PigeonPrototypes(means, middles, cells, images[kept], places[kept], owners[kept])

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """[4, 3, 16, 16] random pixels."""
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
