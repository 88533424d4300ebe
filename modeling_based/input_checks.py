"""Checks of what a BASED model is called with: clear errors where tensors would fail obscurely, or not at all."""

import torch
from transformers.cache_utils import Cache
from transformers.utils import is_torchdynamo_compiling

from .cache_based import stored_tensors


def check_input_ids(input_ids: torch.Tensor, vocab_size: int, *, on_any_device: bool = False) -> None:
    """Raises ValueError where an embedding would fail obscurely. Values are read on the CPU only: a GPU would have to wait."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be integers (torch.long), not {input_ids.dtype}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, seq_len], not of shape {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token (the tokenizer's bos token, say)")
    if is_torchdynamo_compiling() or input_ids.device.type == "meta":
        return
    if on_any_device or input_ids.device.type == "cpu":
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}, which is outside the vocabulary (0 to {vocab_size - 1}):"
                " was the text encoded with another model's tokenizer?"
            )


def check_attention_mask(mask: torch.Tensor, batch_size: int, past_length: int, seq_len: int, has_running_state: bool) -> None:
    """Raises ValueError if a mask does not fit, or is one that the layers with a running state could not follow."""
    if mask.dim() == 4 and has_running_state:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} says which token sees which, but convolution and linear attention"
            " layers sum up all tokens: give a padding mask [batch, seq_len], or pack sequences with cu_seq_lens_q"
        )
    if mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask must be [batch, seq_len], not of shape {tuple(mask.shape)}")
    if mask.dim() == 2 and mask.shape[1] != past_length + seq_len:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns but there are {past_length} tokens in the cache and"
            f" {seq_len} new ones: it must cover all {past_length + seq_len}"
        )
    if mask.shape[0] != batch_size:
        raise ValueError(f"attention_mask has {mask.shape[0]} rows but the input has {batch_size}")


def check_cache(past_key_values: Cache, batch_size: int, num_layers: int) -> None:
    """Raises ValueError if a cache is for another batch size or another number of layers."""
    if len(past_key_values.layers) != num_layers:
        raise ValueError(
            f"the cache has {len(past_key_values.layers)} layers but the model has {num_layers}:"
            " make it with BasedCache(model.config)"
        )
    for layer in past_key_values.layers:
        for tensor in stored_tensors(layer):
            if tensor.numel() and tensor.shape[0] != batch_size:
                raise ValueError(
                    f"the cache holds a batch of {tensor.shape[0]} sequences but the input has {batch_size}:"
                    " pass a cache made for this batch, or none"
                )


def single_tokens_are_real(padding: torch.Tensor) -> bool:
    """Whether no row of padding [batch, 1] is 0. Taken for granted where values cannot be read: in compiled or captured code."""
    if is_torchdynamo_compiling() or (padding.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return bool(padding.all())


def packed_boundaries(position_ids: torch.Tensor, batch_size: int, seq_len: int) -> torch.Tensor | None:
    """cu_seqlens where position_ids of a batch of one start over at 0 inside the row, else None."""
    if is_torchdynamo_compiling() or batch_size != 1 or position_ids.dim() != 2 or seq_len == 1:
        return None
    starts = (position_ids[0] == 0).nonzero().flatten()
    if len(starts) < 2:
        return None
    inner = starts[starts > 0]
    bounds = [inner.new_zeros(1), inner, inner.new_full((1,), seq_len)]
    return torch.cat(bounds).to(torch.int32)
