# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Cache of causal Sumformer models: running sums, of a size that does not depend on the sequence's length."""

import torch
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from .configuration_sumformer import SumformerConfig


class RunningSumLayer(LinearAttentionLayer):
    """One state [batch, ...] in float32, or none before the first token."""

    is_sliding = False
    is_compileable = False  # the state is another tensor after each step

    @property
    def state(self) -> torch.Tensor | None:
        return self.recurrent_states[0]

    def set_state(self, state: torch.Tensor) -> None:
        """Puts a state in the place of the old one."""
        self.dtype, self.device = state.dtype, state.device  # type: ignore[assignment]
        self.recurrent_states[0] = state
        self.is_recurrent_states_initialized[0] = True

    def reset(self) -> None:
        # zeros are no empty state for the logarithms that Performer keeps
        self.recurrent_states[0] = None
        self.is_recurrent_states_initialized[0] = False

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.shape[0], device=self.state.device)
            self.reorder_cache(rows.repeat_interleave(repeats))  # type: ignore[arg-type]

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a Sumformer cache cannot be cropped: a running sum does not forget. Keep a copy from before (copy.deepcopy) and go"
            " on from there"
        )


class SumformerCache(Cache):
    """Cache of a causal model.

    Per layer and sequence, in float32 (float64 in a float64 model):
    - `mixer="sumformer"`: the sum of phi and the number of elements, latent_size + 1 numbers;
    - `mixer="performer"`: per head and random feature the mean of the values and a logarithm, head_dim + 1 numbers;
    - `mixer="softmax"`: keys and values of all tokens, which grow with the sequence, as transformers keeps them.

    `reorder_cache`, `batch_select_indices`, `batch_repeat_interleave` and `reset` work as in other caches. Running sums cannot be
    cropped: `crop` raises `ValueError`.

    Example:

    ```python
    >>> cache = SumformerCache(model.config)
    >>> outputs = model(input_ids, past_key_values=cache)
    >>> outputs = model(next_ids, past_key_values=cache)  # goes on where the first call ended
    ```
    """

    def __init__(self, config: SumformerConfig):
        layer_class = DynamicLayer if config.mixer == "softmax" else RunningSumLayer
        super().__init__(layers=[layer_class() for _ in range(config.num_hidden_layers)])
        self._seen_tokens = 0

    def count_tokens(self, num_tokens: int) -> None:
        """Called by the model once per forward: sums have no other record of the length."""
        self._seen_tokens += num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen_tokens + query_length, 0

    def reset(self) -> None:
        super().reset()
        self._seen_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        before = self.layers[0].get_seq_length() if isinstance(self.layers[0], DynamicLayer) else 0
        super().crop(tokens_to_remove)
        self._seen_tokens += self.layers[0].get_seq_length() - before

    def tensors(self) -> list[torch.Tensor]:
        """What the layers hold now, the batch on the first axis; none before the first use."""
        held = [layer.state if isinstance(layer, RunningSumLayer) else (layer.keys, layer.values) for layer in self.layers]
        flat = [part for item in held for part in (item if isinstance(item, tuple) else (item,))]
        return [tensor for tensor in flat if tensor is not None]

    def size_bytes(self) -> int:
        """Bytes that the cache holds now (0 before the first forward)."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


__all__ = ["SumformerCache"]
