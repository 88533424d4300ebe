"""silu(gate) * up: the plain form against its definition, the Triton form against the plain one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.kernels import silu_mul as op
from geobased.kernels.silu_mul import silu_mul

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(shape, *, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))


def run(gate, up, dy, backend) -> dict[str, torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (gate, up)]
    y = silu_mul(*leaves, backend=backend)
    return dict(zip(("y", "dgate", "dup"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))


def check_against_float64(gate, up, dy) -> None:
    actual = run(gate, up, dy, "triton")
    for name, expected in run(gate.double(), up.double(), dy.double(), "torch").items():
        error = relative_error(actual[name], expected)
        assert error <= TOLERANCE[gate.dtype], f"{name}: relative error {error:.1e}"
        assert actual[name].dtype == gate.dtype, name


@settings(max_examples=30, deadline=None)
@given(gate=st.floats(-50, 50), up=st.floats(-1e3, 1e3))
def test_reference_is_the_definition(gate, up):
    gate, up = (torch.tensor([[value]], dtype=torch.float64) for value in (gate, up))
    torch.testing.assert_close(silu_mul(gate, up), gate / (1 + (-gate).exp()) * up, rtol=1e-10, atol=1e-12)


def test_reference_has_right_gradients():
    gate, up, _ = (t.double().requires_grad_() for t in random_inputs((3, 5)))
    assert torch.autograd.gradcheck(silu_mul, (gate, up))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 100), (1, 2500), (3, 1, 129)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_reference(shape, dtype, device):
    check_against_float64(*random_inputs(shape, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("width", [2048, 3584, 1001])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_reference_on_gpu(width, dtype, device):
    check_against_float64(*random_inputs((4, 1000, width), dtype=dtype, device=device))
    check_against_float64(*torch.cat(random_inputs((4, 1000, width), dtype=dtype, device=device), dim=-1).chunk(3, dim=-1))


@pytest.mark.usefixtures("poisoned_empty")
def test_halves_of_one_tensor(device):
    check_against_float64(*torch.cat(random_inputs((2, 5, 30), device=device), dim=-1).chunk(3, dim=-1))


def test_strided_inputs(device):
    gate, up, dy = random_inputs((2, 5, 30), device=device)
    columns = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (gate, up)]
    expanded = torch.ones((), device=device).expand(dy.shape)
    actual = run(*columns, expanded, "triton")
    for name, expected in run(gate, up, expanded, "torch").items():
        assert relative_error(actual[name], expected) < 1e-5, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_dtypes_meet_in_the_wider_one(backend, device):
    gate, up, dy = random_inputs((2, 5), device=device)
    actual = run(gate.half(), up, dy, backend)
    assert actual["y"].dtype == actual["dup"].dtype == torch.float32
    assert actual["dgate"].dtype == torch.float16
    assert relative_error(actual["y"], silu_mul(gate.half().float(), up)) < 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter; the sigmoid is then 0
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_large_gates(backend, device):
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], device=device)
    y = silu_mul(gate, torch.ones_like(gate), backend=backend)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 200.0, 1e4], device=device))


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.silu_mul; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_empty_inputs(device):
    empty = torch.randn(2, 0, device=device)
    assert silu_mul(empty, empty).shape == (2, 0)


def test_operators_follow_the_rules_of_custom_ops(device):
    gate, up, dy = random_inputs((3, 8), device=device)
    torch.library.opcheck(op._silu_mul, (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    torch.library.opcheck(op._silu_mul_backward, (dy, gate, up))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile(backend, device):
    gate, up, dy = random_inputs((3, 8), device=device)
    compiled = torch.compile(lambda gate, up: silu_mul(gate, up, backend=backend), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    y = compiled(*leaves)
    for value, (name, expected) in zip((y, *torch.autograd.grad(y, leaves, dy)), run(gate, up, dy, backend).items(), strict=True):
        assert relative_error(value, expected) < 1e-6, name


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(gate=torch.randn(2, 4)), r"gate has shape \(2, 4\) and up \(2, 3\)"),
        (dict(up=torch.ones(2, 3, dtype=torch.int64)), "up has dtype torch.int64"),
        (dict(up=torch.empty(2, 3, device="meta")), "up on meta: move them to one device"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    with pytest.raises(ValueError, match=message):
        silu_mul(**(dict(gate=torch.randn(2, 3), up=torch.randn(2, 3)) | changes))
