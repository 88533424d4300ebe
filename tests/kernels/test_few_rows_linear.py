"""A linear layer for a few rows: the Triton form against the plain twin in float64."""

import pytest
import torch

from geobased.kernels.few_rows_linear import few_rows_linear


def inputs(rows: int, n_in: int, n_out: int, *, norm: bool, bias: bool, dtype: torch.dtype, device: str = "cpu") -> dict:
    generator = torch.Generator().manual_seed(rows + n_in)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {"x": draw(rows, n_in).to(dtype), "weight": (draw(n_out, n_in) * n_in**-0.5).to(dtype)}
    if bias:
        tensors["bias"] = draw(n_out).to(dtype)
    if norm:
        tensors |= {"residual": draw(rows, n_in) * 3, "norm_weight": (1 + 0.1 * draw(n_in)).to(dtype)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


CASES = [
    # rows, n_in, n_out, norm, bias, swiglu
    (1, 64, 40, False, False, False),
    (1, 1792, 130, True, True, False),
    (2, 1100, 34, True, False, True),
    (3, 96, 7, False, True, False),
    (4, 200, 12, True, False, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_matches_float64(case, dtype, device):
    rows, n_in, n_out, norm, bias, swiglu = case
    tensors = inputs(rows, n_in, n_out, norm=norm, bias=bias, dtype=dtype, device=device)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected, expected_residual = few_rows_linear(**exact, eps=1e-5, swiglu=swiglu, backend="torch")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    y, residual = few_rows_linear(**tensors, eps=1e-5, swiglu=swiglu, backend="triton")
    assert y.dtype == dtype and y.shape == (rows, n_out // 2 if swiglu else n_out)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds
    assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else 2.5e-2 if device == "cpu" else 1e-2)
    assert (residual is None) == (not norm)
    if norm:
        assert residual.dtype == torch.float32 and relative_error(residual, expected_residual) < 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items()), "an input has changed"


def test_strided_rows(device):
    tensors = inputs(2, 128, 16, norm=False, bias=False, dtype=torch.float32, device=device)
    wide = torch.randn(2, 300, device=device)
    wide[:, :128] = tensors["x"]
    y, _ = few_rows_linear(wide[:, :128], tensors["weight"], backend="triton")
    assert torch.equal(y, few_rows_linear(**tensors, backend="triton")[0])


def test_too_many_rows_take_the_plain_form():
    tensors = inputs(5, 64, 16, norm=False, bias=False, dtype=torch.float32)
    assert few_rows_linear(**tensors)[0].shape == (5, 16)
    with pytest.raises((ValueError, RuntimeError), match="up to 4 rows"):
        few_rows_linear(**tensors, backend="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(16, 63)}, "contiguous"),
        ({"bias": torch.zeros(15)}, "bias has shape"),
        ({"residual": torch.zeros(2, 64)}, "go together"),
        ({"residual": torch.zeros(2, 63), "norm_weight": torch.ones(64)}, "residual has shape"),
        ({"weight": torch.zeros(15, 64), "swiglu": True}, "even"),
        ({"x": torch.zeros(2, 64, dtype=torch.long)}, "floating point"),
    ],
)
def test_bad_inputs_are_named(changes, message):
    arguments = {"x": torch.zeros(2, 64), "weight": torch.zeros(16, 64)} | changes
    with pytest.raises(ValueError, match=message):
        few_rows_linear(**arguments)
