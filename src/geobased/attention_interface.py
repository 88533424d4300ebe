"""`attn_implementation="geobased"`: any transformers model on our attention kernels.

    model = CLIPModel.from_pretrained("openai/clip-vit-large-patch14-336", attn_implementation="geobased")

Two functions are registered with transformers when geobased is imported. The mask function hands the attention function the
padding mask [batch, kv_len] alone, or None where nothing is padded, since causality and window are known to the kernels; only
masks that are neither padding nor causal nor a causal window stand as [batch, 1, seq_len, kv_len], and layers that get one run
on PyTorch's scaled_dot_product_attention.

Kernels (and Triton) load at the first call; on a CPU their plain PyTorch twins run.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)

NAME = "geobased"


def register_attention() -> None:
    """Makes `attn_implementation="geobased"` known to transformers; `import geobased` calls it."""
    AttentionInterface.register(NAME, geobased_attention_forward)
    # without a mask function of its own transformers would hand over no mask at all, and padding would be attended to
    AttentionMaskInterface.register(NAME, geobased_attention_mask)


# --- attention --------------------------------------------------------------------------------------------------------


def geobased_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, seq_len, head_dim]; key, value [batch, kv_heads, kv_len, head_dim]
    -> [batch, seq_len, heads, head_dim] and None in place of the attention weights.

    attention_mask is what `geobased_attention_mask` made: None, [batch, n] whose zeros are padding (keys from n on do not
    exist), or [batch, 1 or heads, seq_len, kv_len]. A query that sees no key gives zeros.
    """
    if kwargs.get("output_attentions"):
        logger.warning_once(
            f"`{NAME}` attention does not support `output_attentions=True`. Please set your attention to `eager` if you want"
            " any of these features."
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.dim() == 2:
        kept = attention_mask.shape[1]
        key, value, attention_mask = key[:, :, :kept], value[:, :, :kept], attention_mask[:, -key.shape[2] :]
    seq_len, kv_len = query.shape[2], key.shape[2]
    # one query is the last one: causality hides nothing from it
    causal = causal and (seq_len > 1 or sliding_window is not None)
    if sliding_window is not None and sliding_window >= kv_len:
        sliding_window = None

    reason = _unsupported(query, key, value, attention_mask, dropout, causal, sliding_window, kwargs)
    if reason is not None:
        logger.warning_once(f"`{NAME}` attention: {reason}; these layers run on scaled_dot_product_attention")
        # without padding and window PyTorch needs no mask either
        plain = causal and attention_mask is None and sliding_window is None and seq_len == kv_len
        mask = None if plain else _dense_mask(attention_mask, seq_len, kv_len, causal, sliding_window, query.device)
        return sdpa_attention_forward(
            *(module, query, key, value, mask), dropout=dropout, scaling=scaling, is_causal=plain, **kwargs
        )

    from .kernels.flash_attention import flash_attention
    from .kernels.sliding_window_attention import sliding_window_attention

    attend: Callable[..., torch.Tensor]
    if sliding_window is None:
        attend = functools.partial(flash_attention, causal=causal)
    else:
        attend = functools.partial(sliding_window_attention, window=sliding_window)
    heads_last = (x.transpose(1, 2) for x in (query, key, value))
    return attend(*heads_last, attention_mask=attention_mask, softmax_scale=scaling), None


def _unsupported(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    sliding_window: int | None,
    options: dict[str, Any],
) -> str | None:
    """Why the kernels cannot compute this, None if they can."""
    from .kernels.flash_attention import MAX_TRITON_HEAD_DIM

    if dropout > 0:
        return f"its kernels have no dropout (dropout={dropout}; set attention_dropout to 0)"
    if attention_mask is not None and attention_mask.dim() != 2:
        return "the attention mask is more than padding, causality and a causal window"
    if sliding_window is not None and not causal:
        return f"a window of {sliding_window} needs causal attention"
    if value.shape[-1] != query.shape[-1]:
        return f"head_dim {query.shape[-1]} of the keys differs from that of the values, {value.shape[-1]}"
    if query.is_cuda and query.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"its kernels take head_dim up to {MAX_TRITON_HEAD_DIM}, not {query.shape[-1]}"
    if causal and key.shape[2] < query.shape[2]:
        return f"{query.shape[2]} queries stand against {key.shape[2]} keys"
    given = [name for name in ("softcap", "s_aux", "position_bias", "cache", "head_mask") if options.get(name) is not None]
    if given:
        return f"its kernels take no {', '.join(given)}"
    return None


def _dense_mask(
    attention_mask: torch.Tensor | None, seq_len: int, kv_len: int, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """bool [batch or 1, 1, seq_len, kv_len], true where a query sees a key; None if every query sees every key."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    visible = None if attention_mask is None else attention_mask.bool()[:, None, None]
    if causal or window is not None:
        distance = torch.arange(seq_len, device=device)[:, None] + (kv_len - seq_len) - torch.arange(kv_len, device=device)
        run = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            run = run & (distance < window) & (distance > -window)
        visible = run[None, None] if visible is None else visible & run
    if visible is not None and visible.shape[-2] == 1:
        visible = visible.expand(-1, -1, seq_len, -1)
    return visible


# --- masks ------------------------------------------------------------------------------------------------------------


def geobased_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that transformers hands to `geobased_attention_forward`: None, bool [batch, n] or bool [batch, 1, q, kv].

    None says that nothing is padded and that the last query is aligned with the last key. [batch, n], n at most kv_length, says
    that only the first n keys exist (a static cache allocates more), the last of which belongs to the last query.
    """
    padding = attention_mask
    if padding is not None:
        missing = kv_offset + kv_length - padding.shape[-1]
        padding = torch.nn.functional.pad(padding, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length].bool()

    if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
        return _none_if_full(padding)
    # decoding with a static cache also comes without leave to skip the mask, which one query does not need
    may_skip = allow_is_causal_skip or q_length == 1
    is_causal = mask_function is causal_mask_function and may_skip
    is_window = local_size is not None and not use_vmap and (allow_is_causal_skip or _is_window(mask_function, local_size))
    if is_causal or (is_window and may_skip):
        if isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length:
            return _none_if_full(padding)
        if q_length == 1 and (is_causal or kv_length <= (local_size or 0)):
            reached = torch.arange(kv_length, device=device) + kv_offset <= q_offset
            return reached.expand(batch_size, -1) if padding is None else padding & reached
        if isinstance(q_offset, int) or not _is_traced():
            length = int(q_offset) + q_length - kv_offset
            if q_length <= length <= kv_length:
                padding = torch.ones(batch_size, length, dtype=torch.bool, device=device) if padding is None else padding
                return padding[:, :length]

    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # it takes the tensor of a static cache too
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _none_if_full(padding: torch.Tensor | None) -> torch.Tensor | None:
    """None instead of a mask that hides nothing, where looking at it does not break a traced graph."""
    if padding is None or (not _is_traced() and bool(padding.all())):
        return None
    return padding


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_window(mask_function: Callable, window: int) -> bool:
    return _same(mask_function, sliding_window_causal_mask_function(window))


def _same(a: object, b: object) -> bool:
    """Whether two functions have the same code and have closed over the same things."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    code = getattr(a, "__code__", None)
    if code is None or code is not getattr(b, "__code__", None):
        return a is b or (isinstance(a, int) and a == b)
    cells = (getattr(x, "__closure__", None) or () for x in (a, b))
    return _same(*(tuple(cell.cell_contents for cell in closure) for closure in cells))
