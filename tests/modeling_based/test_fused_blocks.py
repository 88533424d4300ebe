"""What the decoder layer fuses (residual and norm, the MLP's gate, rotary embedding) is what the parts compute one by one."""

import pytest
import torch
import torch.nn.functional as F

from geobased import BasedConfig, BasedForCausalLM
from geobased.modeling_based.mixers_based import BasedMLP, BasedRMSNorm
from geobased.modeling_based.modeling_based import BasedDecoderLayer


def config(**changes) -> BasedConfig:
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    return BasedConfig(**(sizes | changes))


def plain_norm(norm: BasedRMSNorm, residual: torch.Tensor) -> torch.Tensor:
    wide = residual if residual.dtype == torch.float64 else residual.float()
    normed = F.rms_norm(wide, norm.weight.shape, norm.weight.to(wide.dtype), norm.eps)
    return normed.to(norm.weight.dtype)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_is_norm_mixer_norm_mlp(dtype, residual):
    torch.manual_seed(0)
    layer = BasedDecoderLayer(config(), 0).to(dtype)
    torch.nn.init.normal_(layer.input_layernorm.weight)
    torch.nn.init.normal_(layer.post_mixer_layernorm.weight)
    hidden = torch.randn(2, 9, 32).to(residual)
    expected = hidden + layer.mixer(plain_norm(layer.input_layernorm, hidden))[0]
    expected = expected + layer.mlp(plain_norm(layer.post_mixer_layernorm, expected))
    assert torch.equal(layer(hidden), expected)


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "relu"])
def test_mlp_applies_the_activation_of_the_config(activation):
    torch.manual_seed(0)
    mlp = BasedMLP(config(hidden_act=activation))
    x = torch.randn(3, 32)
    function = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu}[activation]
    torch.testing.assert_close(mlp(x), mlp.down_proj(function(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_norm_alone_returns_one_tensor():
    norm = BasedRMSNorm(32, eps=1e-5)
    hidden, added = torch.randn(2, 3, 32)
    assert torch.equal(norm(hidden), plain_norm(norm, hidden))
    assert torch.equal(norm(hidden, added), plain_norm(norm, hidden + added))
    normed, total = norm(hidden, added, return_sum=True)
    assert torch.equal(total, hidden + added)
    assert torch.equal(normed, norm(hidden, added))


def test_layers_change_no_tensor_that_was_recorded():
    torch.manual_seed(0)
    model = BasedForCausalLM(config()).eval()
    ids = torch.randint(0, 50, (1, 8))
    with torch.no_grad():
        recorded = model(ids, output_hidden_states=True).hidden_states
        hidden = model.model.embed_tokens(ids)
        assert torch.equal(recorded[0], hidden)
        for layer, after in zip(model.model.layers[:-1], recorded[1:-1], strict=True):
            position_embeddings = model.model.rotary_emb(hidden, torch.arange(8)[None])
            hidden = layer(hidden, position_embeddings=position_embeddings)
            torch.testing.assert_close(after, hidden)


def test_hooks_on_layers_see_whole_hidden_states():
    torch.manual_seed(0)
    model = BasedForCausalLM(config()).eval()
    ids = torch.randint(0, 50, (1, 8))
    expected = model(ids)
    seen = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output))) for layer in model.model.layers
    ]
    hooked = model(ids)
    torch.testing.assert_close(hooked.logits, expected.logits)
    for (_, output), (following, _) in zip(seen, seen[1:], strict=False):
        assert torch.equal(output, following)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(ids).logits, expected.logits)


def test_gradients_are_those_of_whole_hidden_states():
    torch.manual_seed(0)
    model = BasedForCausalLM(config()).double()
    ids = torch.randint(0, 50, (2, 8))
    gradients = []
    for hooked in (False, True):
        handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: None) if hooked else None
        gradients.append(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())))
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(*gradients)


def test_a_layer_may_be_left_out():
    """As where a part of the layers lives in another process."""
    torch.manual_seed(0)
    model = BasedForCausalLM(config()).eval()
    ids = torch.randint(0, 50, (1, 8))
    hidden = model.model.layers[0](model.model.embed_tokens(ids))

    class Missing(torch.nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    model.model.layers[1] = model.model.layers[2] = Missing()
    torch.testing.assert_close(model.model(ids, use_cache=False).last_hidden_state, model.model.norm(hidden))
