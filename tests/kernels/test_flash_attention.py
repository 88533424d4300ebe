"""Softmax attention: the plain form against PyTorch's own, the Triton form against the plain one.

Without a GPU the Triton kernels run in Triton's interpreter. `pytest -m gpu tests/kernels` runs the larger shapes on a GPU.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.kernels import backend as backend_module
from geobased.kernels import flash_attention as op
from geobased.kernels.flash_attention import flash_attention
from geobased.kernels.flash_attention_reference import flash_attention_reference

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float, floor: float = 1e-30) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, name
    error = ((actual - expected).norm() / expected.norm().clamp_min(floor)).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"  # NaN fails too


def random_inputs(batch, seq_len, heads, head_dim, *, kv_len=None, kv_heads=None, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v, dy"""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (batch, seq_len, heads, head_dim), (batch, kv_len or seq_len, kv_heads or heads, head_dim)
    return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in (queries, keys, keys, queries))


def run(q, k, v, dy, **options) -> dict[str, torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = flash_attention(*leaves, **options)
    return dict(zip(("y", "dq", "dk", "dv"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))


def check_against_float64(q, k, v, dy, **options) -> dict[str, torch.Tensor]:
    """Triton's values and gradients against the plain form in float64."""
    actual = run(q, k, v, dy, backend="triton", **options)
    expected = run(*(x.double() for x in (q, k, v, dy)), backend="torch", **options)
    for name, x in expected.items():
        # with a single visible key dq and dk are exactly zero, and rounding is measured against dv
        assert_close(name, actual[name], x, TOLERANCE[q.dtype], floor=0.1 * expected["dv"].norm().item())
        assert actual[name].dtype == q.dtype, name
    return actual


# --- the plain form ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_reference_equals_pytorch(data):
    seq_len, extra, group = (data.draw(st.integers(a, b)) for a, b in ((1, 20), (0, 10), (1, 3)))
    causal = data.draw(st.booleans())
    kv_len = seq_len + extra
    q, k, v, _ = random_inputs(2, seq_len, 2 * group, 4, kv_len=kv_len, kv_heads=2, dtype=torch.float64)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * kv_len, max_size=2 * kv_len))).view(2, kv_len)
    visible = mask[:, None, None].expand(-1, -1, seq_len, -1)
    if causal:
        visible = visible & torch.ones(seq_len, kv_len, dtype=torch.bool).tril(extra)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), visible, enable_gqa=True)
    expected = expected.transpose(1, 2).masked_fill(~visible.any(-1)[:, 0, :, None, None], 0.0)
    actual = flash_attention_reference(q, k, v, causal=causal, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# --- the Triton form against the plain one ----------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "batch, seq_len, heads, head_dim, dtype",
    [
        (2, 1, 2, 16, "fp32"),
        (1, 63, 2, 64, "bf16"),
        (2, 65, 2, 48, "fp32"),
        (1, 130, 1, 96, "fp16"),
        (1, 97, 1, 128, "bf16"),
        (1, 129, 1, 7, "fp32"),
    ],
)
def test_matches_reference(batch, seq_len, heads, head_dim, dtype, causal, device):
    inputs = random_inputs(batch, seq_len, heads, head_dim, dtype=DTYPES[dtype], device=device)
    check_against_float64(*inputs, causal=causal)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, seq_len, heads, head_dim",
    [(3, 577, 16, 64), (1, 1000, 3, 48), (2, 1025, 2, 96), (2, 700, 3, 112), (1, 2048, 2, 128), (5, 17, 3, 80)],
)
def test_matches_reference_on_gpu(batch, seq_len, heads, head_dim, dtype, causal, device):
    inputs = random_inputs(batch, seq_len, heads, head_dim, dtype=DTYPES[dtype], device=device)
    check_against_float64(*inputs, causal=causal)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("causal, seq_len, kv_len", [(True, 40, 101), (False, 40, 101), (False, 101, 40), (True, 1, 70)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_and_other_lengths(causal, seq_len, kv_len, kv_heads, device):
    inputs = random_inputs(2, seq_len, 4, 16, kv_len=kv_len, kv_heads=kv_heads, device=device)
    check_against_float64(*inputs, causal=causal)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_padding(mask_dtype, causal, device):
    """Left, right and scattered padding, and a row of nothing but padding."""
    q, k, v, dy = random_inputs(4, 60, 2, 16, kv_len=70, kv_heads=1, device=device)
    mask = torch.ones(4, 70, dtype=torch.bool, device=device)
    mask[0, :40] = False
    mask[1, 50:] = False
    mask[2, ::3] = False
    mask[3] = False
    actual = check_against_float64(q, k, v, dy, causal=causal, attention_mask=mask.to(mask_dtype))
    for name, x in actual.items():
        assert not x[3].any(), f"{name} of a row of padding"
    for name in ("dk", "dv"):
        assert not actual[name][~mask].any(), f"{name} of padding"
    alone = run(q[1:2], k[1:2, :50], v[1:2, :50], dy[1:2], backend="triton") if not causal else None
    if alone is not None:
        assert_close("y", actual["y"][1:2], alone["y"], 1e-6)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_equal_separate_ones(causal, index_dtype, device):
    bounds = [0, 1, 34, 34, 98, 130]
    q, k, v, dy = random_inputs(1, bounds[-1], 2, 16, kv_heads=1, device=device)
    cu_seqlens = torch.tensor(bounds, dtype=index_dtype, device=device)
    packed = check_against_float64(q, k, v, dy, causal=causal, cu_seqlens=cu_seqlens)
    for start, end in ((0, 1), (1, 34), (34, 98), (98, 130)):
        alone = run(*(x[:, start:end] for x in (q, k, v, dy)), causal=causal, backend="triton")
        for name, x in alone.items():
            torch.testing.assert_close(packed[name][:, start:end], x, rtol=1e-4, atol=1e-5, msg=f"{name} {start}:{end}")


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_with_padding(causal, device):
    q, k, v, dy = random_inputs(1, 70, 1, 16, device=device)
    mask = torch.ones(1, 70, dtype=torch.bool, device=device)
    mask[0, 20:31] = False
    check_against_float64(q, k, v, dy, causal=causal, cu_seqlens=torch.tensor([0, 25, 70]), attention_mask=mask)


@pytest.mark.parametrize("softmax_scale", [0.0, 0.3, 5.0, -1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_scale(softmax_scale, causal, device):
    check_against_float64(*random_inputs(1, 40, 1, 16, device=device), causal=causal, softmax_scale=softmax_scale)


def test_large_scores_do_not_overflow(device):
    q, k, v, dy = random_inputs(1, 40, 1, 16, device=device)
    check_against_float64(10 * q, k, v, dy)
    y = flash_attention(1e4 * q, 1e4 * k, v, backend="triton")
    assert y.isfinite().all()


def test_strided_inputs(device):
    """Slices of one projection, head-major tensors (as transformers has them), and the expanded gradient of a sum."""
    qkv = torch.randn(2, 40, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = qkv.unbind(2)
    expected = run(q.contiguous(), k.contiguous(), v.contiguous(), torch.ones_like(q), backend="torch")
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = flash_attention(*leaves, backend="triton")
    assert y.is_contiguous()
    for name, x in zip(expected, (y, *torch.autograd.grad(y.sum(), leaves)), strict=True):
        assert_close(name, x, expected[name], 1e-5, floor=0.1 * expected["dv"].norm().item())


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_two_runs_give_the_same_bits(causal, device):
    inputs = random_inputs(2, 577, 4, 64, dtype=torch.bfloat16, device=device)
    first, second = (run(*inputs, causal=causal, backend="triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
def test_packed_sequences_on_gpu_do_not_wait(device):
    q, k, v, dy = random_inputs(1, 4096, 4, 64, dtype=torch.bfloat16, device=device)
    cu_seqlens = torch.tensor([0, 100, 1000, 1001, 4096], dtype=torch.int32, device=device)
    run(q, k, v, dy, causal=True, cu_seqlens=cu_seqlens, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, v, dy, causal=True, cu_seqlens=cu_seqlens, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- launch configurations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 16, 48, 64, 80, 96, 112, 128])
@pytest.mark.parametrize("windowed", [False, True])
def test_every_shape_has_a_launch_configuration(dtype, head_dim, windowed):
    from geobased.kernels.flash_attention_configs import launch_config

    for seq_len in (1, 577):
        q = torch.empty(1, seq_len, 1, head_dim, dtype=dtype)
        for kernel in ("forward", "dq", "dkdv"):
            config = launch_config(kernel, q, windowed=windowed)
            assert config is not None
            # the tiles that stay and those that pass by fit the shared memory of every GPU from sm_80 on
            padded = max(16, 1 << (head_dim - 1).bit_length())
            rows = 2 * config["TILE"] + 2 * config["STEP"] * max(1, config["num_stages"])
            rows -= config["TILE"] if kernel == "forward" else 0
            assert rows * padded * q.element_size() <= 99 * 1024, (kernel, config)


# --- interface --------------------------------------------------------------------------------------------------------


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.flash_attention; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_inputs(backend, device):
    for shape in ((2, 0, 2, 16), (0, 5, 2, 16), (2, 5, 0, 16)):
        q = torch.randn(shape, device=device)
        assert flash_attention(q, q, q, backend=backend).shape == shape
    q, k = torch.randn(1, 3, 2, 16, device=device), torch.randn(1, 0, 2, 16, device=device)
    assert not flash_attention(q, k, k, backend=backend).any()  # queries that see no key


def test_operator_follows_the_rules_of_custom_ops(device):
    q, k, v, dy = (x.requires_grad_() for x in random_inputs(1, 5, 2, 16, kv_heads=1, device=device))
    mask = torch.tensor([[False, True, True, True, True]], device=device)
    torch.library.opcheck(op._attention, (q, k, v, True, None, 0.25, mask, None))
    y, logsumexp = op._attention(q, k, v, True, None, 0.25, mask, None)
    arguments = tuple(x.detach() for x in (dy, q, k, v, y, logsumexp))
    torch.library.opcheck(op._attention_backward, (*arguments, True, None, 0.25, mask, None))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile(backend, device):
    q, k, v, dy = random_inputs(1, 20, 1, 16, device=device)
    mask = torch.ones(1, 20, device=device)
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = compiled(*leaves, causal=True, attention_mask=mask, backend=backend)
    expected = run(q, k, v, dy, causal=True, attention_mask=mask, backend=backend)
    for name, x in zip(expected, (y, *torch.autograd.grad(y, leaves, dy)), strict=True):
        assert_close(name, x, expected[name], 1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=torch.randn(2, 6, 32)), "q has shape"),
        (dict(v=torch.randn(2, 6, 2, 8)), "must be equal"),
        (dict(q=torch.randn(2, 6, 3, 16)), "3 heads and k and v have 2: the first must be a multiple"),
        (dict(q=torch.randn(3, 6, 2, 16)), "k and v have shape"),
        (dict(q=torch.randn(2, 7, 2, 16), causal=True), "kv_len 6 is less than seq_len 7"),
        (dict(q=torch.randn(2, 6, 2, 16, dtype=torch.float64)), "dtypes torch.float64, torch.float32"),
        (dict.fromkeys("qkv", torch.ones(2, 6, 2, 16, dtype=torch.int32)), "floating point"),
        (dict(q=torch.empty(2, 6, 2, 16, device="meta")), "move them to one device"),
        (dict(attention_mask=torch.ones(2, 5)), r"attention_mask has shape \(2, 5\)"),
        (dict(cu_seqlens=torch.tensor([0, 6])), "cu_seqlens needs batch 1, not 2"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    q, k, v, _ = random_inputs(2, 6, 2, 16)
    arguments = dict(q=q, k=k, v=v) | changes
    with pytest.raises(ValueError, match=message):
        flash_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_packed_sequences_need_one_key_per_query():
    q, k, v, _ = random_inputs(1, 6, 2, 16, kv_len=8)
    with pytest.raises(ValueError, match="kv_len 8 must equal seq_len 6"):
        flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 6]))


def test_head_dim_beyond_the_triton_form(device, monkeypatch):
    q, k, v, _ = random_inputs(1, 5, 1, 129, device=device)
    expected = flash_attention_reference(q, k, v)
    with pytest.raises(ValueError, match="head_dim up to 128, not 129"):
        flash_attention(q, k, v, backend="triton")
    monkeypatch.setattr(op, "resolve_backend", lambda backend, tensor: "triton")  # as on a GPU
    backend_module._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="head_dim up to 128"):
        y = flash_attention(q, k, v)
    torch.testing.assert_close(y, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attention(q, k, v)
