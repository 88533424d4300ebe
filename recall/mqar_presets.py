"""What the sweeps of multi-query associative recall train: configurations by family, learning rates, seeds, sizes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .modeling_mqar import MQARConfig
from .mqar import FIGURE2_TEST, FIGURE2_TRAIN, Segment
from .state_size import NOT_CAUSAL

# Mamba-2's is the published one; as many values as channels let Gated DeltaNet's states be as small as BASED's
EXPAND = {"mamba2": 2, "gated_deltanet": 1}
# families that cannot take part
ABSENT = {family: f"it is not causal: {reason}" for family, reason in NOT_CAUSAL.items()}


@dataclass(frozen=True)
class Configuration:
    """One model of a sweep: its family, and what it sets of `MQARConfig`."""

    family: str
    mixers: tuple[str, ...]
    hidden_size: int
    feature_dim: int | None = None
    sliding_window: int | None = None
    state_size: int | None = None
    expand: int | None = None

    @property
    def label(self) -> str:
        """Short and unique within a sweep, e.g. "based d128 f16"."""
        sizes = (("d", self.hidden_size), ("f", self.feature_dim), ("w", self.sliding_window), ("n", self.state_size))
        words = [f"{letter}{size}" for letter, size in sizes if size is not None]
        # families that come in two forms
        after_convolution = self.family in ("mamba2", "gated_deltanet") and self.mixers[0] == "conv"
        return " ".join([self.family, *words, *(["after conv"] if after_convolution else [])])

    def model_config(self, vocab_size: int) -> MQARConfig:
        """The configuration of the model; what is not set here keeps `MQARConfig`'s value."""
        sizes: dict[str, Any] = {key: value for key, value in asdict(self).items() if value is not None and key != "family"}
        return MQARConfig(vocab_size=vocab_size, **sizes)


@dataclass(frozen=True)
class Preset:
    """A sweep. Every configuration is trained at every learning rate with the first seed; the other seeds use the best."""

    name: str
    description: str
    configurations: tuple[Configuration, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    train: tuple[Segment, ...] = FIGURE2_TRAIN
    test: tuple[Segment, ...] = FIGURE2_TEST
    vocab_size: int = 8192
    batch_size: int = 256
    precision: str = "bf16"

    def select(self, families: Sequence[str] | None) -> list[Configuration]:
        """The configurations of some families, or all.

        Raises:
            ValueError: a family that is unknown, absent, or not in this preset.
        """
        if families is None:
            return list(self.configurations)
        for family in families:
            if family in ABSENT:
                raise ValueError(f"family {family!r} is absent: {ABSENT[family]}")
            if family not in {configuration.family for configuration in self.configurations}:
                known = dict.fromkeys(configuration.family for configuration in self.configurations)
                raise ValueError(f"preset {self.name} has no family {family!r}; it has {', '.join(known)}")
        return [configuration for configuration in self.configurations if configuration.family in families]


def _based(sizes: Sequence[tuple[int, int]]) -> list[Configuration]:
    return [Configuration("based", ("conv", "linear_attention"), width, feature_dim=features) for width, features in sizes]


def _based_window(sizes: Sequence[tuple[int, int, int]]) -> list[Configuration]:
    mixers = ("conv", "sliding_attention", "linear_attention")
    return [Configuration("based_window", mixers, width, feature_dim=f, sliding_window=w) for width, f, w in sizes]


def _windows(widths: Sequence[tuple[int, int]]) -> list[Configuration]:
    mixers = ("conv", "sliding_attention")
    return [Configuration("sliding_window", mixers, width, sliding_window=window) for width, window in widths]


def _recurrent(family: str, alone: Sequence[tuple[int, int]], after_conv: Sequence[tuple[int, int]]) -> list[Configuration]:
    forms = ((alone, (family, family)), (after_conv, ("conv", family)))
    expand = EXPAND[family]
    return [Configuration(family, mixers, width, state_size=n, expand=expand) for sizes, mixers in forms for width, n in sizes]


def _with_features(family: str, sizes: Sequence[tuple[int, int]]) -> list[Configuration]:
    """Performers and Sumformers after a convolution: width, and number of random features or width of the sum."""
    return [Configuration(family, ("conv", family), width, feature_dim=features) for width, features in sizes]


def _attention(widths: Sequence[int]) -> list[Configuration]:
    return [Configuration("attention", ("conv", "attention"), width) for width in widths]


def _alone(width: int, *, with_window: bool = True) -> list[Configuration]:
    configurations = [
        Configuration("linear_attention", ("linear_attention",) * 2, width, feature_dim=16),
        Configuration("convolution", ("conv",) * 2, width),
    ]
    if with_window:
        configurations.append(Configuration("window_alone", ("sliding_attention",) * 2, width, sliding_window=256))
    return configurations


FIGURE2 = (
    *_based([(32, 8), (48, 8), (64, 8), (128, 8), (48, 16), (64, 16), (48, 24), (64, 24), (128, 16), (128, 24)]),
    *_based_window([(64, 8, 16), (128, 8, 16), (128, 16, 16), (128, 16, 64)]),
    *_attention([64, 128]),
    *_windows([(128, 16), (128, 64), (128, 256), (128, 1024)]),
    *_alone(128),
    *_recurrent("mamba2", alone=[(64, 16)], after_conv=[(64, 16), (128, 16), (128, 64), (128, 128)]),
    *_recurrent("gated_deltanet", alone=[], after_conv=[(64, 16), (128, 16), (128, 64), (128, 128)]),
    *_with_features("performer", [(64, 16), (128, 16), (128, 64), (128, 256)]),
    *_with_features("sumformer", [(64, 64), (128, 128), (128, 1024)]),
)
FIGURE2_QUICK = (
    *_based([(64, 8), (64, 16), (128, 8), (128, 16), (128, 24)]),
    *_based_window([(128, 16, 64)]),
    *_attention([128]),
    *_windows([(128, 64), (128, 256)]),
    *_alone(128, with_window=False),
    *_recurrent("mamba2", alone=[], after_conv=[(128, 16), (128, 64)]),
    *_recurrent("gated_deltanet", alone=[], after_conv=[(128, 64)]),
    *_with_features("performer", [(128, 64)]),
    *_with_features("sumformer", [(128, 128)]),
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "figure2",
            "All families over their sizes, four learning rates, three seeds: over half an hour on one H200.",
            FIGURE2,
            learning_rates=(10**-3, 10**-2.5, 10**-2, 10**-1.5),
            seeds=(0, 1, 2),
            epochs=8,
        ),
        Preset(
            "figure2-quick",
            "A selection of sizes, two learning rates, three seeds: within 5 minutes on one H200.",
            FIGURE2_QUICK,
            learning_rates=(10**-2.5, 10**-2),
            seeds=(0, 1, 2),
            epochs=4,
        ),
        Preset(
            "figure2-paper",
            "As figure2, for the figure's 32 epochs: hours.",
            FIGURE2,
            learning_rates=(10**-3, 10**-2.5, 10**-2, 10**-1.5),
            seeds=(0, 1, 2),
            epochs=32,
        ),
        Preset(
            "smoke",
            "Two tiny models on short sequences of a small vocabulary: a minute on a CPU, to see that everything runs.",
            (*_based([(32, 8)]), *_attention([32])),
            learning_rates=(10**-2.5, 10**-2),
            seeds=(0, 1),
            epochs=2,
            train=(Segment(32, 2, 2048), Segment(32, 4, 2048)),
            test=(Segment(32, 2, 256), Segment(64, 4, 256)),
            vocab_size=128,
            batch_size=64,
        ),
    )
}

__all__ = ["ABSENT", "PRESETS", "Configuration", "Preset"]
