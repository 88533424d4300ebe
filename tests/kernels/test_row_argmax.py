"""The largest entry of every row: the plain form against PyTorch's, the Triton form against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.kernels.row_argmax import row_argmax

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 400), st.integers(0, 3), st.integers(0, 2**31))
def test_first_of_the_largest(rows, n, levels, seed):
    """Few levels make many ties; some rows hold nothing but -inf, some hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels + 1, (rows, n), generator=generator).float()
    scores[scores == 0] = -torch.inf
    for backend in ("torch", "triton"):
        picked = row_argmax(scores, backend=backend)
        expected = [next(i for i, x in enumerate(row) if x == max(row)) for row in scores.tolist()]
        assert picked.tolist() == expected and picked.dtype == torch.int64


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_counts_as_infinity(backend):
    scores = torch.tensor([[1.0, torch.nan, torch.inf], [1.0, torch.inf, torch.nan], [-torch.inf, -torch.inf, 0.0]])
    assert row_argmax(scores, backend=backend).tolist() == [1, 1, 2]


def test_rows_of_a_wider_tensor():
    logits = torch.randn(3, 100)
    for view in (logits[:, :70], logits.T):
        assert torch.equal(row_argmax(view, backend="triton"), view.argmax(-1))


def test_bad_input():
    with pytest.raises(ValueError, match=r"scores has shape \(3,\): it must be \[rows, n\]"):
        row_argmax(torch.zeros(3))
    with pytest.raises(ValueError, match="n >= 1"):
        row_argmax(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"dtype torch.int64: it must be a floating point dtype"):
        row_argmax(torch.zeros(3, 4, dtype=torch.long))
    assert row_argmax(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 50264), (128, 50257), (2048, 50264), (5, 31), (3, 200_001)], ids=str)
def test_on_gpu(shape, dtype):
    # integers: many ties, also in float32
    scores = torch.randint(-300, 300, (shape[0], shape[1] + 3), device="cuda").to(DTYPES[dtype])[:, : shape[1]]
    expected = row_argmax(scores.cpu(), backend="torch")
    assert torch.equal(row_argmax(scores, backend="triton").cpu(), expected)
