import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from geobased.recall.mixers_mqar import MIXERS, Mamba2, Sumformer, gated_delta_rule, state_space_dual
from geobased.recall.modeling_mqar import MQARConfig, MQARForCausalLM


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def make_model(mixers: list[str], **sizes) -> MQARForCausalLM:
    torch.manual_seed(0)
    return MQARForCausalLM(MQARConfig(vocab_size=64, hidden_size=64, mixers=mixers, sliding_window=8, **sizes))


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_mixer_sees_the_future_and_every_weight_learns(mixer):
    model = make_model(["conv", mixer])
    input_ids = torch.randint(0, 64, (2, 80))
    labels = torch.full((2, 80), -100)
    labels[:, 70:] = 3
    model(input_ids, labels=labels).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0] == []

    model.eval()
    changed = input_ids.clone()
    changed[:, 66:] = (changed[:, 66:] + 1) % 64
    with torch.no_grad():
        before, after = model(input_ids).logits, model(changed).logits
    assert torch.equal(before[:, :66], after[:, :66])
    assert not torch.equal(before[:, 66:], after[:, 66:])


@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_at_the_queries_are_those_of_all_positions(mixer):
    model = make_model([mixer, mixer]).eval()
    input_ids, positions = torch.randint(0, 64, (3, 20)), torch.tensor([[19, 4], [0, 7], [5, 6]])
    with torch.no_grad():
        everywhere, asked = model(input_ids).logits, model(input_ids, query_positions=positions).logits
    assert torch.allclose(everywhere.gather(1, positions.unsqueeze(-1).expand(-1, -1, 64)), asked, atol=1e-6)


def test_the_loss_is_the_mean_over_the_queries():
    model = make_model(["conv", "linear_attention"]).eval()
    input_ids, positions = torch.randint(0, 64, (2, 20)), torch.tensor([[3, 9], [5, 11]])
    targets = torch.randint(0, 64, (2, 2))
    labels = torch.full((2, 20), -100).scatter(1, positions, targets)
    loss = model(input_ids, labels=labels).loss
    assert torch.allclose(loss, model(input_ids, labels=targets, query_positions=positions).loss)
    expected = torch.nn.functional.cross_entropy(model(input_ids).logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(loss, expected)


def test_performers_features_follow_the_seed_and_are_saved(tmp_path):
    model, again = make_model(["performer"]), make_model(["performer"])
    torch.manual_seed(1)
    other = MQARForCausalLM(model.config)
    projection = model.layers[0].mixer.projection
    assert projection.shape == (16, 64) and projection.abs().sum() > 0
    assert torch.equal(again.layers[0].mixer.projection, projection)
    assert not torch.equal(other.layers[0].mixer.projection, projection)
    other.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.layers[0].mixer.projection, other.layers[0].mixer.projection)


def test_the_sumformers_mixer_is_the_mean_over_the_prefix():
    mixer = Sumformer(MQARConfig(hidden_size=32, feature_dim=6, mixers=["sumformer"]))
    x = torch.randn(2, 70, 32)
    features = mixer.phi(x)
    means = torch.stack([features[:, : t + 1].mean(1) for t in range(70)], 1)
    assert relative_error(mixer(x), mixer.psi(x, features, means)) < 1e-5


@pytest.mark.parametrize("seq_len", [1, 64, 150])
def test_mamba2_is_the_layer_of_transformers(seq_len):
    torch.manual_seed(0)
    ours = Mamba2(MQARConfig(hidden_size=64, state_size=16, mixers=["mamba2"]))
    sizes = {"hidden_size": 64, "state_size": 16, "head_dim": 64, "num_heads": 2, "expand": 2, "n_groups": 1, "conv_kernel": 4}
    theirs = Mamba2Mixer(Mamba2Config(**sizes, use_bias=False, use_conv_bias=True, num_hidden_layers=1, chunk_size=64), 0)
    torch.nn.init.uniform_(ours.norm.weight, 0.5, 2)
    weights = ours.state_dict()
    weights["conv1d.weight"] = weights.pop("conv.weight").unsqueeze(1)
    weights["conv1d.bias"] = weights.pop("conv.bias")
    theirs.load_state_dict(weights)
    x = torch.randn(2, seq_len, 64)
    with torch.no_grad():
        wanted = theirs(x)
        assert relative_error(ours(x), wanted[0] if isinstance(wanted, tuple) else wanted) < 1e-5


def test_the_chunked_state_space_is_the_recurrence():
    torch.manual_seed(0)
    x, decay = torch.randn(2, 130, 3, 8), -torch.rand(2, 130, 3)
    b, c = torch.randn(2, 2, 130, 16)
    state, wanted = torch.zeros(2, 3, 16, 8), []
    for t in range(130):
        state = state * decay[:, t, :, None, None].exp() + torch.einsum("bn,bhp->bhnp", b[:, t], x[:, t])
        wanted.append(torch.einsum("bn,bhnp->bhp", c[:, t], state))
    assert relative_error(state_space_dual(x, decay, b, c), torch.stack(wanted, 1)) < 1e-5


@pytest.mark.parametrize("seq_len", [1, 64, 130])
def test_the_chunked_delta_rule_is_the_recurrence_and_that_of_transformers(seq_len):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, seq_len, 3, 16)
    v, decay, beta = torch.randn(2, seq_len, 3, 8), -torch.rand(2, seq_len, 3), torch.rand(2, seq_len, 3)
    found = gated_delta_rule(q, k, v, decay, beta)
    theirs = torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    assert relative_error(found, theirs) < 1e-5

    unit_q, unit_k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
    state, wanted = torch.zeros(2, 3, 16, 8), []
    for t in range(seq_len):
        state = state * decay[:, t, :, None, None].exp()
        kept = torch.einsum("bhk,bhkv->bhv", unit_k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", unit_k[:, t] * beta[:, t, :, None], v[:, t] - kept)
        wanted.append(torch.einsum("bhk,bhkv->bhv", unit_q[:, t], state) / 4)
    assert relative_error(found, torch.stack(wanted, 1)) < 1e-5


def test_a_saved_model_is_loaded_by_the_auto_class(tmp_path):
    model = make_model(["conv", "gated_deltanet"], state_size=8).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    input_ids = torch.randint(0, 64, (1, 10))
    assert loaded.config.mixers == ["conv", "gated_deltanet"]
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mixers": ["conv", "hyena"]}, "hyena.*choose one or more of conv"),
        ({"mixers": []}, "choose one or more"),
        ({"feature_dim": 0}, "feature_dim=0 must be at least 1"),
        ({"hidden_size": 50, "num_heads": 4}, "not divisible by num_heads=4"),
        ({"hidden_size": 48, "expand": 1, "mixers": ["mamba2"]}, "48 is not divisible by head_dim=64"),
    ],
)
def test_sizes_that_make_no_model_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        MQARConfig(**wrong)
