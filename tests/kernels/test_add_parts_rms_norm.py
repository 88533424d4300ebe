"""A linear layer in parts and the norm after it: against layer and norm alone, and the Triton form against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.kernels.add_parts_rms_norm import add_parts_rms_norm, linear_in_parts

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 8e-3}
EPS = 1e-5


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def check(rows, n_in, hidden, parts, dtype, residual_dtype, backend, *, bias=True, device="cpu"):
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, DTYPES[dtype])

    x, weight, norm_weight = draw(rows, n_in), draw(hidden, n_in) / n_in**0.5, draw(hidden)
    offset = draw(hidden) if bias else None
    residual = torch.randn(rows, hidden, generator=generator).to(device, DTYPES[residual_dtype])
    sums = linear_in_parts(x, weight, parts)
    assert sums.shape == (parts, rows, hidden) and sums.dtype == torch.float32
    exact = residual.double() + F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    normed = add_parts_rms_norm(sums, offset, residual, norm_weight, EPS, backend=backend)
    assert normed.dtype == norm_weight.dtype
    assert relative_error(residual, exact) < TOLERANCE[residual_dtype]  # written in place
    assert relative_error(normed, F.rms_norm(exact, (hidden,), norm_weight.double(), EPS)) < TOLERANCE[dtype]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 70), st.sampled_from(["torch", "triton"]), st.booleans())
def test_parts_add_up(rows, parts, hidden, backend, bias):
    check(rows, 32 * parts, hidden, parts, "fp32", "fp32", backend, bias=bias)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "residual_dtype"), [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")])
def test_dtypes(dtype, residual_dtype, backend):
    check(3, 128, 100, 2, dtype, residual_dtype, backend)


def test_one_part_is_the_plain_norm():
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    expected = F.rms_norm(x + residual, (16,), weight, EPS)
    assert torch.allclose(add_parts_rms_norm(x[None], None, residual, weight, EPS), expected, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="parts=3 must divide the number of inputs, 64"):
        linear_in_parts(torch.zeros(2, 64), torch.zeros(8, 64), 3)
    with pytest.raises(ValueError, match=r"give \[rows, n_in\] and \[n_out, n_in\]"):
        linear_in_parts(torch.zeros(2, 64), torch.zeros(8, 32), 2)
    with pytest.raises(ValueError, match=r"give \[any number, rows, hidden\]"):
        add_parts_rms_norm(torch.zeros(2, 3, 8), None, torch.zeros(2, 8), torch.zeros(8), EPS)
    with pytest.raises(ValueError, match="residual is written in place"):
        add_parts_rms_norm(torch.zeros(2, 3, 8), None, torch.zeros(8, 3).T, torch.zeros(8), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n_in", "hidden", "parts"), [(128, 3584, 1792, 2), (7, 2048, 1024, 4), (256, 1792, 1792, 2)])
def test_on_gpu(rows, n_in, hidden, parts, dtype):
    check(rows, n_in, hidden, parts, dtype, "fp32", "triton", device="cuda")
