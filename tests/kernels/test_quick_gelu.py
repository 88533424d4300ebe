"""x * sigmoid(1.702 x): the plain form against transformers' activation, the Triton form against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import QuickGELUActivation

from geobased.kernels import quick_gelu as op
from geobased.kernels.quick_gelu import quick_gelu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(shape, *, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return tuple((3 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(2))


def run(x, dy, backend):
    x = x.detach().requires_grad_()
    y = quick_gelu(x, backend=backend)
    return y, *torch.autograd.grad(y, x, dy)


def check_against_float64(x, dy) -> None:
    expected = run(x.double(), dy.double(), "torch")
    for name, actual, truth in zip(("y", "dx"), run(x, dy, "triton"), expected, strict=True):
        error = relative_error(actual, truth)
        assert error <= TOLERANCE[x.dtype], f"{name}: relative error {error:.1e}"
        assert actual.dtype == x.dtype, name


@settings(max_examples=30, deadline=None)
@given(value=st.floats(-50, 50))
def test_reference_is_the_activation_of_transformers(value):
    x = torch.tensor([value], dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), QuickGELUActivation()(x), rtol=1e-12, atol=1e-12)


def test_reference_has_right_gradients():
    assert torch.autograd.gradcheck(quick_gelu, (random_inputs((3, 5))[0].double().requires_grad_(),))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(1,), (2, 3, 100), (3, 1, 2049)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_reference(shape, dtype, device):
    check_against_float64(*random_inputs(shape, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_reference_on_gpu(dtype, device):
    check_against_float64(*random_inputs((4, 577, 4096), dtype=dtype, device=device))
    check_against_float64(*random_inputs((4, 577, 1001), dtype=dtype, device=device))


def test_strided_inputs(device):
    x, dy = random_inputs((4, 30), device=device)
    actual = run(x.t(), torch.ones((), device=device).expand(30, 4), "triton")
    for value, expected in zip(actual, run(x.t().contiguous(), torch.ones(30, 4, device=device), "torch"), strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter; the sigmoid is then 0
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_large_values(backend, device):
    y = quick_gelu(torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], device=device), backend=backend)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 200.0, 1e4], device=device))


def test_empty_input(device):
    assert quick_gelu(torch.randn(2, 0, device=device)).shape == (2, 0)


def test_operators_follow_the_rules_of_custom_ops(device):
    x, dy = random_inputs((3, 8), device=device)
    torch.library.opcheck(op._quick_gelu, (x.clone().requires_grad_(),))
    torch.library.opcheck(op._quick_gelu_backward, (dy, x))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile(backend, device):
    x, dy = random_inputs((3, 8), device=device)
    compiled = torch.compile(lambda x: quick_gelu(x, backend=backend), fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    for value, expected in zip((y, *torch.autograd.grad(y, leaf, dy)), run(x, dy, backend), strict=True):
        assert relative_error(value, expected) < 1e-6


def test_integers_are_refused():
    with pytest.raises(ValueError, match="x has dtype torch.int64"):
        quick_gelu(torch.ones(2, dtype=torch.int64))
