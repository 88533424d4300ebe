"""Cache of BASED models: everything a sequence needs to go on, in a size that does not depend on its length."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer, LinearAttentionLayer

from .configuration_based import BasedConfig


class RingSlidingWindowLayer(CacheLayerMixin):
    """The last `sliding_window` keys and values in a ring buffer: the token at position p lies in slot p % sliding_window.

    One token is stored by overwriting one slot, so a step moves no old keys (transformers' own dynamic layer copies the whole
    window every step). Keys are stored with their rotary embedding, so attention does not care about the order of the slots.
    """

    is_sliding = True
    is_croppable = False

    def __init__(self, sliding_window: int):
        super().__init__()
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self._ring_keys: torch.Tensor | None = None
        self._ring_values: torch.Tensor | None = None

    # `keys` and `values` are what other code of transformers reads: the filled slots, oldest token first
    @property
    def keys(self) -> torch.Tensor | None:
        return self._in_order(self._ring_keys)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._ring_keys = self._as_ring(value)

    @property
    def values(self) -> torch.Tensor | None:
        return self._in_order(self._ring_values)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._ring_values = self._as_ring(value)

    @property
    def num_filled(self) -> int:
        return min(self.cumulative_length, self.sliding_window)

    def _in_order(self, ring: torch.Tensor | None, newest: int | None = None) -> torch.Tensor | None:
        """The newest `newest` (default: all) stored tokens of a ring, oldest first."""
        if ring is None:
            return None
        count = self.num_filled if newest is None else min(newest, self.num_filled)
        start = self.cumulative_length - count
        if start % self.sliding_window + count <= self.sliding_window:
            return ring.narrow(2, start % self.sliding_window, count)
        slots = torch.arange(start, self.cumulative_length, device=ring.device) % self.sliding_window
        return ring.index_select(2, slots)

    def _as_ring(self, tokens: torch.Tensor | None) -> torch.Tensor | None:
        if tokens is None:
            return None
        ring = tokens.new_zeros(*tokens.shape[:2], self.sliding_window, tokens.shape[-1])
        start = self.cumulative_length - tokens.shape[2]
        slots = torch.arange(start, self.cumulative_length, device=tokens.device) % self.sliding_window
        return ring.index_copy_(2, slots, tokens)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, head_dim = key_states.shape
        self._ring_keys = key_states.new_zeros(batch, heads, self.sliding_window, head_dim)
        self._ring_values = value_states.new_zeros(batch, heads, self.sliding_window, value_states.shape[-1])
        self.is_initialized = True

    def _check_batch(self, key_states: torch.Tensor) -> None:
        if self._ring_keys.shape[0] != key_states.shape[0]:
            raise ValueError(
                f"the cache holds a batch of {self._ring_keys.shape[0]} sequences but the input has {key_states.shape[0]}:"
                " pass a cache made for this batch, or none"
            )

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one token, [batch, heads, 1, head_dim], and returns the filled slots in *slot* order."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_batch(key_states)
        slot = self.cumulative_length % self.sliding_window
        self._ring_keys[:, :, slot : slot + 1] = key_states
        self._ring_values[:, :, slot : slot + 1] = value_states
        self.cumulative_length += 1
        return self._ring_keys[:, :, : self.num_filled], self._ring_values[:, :, : self.num_filled]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores tokens, [batch, heads, n, head_dim], and returns the last `sliding_window - 1` older ones followed by them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_batch(key_states)
        older = self.sliding_window - 1
        full_keys = torch.cat([self._in_order(self._ring_keys, older), key_states], dim=2)
        full_values = torch.cat([self._in_order(self._ring_values, older), value_states], dim=2)
        self.cumulative_length += key_states.shape[2]
        kept = min(key_states.shape[2], self.sliding_window)
        positions = torch.arange(self.cumulative_length - kept, self.cumulative_length, device=key_states.device)
        self._ring_keys.index_copy_(2, positions % self.sliding_window, key_states[:, :, -kept:])
        self._ring_values.index_copy_(2, positions % self.sliding_window, value_states[:, :, -kept:])
        return full_keys, full_values

    def slot_positions(self, query_length: int, device: torch.device) -> torch.Tensor:
        """Positions of the tokens that the filled slots hold once `query_length` more tokens are stored."""
        total = self.cumulative_length + query_length
        slots = torch.arange(min(total, self.sliding_window), device=device)
        return total - 1 - (total - 1 - slots) % self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        older = min(self.cumulative_length, self.sliding_window - 1)
        return older + query_length, self.cumulative_length - older

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.sliding_window

    def offload(self) -> None:
        if self.is_initialized:
            self._ring_keys = self._ring_keys.to("cpu", non_blocking=True)
            self._ring_values = self._ring_values.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.is_initialized and self._ring_keys.device != self.device:
            self._ring_keys = self._ring_keys.to(self.device, non_blocking=True)
            self._ring_values = self._ring_values.to(self.device, non_blocking=True)

    def reset(self) -> None:
        if self.is_initialized:
            self._ring_keys.zero_()
            self._ring_values.zero_()
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._ring_keys = self._ring_keys[indices.to(self._ring_keys.device)]
            self._ring_values = self._ring_values[indices.to(self._ring_values.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._ring_keys = self._ring_keys.repeat_interleave(repeats, dim=0)
            self._ring_values = self._ring_values.repeat_interleave(repeats, dim=0)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a BASED cache cannot be cropped: the keys that left the window are gone")


class BasedCache(DynamicCache):
    """Constant-size cache of a BASED model.

    Per layer, and per sequence whatever its length:
    - `linear_attention`: the running sum of packed Taylor features, float32,
      [batch, heads, (d + 1)(d + 2)/2, head_dim + 1] (the last column is the normaliser);
    - `sliding_attention`: a ring buffer of the last `sliding_window` keys and values;
    - `conv`: the last `conv_kernel` inputs of the short convolution.

    `reorder_cache`, `batch_select_indices`, `batch_repeat_interleave` and `reset` work as in other caches. `crop` raises: a
    running sum does not forget.

    Example:

    ```python
    >>> cache = BasedCache(model.config)
    >>> outputs = model(input_ids, past_key_values=cache)
    >>> outputs = model(next_ids, past_key_values=cache)  # goes on where the first call ended
    ```
    """

    # nobody but one call of `generate` knows the cache
    made_by_generate = False

    def __init__(self, config: BasedConfig, **kwargs):
        super().__init__(config=config, **kwargs)
        self.layers = [
            RingSlidingWindowLayer(config.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else layer
            for layer in self.layers
        ]
        self._seen_tokens = 0

    def count_tokens(self, num_tokens: int) -> None:
        """Called by the model once per forward: a model without sliding layers has no other record of the length."""
        self._seen_tokens += num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # within a forward the layers disagree until the last one is done; the count is right before and after
        return self._seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not any(self.is_sliding):
            return self._seen_tokens + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        super().reset()
        self._seen_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a BASED cache cannot be cropped: its recurrent state is a sum over all tokens and cannot forget one."
            " Keep a copy from before (copy.deepcopy) and go on from there"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.reorder_cache(indices)  # type: ignore[arg-type]
            else:
                layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                state = next(stored_tensors(layer), None)
                if state is not None:
                    rows = torch.arange(state.shape[0], device=state.device).repeat_interleave(repeats)
                    layer.reorder_cache(rows)  # type: ignore[arg-type]
            else:
                layer.batch_repeat_interleave(repeats)

    def size_bytes(self) -> int:
        """Bytes that the cache holds now (0 before the first forward)."""
        total = 0
        for layer in self.layers:
            total += sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(layer))
        return total


def stored_tensors(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors that a layer of any cache holds now, the batch on their first axis; none before its first use."""
    if isinstance(layer, LinearAttentionLayer):
        tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    elif isinstance(layer, RingSlidingWindowLayer):
        tensors = [layer._ring_keys, layer._ring_values]  # whole, and without putting them in order as `keys` does
    else:
        tensors = [layer.keys, layer.values]
    yield from (tensor for tensor in tensors if tensor is not None)


__all__ = ["BasedCache"]
