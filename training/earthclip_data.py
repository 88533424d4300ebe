"""What earthclip-mini trains on: sets of places with their captions, drawn once, and crops rendered from them on the device.

Drawing a place costs 50 microseconds of a core and a caption as much; rendering a crop on a GPU costs next to nothing. So places
and captions are drawn before training, captions are tokenized once each, and a step only renders.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from geobased.geography.boundaries import Boundaries, read_boundaries
from geobased.geography.geocell_collection import Geocells
from geobased.modeling_streetclip.captions import make_captions
from geobased.training.earth_crops import SATELLITE, EarthCrops
from geobased.training.earth_labels import ElevationRaster, KoeppenRaster, UnitNames
from geobased.training.earth_projection import EarthImage
from geobased.training.earth_sampling import CropSettings, EarthPlaces, EarthSampler
from geobased.training.geolocation_splits import BlockHoldout
from geobased.training.tokenization import END_OF_TEXT, train_tokenizer
from geobased.whole_file import whole_file

TEST_FRACTION = 0.1
CALIBRATION_FRACTION = 0.05
# numbers of crops of seen areas from here on are not trained on
SEEN_TEST, SEEN_VALIDATION = 1_000_000_000, 2_000_000_000
PLACES_PER_CHUNK = 4096


@dataclass(frozen=True)
class EarthFiles:
    """Paths of what crops and labels come from.

    Args:
        image: equirectangular picture of the Earth.
        elevation: values, latitudes, longitudes (see `ElevationRaster.from_files`).
        koeppen: image of zone numbers, table of codes (see `KoeppenRaster.from_files`).
        boundaries: first-level units; a file that GeoPandas reads.
        columns: its columns of country and unit.

    Raises:
        FileNotFoundError: files that are not there, all of them named.
    """

    image: Path
    elevation: tuple[Path, Path, Path]
    koeppen: tuple[Path, Path]
    boundaries: Path
    columns: tuple[str, str] = ("iso_a2", "name")

    def __post_init__(self) -> None:
        missing = [
            str(path) for path in (self.image, *self.elevation, *self.koeppen, self.boundaries) if not Path(path).is_file()
        ]
        if missing:
            raise FileNotFoundError(f"there is no file {', '.join(missing)}")


@dataclass
class CropSet:
    """Places and what is known of them.

    Attributes:
        places: [n].
        countries: [n] ISO codes.
        captions: the distinct captions.
        caption_ids: int64 [draws, n], rows of `captions`; no draws for sets that are only evaluated.
    """

    places: EarthPlaces
    countries: np.ndarray
    captions: list[str]
    caption_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def save(self, path: Path) -> None:
        """Writes everything to an .npz file, which appears whole or not at all."""
        arrays = {field.name: getattr(self.places, field.name) for field in fields(self.places)}
        captions = np.array(json.dumps(self.captions))
        with whole_file(path) as temporary:
            np.savez(temporary, countries=self.countries, captions=captions, caption_ids=self.caption_ids, **arrays)

    @classmethod
    def load(cls, path: Path) -> "CropSet":
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            places = EarthPlaces(**{field.name: arrays[field.name] for field in fields(EarthPlaces)})
            return cls(places, arrays["countries"], json.loads(str(arrays["captions"])), arrays["caption_ids"])


class EarthData:
    """Samplers of all sides, and the renderer.

    Blocks of the test are a part of those that training leaves out; the others calibrate.

    Args:
        files: sources.
        size: pixels along a crop's edge.
        settings: what crops are drawn; their seed also decides which blocks are held out.
        disjoint: whether training crops show no ground of held-out blocks at all, not only no centre.
        device: where crops are rendered.

    Raises:
        ValueError: files that cannot be used.
    """

    def __init__(
        self, files: EarthFiles, size: int, settings: CropSettings, *, disjoint: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        self.climate = KoeppenRaster.from_files(*files.koeppen)
        self.elevation = ElevationRaster.from_files(*files.elevation)
        self.cells = Geocells.world()
        self.files = files
        self.image = EarthImage.from_file(files.image, device)
        self.size, self.settings, self.disjoint = size, settings, disjoint
        self.test_blocks = BlockHoldout(fraction=TEST_FRACTION, seed=settings.seed)
        self.all_blocks = BlockHoldout(fraction=TEST_FRACTION + CALIBRATION_FRACTION, seed=settings.seed)
        device = self.image.device
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )

    @cached_property
    def boundaries(self) -> Boundaries:
        """First-level units; read when places are drawn or geocells made, and not where both are there already."""
        return read_boundaries(self.files.boundaries, list(self.files.columns))

    @cached_property
    def units(self) -> UnitNames:
        return UnitNames(self.boundaries)

    def _crops(self, side: str, holdout: BlockHoldout, units: UnitNames | None = None) -> EarthCrops:
        sampler = EarthSampler(
            self.climate,
            self.elevation,
            self.cells,
            settings=self.settings,
            holdout=holdout,
            side="training" if side == "training" else "evaluation",
            disjoint=self.disjoint and side == "training",
        )
        return EarthCrops(self.image, sampler, size=self.size, units=units)

    def heads(self) -> list[dict[str, Any]]:
        """Elevation and climate, as `PigeonConfig` takes heads."""
        return [{**head, "weight": 0.5} for head in self._crops("training", self.all_blocks).heads()]

    def draw(self, name: str, count: int, *, caption_draws: int = 0, progress: bool = True) -> CropSet:
        """A set of crops.

        Args:
            name: "train", "seen" (new crops of where training crops are), "validation" (more of these), "calibration" and
                "held_out" (blocks that training leaves out, different ones).
            count: crops.
            caption_draws: captions for each.

        Raises:
            ValueError: an unknown name, and places that cannot be drawn.
        """
        sets = {
            "train": ("training", self.all_blocks, 0),
            "seen": ("training", self.all_blocks, SEEN_TEST),
            "validation": ("training", self.all_blocks, SEEN_VALIDATION),
            "calibration": ("evaluation", self.all_blocks, 0),
            "held_out": ("evaluation", self.test_blocks, 0),
        }
        if name not in sets:
            raise ValueError(f"there is no set {name!r}: choose from {', '.join(sets)}")
        side, blocks, first = sets[name]
        crops = self._crops(side, blocks, self.units if caption_draws else None)
        parts: list[EarthPlaces] = []
        captions: dict[str, int] = {}
        ids: list[np.ndarray] = []
        drawn = 0
        with tqdm(total=count, desc=f"places ({name})", unit="crop", disable=not progress) as bar:
            while drawn < count:
                start = first
                size = min(PLACES_PER_CHUNK, count - drawn)
                places = crops.places(np.arange(start, start + size))
                first += size
                if name == "calibration":
                    places = places[~self.test_blocks.held_out(places.latitude, places.longitude)]
                described = crops.describe(places) if caption_draws else []
                rows = np.empty((caption_draws, len(places)), dtype=np.int64)
                for draw in range(caption_draws):
                    texts = make_captions(described, SATELLITE, seed=self.settings.seed + draw, first=start)
                    rows[draw] = [captions.setdefault(text, len(captions)) for text in texts]
                parts.append(places)
                ids.append(rows)
                drawn += len(places)
                bar.update(len(places))
        joined = EarthPlaces.concatenate(parts)
        codes = self.cells.country_codes[joined.geocell].astype(str)
        return CropSet(joined, codes, list(captions), np.concatenate(ids, axis=1))

    def pixels(
        self, places: EarthPlaces, *, degrees: np.ndarray | None = None, rotation: np.ndarray | None = None
    ) -> torch.Tensor:
        """Crops as an image file holds them, in 8 bits: float32 [n, 3, size, size] from 0 to 1, on the device.

        Args:
            places: [n].
            degrees, rotation: [n] in place of the places' own.
        """
        across, turn = places.degrees if degrees is None else degrees, places.rotation if rotation is None else rotation
        crops = self.image.crops(places.latitude, places.longitude, across, turn, size=self.size)
        return (crops * 255).round_().div_(255)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels as CLIP's image processor gives them to a model."""
        return (pixels - self._mean) / self._std

    def training_pixels(self, places: EarthPlaces, generator: np.random.Generator) -> torch.Tensor:
        """Normalised crops [n, 3, size, size] at places, turned and scaled anew: a place is another picture every time.

        With `disjoint` crops stay as they were drawn, for a turned one might show held-out ground.
        """
        if self.disjoint:
            return self.normalised(self.pixels(places))
        low, high = np.log(self.settings.degrees)
        degrees = np.exp(generator.uniform(low, high, len(places)))
        rotation = generator.uniform(-self.settings.rotation, self.settings.rotation, len(places))
        return self.normalised(self.pixels(places, degrees=degrees, rotation=rotation))


def caption_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of captions that ends a text as CLIP's text tower expects it, and pads on the right.

    Raises:
        ValueError: texts too few for the vocabulary.
    """
    from tokenizers import processors

    tokenizer = train_tokenizer(texts, vocab_size, model_max_length=max_length)
    tokenizer.padding_side = "right"
    end = (END_OF_TEXT, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=[end])
    return tokenizer


__all__ = ["CropSet", "EarthData", "EarthFiles", "caption_tokenizer"]
