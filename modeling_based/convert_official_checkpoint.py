"""Reads checkpoints in the official BASED format and writes them in transformers' format.

The official files are a `GPT2Config` with hydra targets and a Lightning state dict. Names that changed over the authors'
repositories are understood; variants that compute something else are refused rather than loaded wrongly.
"""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .configuration_based import BasedConfig
from .modeling_based import BasedForCausalLM
from .official_format import read_official_config
from .whole_folder import refuse_existing, whole_folder

# last component of a hydra `_target_` -> what the layer computes
MIXER_TARGETS = {
    "BaseConv": "conv",
    "BaseConvWithSiLU4": "conv",
    "LinearAttention": "linear_attention",
    "SlidingAttention": "sliding_attention",
    "SlidingsMHA": "sliding_attention",
}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
# keys that belong to variants of the layers, and why they cannot be represented
REFUSED_KEYS = {
    "decay_proj": "a learned decay in linear attention (`use_decay_proj`)",
    "g_norm": "linear attention normalised by an RMSNorm instead of its denominator (the ThunderKittens demo variant)",
    "conv.bias": "a bias in the short convolution (models trained with the causal_conv1d path)",
}
# counters and buffers that no layer reads
IGNORED_KEYS = re.compile(r"metrics|^transformer\.decay\.|rotary_emb\.|inv_freq")


def convert_official_checkpoint(
    source: str | Path, destination: str | Path, *, dtype: torch.dtype | str | None = None, overwrite: bool = False
) -> Path:
    """Converts an official BASED checkpoint and returns the folder it was written to.

    Args:
        source: a folder with config.json and pytorch_model.bin (or model.safetensors), or the Hub id of one. Pickles are read
            with `weights_only=True` only.
        destination: folder to write; it appears complete or not at all.
        dtype: dtype of the written weights, such as `torch.bfloat16` or "bfloat16"; by default that of the source.
        overwrite: whether an existing destination may be replaced.

    Raises `ValueError` if a file is missing, damaged or incomplete, if names or shapes do not fit the configuration, or if the
    checkpoint is a variant that [`BasedConfig`] cannot represent.

    Example:

    ```python
    >>> from geobased.modeling_based.convert_official_checkpoint import convert_official_checkpoint
    >>> convert_official_checkpoint("hazyresearch/based-360m", "based-360m")
    >>> model = AutoModelForCausalLM.from_pretrained("based-360m")
    ```
    """
    destination = Path(destination)
    refuse_existing(destination, overwrite)
    folder = _local_folder(source)
    official = read_official_config(folder / "config.json")
    state_dict = _official_weights(folder)
    config = _convert_config(official, state_dict)
    if dtype is not None:
        dtype = _dtype(dtype)
    elif not all(t.is_floating_point() for t in state_dict.values()):
        raise ValueError(f"{folder} holds weights that are not floating point numbers")
    weights = _convert_weights(state_dict, config)

    with torch.device("meta"):
        model = BasedForCausalLM(config)
    _check_weights(weights, model, folder)
    if dtype is None:
        dtype = weights["model.embed_tokens.weight"].dtype
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True, strict=False)
    model.tie_weights()
    model.config.dtype = dtype
    with whole_folder(destination) as written:
        model.save_pretrained(written)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, written / name)
    return destination


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating point dtype: use float32, bfloat16 or float16")
    return found


def _local_folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file: give the folder that holds config.json and the weights")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise ValueError(f"{source} is neither a folder nor a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", *WEIGHT_FILES, *TOKENIZER_FILES]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the Hub client raises many unrelated types; the cause is kept
        raise ValueError(f"{source} is no local folder and could not be had from the Hub: {error}") from error


def _official_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict with the official names, without the wrapper's prefix, counters and unused buffers."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no weights: expected {' or '.join(WEIGHT_FILES)}")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors readers each raise their own types
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}): the file is damaged or incomplete,"
            " or holds more than tensors"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    renamed = {re.sub(r"^model\.", "", key): value for key, value in loaded.items()}
    return {k: v for k, v in renamed.items() if isinstance(v, torch.Tensor) and not IGNORED_KEYS.search(k)}


def _setting(official: dict[str, Any], section: str, name: str, default: Any) -> Any:
    value = (official.get(section) or {}).get(name)
    return default if value is None else value


def _convert_config(official: dict[str, Any], weights: dict[str, torch.Tensor]) -> BasedConfig:
    for part, reason in REFUSED_KEYS.items():
        if found := next((key for key in weights if f".{part}." in f"{key}." and ".mixer." in key), None):
            raise ValueError(f"this checkpoint has {reason}, as `{found}` shows; geobased cannot represent it")
    # the published checkpoints left some settings at GPT2Config's defaults
    num_layers, hidden_size = official.get("n_layer", 12), official.get("n_embd", 768)
    activation = official.get("activation_function", "swiglu")
    if activation not in ("swiglu", "silu"):
        raise ValueError(f"activation_function={activation!r} is not the SwiGLU of BASED; geobased cannot represent it")
    if not official.get("rms_norm", True):
        raise ValueError("rms_norm=false: BASED uses RMSNorm; geobased cannot represent LayerNorm")
    if official.get("rotary_emb_fraction", 1) not in (1, 1.0):
        raise ValueError(f"rotary_emb_fraction={official['rotary_emb_fraction']}: only full rotary embedding is supported")
    mixers = _mixers(official, num_layers)
    heads = {
        "linear_attention": _setting(official, "alt_mixer", "num_heads", official.get("n_head", 12)),
        "sliding_attention": _setting(official, "alt_mixer_2", "num_heads", official.get("n_head", 12)),
    }
    used_heads = {heads[m] for m in mixers if m in heads} or {official.get("n_head", 12)}
    if len(used_heads) > 1:
        raise ValueError(f"linear and sliding attention have different numbers of heads ({heads}); geobased needs equal ones")
    feature_dim = _setting(official, "alt_mixer", "feature_dim", 16)
    window = _setting(official, "alt_mixer_2", "window_size", 128)
    multiple = official.get("pad_vocab_size_multiple", 1)
    vocab_size = official.get("vocab_size", 50257)
    ids = {name: official.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if vocab_size == 50257:  # the gpt2 tokenizer, whose ids GPT2Config has as defaults
        ids = ids | {name: 50256 for name in ("bos_token_id", "eos_token_id") if ids[name] is None}
    fc1 = weights.get("transformer.layers.0.mlp.fc1.weight")
    inner = official.get("n_inner") or 4 * hidden_size
    head, embedding = weights.get("lm_head.weight"), weights.get("transformer.embeddings.word_embeddings.weight")
    return BasedConfig(
        vocab_size=math.ceil(vocab_size / multiple) * multiple,
        unpadded_vocab_size=vocab_size,
        hidden_size=hidden_size,
        # the official MLP rounds its width up to a multiple of 256
        intermediate_size=fc1.shape[0] // 2 if fc1 is not None else math.ceil(inner / 256) * 256,
        num_hidden_layers=num_layers,
        num_attention_heads=used_heads.pop(),
        feature_dim=feature_dim,
        mixers=mixers,
        # the official layer looks back window_size // 2 tokens and sees itself
        sliding_window=window // 2 + 1,
        # the file's `kernel_sizes` never reaches the layer, `kernel_size` does
        conv_kernel=_setting(official, "mixer", "kernel_size", 3),
        rope_parameters={"rope_type": "default", "rope_theta": float(official.get("rotary_emb_base", 10000.0))},
        max_position_embeddings=_setting(official, "mixer", "l_max", 2048),
        rms_norm_eps=official.get("layer_norm_epsilon", 1e-5),
        initializer_range=official.get("initializer_range", 0.02),
        residual_in_fp32=official.get("residual_in_fp32", True),
        tie_word_embeddings=head is None or embedding is None or torch.equal(head, embedding),
        **ids,
    )


def _mixers(official: dict[str, Any], num_layers: int) -> list[str]:
    """What each layer computes: the second list of layers wins over the first, as in the official model."""
    kinds = {}
    for section, default in (("mixer", "conv"), ("alt_mixer", "linear_attention"), ("alt_mixer_2", "sliding_attention")):
        target = str(_setting(official, section, "_target_", "")).rsplit(".", 1)[-1]
        if target and target not in MIXER_TARGETS:
            raise ValueError(f"{section} is a {target!r}; geobased knows {', '.join(MIXER_TARGETS)}")
        kinds[section] = MIXER_TARGETS.get(target, default)
    mixers = [kinds["mixer"]] * num_layers
    for section in ("alt_mixer", "alt_mixer_2"):
        for i in official.get(f"{section}_layers") or []:
            if not 0 <= i < num_layers:
                raise ValueError(f"{section}_layers names layer {i} but the model has n_layer={num_layers}")
            mixers[i] = kinds[section]
    return mixers


def _convert_weights(official: dict[str, torch.Tensor], config: BasedConfig) -> dict[str, torch.Tensor]:
    """Official names -> ours. Names without a counterpart are kept as they are, for the check that follows to report."""
    rules = [
        (r"transformer\.embeddings\.word_embeddings\.", "model.embed_tokens."),
        (r"transformer\.ln_f\.", "model.norm."),
        (r"transformer\.layers\.(\d+)\.norm1\.", r"model.layers.\1.input_layernorm."),
        (r"transformer\.layers\.(\d+)\.norm2\.", r"model.layers.\1.post_mixer_layernorm."),
        (r"transformer\.layers\.(\d+)\.mlp\.fc2\.", r"model.layers.\1.mlp.down_proj."),
        (r"transformer\.layers\.(\d+)\.mixer\.conv\.conv\.", r"model.layers.\1.mixer.conv1d."),
        (r"transformer\.layers\.(\d+)\.mixer\.proj_([qkv])\.", r"model.layers.\1.mixer.\2_proj."),
        (r"transformer\.layers\.(\d+)\.", r"model.layers.\1."),
    ]
    converted: dict[str, torch.Tensor] = {}
    for key, weight in official.items():
        match = re.match(r"transformer\.layers\.(\d+)\.(mlp\.fc1|mixer\.Wqkv|mixer\.out_proj)\.weight$", key)
        layer = f"model.layers.{match.group(1)}" if match else ""
        if match and match.group(2) == "mlp.fc1":  # the value comes first, the gate second
            converted[f"{layer}.mlp.up_proj.weight"], converted[f"{layer}.mlp.gate_proj.weight"] = weight.chunk(2)
        elif match and match.group(2) == "mixer.Wqkv":
            for name, part in zip("qkv", weight.chunk(3), strict=True):
                converted[f"{layer}.mixer.{name}_proj.weight"] = part
        elif match and match.group(2) == "mixer.out_proj" and _mixer_of(config, int(match.group(1))) != "conv":
            converted[f"{layer}.mixer.o_proj.weight"] = weight
        else:
            name = key
            for pattern, replacement in rules:
                name, hits = re.subn(f"^{pattern}", replacement, name)
                if hits:
                    break
            converted[name] = weight
    if config.tie_word_embeddings:
        converted.pop("lm_head.weight", None)
    return {name: weight.contiguous() for name, weight in converted.items()}


def _mixer_of(config: BasedConfig, layer: int) -> str:
    assert config.mixers is not None
    return config.mixers[layer] if layer < len(config.mixers) else "conv"


def _check_weights(weights: dict[str, torch.Tensor], model: BasedForCausalLM, folder: Path) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights that its config.json asks for, among them {missing[0]}")
    if unexpected:
        raise ValueError(
            f"{folder} holds {len(unexpected)} weights that its config.json does not account for, among them {unexpected[0]}"
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(weights[name].shape)} but config.json asks for {shape}: the weights and"
                " the configuration are of different models"
            )


__all__ = ["convert_official_checkpoint"]
