"""Sliding window attention: the plain form against the official implementation's numbers, the Triton form against the plain one.

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
from geobased.kernels import flash_attention as op  # the op that windows share with all softmax attention
from geobased.kernels.sliding_window_attention import sliding_window_attention
from geobased.kernels.sliding_window_attention_reference import sliding_window_attention_reference

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float, floor: float = 1e-30) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, name
    error = ((actual - expected).norm() / expected.norm().clamp_min(floor)).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"  # NaN fails too


def random_inputs(batch, seq_len, heads, head_dim, *, kept=0, dtype=torch.float32, device="cpu", seed=0):
    """q, dy of seq_len tokens and k, v of `kept` more."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (seq_len, seq_len + kept, seq_len + kept, seq_len)
    q, k, v, dy = (torch.randn(batch, n, heads, head_dim, generator=generator).to(device, dtype) for n in lengths)
    return q, k, v, dy


def run(q, k, v, dy, **options) -> dict[str, torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = sliding_window_attention(*leaves, **options)
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


def cases(*shapes):
    return [pytest.param(*shape[:-1], DTYPES[shape[-1]], id="B{}-T{}-H{}-D{}-W{}-{}".format(*shape)) for shape in shapes]


# --- the plain form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, window", [("B1T20H2d16left0rot1", 1), ("B2T40H2d16left8rot1", 9)])
def test_reference_reproduces_official_numbers(reference_tensors, case, window):
    fixture = reference_tensors("based/modules_fp64")
    q, k, v = fixture[f"swa.{case}.qkv_rot"].unbind(2)
    y = sliding_window_attention(q, k, v, window=window)
    assert_close("y", y, fixture[f"swa.{case}.y"], 1e-12)


def dense_attention(q, k, v, visible):
    """visible [batch, seq_len, kv_len]"""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    visible = visible[:, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reference_equals_dense_softmax(data):
    seq_len, kept, window = (data.draw(st.integers(a, b)) for a, b in ((1, 40), (0, 12), (1, 60)))
    block_size = data.draw(st.sampled_from([1, 7, 16, 128]))
    q, k, v, _ = random_inputs(2, seq_len, 1, 4, kept=kept, dtype=torch.float64, seed=data.draw(st.integers(0, 99)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * k.shape[1], max_size=2 * k.shape[1]))).view(2, -1)
    distance = torch.arange(seq_len)[:, None] + kept - torch.arange(seq_len + kept)
    visible = (distance >= 0) & (distance < window) & mask[:, None]
    y = sliding_window_attention_reference(q, k, v, window=window, attention_mask=mask, block_size=block_size)
    torch.testing.assert_close(y, dense_attention(q, k, v, visible), rtol=1e-10, atol=1e-12)


# --- the Triton form against the plain one ----------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "batch, seq_len, heads, head_dim, window, dtype",
    cases(
        (1, 1, 1, 64, 1, "fp32"),
        (1, 1, 2, 16, 9, "bf16"),
        (2, 63, 2, 64, 9, "fp32"),
        (2, 65, 3, 112, 9, "fp32"),
        (1, 63, 1, 40, 129, "bf16"),
        (1, 130, 2, 80, 64, "fp16"),
        (1, 130, 1, 1, 64, "fp32"),
        (1, 130, 1, 128, 1, "fp16"),
        (1, 130, 1, 16, 1000, "fp32"),
        (1, 300, 1, 64, 129, "bf16"),
        (1, 300, 1, 112, 129, "bf16"),
        (1, 300, 1, 32, 129, "fp32"),
    ),
)
def test_matches_reference(batch, seq_len, heads, head_dim, window, dtype, device):
    check_against_float64(*random_inputs(batch, seq_len, heads, head_dim, dtype=dtype, device=device), window=window)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "batch, seq_len, heads, head_dim, window, dtype",
    cases(
        *((1, 4096, 16, head_dim, 129, dtype) for head_dim in (64, 80, 112, 128) for dtype in DTYPES),
        *((2, 1000, 4, 64, window, dtype) for window in (1, 65, 128, 1000) for dtype in DTYPES),
        (3, 4097, 5, 7, 33, "fp16"),
        (2, 4095, 3, 100, 64, "bf16"),
    ),
)
def test_matches_reference_on_gpu(batch, seq_len, heads, head_dim, window, dtype, device):
    check_against_float64(*random_inputs(batch, seq_len, heads, head_dim, dtype=dtype, device=device), window=window)


@pytest.mark.parametrize("seq_len, kept, window", [(130, 0, 97), (100, 37, 70), (45, 200, 129)])
@pytest.mark.parametrize("mask_all", [True, False])
def test_masking_only_edge_tiles_changes_nothing(seq_len, kept, window, mask_all, device, monkeypatch):
    from geobased.kernels.flash_attention_configs import CONFIGS

    for kernel in ("forward", "dq", "dkdv"):
        key = (kernel, True, 4, 64)
        monkeypatch.setitem(CONFIGS, key, CONFIGS[key] | {"MASK_ALL": mask_all, "TILE": 32, "STEP": 16})
    check_against_float64(*random_inputs(1, seq_len, 1, 16, kept=kept, device=device), window=window)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("seq_len, kept, window", [(1, 0, 1), (1, 140, 129), (37, 128, 129), (70, 5, 9), (3, 300, 64)])
def test_kept_keys(seq_len, kept, window, device):
    """A later piece with the keys kept from before gives what the whole sequence gives."""
    q, k, v, dy = random_inputs(1, seq_len + kept, 2, 16, device=device)
    actual = check_against_float64(q[:, kept:], k, v, dy[:, kept:], window=window)
    whole = sliding_window_attention(q, k, v, window=window, backend="torch")
    assert_close("y", actual["y"], whole[:, kept:], 1e-5)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_padding(mask_dtype, device):
    """Left, right and scattered padding, and a row of nothing but padding."""
    q, k, v, dy = random_inputs(4, 60, 1, 16, kept=3, device=device)
    mask = torch.ones(4, 63, dtype=torch.bool, device=device)
    mask[0, :40] = False
    mask[1, 50:] = False
    mask[2, ::3] = False
    mask[3] = False
    actual = check_against_float64(q, k, v, dy, window=9, attention_mask=mask.to(mask_dtype))
    for name, x in actual.items():
        assert not x[3].any(), f"{name} of a row of padding"
    assert not actual["y"][0, :37].any() and not actual["dq"][0, :37].any()
    alone = run(q[:1, 37:], k[:1, 40:], v[:1, 40:], dy[:1, 37:], window=9, backend="triton")
    assert_close("y", actual["y"][:1, 37:], alone["y"], 1e-6)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("window, index_dtype", [(9, torch.int32), (1000, torch.int64)])
def test_packed_sequences_equal_separate_ones(window, index_dtype, device):
    bounds = [0, 1, 34, 34, 98, 130]
    q, k, v, dy = random_inputs(1, bounds[-1], 2, 16, device=device)
    cu_seqlens = torch.tensor(bounds, dtype=index_dtype, device=device)
    packed = check_against_float64(q, k, v, dy, window=window, cu_seqlens=cu_seqlens)
    for start, end in ((0, 1), (1, 34), (34, 98), (98, 130)):
        alone = run(*(x[:, start:end] for x in (q, k, v, dy)), window=window, backend="triton")
        for name, x in alone.items():
            torch.testing.assert_close(packed[name][:, start:end], x, rtol=1e-4, atol=1e-5, msg=f"{name} {start}:{end}")


def test_packed_sequences_with_padding(device):
    q, k, v, dy = random_inputs(1, 70, 1, 16, device=device)
    mask = torch.ones(1, 70, dtype=torch.bool, device=device)
    mask[0, 20:31] = False
    cu_seqlens = torch.tensor([0, 25, 70])  # may stay on the CPU
    check_against_float64(q, k, v, dy, window=12, cu_seqlens=cu_seqlens, attention_mask=mask)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("window", [70, 71, 2**40])
def test_a_window_of_all_keys_is_causal_attention(backend, window, device):
    q, k, v, dy = random_inputs(2, 70, 2, 32, device=device)
    actual = run(q, k, v, dy, window=window, backend=backend)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True).transpose(1, 2)
    for name, x in zip(("y", "dq", "dk", "dv"), (y, *torch.autograd.grad(y, leaves, dy.double())), strict=True):
        assert_close(name, actual[name], x, 1e-5)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads, device):
    """Query heads that share a key head: as with the key heads repeated, and their gradients summed."""
    q, _, _, dy = random_inputs(2, 70, 4, 16, device=device)
    k, v = (x[:, :, :kv_heads] for x in random_inputs(2, 70, 4, 16, device=device, seed=1)[1:3])
    actual = check_against_float64(q, k, v, dy, window=9)
    repeated = run(q, *(x.repeat_interleave(4 // kv_heads, 2) for x in (k, v)), dy, window=9, backend="triton")
    assert_close("y", actual["y"], repeated["y"], 1e-6)
    for name in ("dk", "dv"):
        assert_close(name, actual[name], repeated[name].view(2, 70, kv_heads, -1, 16).sum(3), 1e-5)


@pytest.mark.parametrize("softmax_scale", [0.0, 0.3, 5.0, -1.0])
def test_softmax_scale(softmax_scale, device):
    check_against_float64(*random_inputs(1, 40, 1, 16, device=device), window=9, softmax_scale=softmax_scale)


def test_large_scores_do_not_overflow(device):
    q, k, v, dy = random_inputs(1, 40, 1, 16, device=device)
    check_against_float64(10 * q, k, v, dy, window=9)
    y = sliding_window_attention(1e4 * q, 1e4 * k, v, window=9, backend="triton")
    assert y.isfinite().all()


def test_strided_inputs(device):
    """Slices of one projection, head-major tensors, and the expanded gradient of a sum."""
    qkv = torch.randn(2, 40, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = qkv.unbind(2)
    expected = sliding_window_attention(q.contiguous(), k.contiguous(), v.contiguous(), window=9, backend="triton")
    assert_close("y", sliding_window_attention(q, k, v, window=9, backend="triton"), expected, 1e-6)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = sliding_window_attention(*leaves, window=9, backend="triton")
    assert_close("y", y, expected, 1e-6)
    assert y.is_contiguous()
    expected = run(*leaves, torch.ones_like(y), window=9, backend="torch")
    for name, x in zip(("dq", "dk", "dv"), torch.autograd.grad(y.sum(), leaves), strict=True):
        assert_close(name, x, expected[name], 1e-5, floor=0.1 * expected["dv"].norm().item())


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(device):
    inputs = random_inputs(2, 2048, 4, 64, dtype=torch.bfloat16, device=device)
    first, second = (run(*inputs, window=129, backend="triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
def test_packed_sequences_on_gpu_do_not_wait(device):
    q, k, v, dy = random_inputs(1, 4096, 4, 64, dtype=torch.bfloat16, device=device)
    cu_seqlens = torch.tensor([0, 100, 1000, 1001, 4096], dtype=torch.int32, device=device)
    run(q, k, v, dy, window=129, cu_seqlens=cu_seqlens, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, v, dy, window=129, cu_seqlens=cu_seqlens, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- interface --------------------------------------------------------------------------------------------------------


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.sliding_window_attention; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_empty_inputs(device):
    for shape in ((2, 0, 2, 16), (0, 5, 2, 16), (2, 5, 0, 16)):
        q = torch.randn(shape, device=device)
        assert sliding_window_attention(q, q, q, window=3).shape == shape
    q, k, v, _ = random_inputs(1, 0, 2, 16, kept=4, device=device)
    assert sliding_window_attention(q, k, v, window=3, backend="triton").shape == (1, 0, 2, 16)


def test_operator_follows_the_rules_of_custom_ops(device):
    q, k, v, dy = (x.requires_grad_() for x in random_inputs(1, 5, 1, 16, device=device))
    mask = torch.tensor([[False, True, True, True, True]], device=device)
    torch.library.opcheck(op._attention, (q, k, v, True, 3, 0.25, mask, None))
    y, logsumexp = op._attention(q, k, v, True, 3, 0.25, mask, None)
    arguments = tuple(x.detach() for x in (dy, q, k, v, y, logsumexp))
    torch.library.opcheck(op._attention_backward, (*arguments, True, 3, 0.25, mask, None))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile(backend, device):
    q, k, v, dy = random_inputs(1, 20, 1, 16, device=device)
    mask = torch.ones(1, 20, device=device)
    compiled = torch.compile(sliding_window_attention, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = compiled(*leaves, window=9, attention_mask=mask, backend=backend)
    expected = run(q, k, v, dy, window=9, attention_mask=mask, backend=backend)
    for name, x in zip(expected, (y, *torch.autograd.grad(y, leaves, dy)), strict=True):
        assert_close(name, x, expected[name], 1e-6)


def _bad(**changes):
    q, k, v, _ = random_inputs(2, 6, 2, 16)
    arguments = dict(q=q, k=k, v=v, window=3) | changes
    return arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window=0), "window=0 must be at least 1"),
        (dict(window=-1), "window=-1 must be at least 1"),
        (dict(q=torch.randn(2, 6, 32)), "q has shape"),
        (dict(v=torch.randn(2, 6, 2, 8)), "must be equal"),
        (dict(q=torch.randn(2, 6, 3, 16)), "3 heads and k and v have 2"),
        (dict(q=torch.randn(3, 6, 2, 16)), "k and v have shape"),
        (dict(q=torch.randn(2, 7, 2, 16)), "kv_len 6 is less than seq_len 7"),
        (dict(q=torch.randn(2, 6, 2, 16, dtype=torch.float64)), "dtypes torch.float64, torch.float32"),
        (dict.fromkeys("qkv", torch.ones(2, 6, 2, 16, dtype=torch.int32)), "floating point"),
        (dict(q=torch.empty(2, 6, 2, 16, device="meta")), "move them to one device"),
        (dict(attention_mask=torch.ones(2, 5)), r"attention_mask has shape \(2, 5\)"),
        (dict(cu_seqlens=torch.tensor([0, 6])), "cu_seqlens needs batch 1, not 2"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    q, k, v, options = _bad(**changes)
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(q, k, v, **options)


@pytest.mark.parametrize(
    "cu_seqlens, kept, message",
    [
        (torch.tensor([0, 5]), 0, "must rise from 0 to seq_len 6"),
        (torch.tensor([1, 6]), 0, "must rise from 0"),
        (torch.tensor([0, 4, 3, 6]), 0, "must rise from 0"),
        (torch.tensor([0.0, 6.0]), 0, "make it torch.int32 or torch.int64"),
        (torch.tensor([6]), 0, "number of sequences"),
        (torch.tensor([0, 6]), 2, "kv_len 8 must equal seq_len 6"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, kept, message):
    q, k, v, _ = random_inputs(1, 6, 2, 16, kept=kept)
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(q, k, v, window=3, cu_seqlens=cu_seqlens)


def test_head_dim_beyond_the_triton_form(device, monkeypatch):
    q, k, v, _ = random_inputs(1, 5, 1, 129, device=device)
    expected = sliding_window_attention_reference(q, k, v, window=3)
    with pytest.raises(ValueError, match="head_dim up to 128, not 129"):
        sliding_window_attention(q, k, v, window=3, backend="triton")
    monkeypatch.setattr(op, "resolve_backend", lambda backend, tensor: "triton")  # as on a GPU
    backend_module._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="head_dim up to 128"):
        y = sliding_window_attention(q, k, v, window=3)
    torch.testing.assert_close(y, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sliding_window_attention(q, k, v, window=3)
