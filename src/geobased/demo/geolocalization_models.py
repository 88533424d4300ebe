"""The models that a page offers: those it was started with and those that ship, and never one that a visitor names."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geobased import checkpoint_path, shipped_checkpoints
from geobased.cli.errors import CommandError
from geobased.cli.locate import load_geolocalizer
from geobased.modeling_streetclip.zero_shot import SearchLevel
from geobased.pipelines.geolocalization_cells import CellAreas

if TYPE_CHECKING:
    from geobased.pipelines import ImageGeolocalizationPipeline

MODEL_TYPES = ("pigeon", "streetclip", "clip")
# a model asks for places in the words that it was trained with
SHIPPED_LEVELS = {"earthclip-mini-clip": (SearchLevel("country", ("A satellite photo in {country}.",)),)}


def shipped_geolocalizers() -> list[str]:
    """Names of the shipped models that locate images."""
    configs = {name: Path(checkpoint_path(name), "config.json") for name in shipped_checkpoints()}
    return [name for name, path in configs.items() if json.loads(path.read_text("utf-8"))["model_type"] in MODEL_TYPES]


class Models:
    """Pipelines by the names of their models, each loaded when it is first used; the first one is loaded at once.

    Args:
        names: what the page was started with: shipped models, folders or Hub ids.

    Raises `CommandError` if there are none, and if the first one cannot be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise CommandError("give at least one model")
        self.names = list(dict.fromkeys([*names, *shipped_geolocalizers()]))
        self.first = self.names[0]
        self._loaded: dict[str, tuple[ImageGeolocalizationPipeline, CellAreas | None]] = {}
        self._lock = threading.Lock()
        self.pipe(self.first)

    def pipe(self, name: str) -> "ImageGeolocalizationPipeline":
        """The pipeline of a model. Raises `CommandError` for one that the page does not offer or that cannot be loaded."""
        return self._load(name)[0]

    def areas(self, name: str) -> CellAreas | None:
        """Where the model's geocells lie; None for one without."""
        return self._load(name)[1]

    def _load(self, name: str) -> tuple[Any, CellAreas | None]:
        if name not in self.names:
            raise CommandError(f"this page does not offer the model {name!r}: choose from {', '.join(self.names)}")
        with self._lock:
            if name not in self._loaded:
                pipe = load_geolocalizer(name, SHIPPED_LEVELS.get(name), None, "auto", "auto")
                self._loaded[name] = pipe, CellAreas.of(pipe)
            return self._loaded[name]


__all__ = ["Models", "shipped_geolocalizers"]
