# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""The auxiliary heads of PIGEON: any set of regressions and classifications, as the configuration lists them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

from .configuration_pigeon import PigeonConfig
from .loss_pigeon import IGNORE_INDEX, classification_loss, regression_loss


class PigeonHeads(nn.Module):
    """Linear heads on the image embedding, by name.

    Raises `ValueError` for a name that modules have in use.
    """

    def __init__(self, config: PigeonConfig):
        super().__init__()
        self.specifications = {head["name"]: head for head in config.heads}
        for name, head in self.specifications.items():
            if hasattr(self, name):
                raise ValueError(f"a head cannot be named {name!r}, which modules have in use: choose another name")
            self.add_module(name, nn.Linear(config.vision_config.hidden_size, head["size"]))

    def forward(self, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        """embeddings [batch, hidden_size] -> name: (standardised) values or logits [batch, size]."""
        return {name: self.get_submodule(name)(embeddings) for name in self.specifications}

    def losses(self, outputs: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """name: loss times its weight, for each head that has labels.

        Labels of a regression are values [batch, size] (NaN: not known) in the units of the configuration's transformation; of
        a classification, classes [batch] (-100: not known) or probabilities [batch, size].

        Raises `ValueError` for a head that there is not, and labels of a wrong shape or outside the classes.
        """
        losses = {}
        for name, values in labels.items():
            head = self.specifications.get(name)
            if head is None:
                raise ValueError(f"head_labels has {name!r}, but the heads are: {', '.join(self.specifications) or 'none'}")
            output = outputs[name]
            values = values.to(output.device)
            _check_labels(name, head, values, output)
            if head["kind"] == "regression":
                loss = regression_loss(output, self.targets(name, values))
            else:
                loss = classification_loss(output, values)
            losses[name] = head["weight"] * loss
        return losses

    def targets(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values [batch, size] of a regression head in their own units -> what the head learns to put out.

        Raises `ValueError` where the logarithm of a value does not exist.
        """
        log_offsets, mean, std = _transformation(self.specifications[name], values)
        targets = values.float()
        logged = ~log_offsets.isnan()
        shifted = targets + log_offsets.nan_to_num()
        if not is_torchdynamo_compiling() and bool((logged & (shifted <= 0)).any()):
            row, column = (logged & (shifted <= 0)).nonzero()[0].tolist()
            raise ValueError(
                f"head_labels[{name!r}][{row}, {column}] is {values[row, column].item():g}, and its logarithm with offset"
                f" {log_offsets[column].item():g} does not exist: give a larger log_offsets in the configuration"
            )
        return (torch.where(logged, torch.where(logged, shifted, 1).log(), targets) - mean) / std

    def natural_values(self, name: str, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs [batch, size] of a regression head -> values in their own units: the inverse of `targets`."""
        log_offsets, mean, std = _transformation(self.specifications[name], outputs)
        values = outputs.float() * std + mean
        return torch.where(log_offsets.isnan(), values, values.exp() - log_offsets.nan_to_num())


def _transformation(head: dict[str, Any], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head's logarithm offsets (NaN: no logarithm), means and standard deviations, [size] each."""
    size = head["size"]
    offsets = [float("nan") if offset is None else offset for offset in head.get("log_offsets") or [None] * size]
    rows = (offsets, head.get("means") or [0.0] * size, head.get("stds") or [1.0] * size)
    log_offsets, means, stds = (torch.tensor(row, dtype=torch.float32, device=like.device) for row in rows)
    return log_offsets, means, stds


def _check_labels(name: str, head: dict[str, Any], labels: torch.Tensor, outputs: torch.Tensor) -> None:
    classes = head["kind"] == "classification" and not labels.is_floating_point()
    expected = outputs.shape[:1] if classes else outputs.shape
    if labels.shape != expected:
        raise ValueError(f"head_labels[{name!r}] has shape {tuple(labels.shape)}, not {tuple(expected)}")
    if is_torchdynamo_compiling():
        return
    if classes:
        bad = ((labels < 0) | (labels >= head["size"])) & (labels != IGNORE_INDEX)
        if bool(bad.any()):
            wrong = labels[bad][0].item()
            raise ValueError(f"head_labels[{name!r}] holds class {wrong}; there are 0 to {head['size'] - 1} (-100: unknown)")
    elif bool(labels.isinf().any()) or (head["kind"] == "classification" and bool(labels.isnan().any())):
        raise ValueError(f"head_labels[{name!r}] holds a value that is no number")


__all__ = ["PigeonHeads"]
