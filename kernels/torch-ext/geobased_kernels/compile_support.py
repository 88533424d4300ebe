"""What torch.compile needs to know of the ops beyond their fake forms."""

import sys
from collections.abc import Callable
from typing import Any

import torch

# from this version on inductor describes an op that it does not know only if somebody reads its log
_DESCRIBES_LAZILY = (2, 13)
_describes_eagerly = tuple(int(part) for part in torch.__version__.split(".")[:2]) < _DESCRIBES_LAZILY


def register_fake(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`op.register_fake` (of an op from `torch.library.custom_op`) for models of any depth.

    When inductor meets an op that it does not know, it writes out for its log what the op's inputs were computed from: in a
    decoder, whose residual stream forks in every layer, that doubles with each of them. Ops that are registered as known before
    inductor meets them are not written out.
    """

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        def fake_of_known_op(*arguments: Any, **named: Any) -> Any:
            _make_known(op._opoverload)
            return fake(*arguments, **named)

        return op.register_fake(fake_of_known_op if _describes_eagerly else fake)

    return decorate


def _make_known(overload: torch._ops.OpOverload) -> None:
    lowering = sys.modules.get("torch._inductor.lowering")  # absent unless inductor is compiling something
    if lowering is not None and overload not in lowering.lowerings:
        lowering.make_fallback(overload, layout_constraint=lowering.constrain_to_fx_strides, warn=False)
