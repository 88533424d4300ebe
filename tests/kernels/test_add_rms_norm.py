"""Residual add and RMSNorm: the plain form against its definition, the Triton form against the plain one.

Without a GPU the Triton kernels run in Triton's interpreter. `pytest -m gpu tests/kernels` runs the larger shapes on a GPU.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.kernels import add_rms_norm as op
from geobased.kernels import backend as backend_module
from geobased.kernels.add_rms_norm import add_rms_norm
from geobased.kernels.add_rms_norm_reference import add_rms_norm_reference

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
EPS = 1e-5
# dtypes of x, residual and weight: a float32 model, the residual in float32 or not, autocast
MIXTURES = [
    ("fp32",) * 3,
    ("bf16", "fp32", "bf16"),
    ("bf16",) * 3,
    ("fp16", "fp32", "fp16"),
    ("fp16",) * 3,
    ("bf16", "fp32", "fp32"),
]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(shape, dtypes=("fp32",) * 3, *, device="cpu", with_x=True):
    """x (or None), residual, weight and the gradients of both results."""
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (DTYPES[name] for name in dtypes)

    def draw(size, dtype):
        return torch.randn(size, generator=generator).to(device, dtype)

    first = draw(shape, x)
    return (first if with_x else None, draw(shape, residual), draw(shape[-1:], weight)), (
        draw(shape, weight),
        draw(shape, residual),
    )


def run(inputs, gradients, backend) -> dict[str, torch.Tensor]:
    leaves = {
        name: t.detach().requires_grad_() for name, t in zip(("x", "residual", "weight"), inputs, strict=True) if t is not None
    }
    outputs = add_rms_norm(leaves.get("x"), leaves["residual"], leaves["weight"], EPS, backend=backend)
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return dict(zip(("normed", "new_residual", *(f"d{name}" for name in leaves)), (*outputs, *found), strict=True))


def check_against_float64(inputs, gradients) -> dict[str, torch.Tensor]:
    actual = run(inputs, gradients, "triton")
    doubled = tuple(None if t is None else t.double() for t in inputs)
    expected = run(doubled, tuple(t.double() for t in gradients), "torch")
    same_dtypes = run(inputs, gradients, "torch")
    assert actual.keys() == expected.keys()
    narrow = max((t.dtype for t in inputs if t is not None), key=TOLERANCE.__getitem__)
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert error <= TOLERANCE[narrow], f"{name}: relative error {error:.1e}"
        assert actual[name].dtype == same_dtypes[name].dtype, name
        assert actual[name].shape == same_dtypes[name].shape, name
    return actual


# --- the plain form ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 4), hidden=st.integers(1, 9), scale=st.floats(1e-3, 1e3), eps=st.floats(1e-8, 1.0))
def test_reference_is_the_definition(rows, hidden, scale, eps):
    (x, residual, weight), _ = random_inputs((rows, hidden))
    x, residual, weight = x.double() * scale, residual.double() * scale, weight.double()
    normed, new_residual = add_rms_norm_reference(x, residual, weight, eps)
    torch.testing.assert_close(new_residual, residual + x)
    expected = new_residual / (new_residual.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    torch.testing.assert_close(normed, expected, rtol=1e-10, atol=1e-12)


def test_reference_has_right_gradients():
    (x, residual, weight), _ = random_inputs((3, 5))
    leaves = [t.double().requires_grad_() for t in (x, residual, weight)]
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, EPS), leaves)
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(None, *t, EPS), leaves[1:])


def test_norm_is_taken_of_the_rounded_sum():
    (x, residual, weight), _ = random_inputs((4, 33), ("bf16",) * 3)
    normed, new_residual = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(new_residual, residual + x)
    assert torch.equal(normed, add_rms_norm(None, new_residual, weight, EPS)[0])


# --- the Triton form against the plain one ----------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("with_x", [True, False], ids=["add", "alone"])
@pytest.mark.parametrize("dtypes", MIXTURES, ids="-".join)
def test_matches_reference(dtypes, with_x, device):
    check_against_float64(*random_inputs((2, 3, 100), dtypes, device=device, with_x=with_x))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1, 1), (5, 128), (2, 1, 129)], ids=str)
def test_shapes(shape, device):
    check_against_float64(*random_inputs(shape, ("bf16", "fp32", "bf16"), device=device))


@pytest.mark.usefixtures("poisoned_empty")
def test_more_rows_than_programs(device, monkeypatch):
    from geobased.kernels import add_rms_norm_triton

    monkeypatch.setattr(add_rms_norm_triton, "BACKWARD_PROGRAMS", 3)
    check_against_float64(*random_inputs((11, 20), device=device))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("hidden", [1024, 1792, 2000, 4096, 16384])
@pytest.mark.parametrize("dtypes", MIXTURES, ids="-".join)
def test_matches_reference_on_gpu(dtypes, hidden, device):
    for with_x in (True, False):
        check_against_float64(*random_inputs((2, 1500, hidden), dtypes, device=device, with_x=with_x))


@pytest.mark.parametrize("unused", ["normed", "new_residual"])
@pytest.mark.parametrize("with_x", [True, False], ids=["add", "alone"])
def test_one_result_unused(unused, with_x, device):
    inputs, gradients = random_inputs((4, 20), ("bf16", "fp32", "bf16"), device=device, with_x=with_x)
    kept = 0 if unused == "new_residual" else 1
    results = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in inputs if t is not None]
        outputs = add_rms_norm(leaves[0] if with_x else None, *leaves[-2:], EPS, backend=backend)
        results.append(torch.autograd.grad(outputs[kept], leaves, gradients[kept], allow_unused=True))
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or relative_error(actual, expected) < 8e-3


def test_strided_inputs(device):
    (x, residual, weight), gradients = random_inputs((6, 40), device=device)
    strided = tuple(t.t().contiguous().t() for t in (x, residual))
    expanded = tuple(torch.ones((), device=device).expand(6, 40) for _ in gradients)
    actual = run((*strided, weight), expanded, "triton")
    for name, value in run((x, residual, weight), expanded, "torch").items():
        assert relative_error(actual[name], value) < 1e-5, name


def test_gradients_have_the_same_bits_every_time(device):
    first, second = (run(*random_inputs((50, 24), device=device), "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_in_place(backend, device):
    (x, residual, weight), _ = random_inputs((3, 1, 20), ("bf16", "fp32", "bf16"), device=device)
    expected = add_rms_norm(x, residual, weight, EPS, backend=backend)
    written = residual.clone()
    normed, returned = add_rms_norm(x, written, weight, EPS, inplace=True, backend=backend)
    assert returned is written
    assert torch.equal(written, expected[1])
    assert torch.equal(normed, expected[0])


def test_in_place_is_refused_where_gradients_are_needed():
    (x, residual, weight), _ = random_inputs((3, 20))
    weight.requires_grad_()
    with pytest.raises(ValueError, match="overwrites what the backward pass needs"):
        add_rms_norm(x, residual, weight, EPS, inplace=True)
    with torch.no_grad():
        add_rms_norm(x, residual, weight, EPS, inplace=True)
        with pytest.raises(ValueError, match="needs a contiguous residual"):
            add_rms_norm(x, residual.t().contiguous().t(), weight, EPS, inplace=True)


# --- interface --------------------------------------------------------------------------------------------------------


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.add_rms_norm; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_empty_inputs(device):
    residual = torch.randn(2, 0, 3, device=device)
    normed, new_residual = add_rms_norm(residual, residual, torch.ones(3, device=device), EPS)
    assert normed.shape == new_residual.shape == residual.shape


def test_operators_follow_the_rules_of_custom_ops(device):
    (x, residual, weight), (dnormed, dresidual) = random_inputs((3, 8), ("fp16", "fp32", "fp16"), device=device)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    torch.library.opcheck(op._add_rms_norm, (*leaves, EPS), atol=1e-3, rtol=1e-3)
    torch.library.opcheck(op._rms_norm, (*leaves[1:], EPS), atol=1e-3, rtol=1e-3)
    x, residual, weight = (t.detach() for t in leaves)
    torch.library.opcheck(op._add_rms_norm_, (x, residual, weight, EPS))
    _, new_residual, reciprocal = op._add_rms_norm(x, residual, weight, EPS)
    for gradient in (dresidual, None):
        torch.library.opcheck(op._add_rms_norm_backward, (dnormed, gradient, new_residual, weight, reciprocal, torch.float16))


@pytest.mark.parametrize("with_x", [True, False], ids=["add", "alone"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile(backend, with_x, device):
    inputs, gradients = random_inputs((3, 20), device=device, with_x=with_x)
    compiled = torch.compile(lambda *t: add_rms_norm(*t, EPS, backend=backend), fullgraph=True, backend="aot_eager")
    leaves = [t.detach().clone().requires_grad_() for t in inputs if t is not None]
    outputs = compiled(leaves[0] if with_x else None, *leaves[-2:])
    values = (*outputs, *torch.autograd.grad(outputs, leaves, gradients))
    for value, (name, expected) in zip(values, run(inputs, gradients, backend).items(), strict=True):
        assert relative_error(value, expected) < 1e-6, name


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(weight=torch.randn(5)), r"residual has shape \(2, 4\) and weight \(5,\)"),
        (dict(x=torch.randn(3, 4)), r"x has shape \(3, 4\)"),
        (dict(x=torch.ones(2, 4, dtype=torch.int64)), "x has dtype torch.int64"),
        (dict(x=torch.empty(2, 4, device="meta")), "move them to one device"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    arguments = dict(x=torch.randn(2, 4), residual=torch.randn(2, 4), weight=torch.randn(4), eps=EPS) | changes
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments)


def test_rows_beyond_the_triton_form(monkeypatch, device):
    monkeypatch.setattr(op, "MAX_TRITON_HIDDEN", 8)
    (x, residual, weight), _ = random_inputs((2, 9), device=device)
    with pytest.raises(ValueError, match="rows of up to 8 numbers, not 9"):
        add_rms_norm(x, residual, weight, EPS, backend="triton")
    monkeypatch.setattr(op, "resolve_backend", lambda backend, tensor: "triton")  # as on a GPU
    backend_module._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="rows of up to 8 numbers"):
        add_rms_norm(x, residual, weight, EPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_rms_norm(x, residual, weight, EPS)
