"""FAVOR+ and Linformer's attention: reference formulas, masks, causality, and what they have in common with a sum."""

import pytest
import torch

from geobased.modeling_sumformer.linformer import linformer_attention
from geobased.modeling_sumformer.performer import favor_attention, orthogonal_random_features


def published_favor(q, k, v, projection, eps, mask=None):
    """FAVOR+ as published, with its stabilisers and epsilon; padding is left out of both sums and of the stabiliser."""
    scale, ratio = q.shape[-1] ** -0.25, projection.shape[0] ** -0.5
    query, key = q * scale @ projection.T, k * scale @ projection.T
    if mask is not None:
        key = key.masked_fill(~mask[:, None, :, None], -1e9)
    query_norm, key_norm = ((x * scale).square().sum(-1, keepdim=True) / 2 for x in (q, k))
    phi_q = ratio * ((query - query_norm - query.amax(-1, keepdim=True)).exp() + eps)
    phi_k = ratio * ((key - key_norm - key.amax((-1, -2), keepdim=True)).exp() + eps)
    if mask is not None:
        phi_k = phi_k * mask[:, None, :, None]
    return phi_q @ (phi_k.transpose(-1, -2) @ v) / (phi_q @ phi_k.sum(-2).unsqueeze(-1))


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 37, 8, generator=generator, dtype=torch.float64) for _ in range(3))


@pytest.fixture
def projection() -> torch.Tensor:
    return orthogonal_random_features(20, 8, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_favor_matches_the_published_formula(qkv, projection, eps):
    q, k, v = qkv
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) > 0.3
    near = {"rtol": 0, "atol": 1e-12}
    assert torch.allclose(favor_attention(*qkv, projection, eps=eps), published_favor(*qkv, projection, eps), **near)
    masked = favor_attention(*qkv, projection, eps=eps, attention_mask=mask)
    assert torch.allclose(masked, published_favor(*qkv, projection, eps, mask), **near)
    causal = favor_attention(*qkv, projection, eps=eps, causal=True)
    for end in (1, 16, 17, 37):
        prefix = published_favor(q[:, :, :end], k[:, :, :end], v[:, :, :end], projection, eps)
        assert torch.allclose(causal[:, :, end - 1], prefix[:, :, -1], **near)


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("factor", [1.5, 5.0, 100.0])
def test_later_keys_do_not_leak(qkv, projection, eps, factor):
    q, k, v = qkv
    before = favor_attention(q, k, v, projection, causal=True, eps=eps)
    k = k.clone()
    k[:, :, -1] *= factor
    after = favor_attention(q, k, v, projection, causal=True, eps=eps)
    assert torch.equal(after[:, :, :-1], before[:, :, :-1])


@pytest.mark.parametrize("causal", [False, True])
def test_padding_leaves_both_sums_and_the_inputs_alone(qkv, projection, causal):
    q, k, v = qkv
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[:, [0, 5, 36]] = False
    kept = [x.clone() for x in qkv]
    alone = favor_attention(q[:, :, mask[0]], k[:, :, mask[0]], v[:, :, mask[0]], projection, causal=causal)
    padded = favor_attention(q, k, v, projection, causal=causal, attention_mask=mask)
    assert torch.allclose(padded[:, :, mask[0]], alone, rtol=0, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(qkv, kept, strict=True))
    nothing = favor_attention(q, k, v, projection, causal=causal, attention_mask=torch.zeros(2, 37))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_keys_of_any_size_are_exact_in_float32(qkv, projection):
    # features of such keys underflow by themselves; logarithms of sums do not
    q, k, v = (x.clone() for x in qkv)
    k[:, :, 0] *= 100
    k[:, :, 5] *= 50
    expected = favor_attention(q, k, v, projection, causal=True)
    actual = favor_attention(q.float(), k.float(), v.float(), projection.float(), causal=True)
    assert torch.allclose(actual.double(), expected, atol=1e-4)
    assert torch.allclose(actual[:, :, 0], v[:, :, 0].float())


def test_a_state_goes_on_where_the_sequence_ended(qkv, projection):
    whole, final = favor_attention(*qkv, projection, causal=True, output_final_state=True)
    state, pieces = None, []
    for part in zip(*(x.split([20, 1, 16], dim=2) for x in qkv), strict=True):
        y, state = favor_attention(*part, projection, causal=True, initial_state=state, output_final_state=True)
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, 2), whole, rtol=0, atol=1e-12)
    assert torch.allclose(state, final, rtol=0, atol=1e-12)
    assert final.shape == (2, 3, 20, 9)


def test_gradients_of_causal_favor(projection):
    inputs = [torch.randn(1, 1, 19, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: favor_attention(q, k, v, projection[:4], causal=True), inputs, fast_mode=True)


def test_the_estimate_approaches_softmax_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (0.7 * torch.randn(1, 2, 16, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    exact = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    errors = []
    for num_features in (8, 128, 2048):
        drawn = [orthogonal_random_features(num_features, 8, generator=generator).double() for _ in range(8)]
        errors.append(torch.stack([(favor_attention(q, k, v, p) - exact).square().mean() for p in drawn]).mean().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 1e-3


def test_random_features_are_orthogonal_and_without_a_preferred_direction():
    projection = orthogonal_random_features(10, 4, generator=torch.Generator().manual_seed(0))
    for block in (projection[:4], projection[4:8], projection[8:]):
        angles = torch.nn.functional.normalize(block) @ torch.nn.functional.normalize(block).T
        assert torch.allclose(angles, torch.eye(len(block)), atol=1e-6)
    constant = orthogonal_random_features(6, 4, scaling="constant")
    assert torch.allclose(constant.norm(dim=1), torch.full((6,), 2.0))
    generator = torch.Generator().manual_seed(0)
    first_rows = torch.cat([orthogonal_random_features(1, 4, generator=generator) for _ in range(2000)])
    assert first_rows.mean(0).abs().max() < 0.1  # QR alone gives a first entry that is negative, -0.8 on average
    assert torch.allclose(first_rows.T @ first_rows / 2000, torch.eye(4), atol=0.15)


def test_favor_refuses_what_does_not_fit(qkv, projection):
    for arguments, options, message in (
        ((qkv[0], qkv[1][:, :, :5], qkv[2], projection), {}, "must be"),
        ((*qkv, projection[:, :3]), {}, "head_dim=8"),
        ((*qkv, projection), {"attention_mask": torch.ones(2, 5)}, "attention_mask"),
        ((*qkv, projection), {"output_final_state": True}, "causal=True and eps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            favor_attention(*arguments, **options)
    with pytest.raises(ValueError, match="scaling='none'"):
        orthogonal_random_features(4, 4, scaling="none")


# Linformer


def test_linformer_matches_its_formula_on_shorter_inputs(qkv):
    q, k, v = qkv
    e, f = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys, values = (torch.einsum("bhnd,nk->bhkd", x, p[:37]) for x, p in ((k, e), (v, f)))
    expected = torch.einsum("bhnd,bhkd->bhnk", q, keys).div(8**0.5).softmax(-1) @ values
    assert torch.allclose(linformer_attention(q, k, v, e, f), expected, rtol=0, atol=1e-12)
    mask = torch.ones(2, 37)
    mask[:, 30:] = 0
    short = linformer_attention(q[:, :, :30], k[:, :, :30], v[:, :, :30], e, f)
    masked = linformer_attention(q, k, v, e, f, attention_mask=mask)
    assert torch.allclose(masked[:, :, :30], short, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="37 elements but e and f have 20 rows"):
        linformer_attention(q, k, v, e[:20], f[:20])
    with pytest.raises(ValueError, match="both alike"):
        linformer_attention(q, k, v, e, f[:, :2])


# what all have in common: without queries and keys, attention is the mean


@pytest.mark.parametrize("mixer", ["softmax", "performer", "linformer"])
def test_attention_with_zero_queries_and_keys_is_the_mean(qkv, projection, mixer):
    v, zero = qkv[2], torch.zeros_like(qkv[0])
    if mixer == "softmax":
        y = torch.nn.functional.scaled_dot_product_attention(zero, zero, v)
    elif mixer == "performer":
        y = favor_attention(zero, zero, v, projection)
    else:
        rows = torch.full((37, 5), 1 / 37, dtype=torch.float64)
        y = linformer_attention(zero, zero, v, rows, rows)
    assert torch.allclose(y, v.mean(2, keepdim=True).expand_as(v), rtol=0, atol=1e-15)
