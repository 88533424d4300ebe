"""Rotary embedding: the plain form against complex numbers, the Triton form against the plain one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.kernels import rotary_embedding as op
from geobased.kernels.rotary_embedding import rotary_embedding

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
NAMES = ("q", "k", "dq", "dk")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(batch, seq_len, heads, head_dim, *, dtype=torch.float32, device="cpu", angle_batch=1):
    """q, k; cos and sin whose halves differ, more general than a model's; gradients of both results."""
    generator = torch.Generator().manual_seed(0)
    q, k, dq, dk = (torch.randn(batch, seq_len, heads, head_dim, generator=generator).to(device, dtype) for _ in range(4))
    cos, sin = (torch.randn(angle_batch, seq_len, head_dim, generator=generator).to(device, dtype) for _ in range(2))
    return (q, k, cos, sin), (dq, dk)


def run(inputs, gradients, backend) -> dict[str, torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs[:2]]
    outputs = rotary_embedding(*leaves, *inputs[2:], backend=backend)
    return dict(zip(NAMES, (*outputs, *torch.autograd.grad(outputs, leaves, gradients)), strict=True))


def check_against_float64(inputs, gradients) -> None:
    actual = run(inputs, gradients, "triton")
    expected = run(tuple(t.double() for t in inputs), tuple(t.double() for t in gradients), "torch")
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert error <= TOLERANCE[inputs[0].dtype], f"{name}: relative error {error:.1e}"
        assert actual[name].dtype == inputs[0].dtype, name


@settings(max_examples=20, deadline=None)
@given(half=st.integers(1, 5), position=st.integers(0, 10000))
def test_reference_turns_complex_numbers(half, position):
    (q, k, _, _), _ = random_inputs(1, 1, 2, 2 * half)
    q, k = q.double(), k.double()
    angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    doubled = torch.cat((angles, angles)).view(1, 1, -1)
    turned = rotary_embedding(q, k, doubled.cos(), doubled.sin())
    for before, after in zip((q, k), turned, strict=True):
        expected = torch.complex(*before.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(torch.complex(*after.chunk(2, dim=-1)), expected, rtol=1e-9, atol=1e-9)


def test_reference_has_right_gradients():
    inputs, _ = random_inputs(2, 3, 2, 4, dtype=torch.float64)
    q, k = (t.requires_grad_() for t in inputs[:2])
    assert torch.autograd.gradcheck(lambda q, k: rotary_embedding(q, k, *inputs[2:]), (q, k))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 24), (3, 5, 1, 112), (1, 70, 2, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_reference(shape, dtype, device):
    for angle_batch in {1, shape[0]}:
        check_against_float64(*random_inputs(*shape, dtype=dtype, device=device, angle_batch=angle_batch))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("head_dim", [64, 112, 128, 250])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_reference_on_gpu(head_dim, dtype, device):
    check_against_float64(*random_inputs(4, 1000, 16, head_dim, dtype=dtype, device=device))


def test_strided_inputs(device):
    (q, k, cos, sin), gradients = random_inputs(2, 6, 3, 8, device=device)
    strided = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    expanded = tuple(torch.ones((), device=device).expand(q.shape) for _ in gradients)
    actual = run((*strided, cos.mT.contiguous().mT, sin), expanded, "triton")
    for name, value in run((q, k, cos, sin), expanded, "torch").items():
        assert relative_error(actual[name], value) < 1e-5, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_angles_may_be_wider_than_queries(backend, device):
    """As under autocast, where projections are in half precision and cos and sin are not."""
    (q, k, cos, sin), _ = random_inputs(1, 6, 3, 8, device=device)
    turned = rotary_embedding(q.bfloat16(), k.bfloat16(), cos, sin, backend=backend)
    assert turned[0].dtype == turned[1].dtype == torch.bfloat16
    assert relative_error(turned[0], rotary_embedding(q.bfloat16().double(), k.bfloat16().double(), cos, sin)[0]) < 8e-3


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.rotary_embedding; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_empty_inputs(device):
    (q, k, cos, sin), _ = random_inputs(2, 0, 3, 8, device=device)
    assert rotary_embedding(q, k, cos, sin)[1].shape == k.shape


def test_operator_follows_the_rules_of_custom_ops(device):
    (q, k, cos, sin), _ = random_inputs(1, 5, 2, 4, device=device)
    for transposed in (False, True):
        torch.library.opcheck(op._turn, (q.clone().requires_grad_(), k.clone().requires_grad_(), cos, sin, transposed))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile(backend, device):
    inputs, gradients = random_inputs(2, 5, 2, 4, device=device)
    compiled = torch.compile(lambda *t: rotary_embedding(*t, backend=backend), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in inputs[:2]]
    outputs = compiled(*leaves, *inputs[2:])
    values = (*outputs, *torch.autograd.grad(outputs, leaves, gradients))
    for value, (name, expected) in zip(values, run(inputs, gradients, backend).items(), strict=True):
        assert relative_error(value, expected) < 1e-6, name


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=torch.randn(2, 5, 3, 6)), r"q has shape \(2, 5, 3, 6\)"),
        (dict(q=torch.randn(2, 5, 3, 7), k=torch.randn(2, 5, 3, 7)), "head_dim even"),
        (dict(cos=torch.randn(3, 5, 8)), r"cos has shape \(3, 5, 8\)"),
        (dict(sin=torch.randn(1, 5, 4)), r"they must be \[2 or 1, 5, 8\]"),
        (dict(k=torch.randn(2, 5, 3, 8, dtype=torch.float64)), "dtypes torch.float32 and torch.float64"),
        (dict(cos=torch.empty(1, 5, 8, device="meta")), "move them to one device"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    (q, k, cos, sin), _ = random_inputs(2, 5, 3, 8)
    with pytest.raises(ValueError, match=message):
        rotary_embedding(**(dict(q=q, k=k, cos=cos, sin=sin) | changes))
