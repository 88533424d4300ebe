"""Weights that lie side by side are still parameters like others."""

import torch
from torch import nn

from geobased import BasedForCausalLM
from geobased.modeling_based import fast_generation
from geobased.modeling_based.fused_weights import fuse_rows, side_by_side


def test_weights_stay_parameters(make_model, make_ids, tmp_path):
    model, ids = make_model(), make_ids(2, 5)
    model.fast_generation = "eager"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    mixer, mlp = model.model.layers[1].mixer, model.model.layers[1].mlp
    assert side_by_side([mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight]).shape == (64, 32)
    assert side_by_side([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    model.save_pretrained(tmp_path / "saved")  # safetensors refuses shared memory
    loaded = BasedForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.5 * sum(v.nbytes for v in before.values()) + 20_000

    # new values reach the steps, through load_state_dict and through training
    other = make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.load_state_dict(other.state_dict())
    expected = other.generate(ids, max_new_tokens=6, do_sample=False)
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == expected.tolist() != tokens.tolist()
    for each in (model, other):
        each.train()
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.05)
        each(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        each.eval()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    expected = other.generate(ids, max_new_tokens=6, do_sample=False)
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == expected.tolist()

    # moved weights: the old step is let go, a new one is built
    model.to(torch.bfloat16).to(torch.float32)
    assert model not in fast_generation._steps
    other.to(torch.bfloat16).to(torch.float32)
    expected = other.generate(ids, max_new_tokens=6, do_sample=False)
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == expected.tolist()
    model.resize_token_embeddings(70)
    assert model.generate(ids, max_new_tokens=6, do_sample=False).shape == (2, 11)


def test_fuse_rows_refuses_what_is_not_safe():
    def parameters(*shapes):
        return [nn.Parameter(torch.randn(*shape)) for shape in shapes]

    assert fuse_rows(parameters((3, 4), (5, 4))).shape == (8, 4)
    a, b = parameters((3, 4), (5, 4))
    whole = fuse_rows([a, b])
    assert fuse_rows([a, b]).data_ptr() == whole.data_ptr() and torch.equal(torch.cat([a, b]), whole)
    assert fuse_rows(parameters((3, 4), (5, 6))) is None
    assert fuse_rows([a, a]) is None, "a tied weight cannot be in two places"
    shared = nn.Parameter(whole[:3])
    assert fuse_rows([shared, *parameters((2, 4))]) is None
    with torch.inference_mode():
        assert fuse_rows(parameters((3, 4), (5, 4))) is None
