"""The models of the approximation experiment, at equal numbers of parameters or with equal psi."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from geobased.modeling_sumformer import SumformerConfig, SumformerForTokenClassification

HIDDEN_SIZE, NUM_HEADS = 32, 4
NUM_PARAMETERS = 20_000
"""Of every model, but for those with equal psi; without the head."""
PSI_WIDTH = 128
"""Hidden units of psi where it is the same for all latent sizes."""
NUM_INDUCING_POINTS = 16
SET_TRANSFORMER = "set_transformer"


@dataclass(frozen=True)
class Family:
    """A kind of model: what it is called, and how its configuration differs from a Sumformer's of one block."""

    title: str
    mixer: str = "sumformer"
    changes: tuple[tuple[str, Any], ...] = ()


def _performer(num_random_features: int) -> Family:
    changes = (("num_hidden_layers", 2), ("num_random_features", num_random_features))
    return Family(f"Performer, {num_random_features} features", "performer", changes)


_POLYNOMIAL = (("phi_type", "polynomial"), ("phi_variables", 3), ("phi_degree", 3))
_FOURIER = (("phi_type", "fourier"), ("latent_size", 64), ("fourier_scale", 3.0))
_BILINEAR = (("psi_type", "bilinear"),)
_STACKED = (("num_hidden_layers", 2), ("latent_size", 16))
FAMILIES: dict[str, Family] = {
    "sumformer": Family("Sumformer, MLP φ"),
    "sumformer_polynomial": Family("Sumformer, polynomial φ", changes=_POLYNOMIAL),
    "sumformer_fourier": Family("Sumformer, Fourier φ", changes=_FOURIER),
    "sumformer_bilinear": Family("Sumformer, MLP φ, bilinear ψ", changes=_BILINEAR),
    "sumformer_fourier_bilinear": Family("Sumformer, Fourier φ, bilinear ψ", changes=(*_FOURIER, *_BILINEAR)),
    "sumformer_stacked": Family("Sumformer, two blocks", changes=_STACKED),
    "deep_sets": Family("DeepSets, three layers", changes=(("phi_type", "linear"), ("num_hidden_layers", 3))),
    SET_TRANSFORMER: Family("Set Transformer, ISAB"),
    "transformer_1": Family("Transformer, one layer", "softmax"),
    "transformer_2": Family("Transformer, two layers", "softmax", (("num_hidden_layers", 2),)),
    "linformer": Family("Linformer", "linformer", (("num_hidden_layers", 2),)),
    "performer_16": _performer(16),
    "performer_64": _performer(64),
    "performer_256": _performer(256),
}


@dataclass(frozen=True)
class Architecture:
    """A family on sets of n points in d dimensions.

    `latent_size` is d' of a Sumformer with an MLP phi, the family's by default. With `equal_psi` psi has `PSI_WIDTH` hidden units
    and the number of parameters grows with d'; otherwise it is `NUM_PARAMETERS`, as nearly as widths allow.
    """

    family: str
    num_elements: int
    num_coordinates: int
    latent_size: int | None = None
    equal_psi: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is none of {', '.join(FAMILIES)}")
        if (self.latent_size is not None or self.equal_psi) and self.family != "sumformer":
            raise ValueError(f"a latent size or equal psi needs the family 'sumformer', not {self.family!r}")

    @property
    def size(self) -> tuple[int, int]:
        """n and d."""
        return self.num_elements, self.num_coordinates

    @property
    def label(self) -> str:
        """A name for files."""
        latent = "" if self.latent_size is None else f"-latent{self.latent_size}"
        return f"{self.family}-n{self.num_elements}-d{self.num_coordinates}{latent}{'-equal-psi' if self.equal_psi else ''}"

    @property
    def largest_input(self) -> int | None:
        """Most points that the model can read: Linformer has a row of its projections for each."""
        return self.num_elements if self.family == "linformer" else None

    def config(self, seed: int = 0) -> SumformerConfig:
        """The configuration of all families but the Set Transformer; `seed` is that of Performer's features.

        Raises `ValueError` where even the narrowest model has too many parameters.
        """
        head: dict[str, Any] = {"num_labels": 1}
        base = SumformerConfig(
            feature_size=self.num_coordinates,
            hidden_size=HIDDEN_SIZE,
            num_attention_heads=NUM_HEADS,
            num_hidden_layers=1,
            latent_size=self.latent_size or HIDDEN_SIZE,
            intermediate_size=PSI_WIDTH,
            aggregation="mean",
            linformer_size=max(1, self.num_elements // 2),
            max_linformer_len=self.num_elements,
            performer_redraw_interval=0,
            performer_seed=seed,
            problem_type="regression",
            **head,
        )
        if self.equal_psi:
            return base
        family = FAMILIES[self.family]
        return base.with_mixer(family.mixer, NUM_PARAMETERS, **dict(family.changes))

    def build(self, seed: int = 0) -> "SetFunction":
        """The model with the initial weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.family == SET_TRANSFORMER:
                return SetFunction(set_transformer(self.num_coordinates))
            return SetFunction(SumformerForTokenClassification(self.config(seed)))


class SetFunction(nn.Module):
    """One number for each point of a set: x [batch, n, d] -> [batch, n]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()  # no dropout, and Performer's features stay as they are

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.model, SetTransformer):
            return self.model(x)
        return self.model(input_features=x).logits[..., 0]

    def num_parameters(self) -> int:
        """Trained numbers, the head's included."""
        return sum(parameter.numel() for parameter in self.parameters())


class MultiheadAttentionBlock(nn.Module):
    """MAB(X, Y) = norm(H + rFF(H)) with H = norm(X + attention(X, Y, Y)), as in Lee et al. 2019."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE) for _ in range(4))
        self.attention_norm, self.output_norm = nn.LayerNorm(HIDDEN_SIZE), nn.LayerNorm(HIDDEN_SIZE)
        self.feed_forward = nn.Sequential(nn.Linear(HIDDEN_SIZE, width), nn.GELU(), nn.Linear(width, HIDDEN_SIZE))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [batch, n, hidden], y [batch, m, hidden] -> like x."""
        q, k, v = (
            projection(part).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for projection, part in ((self.q_proj, x), (self.k_proj, y), (self.v_proj, y))
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        hidden = self.attention_norm(x + self.o_proj(attended))
        return self.output_norm(hidden + self.feed_forward(hidden))


class SetTransformer(nn.Module):
    """An induced set attention block between linear layers (Lee et al. 2019, "Set Transformer", arXiv:1810.00825).

    ISAB(X) = MAB(X, MAB(I, X)) with learned points I: linear in n, and permutation equivariant.
    """

    def __init__(self, num_coordinates: int, width: int):
        super().__init__()
        self.feature_projection = nn.Linear(num_coordinates, HIDDEN_SIZE)
        self.inducing_points = nn.Parameter(torch.empty(NUM_INDUCING_POINTS, HIDDEN_SIZE))
        nn.init.xavier_uniform_(self.inducing_points)
        self.to_points, self.from_points = MultiheadAttentionBlock(width), MultiheadAttentionBlock(width)
        self.score = nn.Linear(HIDDEN_SIZE, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, n, num_coordinates] -> [batch, n]."""
        x = self.feature_projection(x)
        points = self.to_points(self.inducing_points.expand(x.shape[0], -1, -1), x)
        return self.score(self.from_points(x, points))[..., 0]


def set_transformer(num_coordinates: int) -> SetTransformer:
    """One whose number of parameters, without the head, is as near to `NUM_PARAMETERS` as its width allows."""

    def count(width: int) -> int:
        with torch.device("meta"):
            model = SetTransformer(num_coordinates, width)
        return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("score."))

    per_column = count(2) - count(1)
    return SetTransformer(num_coordinates, 1 + round((NUM_PARAMETERS - count(1)) / per_column))


__all__ = [
    "FAMILIES",
    "NUM_PARAMETERS",
    "PSI_WIDTH",
    "SET_TRANSFORMER",
    "Architecture",
    "Family",
    "SetFunction",
    "SetTransformer",
    "set_transformer",
]
