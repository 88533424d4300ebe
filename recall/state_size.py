"""How many bytes a sequence mixer keeps of a sequence: one axis of the recall-memory tradeoff."""

from typing import Any

MIXERS = (
    "conv",
    "attention",
    "sliding_attention",
    "linear_attention",
    "mamba2",
    "gated_deltanet",
    "performer",
    "sumformer",
)
NOT_CAUSAL = {"linformer": "it projects the whole sequence, so no state of fixed size can be kept token by token"}
# decoders of transformers whose layers keep keys and values of all tokens or of a window, and nothing else
ATTENTION_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# attributes of a configuration that have the name of an argument of `mixer_state_bytes`
MIXER_SIZES = (
    "num_heads",
    "feature_dim",
    "sliding_window",
    "conv_kernel",
    "conv_dim",
    "state_size",
    "expand",
    "num_groups",
    "short_conv_kernel",
    "key_head_dim",
    "value_head_dim",
)


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive integer")


def mixer_state_bytes(
    mixer: str,
    seq_len: int,
    *,
    hidden_size: int,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    feature_dim: int = 16,
    sliding_window: int = 64,
    conv_kernel: int = 3,
    conv_dim: int | None = None,
    state_size: int = 16,
    expand: int = 2,
    num_groups: int = 1,
    short_conv_kernel: int = 4,
    key_head_dim: int | None = None,
    value_head_dim: int | None = None,
    bytes_per_number: int = 4,
) -> int:
    """Bytes that one layer keeps of one sequence after `seq_len` tokens, to go on with the next.

    | mixer | numbers |
    | --- | --- |
    | conv | `conv_dim * conv_kernel`; `conv_kernel - 1` inputs would do, but this is how the published figure counts |
    | attention | `2 * num_kv_heads * head_dim * seq_len` |
    | sliding_attention | `2 * num_kv_heads * head_dim * min(sliding_window, seq_len)` |
    | linear_attention (Taylor) | `num_heads * D * (head_dim + 1)`, where `D = (feature_dim + 1) * (feature_dim + 2) / 2` |
    | mamba2 | `d * state_size + (d + 2 * num_groups * state_size) * short_conv_kernel`, where `d = expand * hidden_size` |
    | gated_deltanet | `num_heads * (k * v + (2 * k + v) * short_conv_kernel)`, `k = key_head_dim`, `v = value_head_dim` |
    | performer | `num_heads * feature_dim * (head_dim + 1)` |
    | sumformer | `feature_dim`, the width of its sum |

    Args:
        mixer: one of `MIXERS`.
        seq_len: tokens so far.
        hidden_size: width of the layer.
        num_heads, num_kv_heads: heads, and those of keys and values (`num_heads` if not given).
        head_dim: width of a head's values; `hidden_size // num_heads` if not given.
        feature_dim: width of a head's queries and keys (Taylor), number of random features (Performer), width of the sum
            (Sumformer).
        sliding_window: keys that a query sees, itself included.
        conv_kernel, conv_dim: taps and channels (`hidden_size` if not given) of a convolution layer.
        state_size, expand, num_groups: of Mamba 2, as in transformers.
        short_conv_kernel: taps of the convolutions inside Mamba 2 and Gated DeltaNet layers; 0 without them.
        key_head_dim, value_head_dim: of Gated DeltaNet; `head_dim` and `expand * key_head_dim` if not given.
        bytes_per_number: 4 for float32, 2 for half precision.

    Raises:
        ValueError: unknown mixer, one that is not causal, or a size that is not positive; the message names it.
    """
    if mixer in NOT_CAUSAL:
        raise ValueError(f"mixer {mixer!r} is not causal: {NOT_CAUSAL[mixer]}")
    if mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}: choose from {', '.join(MIXERS)}")
    _check_sizes(seq_len=seq_len, hidden_size=hidden_size, num_heads=num_heads, bytes_per_number=bytes_per_number)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not divisible by num_heads={num_heads}: give head_dim")
        head_dim = hidden_size // num_heads
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    conv_dim = hidden_size if conv_dim is None else conv_dim
    key_head_dim = head_dim if key_head_dim is None else key_head_dim
    value_head_dim = expand * key_head_dim if value_head_dim is None else value_head_dim
    _check_sizes(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        feature_dim=feature_dim,
        sliding_window=sliding_window,
        conv_kernel=conv_kernel,
        conv_dim=conv_dim,
        state_size=state_size,
        expand=expand,
        num_groups=num_groups,
        key_head_dim=key_head_dim,
        value_head_dim=value_head_dim,
    )
    if short_conv_kernel != 0:
        _check_sizes(short_conv_kernel=short_conv_kernel)

    if mixer == "conv":
        numbers = conv_dim * conv_kernel
    elif mixer == "attention":
        numbers = 2 * num_kv_heads * head_dim * seq_len
    elif mixer == "sliding_attention":
        numbers = 2 * num_kv_heads * head_dim * min(sliding_window, seq_len)
    elif mixer == "linear_attention":
        numbers = num_heads * (feature_dim + 1) * (feature_dim + 2) // 2 * (head_dim + 1)
    elif mixer == "mamba2":
        inner = expand * hidden_size
        numbers = inner * state_size + (inner + 2 * num_groups * state_size) * short_conv_kernel
    elif mixer == "gated_deltanet":
        convolutions = (2 * key_head_dim + value_head_dim) * short_conv_kernel
        numbers = num_heads * (key_head_dim * value_head_dim + convolutions)
    elif mixer == "performer":
        numbers = num_heads * feature_dim * (head_dim + 1)
    else:
        numbers = feature_dim
    return numbers * bytes_per_number


def _layers(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Mixer and sizes of each layer."""
    model_type = getattr(config, "model_type", None)
    if model_type in ATTENTION_MODEL_TYPES:
        window = getattr(config, "sliding_window", None)
        sizes = {
            "hidden_size": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None),
        } | ({} if window is None else {"sliding_window": window})
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
        return [("attention" if kind == "full_attention" else kind, sizes) for kind in kinds]
    if model_type == "sumformer":
        features = config.num_random_features if config.mixer == "performer" else config.latent_size
        mixer = "attention" if config.mixer == "softmax" else config.mixer
        sizes = {"hidden_size": config.hidden_size, "num_heads": config.num_attention_heads, "feature_dim": features}
        return [(mixer, sizes)] * config.num_hidden_layers
    mixers = getattr(config, "mixers", None)
    if mixers is None:
        raise ValueError(
            f"the state of {type(config).__name__} (model type {model_type!r}) is not known: it has no `mixers`, and is not of"
            f" {', '.join(ATTENTION_MODEL_TYPES)}"
        )
    sizes = {name: value for name in MIXER_SIZES if (value := getattr(config, name, None)) is not None}
    sizes["hidden_size"] = config.hidden_size
    if model_type == "based":
        sizes |= {"num_heads": config.num_attention_heads, "head_dim": config.head_dim}
    if model_type == "mqar":
        heads = config.expand * config.hidden_size // config.head_dim
        delta_net = {"num_heads": heads, "key_head_dim": config.state_size, "value_head_dim": config.head_dim}
        return [(mixer, sizes | (delta_net if mixer == "gated_deltanet" else {})) for mixer in mixers]
    return [(mixer, sizes) for mixer in mixers]


def state_bytes(config: Any, seq_len: int, bytes_per_number: int = 4) -> int:
    """Bytes that all layers of a model keep of one sequence after `seq_len` tokens, as `mixer_state_bytes` counts them.

    For a `BasedConfig` that is what `BasedCache.size_bytes` says of a float32 model once the window is full. Before that the
    cache already holds the whole ring of `sliding_window` keys, and in half precision linear attention's sums stay float32. A
    `SumformerCache` holds one number more a Sumformer layer, how many tokens were summed.

    Args:
        config: a `BasedConfig` or `SumformerConfig`; a configuration of transformers' Llama, Mistral, Qwen 2 or Qwen 3; or any
            object with `mixers` (a name of `MIXERS` a layer), `hidden_size` and, where they are not the defaults, the arguments
            of `mixer_state_bytes` of the same names (`MIXER_SIZES`).
        seq_len: tokens so far.
        bytes_per_number: 4 for float32, 2 for half precision.

    Raises:
        ValueError: a configuration or a mixer whose state is not known, or sizes that make no layer.

    Example:
        >>> from geobased import BasedConfig
        >>> state_bytes(BasedConfig.based_360m(), seq_len=2048)
        8884032
    """
    return sum(mixer_state_bytes(mixer, seq_len, bytes_per_number=bytes_per_number, **sizes) for mixer, sizes in _layers(config))


__all__ = ["MIXERS", "MIXER_SIZES", "NOT_CAUSAL", "mixer_state_bytes", "state_bytes"]
