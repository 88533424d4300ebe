"""BasedConfig: presets, derived fields, serialisation, bad values."""

import json

import pytest
import torch
from transformers import AutoConfig

from geobased import BasedConfig, BasedForCausalLM

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("preset", "parameters", "linear_layers", "sliding_layers"),
    [
        ("based_360m", 362_620_928, [1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
        ("based_1b", 1_349_453_056, [1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
    ],
)
def test_presets_are_the_published_models(preset, parameters, linear_layers, sliding_layers):
    config = getattr(BasedConfig, preset)()
    with torch.device("meta"):
        model = BasedForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [i for i, m in enumerate(config.mixers) if m == "linear_attention"] == linear_layers
    assert [i for i, m in enumerate(config.mixers) if m == "sliding_attention"] == sliding_layers
    assert (config.vocab_size, config.unpadded_vocab_size, config.sliding_window) == (50264, 50257, 129)


def test_presets_take_changes():
    assert BasedConfig.based_1b(sliding_window=65).sliding_window == 65
    assert BasedConfig.based_360m(vocab_size=60000, unpadded_vocab_size=None).unpadded_vocab_size is None


@pytest.mark.parametrize("layers", range(1, 13))
def test_default_mixers(layers):
    mixers = BasedConfig(**(SMALL | {"num_hidden_layers": layers})).mixers
    assert len(mixers) == layers
    assert layers <= 5 or mixers[-1] != "linear_attention"


def test_layer_types_say_what_the_cache_holds():
    mixers = ["conv", "linear_attention", "sliding_attention"]
    config = BasedConfig(**SMALL, mixers=mixers, layer_types=["conv", "conv", "conv"])
    assert config.mixers == mixers
    assert config.layer_types == ["linear_attention", "linear_attention", "sliding_attention"]


def test_derived_widths():
    config = BasedConfig(**SMALL)
    assert (config.head_dim, config.conv_dim) == (16, 64)
    assert config.rope_parameters["rope_theta"] == 10000
    assert BasedConfig(**SMALL, head_dim=24, conv_dim=40).conv_dim == 40


@pytest.mark.parametrize("how", ["save_pretrained", "to_dict", "to_json_string", "AutoConfig"])
def test_round_trip(tmp_path, how):
    config = BasedConfig(
        **SMALL,
        vocab_size=64,
        unpadded_vocab_size=61,
        mixers=["sliding_attention", "conv", "linear_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        eos_token_id=[2, 3],
        num_labels=5,
    )
    config.save_pretrained(tmp_path)
    loaded = {
        "save_pretrained": lambda: BasedConfig.from_pretrained(tmp_path),
        "to_dict": lambda: BasedConfig.from_dict(config.to_dict()),
        "to_json_string": lambda: BasedConfig.from_dict(json.loads(config.to_json_string())),
        "AutoConfig": lambda: AutoConfig.from_pretrained(tmp_path),
    }[how]()
    assert isinstance(loaded, BasedConfig)
    for name in ("mixers", "layer_types", "rope_parameters", "unpadded_vocab_size", "eos_token_id", "num_labels", "conv_dim"):
        assert getattr(loaded, name) == getattr(config, name), f"{name} changed on the way through {how}"


def test_auto_config_for_model():
    config = AutoConfig.for_model("based", **SMALL, vocab_size=64, feature_dim=4, sliding_window=5, mixers=["conv"] * 3)
    assert isinstance(config, BasedConfig)
    assert (config.feature_dim, config.sliding_window) == (4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": ["conv", "mamba", "conv"]}, "unknown layer type 'mamba'"),
        ({"mixers": ["conv", "conv"]}, "names 2 layers but num_hidden_layers=3"),
        ({"num_attention_heads": 3}, "hidden_size=32 is not divisible by num_attention_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"feature_dim": 0}, "feature_dim=0"),
        ({"feature_dim": 65}, "feature_dim=65"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"conv_kernel": 0}, "conv_kernel=0"),
        ({"conv_dim": 0}, "conv_dim=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"hidden_size": -32}, "hidden_size=-32"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": 64, "unpadded_vocab_size": 65}, "unpadded_vocab_size=65"),
        ({"unpadded_vocab_size": 0}, "unpadded_vocab_size=0"),
        ({"alt_mixer": {"_target_": "based.models.mixers.linear_attention.LinearAttention"}}, "geobased convert"),
    ],
    ids=lambda value: str(value).replace(" ", "_")[:40] if isinstance(value, dict) else "",
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        BasedConfig(**(SMALL | changes))


@pytest.mark.parametrize(("name", "value"), [("hidden_size", "wide"), ("residual_in_fp32", "yes"), ("rms_norm_eps", "small")])
def test_wrong_types_are_named(name, value):
    with pytest.raises(Exception, match=name):
        BasedConfig(**(SMALL | {name: value}))


@pytest.mark.parametrize("extra", [{}, {"model_type": "gpt2"}], ids=["no_model_type", "gpt2"])
def test_official_checkpoints_say_how_to_go_on(tmp_path, extra):
    official = {"alt_mixer": {"_target_": "x"}, "alt_mixer_layers": [1, 6], "n_embd": 32, **extra}
    (tmp_path / "config.json").write_text(json.dumps(official))
    with pytest.raises(ValueError, match="geobased convert"):
        AutoConfig.from_pretrained(tmp_path)
