import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2Model, MistralConfig, Qwen2Config, Qwen3NextConfig
from transformers import Qwen3NextModel as GatedDeltaNetModel

from geobased import BasedConfig, BasedForCausalLM, SumformerCache, SumformerConfig, SumformerForCausalLM
from geobased.modeling_based.cache_based import BasedCache, stored_tensors
from geobased.recall.state_size import MIXERS, mixer_state_bytes, state_bytes


def _config(mixers, **sizes):
    return SimpleNamespace(mixers=mixers, **{"hidden_size": 128, "num_heads": 1, "feature_dim": 16, "conv_kernel": 3} | sizes)


def _per_sequence(cache, batch=1):
    tensors = [tensor for layer in cache.layers for tensor in stored_tensors(layer)]
    assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors)
    return sum(tensor.numel() * 4 for tensor in tensors) // batch


def test_points_of_the_published_figure():
    based = state_bytes(_config(["conv", "linear_attention"]), 1024)
    assert based == 4 * (128 * 153 + 153 + 128 * 3) == 80_484
    assert math.log2(based) == pytest.approx(16.3, abs=0.01)
    window = state_bytes(_config(["conv", "sliding_attention"], sliding_window=64), 1024)
    assert window == 2**16 + 4 * 128 * 3
    for hidden_size, feature_dim, exponent in ((48, 8, 13.2), (64, 24, 16.4)):
        found = state_bytes(_config(["conv", "linear_attention"], hidden_size=hidden_size, feature_dim=feature_dim), 1)
        assert math.log2(found) == pytest.approx(exponent, abs=0.1)


@pytest.mark.parametrize(
    "mixer, sizes, numbers",
    [
        ("conv", {"conv_dim": 20, "conv_kernel": 4}, 80),
        ("attention", {"num_heads": 4, "num_kv_heads": 2}, 2 * 2 * 8 * 100),
        ("sliding_attention", {"sliding_window": 30}, 2 * 32 * 30),
        ("sliding_attention", {"sliding_window": 101}, 2 * 32 * 100),
        ("linear_attention", {"num_heads": 4, "feature_dim": 3}, 4 * 10 * 9),
        ("mamba2", {"state_size": 8, "num_groups": 2}, 64 * 8 + (64 + 32) * 4),
        ("gated_deltanet", {"num_heads": 2, "short_conv_kernel": 0}, 2 * 16 * 32),
        ("performer", {"feature_dim": 5, "num_heads": 2}, 2 * 5 * 17),
        ("sumformer", {"feature_dim": 5}, 5),
    ],
)
def test_numbers_of_each_mixer(mixer, sizes, numbers):
    assert mixer_state_bytes(mixer, 100, hidden_size=32, **sizes) == 4 * numbers
    assert mixer_state_bytes(mixer, 100, hidden_size=32, **sizes, bytes_per_number=2) == 2 * numbers


def test_only_attention_grows_without_bound():
    def grows(mixer):
        return mixer_state_bytes(mixer, 2048, hidden_size=64) > mixer_state_bytes(mixer, 1024, hidden_size=64)

    assert [mixer for mixer in MIXERS if grows(mixer)] == ["attention"]


@pytest.mark.parametrize("mixer", ["sumformer", "performer", "softmax"])
def test_sumformer_cache_holds_what_is_counted(mixer):
    config = SumformerConfig(vocab_size=40, hidden_size=32, latent_size=10, num_random_features=6, mixer=mixer, causal=True)
    model, cache = SumformerForCausalLM(config).eval(), SumformerCache(config)
    with torch.no_grad():
        model(torch.ones(3, 7, dtype=torch.long), past_key_values=cache)
    counter = 4 * config.num_hidden_layers if mixer == "sumformer" else 0
    assert state_bytes(config, 7) + counter == cache.size_bytes() // 3
    with pytest.raises(ValueError, match="is not causal"):
        state_bytes(SumformerConfig(mixer="linformer"), 7)


@pytest.mark.parametrize("seq_len", [5, 8, 20])
def test_based_cache_holds_what_is_counted_once_the_window_is_full(seq_len):
    config = BasedConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, sliding_window=8
    )
    model, cache = BasedForCausalLM(config).eval(), BasedCache(config)
    with torch.no_grad():
        model(torch.ones(2, seq_len, dtype=torch.long), past_key_values=cache)
    missing = max(0, 8 - seq_len)  # slots of the ring that are allocated and empty
    assert state_bytes(config, seq_len) + 4 * 2 * 32 * missing == cache.size_bytes() // 2


def test_transformers_caches_hold_what_is_counted():
    ids = torch.ones(1, 12, dtype=torch.long)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}
    llama = LlamaConfig(**sizes, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    mamba = Mamba2Config(**sizes, num_heads=8, head_dim=8, state_size=16, n_groups=2, expand=2, chunk_size=4)
    deltanet = Qwen3NextConfig(
        **sizes,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
    )
    with torch.no_grad():
        assert state_bytes(llama, 12) == _per_sequence(LlamaForCausalLM(llama)(ids, use_cache=True).past_key_values)
        held = _per_sequence(Mamba2Model(mamba)(ids, use_cache=True).cache_params)
        assert held == state_bytes(_config(["mamba2"] * 2, hidden_size=32, state_size=16, num_groups=2), 12)
        held = _per_sequence(GatedDeltaNetModel(deltanet)(ids, use_cache=True).past_key_values)
        counted = _config(["gated_deltanet", "attention"], hidden_size=32, num_heads=2, key_head_dim=8, value_head_dim=16)
        assert held == state_bytes(counted, 12)


def test_windows_of_transformers_models():
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert state_bytes(MistralConfig(**sizes, sliding_window=10), 100) == 4 * 4 * 2 * 2 * 16 * 10
    assert state_bytes(MistralConfig(**sizes, sliding_window=None), 100) == 4 * 4 * 2 * 2 * 16 * 100
    mixed = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=10, max_window_layers=3)
    assert state_bytes(mixed, 100, bytes_per_number=2) == 2 * 2 * 2 * 16 * (3 * 100 + 10)


def test_what_cannot_be_counted_is_named():
    with pytest.raises(ValueError, match="'linformer' is not causal"):
        mixer_state_bytes("linformer", 10, hidden_size=32)
    with pytest.raises(ValueError, match="unknown mixer 'hyena': choose from conv"):
        state_bytes(_config(["conv", "hyena"]), 10)
    with pytest.raises(ValueError, match="Mamba2Config .model type 'mamba2'. is not known"):
        state_bytes(Mamba2Config(), 10)
    with pytest.raises(ValueError, match="seq_len=0 must be a positive"):
        state_bytes(_config(["conv"]), 0)
    with pytest.raises(ValueError, match="hidden_size=32 is not divisible by num_heads=3"):
        mixer_state_bytes("attention", 10, hidden_size=32, num_heads=3)
    with pytest.raises(ValueError, match="sliding_window=0"):
        mixer_state_bytes("sliding_attention", 10, hidden_size=32, sliding_window=0)
