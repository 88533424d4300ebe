"""The largest entry of every row, as a custom op for the Triton form: what greedy decoding does with logits.

PyTorch's own argmax takes several times as long as reading the logits; a program here reads a row once, in wide loads.
"""

import torch

from .backend import resolve_backend
from .compile_support import register_fake
from .row_argmax_reference import row_argmax_reference


def row_argmax(scores: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """scores [rows, n] -> int64 [rows]: the first of the largest entries of each row. NaN counts as infinity.

    Raises ValueError for another shape and for a dtype that is not floating point.

    Example:
        >>> row_argmax(torch.tensor([[0.0, 2.0, 2.0], [1.0, -1.0, 0.0]]))
        tensor([1, 0])
    """
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores has shape {tuple(scores.shape)}: it must be [rows, n] with n >= 1")
    if not scores.is_floating_point():
        raise ValueError(f"scores has dtype {scores.dtype}: it must be a floating point dtype")
    if scores.shape[0] == 0 or resolve_backend(backend, scores) == "torch":
        return row_argmax_reference(scores)
    return _row_argmax(scores)


@torch.library.custom_op("geobased::row_argmax", mutates_args=())
def _row_argmax(scores: torch.Tensor) -> torch.Tensor:
    from . import row_argmax_triton

    return row_argmax_triton.row_argmax(scores)


@register_fake(_row_argmax)
def _(scores):
    return torch.empty(scores.shape[0], dtype=torch.int64, device=scores.device)
