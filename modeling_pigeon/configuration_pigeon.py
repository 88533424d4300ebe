# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Configuration of PIGEON image geolocalization models."""

import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, PreTrainedConfig

EMBEDDINGS = ("token_mean", "cls")
SMOOTHING_RULES = ("paper", "code")
PROTOTYPE_STORAGES = ("float", "int8")
PLACE_RULES = ("prototype", "likelihood")
HEAD_KINDS = ("regression", "classification")
HEAD_KEYS = ("name", "kind", "size", "weight", "labels", "log_offsets", "means", "stds")
# climate of the place and month of the picture: what PIGEON learns beside the geocell, with the published weights
PIGEON_HEADS: tuple[dict[str, Any], ...] = (
    {
        "name": "environment",
        "kind": "regression",
        "size": 6,
        "weight": 8.0,
        "labels": [
            "elevation",
            "population_density",
            "temperature_average",
            "temperature_difference",
            "precipitation_average",
            "precipitation_difference",
        ],
    },
    {"name": "climate", "kind": "classification", "size": 28, "weight": 2.0},
    {"name": "month", "kind": "classification", "size": 12, "weight": 1.0},
)


@strict
class PigeonConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PigeonForImageGeolocalization`] (Haas et al. 2023, "PIGEON: Predicting Image Geolocations",
    arXiv:2307.05845). The defaults of smoothing and refinement are PIGEON's; `PigeonConfig.pigeon()` and
    `PigeonConfig.pigeotto()` give the published models.

    Args:
        vision_config (`dict` or `CLIPVisionConfig`, *optional*):
            The CLIP vision tower; transformers' default (ViT-B/32) if not given.
        num_cells (`int`, defaults to 2076):
            Number of geocells the cell head chooses from.
        embedding (`str`, defaults to `"token_mean"`):
            What of the tower's last hidden state the heads read, before its final layer norm: `"token_mean"`, the mean of all
            tokens with the class token (PIGEON), or `"cls"`, the class token.
        heads (`list[dict]`, *optional*):
            Auxiliary heads, each `{"name", "kind", "size", "weight", ...}`: `kind` is `"regression"` (mean squared error) or
            `"classification"` (cross entropy), `size` the number of values or classes, `weight` (defaults to 1) what its loss is
            multiplied by. `labels` names the values or classes. A regression head may transform its targets:
            `log_offsets` (a number or None per value: log(value + offset)), then `means` and `stds` (standardised).
        cell_loss_weight (`float`, defaults to 1.0):
            What the cell head's loss is multiplied by.
        smoothing_tau_km (`float`, *optional*, defaults to 75):
            Distance over which a cell's target falls to 1/e. `None`: plain cross entropy with the true cell.
        smoothing_rule (`str`, defaults to `"paper"`):
            The distance that targets are relative to: the true cell's (`"paper"`), or the nearest cell's (`"code"`: what the
            released code computes).
        smoothing_normalize (`bool`, defaults to `False`):
            Whether a row of targets is divided by its sum. As published it is not, so that images among many small cells weigh
            more; by the paper's rule the sum has no bound where another centroid is much nearer than the true cell's.
        refinement_top_k (`int`, defaults to 5), refinement_temperature (`float`, defaults to 1.6):
            How many cells compete by their prototypes, and the temperature of the softmax over distances to them.
        refinement_max_km (`float`, *optional*, defaults to 1000):
            A refined answer is never farther than this from the centroid of the likeliest cell. `None`: no limit.
        place_rule (`str`, defaults to `"prototype"`):
            Where in a candidate cell an answer lies: `"prototype"`, at the image nearest to the query among those of the cell's
            nearest prototype, or at the cell's centroid if it has none (PIGEON); or `"likelihood"`, where the probabilities of
            the cells around it say, as the smoothing of the targets has it (not in the paper; see `placement_pigeon.py`).
            Candidates are then such surroundings, with the sum of their probabilities.
        place_tau_km (`float`, *optional*):
            The smoothing that `"likelihood"` undoes; `smoothing_tau_km` if not given. Other values make up for
            `cell_temperature` and for an overconfident head; fitted on held-out images.
        place_neighbors (`int`, defaults to 32):
            How many cells around a candidate `"likelihood"` reads.
        num_prototypes, num_prototype_images (`int`, defaults to 0):
            Sizes of the prototype table; `set_prototypes` writes them.
        prototype_storage (`str`, defaults to `"float"`):
            `"float"` keeps prototypes in the model's dtype, `"int8"` in a quarter of float32's space.
        cell_temperature (`float`, defaults to 1.0):
            What cell logits are divided by in answers (not in the loss); fitted on held-out images.
        radius_coverage (`float`, defaults to 0.9):
            How often the true place should lie within an answer's `error_radius_km`.
        radius_scales (`dict[str, float]`, *optional*):
            Calibration of error radii: a factor per coverage (`{"0.9": 1.3}`), fitted on held-out images. `None`: not
            calibrated.
        abstain_radius_km, abstain_probability (`float`, *optional*):
            An answer abstains if its error radius (at `radius_coverage`) is larger, or its score is lower. `None`: never.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of new heads' weights.

    Raises `ValueError` for values that cannot make a model; the message names the value.

    Example:

    ```python
    >>> from geobased.modeling_pigeon import PigeonConfig
    >>> climate = {"name": "climate", "kind": "classification", "size": 30, "weight": 2.0}
    >>> config = PigeonConfig(num_cells=100, heads=[climate])
    ```
    """

    model_type = "pigeon"
    sub_configs = {"vision_config": CLIPVisionConfig}
    # what transformers from 5.23 on reads in place of sub_configs
    sub_configs_defaults = {"vision_config": CLIPVisionConfig}  # type: ignore[dict-item]
    keys_to_ignore_at_inference = ["cell_loss", "head_losses", "head_outputs", "embeddings", "hidden_states", "attentions"]

    vision_config: dict | CLIPVisionConfig | None = None
    num_cells: int = 2076
    embedding: str = "token_mean"
    heads: list[dict] | tuple[dict, ...] | None = None
    cell_loss_weight: int | float = 1.0
    smoothing_tau_km: int | float | None = 75.0
    smoothing_rule: str = "paper"
    smoothing_normalize: bool = False
    refinement_top_k: int = 5
    refinement_temperature: int | float = 1.6
    refinement_max_km: int | float | None = 1000.0
    place_rule: str = "prototype"
    place_tau_km: int | float | None = None
    place_neighbors: int = 32
    num_prototypes: int = 0
    num_prototype_images: int = 0
    prototype_storage: str = "float"
    cell_temperature: int | float = 1.0
    radius_coverage: float = 0.9
    radius_scales: dict[str, float] | None = None
    abstain_radius_km: int | float | None = None
    abstain_probability: int | float | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig()
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        self.heads = [checked_head(head) for head in self.heads or []]
        self._check_values()
        super().__post_init__(**kwargs)

    def _check_values(self) -> None:
        names = [head["name"] for head in self.heads]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"heads has two heads named {repeated[0]!r}: give each its own name")
        for name, choices in (
            ("embedding", EMBEDDINGS),
            ("smoothing_rule", SMOOTHING_RULES),
            ("prototype_storage", PROTOTYPE_STORAGES),
            ("place_rule", PLACE_RULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(choices)}")
        if self.place_rule == "likelihood" and self.place_tau_km is None and self.smoothing_tau_km is None:
            raise ValueError("place_rule='likelihood' undoes the smoothing, and there is none: give place_tau_km")
        sizes = {"num_cells": 1, "refinement_top_k": 1, "place_neighbors": 1, "num_prototypes": 0, "num_prototype_images": 0}
        for name, low in sizes.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        lengths = ("smoothing_tau_km", "refinement_max_km", "place_tau_km", "abstain_radius_km")
        for name in (*lengths, "refinement_temperature", "cell_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be a positive number{' or None' if name.endswith('_km') else ''}")
        if not 0 <= self.cell_loss_weight < float("inf"):
            raise ValueError(f"cell_loss_weight={self.cell_loss_weight} must be a number from 0 on")
        if not 0 < self.radius_coverage < 1:
            raise ValueError(f"radius_coverage={self.radius_coverage} must lie between 0 and 1, 0.9 say")
        if self.abstain_probability is not None and not 0 <= self.abstain_probability <= 1:
            raise ValueError(f"abstain_probability={self.abstain_probability} must lie between 0 and 1, or be None")
        for coverage, scale in (self.radius_scales or {}).items():
            if not 0 < float(coverage) < 1 or not 0 < scale < float("inf"):
                raise ValueError(f"radius_scales has {coverage!r}: {scale}; give a coverage below 1 and a positive factor")

    def head(self, name: str) -> dict[str, Any]:
        """The auxiliary head of that name. Raises `ValueError`, listing those there are, if there is none."""
        for head in self.heads:
            if head["name"] == name:
                return head
        raise ValueError(f"no head is named {name!r}; there are: {', '.join(head['name'] for head in self.heads) or 'none'}")

    @classmethod
    def pigeon(cls, **kwargs: Any) -> "PigeonConfig":
        """PIGEON: street views as panoramas of four, on CLIP ViT-L/14-336."""
        defaults = {"vision_config": clip_large_336(), "heads": [dict(head) for head in PIGEON_HEADS]}
        return cls(**(defaults | kwargs))

    @classmethod
    def pigeotto(cls, **kwargs: Any) -> "PigeonConfig":
        """PIGEOTTO: single photos of any kind; other smoothing and refinement, no month head."""
        defaults = {
            "heads": [dict(head) for head in PIGEON_HEADS[:2]],
            "smoothing_tau_km": 65.0,
            "refinement_top_k": 40,
            "refinement_temperature": 0.6,
            "refinement_max_km": None,
        }
        return cls.pigeon(**(defaults | kwargs))


def clip_large_336() -> dict[str, Any]:
    """The vision tower of openai/clip-vit-large-patch14-336, as arguments of `CLIPVisionConfig`."""
    return {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }


def checked_head(head: dict[str, Any]) -> dict[str, Any]:
    """A copy of an auxiliary head's description with its weight filled in.

    Raises `ValueError` that names the head and the value if it is not one (see [`PigeonConfig`]).
    """
    name = head.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"heads has a head named {name!r}: a name is made of letters, digits and _")
    unknown = sorted(set(head) - set(HEAD_KEYS))
    if unknown:
        raise ValueError(f"head {name!r} has unknown key {unknown[0]!r}; known are {', '.join(HEAD_KEYS)}")
    if head.get("kind") not in HEAD_KINDS:
        raise ValueError(f"head {name!r} has kind={head.get('kind')!r}; choose from {', '.join(HEAD_KINDS)}")
    size, weight = head.get("size"), head.get("weight", 1.0)
    if not isinstance(size, int) or size < 1 or (size < 2 and head["kind"] == "classification"):
        raise ValueError(f"head {name!r} has size={size!r}: give the number of values (from 1 on) or of classes (from 2 on)")
    if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ValueError(f"head {name!r} has weight={weight!r}: give a number from 0 on")
    for key in ("labels", "log_offsets", "means", "stds"):
        if head.get(key) is None:
            continue
        if len(head[key]) != size:
            raise ValueError(f"head {name!r} has {len(head[key])} {key} but size={size}: give one per value")
        if key != "labels" and head["kind"] != "regression":
            raise ValueError(f"head {name!r} is a classification: {key} is for regression")
    if any(not 0 < std < float("inf") for std in head.get("stds") or []):
        raise ValueError(f"head {name!r} has stds={head['stds']}: all must be positive")
    return {**head, "weight": float(weight)}


__all__ = ["PIGEON_HEADS", "PigeonConfig"]
