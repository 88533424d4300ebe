"""Gated short convolution: the plain form against the official implementation's numbers, the Triton form against the plain one.

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
from geobased.kernels import gated_short_convolution as op
from geobased.kernels.gated_short_convolution import gated_short_convolution, gated_short_convolution_of_halves
from geobased.kernels.gated_short_convolution_reference import gated_short_convolution_reference

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
NAMES = ("y", "dx", "dgate", "dweight", "dstate")


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, name
    error = ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"  # NaN fails too


def random_inputs(batch, seq_len, channels, kernel, *, dtype=torch.float32, device="cpu", seed=0):
    """x and gate, halves of one tensor; weight; dy."""
    generator = torch.Generator().manual_seed(seed)
    x, gate, dy = torch.randn(batch, seq_len, 3 * channels, generator=generator).to(device, dtype).chunk(3, dim=-1)
    return x, gate, torch.randn(channels, kernel, generator=generator).to(device, dtype), dy


def random_state(batch, channels, length, *, dtype=torch.float32, device="cpu"):
    return torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def run(x, gate, weight, dy, *, state=None, **options) -> dict[str, torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, gate, weight, state) if t is not None]
    y = gated_short_convolution(*leaves[:3], state=leaves[3] if state is not None else None, **options)
    return dict(zip(NAMES, (y, *torch.autograd.grad(y, leaves, dy)), strict=False))


def check_against_float64(x, gate, weight, dy, *, state=None, **options) -> dict[str, torch.Tensor]:
    """Triton's values and gradients against the plain form in float64."""
    actual = run(x, gate, weight, dy, state=state, backend="triton", **options)
    doubled = None if state is None else state.double()
    expected = run(*(t.double() for t in (x, gate, weight, dy)), state=doubled, backend="torch", **options)
    assert actual.keys() == expected.keys()
    for (name, t), like in zip(expected.items(), (x, x, gate, weight, state), strict=False):
        assert_close(name, actual[name], t, TOLERANCE[x.dtype])
        assert actual[name].dtype == like.dtype, name
    return actual


def cases(*shapes):
    return [pytest.param(*shape[:-1], DTYPES[shape[-1]], id="B{}-T{}-C{}-K{}-{}".format(*shape)) for shape in shapes]


# --- the plain form ---------------------------------------------------------------------------------------------------


def test_reference_reproduces_official_numbers(reference_tensors):
    fixture = reference_tensors("based/modules_fp64")
    parameters = {name.removeprefix("baseconv.sd."): t for name, t in fixture.items() if name.startswith("baseconv.sd.")}
    projected = F.linear(fixture["baseconv.x"], parameters["in_proj.weight"], parameters["in_proj.bias"])
    y = gated_short_convolution(*projected.chunk(2, dim=-1), parameters["conv.conv.weight"].squeeze(1))
    y = F.linear(y, parameters["out_proj.weight"], parameters["out_proj.bias"])
    assert_close("y", y, fixture["baseconv.y"], 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reference_equals_the_sum_over_taps(data):
    seq_len, kernel, kept = (data.draw(st.integers(a, b)) for a, b in ((1, 12), (1, 8), (0, 10)))
    x, gate, weight, _ = random_inputs(1, seq_len, 2, kernel, dtype=torch.float64, seed=data.draw(st.integers(0, 99)))
    state = random_state(1, 2, kept, dtype=torch.float64)
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=seq_len, max_size=seq_len))])
    history = torch.cat([torch.zeros(1, 2, kernel, dtype=torch.float64), state, (x * mask[..., None]).mT], dim=-1)
    conv = torch.stack([(history[..., -n - kernel : history.shape[-1] - n] * weight).sum(-1) for n in range(seq_len)], 1)
    y = gated_short_convolution_reference(x, gate, weight, state=state, attention_mask=mask)
    torch.testing.assert_close(y, F.silu(conv.flip(1)) * gate, rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 20), kernel=st.integers(1, 8))
def test_reference_in_two_pieces_equals_one(cut, kernel):
    x, gate, weight, _ = random_inputs(2, 20, 3, kernel, dtype=torch.float64)
    whole = gated_short_convolution(x, gate, weight)
    first = gated_short_convolution(x[:, :cut], gate[:, :cut], weight)
    second = gated_short_convolution(x[:, cut:], gate[:, cut:], weight, state=x[:, :cut].mT)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-10, atol=1e-12)


# --- the Triton form against the plain one ----------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "batch, seq_len, channels, kernel, dtype",
    cases(
        (1, 1, 1, 3, "fp32"),
        (2, 1, 130, 4, "bf16"),
        (2, 63, 30, 3, "fp32"),
        (1, 130, 70, 4, "fp16"),
        (3, 33, 24, 2, "bf16"),
        (1, 40, 24, 8, "fp32"),
        (1, 300, 24, 3, "bf16"),
    ),
)
def test_matches_reference(batch, seq_len, channels, kernel, dtype, device):
    check_against_float64(*random_inputs(batch, seq_len, channels, kernel, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "batch, seq_len, channels, kernel, dtype",
    cases(
        *((4, 4096, channels, 3, dtype) for channels in (2048, 3584) for dtype in DTYPES),
        *((2, 1000, 100, kernel, "fp32") for kernel in range(2, 9)),
        (3, 4097, 129, 4, "bf16"),
    ),
)
def test_matches_reference_on_gpu(batch, seq_len, channels, kernel, dtype, device):
    check_against_float64(*random_inputs(batch, seq_len, channels, kernel, dtype=dtype, device=device))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("seq_len, kernel, kept", [(1, 3, 2), (1, 4, 1), (40, 3, 3), (2, 5, 7), (70, 2, 1), (5, 3, 0)])
def test_state(seq_len, kernel, kept, device):
    state = random_state(2, 20, kept, device=device)
    check_against_float64(*random_inputs(2, seq_len, 20, kernel, device=device), state=state)


def test_state_and_weight_may_be_wider_than_x(device):
    """As under autocast, and with the float32 cache of a half precision model."""
    x, gate, weight, dy = random_inputs(1, 40, 20, 3, dtype=torch.bfloat16, device=device)
    state = random_state(1, 20, 2, device=device)
    actual = check_against_float64(x, gate, weight.float(), dy, state=state)
    assert actual["dweight"].dtype == actual["dstate"].dtype == torch.float32


def test_two_pieces_equal_one(device):
    x, gate, weight, _ = random_inputs(2, 70, 20, 4, device=device)
    whole = gated_short_convolution(x, gate, weight, backend="triton")
    first = gated_short_convolution(x[:, :33], gate[:, :33], weight, backend="triton")
    second = gated_short_convolution(x[:, 33:], gate[:, 33:], weight, state=x[:, 30:33].mT, backend="triton")
    assert_close("y", torch.cat([first, second], dim=1), whole, 1e-6)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_padding(mask_dtype, device):
    x, gate, weight, dy = random_inputs(3, 50, 20, 3, device=device)
    mask = torch.ones(3, 50, dtype=torch.bool, device=device)
    mask[0, :20] = False
    mask[1, ::3] = False
    mask[2] = False
    state = random_state(3, 20, 2, device=device)
    actual = check_against_float64(x, gate, weight, dy, attention_mask=mask.to(mask_dtype), state=state)
    assert not actual["dx"][~mask].any()
    hidden = torch.where(mask[..., None], x, float("nan"))
    masked = gated_short_convolution(hidden, gate, weight, attention_mask=mask, state=state, backend="triton")
    assert torch.equal(masked, actual["y"])  # padding is never read
    alone = gated_short_convolution(x[:1, 20:], gate[:1, 20:], weight, backend="triton")
    masked = gated_short_convolution(x, gate, weight, attention_mask=mask, backend="triton")
    assert_close("y", masked[:1, 20:], alone, 1e-6)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_equal_separate_ones(index_dtype, device):
    x, gate, weight, dy = random_inputs(1, 70, 20, 4, device=device)
    cu_seqlens = torch.tensor([0, 1, 3, 34, 34, 70], dtype=index_dtype, device=device)
    packed = check_against_float64(x, gate, weight, dy, cu_seqlens=cu_seqlens)
    for start, end in ((0, 1), (1, 3), (3, 34), (34, 70)):
        piece = slice(start, end)
        alone = run(x[:, piece], gate[:, piece], weight, dy[:, piece], backend="triton")
        for name in ("y", "dx", "dgate"):
            assert_close(name, packed[name][:, piece], alone[name], 1e-6)


def test_packed_sequences_with_padding(device):
    mask = (torch.arange(50, device=device) % 7 > 1)[None]
    cu_seqlens = torch.tensor([0, 33, 50])  # may stay on the CPU
    check_against_float64(*random_inputs(1, 50, 20, 3, device=device), cu_seqlens=cu_seqlens, attention_mask=mask)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("masking", ["none", "padding", "packed"])
def test_halves_of_one_tensor(masking, device):
    """The same numbers as of two chunks, to the bit, with a gradient that is one tensor."""
    x, gate, weight, dy = random_inputs(1, 70, 20, 3, dtype=torch.bfloat16, device=device)
    options = {
        "none": {},
        "padding": dict(attention_mask=(torch.arange(70, device=device) % 5 > 0)[None]),
        "packed": dict(cu_seqlens=torch.tensor([0, 33, 70])),
    }[masking]
    expected = run(x, gate, weight, dy, backend="triton", **options)
    for backend in ("triton", "torch"):
        halves, leaf = torch.cat([x, gate], dim=-1).requires_grad_(), weight.detach().requires_grad_()
        y = gated_short_convolution_of_halves(halves, leaf, backend=backend, **options)
        dhalves, dweight = torch.autograd.grad(y, (halves, leaf), dy)
        for name, t in zip(NAMES, (y, *dhalves.chunk(2, dim=-1), dweight), strict=False):
            assert_close(name, t, expected[name], 0 if backend == "triton" else TOLERANCE[x.dtype])


def test_strided_inputs(device):
    """Channel-major tensors and the expanded gradient of a sum."""
    x, gate, weight, dy = random_inputs(2, 40, 20, 3, device=device)
    expected = run(x, gate, weight, torch.ones_like(dy), backend="torch")
    leaves = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (x, gate)]
    leaves.append(weight.t().contiguous().t().requires_grad_())
    y = gated_short_convolution(*leaves, backend="triton")
    assert y.is_contiguous()
    for name, t in zip(NAMES, (y, *torch.autograd.grad(y.sum(), leaves)), strict=False):
        assert_close(name, t, expected[name], 1e-5)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(device):
    inputs = random_inputs(2, 2048, 512, 3, dtype=torch.bfloat16, device=device)
    first, second = (run(*inputs, backend="triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- interface --------------------------------------------------------------------------------------------------------


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.gated_short_convolution; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_empty_inputs(device):
    for shape in ((2, 0, 3), (0, 5, 3), (2, 5, 0)):
        x = torch.randn(shape, device=device)
        halves = torch.randn(*shape[:2], 2 * shape[2], device=device)
        assert gated_short_convolution_of_halves(halves, torch.randn(shape[2], 3, device=device)).shape == shape
        assert gated_short_convolution(x, x, torch.randn(shape[2], 3, device=device)).shape == shape


def test_operator_follows_the_rules_of_custom_ops(device):
    x, gate, weight, dy = (t.contiguous().requires_grad_() for t in random_inputs(1, 5, 3, 3, device=device))
    state = random_state(1, 3, 2, device=device).requires_grad_()
    mask = torch.tensor([[False, True, True, True, True]], device=device)
    torch.library.opcheck(op._convolution, (x, gate, weight, state, mask, None))
    arguments = tuple(t.detach() for t in (dy, x, gate, weight, state))
    torch.library.opcheck(op._convolution_backward, (*arguments, mask, None))
    halves = torch.cat([x, gate], dim=-1).detach()
    torch.library.opcheck(op._convolution_of_halves, (halves.clone().requires_grad_(), weight, mask, None))
    torch.library.opcheck(op._convolution_of_halves_backward, (dy.detach(), halves, weight.detach(), mask, None))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile(backend, device):
    x, gate, weight, dy = random_inputs(1, 20, 3, 3, device=device)
    mask = torch.ones(1, 20, device=device)
    compiled = torch.compile(gated_short_convolution, fullgraph=True, backend="aot_eager")
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate, weight)]
    y = compiled(*leaves, attention_mask=mask, backend=backend)
    expected = run(x, gate, weight, dy, attention_mask=mask, backend=backend)
    for name, t in zip(expected, (y, *torch.autograd.grad(y, leaves, dy)), strict=True):
        assert_close(name, t, expected[name], 1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=torch.randn(2, 24)), "x has shape"),
        (dict(gate=torch.randn(2, 6, 3)), "and gate"),
        (dict(weight=torch.randn(4, 1, 3)), "weight has shape"),
        (dict(weight=torch.randn(5, 3)), r"weight has shape \(5, 3\)"),
        (dict(weight=torch.randn(4, 0)), r"weight has shape \(4, 0\)"),
        (dict(weight=torch.ones(4, 3, dtype=torch.int64)), "weight has dtype torch.int64"),
        (dict(gate=torch.randn(2, 6, 4, dtype=torch.float64)), "dtypes torch.float32 and torch.float64"),
        (dict(gate=torch.empty(2, 6, 4, device="meta")), "move them to one device"),
        (dict(state=torch.randn(2, 3, 2)), r"state has shape \(2, 3, 2\)"),
        (dict(attention_mask=torch.ones(2, 7)), r"attention_mask has shape \(2, 7\)"),
        (dict(cu_seqlens=torch.tensor([0, 6])), "cu_seqlens needs batch 1, not 2"),
        (dict(cu_seqlens=torch.tensor([0, 6]), state=torch.randn(2, 4, 2)), "do not go together"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    x, gate, weight, _ = random_inputs(2, 6, 4, 3)
    with pytest.raises(ValueError, match=message):
        gated_short_convolution(**(dict(x=x, gate=gate, weight=weight) | changes))


@pytest.mark.parametrize(
    "cu_seqlens, message",
    [
        (torch.tensor([0, 5]), "must rise from 0 to seq_len 6"),
        (torch.tensor([0, 4, 3, 6]), "must rise from 0"),
        (torch.tensor([0.0, 6.0]), "make it torch.int32 or torch.int64"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, message):
    x, gate, weight, _ = random_inputs(1, 6, 4, 3)
    with pytest.raises(ValueError, match=message):
        gated_short_convolution(x, gate, weight, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("kernel", [1, 9])
def test_kernels_beyond_the_triton_form(kernel, device, monkeypatch):
    x, gate, weight, _ = random_inputs(1, 12, 2, kernel, device=device)
    expected = gated_short_convolution_reference(x, gate, weight)
    with pytest.raises(ValueError, match=f"2 to 8 taps, not {kernel}"):
        gated_short_convolution(x, gate, weight, backend="triton")
    monkeypatch.setattr(op, "resolve_backend", lambda backend, tensor: "triton")  # as on a GPU
    backend_module._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="2 to 8 taps"):
        y = gated_short_convolution(x, gate, weight)
    torch.testing.assert_close(y, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated_short_convolution(x, gate, weight)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 7)])
def test_bad_halves(shape):
    with pytest.raises(ValueError, match=r"it must be \[batch, seq_len, 2 \* channels\]"):
        gated_short_convolution_of_halves(torch.randn(shape), torch.randn(3, 3))
