"""Cross entropy of each token, differentiable, as one custom op for the Triton form.

    loss = logsumexp(logits) - logits[label]

Half-precision logits are read as they are and summed in float32: no float32 copy of them exists, neither here nor in the
backward pass, which saves one number per token and writes the gradient in the logits' dtype.
"""

import torch

from .backend import resolve_backend
from .compile_support import register_fake
from .cross_entropy_reference import cross_entropy_reference
from .direct_call import direct_call


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100, backend: str = "auto") -> torch.Tensor:
    """logits [..., vocab_size]; labels [...] int64 -> the loss of each token, float32 (float64 for float64) [...].

    Args:
        labels: ids below vocab_size; the loss is zero where a label is ignore_index. Other values that are no ids raise on the
            CPU and give NaN in the Triton form, where raising would have to wait for the GPU.
        backend: "auto", "triton" or "torch".

    Raises ValueError for shapes, dtypes or devices that do not fit.

    Example:
        >>> logits, labels = torch.randn(2, 5, 100), torch.randint(0, 100, (2, 5))
        >>> cross_entropy(logits, labels).shape
        torch.Size([2, 5])
    """
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: give [..., vocab_size] and [...]"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits have dtype {logits.dtype}: it must be a floating point dtype")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels have dtype {labels.dtype}: make them torch.int64")
    if logits.device != labels.device:
        raise ValueError(f"logits are on {logits.device} and labels on {labels.device}: move them to one device")
    if logits.numel() == 0 or resolve_backend(backend, logits) == "torch":
        return cross_entropy_reference(logits, labels, ignore_index=ignore_index)
    return _run(logits, labels, ignore_index)[0]


@torch.library.custom_op("geobased::cross_entropy", mutates_args=())
def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> losses and the logsumexp of each row, both float32 and like labels."""
    from . import cross_entropy_triton

    return cross_entropy_triton.forward(logits, labels, ignore_index)


@register_fake(_cross_entropy)
def _(logits, labels, ignore_index):
    return tuple(torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(2))


@torch.library.custom_op("geobased::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dlosses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, logsumexp: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """-> dlogits."""
    from . import cross_entropy_triton

    return cross_entropy_triton.backward(dlosses, logits, labels, logsumexp, ignore_index)


@register_fake(_cross_entropy_backward)
def _(dlosses, logits, labels, logsumexp, ignore_index):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output) -> None:
    logits, labels, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, labels, output[1])


def _backward(ctx, dlosses, _):
    return _run_backward(dlosses, *ctx.saved_tensors, ctx.ignore_index), None, None


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
_run = direct_call(_cross_entropy, _setup_context, _backward)
_run_backward = direct_call(_cross_entropy_backward)
