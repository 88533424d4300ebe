"""What the approximation experiment consists of: ladders of architectures and targets, presets."""

from collections.abc import Mapping
from dataclasses import dataclass

from .sumformer_experiment_cohorts import TrainingSettings
from .sumformer_experiment_models import FAMILIES, Architecture
from .sumformer_experiment_targets import TARGETS

STANDARD_SIZE = (8, 2)
"""n and d where nothing else is said."""
LATENT_SIZES = tuple(2**k for k in range(9))
# of the ladders over sizes: one of each kind
COMPARED = (
    "sumformer",
    "sumformer_fourier_bilinear",
    "sumformer_stacked",
    "deep_sets",
    "set_transformer",
    "transformer_2",
    "linformer",
    "performer_64",
)


@dataclass(frozen=True)
class Ladder:
    """Architectures that are laid side by side, on the same targets."""

    architectures: tuple[Architecture, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Preset:
    """Everything that the results depend on. Ladders stand in the order of their importance, which is that of the trainings."""

    name: str
    ladders: Mapping[str, Ladder]
    num_seeds: int = 5
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    """The first seed tries all; the validation error chooses, for each architecture and target."""
    training: TrainingSettings = TrainingSettings()
    lengths: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Of the sets on which the models of the first ladder are tested as well."""
    timed_lengths: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    timed_points: int = 16384
    """Points in a timed batch."""

    def targets_of(self) -> dict[Architecture, tuple[str, ...]]:
        """All architectures, in the order of the ladders, with their targets."""
        found: dict[Architecture, tuple[str, ...]] = {}
        for ladder in self.ladders.values():
            for architecture in ladder.architectures:
                found[architecture] = tuple(dict.fromkeys((*found.get(architecture, ()), *ladder.targets)))
        return found

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the first ladder."""
        return tuple(architecture.family for architecture in next(iter(self.ladders.values())).architectures)


def _families(families: tuple[str, ...], *sizes: tuple[int, int]) -> tuple[Architecture, ...]:
    return tuple(Architecture(family, *size) for size in sizes for family in families)


def _latent(size: tuple[int, int], latent_sizes: tuple[int, ...], equal_psi: bool) -> tuple[Architecture, ...]:
    return tuple(Architecture("sumformer", *size, latent, equal_psi) for latent in latent_sizes)


ALL_TARGETS, FOUR_TARGETS = tuple(TARGETS), ("polynomial", "kernel_density", "rank", "maximum")
_N, _D = STANDARD_SIZE
PRESETS = {
    "standard": Preset(
        "standard",
        {
            "models": Ladder(_families(tuple(FAMILIES), STANDARD_SIZE), ALL_TARGETS),
            "latent, equal parameters": Ladder(_latent(STANDARD_SIZE, LATENT_SIZES, equal_psi=False), ALL_TARGETS),
            "latent, equal psi": Ladder(_latent(STANDARD_SIZE, LATENT_SIZES, equal_psi=True), ALL_TARGETS),
            "set size": Ladder(_families(COMPARED, *((n, _D) for n in (4, 16, 32, 64))), FOUR_TARGETS),
            "dimension": Ladder(_families(COMPARED, *((_N, d) for d in (1, 4))), FOUR_TARGETS),
            "latent, numbers": Ladder(_latent((_N, 1), LATENT_SIZES, equal_psi=True), FOUR_TARGETS),
        },
    ),
    "smoke": Preset(
        "smoke",
        {
            "models": Ladder(_families(("sumformer", "set_transformer", "linformer"), (4, 2)), ("polynomial", "rank")),
            "latent, equal psi": Ladder(_latent((4, 2), (1, 4), equal_psi=True), ("polynomial",)),
            "set size": Ladder(_families(("sumformer",), (6, 2)), ("polynomial",)),
        },
        num_seeds=2,
        learning_rates=(3e-3, 1e-2),
        training=TrainingSettings(40, 20, 20, 5, 20, points_per_step=128, validation_points=256, test_points=512),
        lengths=(3, 4, 8),
        timed_lengths=(8, 16),
        timed_points=32,
    ),
}

__all__ = ["ALL_TARGETS", "COMPARED", "FOUR_TARGETS", "LATENT_SIZES", "PRESETS", "STANDARD_SIZE", "Ladder", "Preset"]
