"""Calls of custom ops without torch.library's dispatch, where nobody needs it.

A registered op lets torch.compile and torch.export see through a kernel. In plain eager code its dispatch costs more host time
than the launch of a small kernel, and a training step of a small model is bound by the host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def direct_call(
    op: Any, setup_context: Callable[..., None] | None = None, backward: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A function that computes what `op` (from `torch.library.custom_op`) computes, with the same gradients.

    Plain tensors in plain eager code go straight to the op's own function, as an autograd function if `backward` and
    `setup_context` (those of `register_autograd`) are given. Anything that traces, transforms or intercepts the call gets the op.
    """
    function = op._init_fn

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = function(*arguments)
            assert setup_context is not None
            setup_context(ctx, arguments, output)  # here, not as the class's own: that costs a second pass through Python
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            assert backward is not None
            return backward(ctx, *gradients)

    def call(*arguments: Any) -> Any:
        if not _is_plain_eager(arguments):
            return op(*arguments)
        if not torch.is_grad_enabled():
            return function(*arguments)
        if not any(isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments):
            return function(*arguments)
        # an op without a gradient (the gradient of another op, say) must refuse to be differentiated, as it does by itself
        return op(*arguments) if backward is None else Direct.apply(*arguments)

    return call


def _is_plain_eager(arguments: Sequence[Any]) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if _get_current_dispatch_mode() is not None:  # fake tensors, proxies, counters of operations
        return False
    return all(type(argument) in PLAIN_TYPES for argument in arguments if isinstance(argument, torch.Tensor))
