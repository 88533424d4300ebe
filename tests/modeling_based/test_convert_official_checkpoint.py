"""Official checkpoints: the converted tiny_a reproduces the reference values of the official implementation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from geobased import BasedCache, BasedConfig, BasedForCausalLM
from geobased.modeling_based.convert_official_checkpoint import _convert_config, convert_official_checkpoint
from geobased.modeling_based.taylor_linear_attention_reference import unpack_state

FIXTURES = Path(__file__).parents[1] / "fixtures" / "based"
TINY = FIXTURES / "tiny_a"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the official checkpoint to be spoilt."""
    target = tmp_path / "source"
    target.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copyfile(TINY / name, target / name)
    return target


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize(("dtype", "name", "tolerance"), [(torch.float64, "fp64", 1e-9), (torch.float32, "fp32", 2e-4)])
def test_logits(converted, golden, dtype, name, tolerance):
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=dtype)
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    assert logits.dtype == dtype
    assert (logits - golden[f"logits_{name}"]).abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_every_layer(converted, golden, dtype, tolerance):
    model = BasedForCausalLM.from_pretrained(converted, dtype=dtype)
    seen = {}
    parts = {"input_layernorm": "norm1", "mixer": "mixer", "post_mixer_layernorm": "norm2", "mlp": "mlp"}
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in parts.items():

            def hook(module, args, output, key=f"fp64.layers.{i}.{theirs}_out"):
                seen[key] = output[0] if isinstance(output, tuple) else output

            getattr(layer, ours).register_forward_hook(hook)
    with torch.no_grad():
        seen["fp64.ln_f_out"] = model.model(golden["input_ids"]).last_hidden_state
    for key, value in seen.items():
        # of the first sequence
        assert (value[:1] - golden[key]).abs().max() < tolerance, key
    assert len(seen) == 4 * 6 + 1


@pytest.mark.parametrize("length", [1, 2, 5, 24])
def test_greedy_tokens(converted, golden, length):
    """The official sampler may pick ids that only pad the vocabulary; ours does so only when told that none is padding."""
    model = AutoModelForCausalLM.from_pretrained(converted)
    sequences, scores = golden[f"gen.prompt{length}.sequences"], golden[f"gen.prompt{length}.scores"]
    if sequences.max() >= model.config.unpadded_vocab_size:
        model.config.unpadded_vocab_size = None
    result = model.generate(
        sequences[:, :length], max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(result.sequences, sequences)
    assert (torch.stack(result.logits, 1) - scores).abs().max() < 2e-4


def test_padding_ids_are_not_picked(converted, golden):
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.vocab_size == 256 and model.config.unpadded_vocab_size == 250
    official = golden["gen.prompt1.sequences"]
    assert official.max() >= 250, "the case needs an official sample with a padding id"
    ours = model.generate(official[:, :1], max_new_tokens=24, do_sample=False)
    assert ours.max() < 250
    first = (official >= 250).any(0).nonzero()[0].item()
    assert torch.equal(ours[:, :first], official[:, :first])


def test_caches_after_prefill_and_decode(converted, golden):
    model = BasedForCausalLM.from_pretrained(converted)
    cache, ids = BasedCache(model.config), golden["input_ids"]

    def check(stage: str) -> None:
        for i, (mixer, layer) in enumerate(zip(model.config.mixers, cache.layers, strict=True)):
            expected = f"state.{stage}.layers.{i}."
            if mixer == "conv":
                pairs = {"conv": layer.conv_states[0]}
            elif mixer == "linear_attention":
                state = unpack_state(layer.recurrent_states[0], model.config.feature_dim)
                pairs = {"kv_state": state[..., :-1].mT.unsqueeze(2), "k_state": state[..., -1][:, :, None, None]}
            else:
                window = model.config.sliding_window
                pairs = {"kv_cache": torch.stack([layer.keys, layer.values]).permute(1, 3, 0, 2, 4)}
                golden[expected + "kv_cache"] = golden[expected + "kv_cache"][:, -window:]
            for name, value in pairs.items():
                assert (value - golden[expected + name]).abs().max() < 2e-4, expected + name

    with torch.no_grad():
        model(ids[:, :24], past_key_values=cache)
        check("prefill24")
        for i in range(24, 27):
            model(ids[:, i : i + 1], past_key_values=cache)
        check("decode27")


@pytest.mark.parametrize(("size", "preset"), [("360m", BasedConfig.based_360m), ("1b", BasedConfig.based_1b)])
def test_published_configurations(size, preset):
    """The published YAML settings and parameter names give the presets, shape by shape."""
    official = json.loads((FIXTURES / f"config_based-{size}_from_yaml.json").read_text())
    shapes = dict(line.split("\t")[:2] for line in (FIXTURES / f"keys_based-{size}.txt").read_text().splitlines())
    with torch.device("meta"):
        weights = {
            name: torch.empty([int(n) for n in shape.strip("()").split(",") if n.strip()]) for name, shape in shapes.items()
        }
    weights = {k: v for k, v in weights.items() if "decay" not in k and k != "lm_head.weight"}
    config = _convert_config(official, weights)
    ours, expected = config.to_dict(), preset().to_dict()
    assert {k: v for k, v in ours.items() if k != "rope_parameters"} == {
        k: v for k, v in expected.items() if k != "rope_parameters"
    }
    with torch.device("meta"):
        model = BasedForCausalLM(config)
    assert model.num_parameters() == {"360m": 362_620_928, "1b": 1_349_453_056}[size]
    assert sum(w.numel() for w in weights.values()) == model.num_parameters()


def test_safetensors_wrapped_and_aliased_sources(copy, golden, tmp_path):
    """Names the authors used over time, a wrapped state dict, counters, an unused decay buffer, safetensors instead of pickle."""
    config = json.loads((copy / "config.json").read_text())
    config["mixer"]["_target_"] = "src.models.mixers.base_conv.BaseConvWithSiLU4"
    config["alt_mixer"]["_target_"] = "based.models.mixers.linear_attn.LinearAttention"
    config["alt_mixer_2"] = {"_target_": "src.models.mixers.slide_fa2.SlidingsMHA", "window_size": 16, "do_update": True}
    config["mixer"]["kernel_sizes"] = [3]
    (copy / "config.json").write_text(json.dumps(config))
    weights = torch.load(copy / "pytorch_model.bin", weights_only=True)
    weights = {k: v.clone() for k, v in weights.items() if isinstance(v, torch.Tensor)}
    weights["transformer.decay.decay"] = torch.zeros(4)
    (copy / "pytorch_model.bin").unlink()
    save_file(weights, copy / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(convert_official_checkpoint(copy, tmp_path / "out"), dtype=torch.float64)
    assert (model(golden["input_ids"]).logits - golden["logits_fp64"]).abs().max() < 1e-9


def test_dtype_and_overwrite(tmp_path):
    target = convert_official_checkpoint(TINY, tmp_path / "out", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="exists already"):
        convert_official_checkpoint(TINY, tmp_path / "out")
    convert_official_checkpoint(TINY, tmp_path / "out", overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='float99'"):
        convert_official_checkpoint(TINY, tmp_path / "other", dtype="float99")
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing half-written may stay behind"


@pytest.mark.parametrize("with_model_type", [False, True], ids=["no-model-type", "gpt2"])
def test_loading_unconverted_says_to_convert(copy, with_model_type):
    if with_model_type:
        edit_config(copy, model_type="gpt2")
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="geobased convert"):
            auto.from_pretrained(copy)


BAD_WEIGHTS = {
    "missing": (lambda w: w.pop("model.transformer.layers.1.mixer.proj_q.weight"), "lacks 1 weights.*layers.1.mixer.q_proj"),
    "unexpected": (lambda w: w.update({"model.transformer.layers.9.x": torch.ones(2)}), "1 weights.*model.layers.9.x"),
    "shape": (
        lambda w: w.update({"model.transformer.layers.1.mixer.proj_q.weight": torch.ones(32, 64)}),
        r"q_proj.weight has shape \(32, 64\)",
    ),
    "g_norm": (lambda w: w.update({"model.transformer.layers.1.mixer.g_norm.weight": torch.ones(16)}), "RMSNorm.*g_norm"),
    "decay": (lambda w: w.update({"model.transformer.layers.1.mixer.decay_proj.weight": torch.ones(4, 64)}), "decay_proj"),
    "conv-bias": (lambda w: w.update({"model.transformer.layers.0.mixer.conv.conv.bias": torch.ones(128)}), "conv.conv.bias"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(copy, tmp_path, case):
    change, message = BAD_WEIGHTS[case]
    edit_weights(copy, change)
    with pytest.raises(ValueError, match=message):
        convert_official_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD_CONFIGS = {
    "layer": ({"alt_mixer_layers": [1, 40]}, "names layer 40"),
    "activation": ({"activation_function": "gelu_new"}, "gelu_new"),
    "norm": ({"rms_norm": False}, "rms_norm=false"),
    "rotary": ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction=0.5"),
    "mixer": ({"alt_mixer": {"_target_": "x.Mamba"}}, "'Mamba'"),
    "heads": ({"alt_mixer": {"_target_": "x.LinearAttention", "num_heads": 8}}, "different numbers of heads"),
    "depth": ({"n_layer": 7}, "lacks"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(copy, tmp_path, case):
    changes, message = BAD_CONFIGS[case]
    edit_config(copy, **changes)
    with pytest.raises(ValueError, match=message):
        convert_official_checkpoint(copy, tmp_path / "out")


def test_damaged_and_missing_files(copy, tmp_path):
    whole = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read"):
        convert_official_checkpoint(copy, tmp_path / "out")
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        convert_official_checkpoint(copy, tmp_path / "out")
    (copy / "config.json").write_text('{"alt_mixer": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        convert_official_checkpoint(copy, tmp_path / "out")
    (copy / "config.json").write_text('{"model_type": "based"}')
    with pytest.raises(ValueError, match="already in geobased's format"):
        convert_official_checkpoint(copy, tmp_path / "out")
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        convert_official_checkpoint(copy, tmp_path / "out")
    for nowhere in (tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
            convert_official_checkpoint(nowhere, tmp_path / "out")


def test_pickled_code_is_not_run(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "pwned", "x"))

    torch.save({"model.transformer.ln_f.weight": Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert_official_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


def test_offline_hub_id_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="could not be had from the Hub"):
        convert_official_checkpoint("nobody/no-such-model", tmp_path / "out")
