"""The official BASED checkpoint format (a `GPT2Config` with hydra targets): how it is told, and what it says."""

import functools
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


def is_official_config(config: dict[str, Any]) -> bool:
    """Whether a config.json was written by the authors' training code."""
    return "alt_mixer" in config or "alt_mixer_layers" in config or "GPT2MixerConfig" in str(config.get("_target_", ""))


def convert_first(source: str | Path) -> ValueError:
    return ValueError(
        f"{source} is a BASED checkpoint in the official format, which transformers cannot load directly. Convert it once with"
        f" `geobased convert {source} DST` (or geobased.modeling_based.convert_official_checkpoint) and load DST"
    )


def explain_official_checkpoints() -> None:
    """Makes `AutoConfig.from_pretrained` say how to go on where it meets an official checkpoint.

    transformers decides by `model_type`, which official files lack or set to "gpt2", so without this the answer would be
    "Unrecognized model", or a GPT-2 full of random weights. Every other checkpoint passes through untouched.
    """
    original = AutoConfig.from_pretrained
    if getattr(original, "_explains_official_based", False):
        return

    @functools.wraps(original)
    def from_pretrained(pretrained_model_name_or_path, **kwargs):
        try:
            config = original(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            if "model_type" not in str(error):
                raise
            keys = ("cache_dir", "revision", "token", "subfolder", "local_files_only")
            found, _ = PreTrainedConfig.get_config_dict(
                pretrained_model_name_or_path, **{k: kwargs[k] for k in keys if k in kwargs}
            )
            if not is_official_config(found):
                raise
            raise convert_first(pretrained_model_name_or_path) from None
        loaded = config[0] if isinstance(config, tuple) else config
        if loaded.model_type == "gpt2" and hasattr(loaded, "alt_mixer_layers"):
            raise convert_first(pretrained_model_name_or_path)
        return config

    from_pretrained._explains_official_based = True  # type: ignore[attr-defined]
    AutoConfig.from_pretrained = staticmethod(from_pretrained)  # type: ignore[method-assign]


def read_official_config(path: Path) -> dict[str, Any]:
    """config.json of an official checkpoint. Raises `ValueError` where it is missing, broken or of another format."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json: it is not a checkpoint folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the file is damaged or incomplete") from None
    if not isinstance(config, dict) or not is_official_config(config):
        hint = " (it is already in geobased's format)" if isinstance(config, dict) and config.get("model_type") == "based" else ""
        raise ValueError(f"{path} is not in the official BASED format{hint}: it names neither alt_mixer nor alt_mixer_layers")
    return config
