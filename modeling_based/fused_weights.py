# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Weights of parallel projections as one matrix, without a second copy: each parameter becomes a slice of the matrix's rows.

The parameters stay what they are (names, gradients, `load_state_dict`, `save_pretrained`); only their memory lies side by side.
Nothing keeps the matrix but the parameters: once `.to()` has moved them it is gone.
"""

from collections.abc import Sequence

import torch
from torch import nn


def side_by_side(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The matrix [sum of rows, columns] whose rows `weights` are, if they lie one after the other in memory, else None."""
    first = weights[0].detach()
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == storage and weight.dtype == first.dtype
        if not same or not weight.is_contiguous() or weight.data_ptr() != end or weight.shape[1:] != first.shape[1:]:
            return None
        end += weight.numel() * weight.element_size()
    return first.as_strided((sum(w.shape[0] for w in weights), *first.shape[1:]), first.stride())


def fuse_rows(weights: Sequence[nn.Parameter]) -> torch.Tensor | None:
    """As `side_by_side`, after moving the weights together if need be.

    None where that is not safe: subclasses of `nn.Parameter`, memory shared with other tensors or processes, parameters made
    in inference mode (training could not go on with them).
    """
    fused = side_by_side(weights)
    if fused is not None:
        return fused
    first = weights[0]
    for weight in weights:
        alone = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        alike = weight.dtype == first.dtype and weight.device == first.device and weight.shape[1:] == first.shape[1:]
        if type(weight) is not nn.Parameter or not weight.is_contiguous() or not alone or not alike or weight.is_inference():
            return None
        if weight.device.type == "cpu" and weight.is_shared():
            return None
    if len({weight.data_ptr() for weight in weights}) < len(weights):
        return None
    with torch.inference_mode(False), torch.no_grad():
        fused = torch.cat([weight.detach() for weight in weights])
        start = 0
        for weight in weights:
            weight.data = fused[start : start + weight.shape[0]]
            start += weight.shape[0]
    return fused


__all__ = ["fuse_rows", "side_by_side"]
