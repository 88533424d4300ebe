"""A tiny random CLIP on disk, and small drawn images with places: inputs of tests, not data."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from geobased.modeling_streetclip import StreetCLIPConfig, StreetCLIPModel

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE_SIZE = 16
# a town, its country, and a colour that its images share
TOWNS = (
    ("Lund", "Sweden", 55.7, 13.2, (200, 40, 40)),
    ("Kiruna", "Sweden", 67.9, 20.2, (150, 80, 60)),
    ("Lima", "Peru", -12.0, -77.0, (40, 200, 40)),
    ("Utrecht", "Netherlands", 52.1, 5.1, (40, 40, 200)),
    ("Nairobi", "Kenya", -1.3, 36.8, (200, 200, 40)),
    ("Suva", "Fiji", -18.1, 178.4, (40, 200, 200)),
)


def draw(path: Path, colour: tuple[int, int, int], generator: np.random.Generator) -> None:
    pixels = np.array(colour) + generator.integers(-30, 31, (20, 24, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 48 images, eight of each town, one of them no image, with photos.csv."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    with (folder / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "latitude", "longitude", "country", "town", "elevation", "month"])
        for number in range(48):
            town, country, latitude, longitude, colour = TOWNS[number % len(TOWNS)]
            name = f"{number:02d}.png"
            draw(folder / name, colour, generator)
            shift = generator.uniform(-0.05, 0.05, 2)
            place = [f"{latitude + shift[0]:.5f}", f"{longitude + shift[1]:.5f}"]
            writer.writerow([name, *place, country, town, 100 * (number % 6), 1 + number % 12])
    (folder / "08.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random CLIP with its tokenizer (characters) and image processor."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path_factory.mktemp("clip")
    characters = list(bytes_to_unicode().values())
    words = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = StreetCLIPConfig(
            text_config={**TOWER, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 2},
            vision_config={**TOWER, "image_size": IMAGE_SIZE, "patch_size": 8},
            projection_dim=8,
        )
        StreetCLIPModel(config).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def geocells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of six square cells, one around each town."""
    import shapely

    from geobased.geography.geocell_collection import Geocells

    towns, countries, latitude, longitude, _ = (list(column) for column in zip(*TOWNS, strict=True))
    path = tmp_path_factory.mktemp("geocells") / "towns.geocells"
    Geocells(
        polygons=np.array([shapely.box(x - 1, y - 1, x + 1, y + 1) for x, y in zip(longitude, latitude, strict=True)]),
        country_codes=np.array(["SE", "SE", "PE", "NL", "KE", "FJ"]),
        countries=np.array(countries),
        regions=np.array(towns),
        sizes=np.full(6, 8),
        centroids=np.array([latitude, longitude]).T,
        radii_km=np.full(6, 5.0),
    ).save(path)
    return path
