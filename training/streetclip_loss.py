"""The contrastive loss of CLIP over all processes, and a gradient cache that makes its batch as large as one likes.

Gradient cache (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", arXiv:2101.06983): the
towers' gradient depends on the rest of the batch only through the gradient of the loss by their embeddings. So embeddings are
computed in chunks without a graph, the loss's gradient by them is taken, and each chunk is computed again, with the same random
numbers, to pass that gradient on. Memory is that of a chunk; the cost is one more forward pass.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

MAX_LOGIT_SCALE = math.log(100)  # CLIP never multiplies cosines by more
Embed = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


class _Gather(torch.autograd.Function):
    """Concatenates the processes' rows; a row's gradient is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """rows [n, ...] of every process, [processes * n, ...], with gradients; rows themselves without other processes.

    n must be the same everywhere.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows) if rows.is_floating_point() else _Gather.forward(None, rows)


def contrastive_loss(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor,
    caption_ids: torch.Tensor | None = None,
    gather: bool = True,
) -> torch.Tensor:
    """Symmetric cross entropy of matching images and captions, half of each direction (Radford et al. 2021).

    Args:
        image_embeddings, text_embeddings: [n, width], normalised, of this process; row i of one belongs to row i of the other.
        logit_scale: what cosines are multiplied by (the exponential of CLIP's parameter).
        caption_ids: [n] integers, equal where captions are. Then all equal captions of the batch match, each an equal share;
            without, another image's equal caption is a negative, as in CLIP.
        gather: whether rows of all processes are negatives.

    Returns:
        The mean over this process's rows. Its gradient, averaged over processes as distributed training does, is that of the
        loss of one process that holds all rows.

    Raises:
        ValueError: embeddings of different shapes.
    """
    if image_embeddings.shape != text_embeddings.shape or image_embeddings.dim() != 2:
        raise ValueError(
            f"image and text embeddings must be [n, width] both, not {tuple(image_embeddings.shape)} and"
            f" {tuple(text_embeddings.shape)}"
        )
    # precise sums whatever the towers compute in; float64 stays
    wide = torch.promote_types(image_embeddings.dtype, torch.float32)
    images, texts = image_embeddings.to(wide), text_embeddings.to(wide)
    all_images, all_texts = (gather_rows(images), gather_rows(texts)) if gather else (images, texts)
    count = len(images)
    first = dist.get_rank() * count if len(all_images) > count else 0
    scale = logit_scale.to(wide)
    image_logits, text_logits = scale * images @ all_texts.T, scale * texts @ all_images.T
    if caption_ids is None:
        targets: torch.Tensor = torch.arange(first, first + count, device=images.device)
    else:
        all_ids = gather_rows(caption_ids) if gather else caption_ids
        same = (caption_ids[:, None] == all_ids[None]).to(wide)
        targets = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(image_logits, targets) + F.cross_entropy(text_logits, targets)) / 2


def cached_backward(
    chunks: Sequence[Any],
    embed: Embed,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
    loss_parameters: Sequence[torch.Tensor] = (),
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """The loss of all chunks together, with its gradient passed back chunk by chunk.

    Args:
        chunks: inputs of `embed`, in order.
        embed: chunk -> embeddings of images and texts, [n, width] each.
        loss: embeddings of images and texts of all chunks -> scalar.
        backward: runs backward on a scalar.
        loss_parameters: parameters that `loss` uses itself. They get their gradients with the last chunk, so that distributed
            training sees them once.
        no_sync: context of all passes but the last, in which distributed training must not reduce gradients.

    Returns:
        The loss, detached.

    Raises:
        ValueError: no chunks.
    """
    if not chunks:
        raise ValueError("there are no chunks: give at least one")
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state())
            parts.append(embed(chunk))
    after = _random_state()
    images, texts = (torch.cat(side).detach().requires_grad_() for side in zip(*parts, strict=True))
    with torch.enable_grad():
        total = loss(images, texts)
        by_images, by_texts, *by_parameters = torch.autograd.grad(total, (images, texts, *loss_parameters))
    start = 0
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        last = number == len(chunks) - 1
        _set_random_state(state)
        with nullcontext() if last else no_sync():
            image_part, text_part = embed(chunk)
            rows = slice(start, start + len(image_part))
            surrogate = (image_part.to(by_images.dtype) * by_images[rows]).sum()
            surrogate = surrogate + (text_part.to(by_texts.dtype) * by_texts[rows]).sum()
            if last:
                for parameter, gradient in zip(loss_parameters, by_parameters, strict=True):
                    surrogate = surrogate + (parameter * gradient).sum()
            backward(surrogate)
        start += len(image_part)
    _set_random_state(after)
    return total.detach()


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


__all__ = ["cached_backward", "contrastive_loss", "gather_rows"]
