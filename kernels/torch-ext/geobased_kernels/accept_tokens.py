"""The end of a generation step in one launch: finished rows get padding, the tokens are kept, the counters go on.

A dozen small kernels of PyTorch would take as long as one of the model's matrix products.
"""

import torch

from .accept_tokens_reference import accept_tokens_reference
from .backend import resolve_backend
from .compile_support import register_fake

__all__ = ["accept_tokens"]


def accept_tokens(
    picked: torch.Tensor,
    tokens: torch.Tensor,
    period_tokens: torch.Tensor,
    finished: torch.Tensor,
    ends: torch.Tensor,
    pad: torch.Tensor,
    counters: torch.Tensor,
    slot: torch.Tensor,
    running: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Takes the ids that a step has picked, in place of everything but `picked`, `ends` and `pad`.

    Args:
        picked: int64 [batch].
        tokens: int64 [batch]; becomes `picked`, or `pad` where a row had finished before.
        period_tokens: int64 [capacity, batch]; row `slot` becomes the tokens.
        finished: bool [batch]; rows whose token is one of `ends` finish.
        ends: int64 [any number]. Without any, no row ever finishes and `running` is not looked at.
        pad: int64 [].
        counters: int32 [any number]; all rise by 1, but only if `running` was 1.
        slot: int64 [1]; rises with them.
        running: int32 [1]; becomes 0 once all rows have finished.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check_inputs(picked, tokens, period_tokens, finished, ends, pad, counters, slot, running)
    if picked.numel() == 0 or resolve_backend(backend, period_tokens) == "torch":
        accept_tokens_reference(picked, tokens, period_tokens, finished, ends, pad, counters, slot, running)
    else:
        _accept_tokens(picked, tokens, period_tokens, finished, ends, pad, counters, slot, running)


def _check_inputs(picked, tokens, period_tokens, finished, ends, pad, counters, slot, running) -> None:
    batch = picked.shape[0]
    expected = {
        "picked": (picked, torch.int64, (batch,)),
        "tokens": (tokens, torch.int64, (batch,)),
        "period_tokens": (period_tokens, torch.int64, (period_tokens.shape[0], batch)),
        "finished": (finished, torch.bool, (batch,)),
        "ends": (ends, torch.int64, (ends.numel(),)),
        "pad": (pad, torch.int64, ()),
        "counters": (counters, torch.int32, (counters.numel(),)),
        "slot": (slot, torch.int64, (1,)),
        "running": (running, torch.int32, (1,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it must be a contiguous {dtype} {shape}")


@torch.library.custom_op(
    "geobased::accept_tokens", mutates_args={"tokens", "period_tokens", "finished", "counters", "slot", "running"}
)
def _accept_tokens(
    picked: torch.Tensor,
    tokens: torch.Tensor,
    period_tokens: torch.Tensor,
    finished: torch.Tensor,
    ends: torch.Tensor,
    pad: torch.Tensor,
    counters: torch.Tensor,
    slot: torch.Tensor,
    running: torch.Tensor,
) -> None:
    from . import accept_tokens_triton

    accept_tokens_triton.accept_tokens(picked, tokens, period_tokens, finished, ends, pad, counters, slot, running)


@register_fake(_accept_tokens)
def _(picked, tokens, period_tokens, finished, ends, pad, counters, slot, running):
    return None
