"""CLIP's activation as one kernel: in a large image tower its three operations take a seventh of the time."""

import torch
from torch import nn
from transformers.activations import QuickGELUActivation

from geobased.kernels.quick_gelu import quick_gelu


class FusedQuickGELUActivation(nn.Module):
    """What transformers' `QuickGELUActivation` computes, in one pass over memory."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return quick_gelu(input)


def fuse_activations(model: nn.Module) -> int:
    """Puts `FusedQuickGELUActivation` in place of all `QuickGELUActivation`s of a model; how many there were.

    They hold no weights, so what is saved and loaded stays the same.
    """
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is QuickGELUActivation
    ]
    for module, name in found:
        setattr(module, name, FusedQuickGELUActivation())
    return len(found)


__all__ = ["FusedQuickGELUActivation", "fuse_activations"]
