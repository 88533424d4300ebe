"""Cross entropy of each token: the plain form against its definition, the Triton form against the plain one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.kernels import cross_entropy as op
from geobased.kernels.cross_entropy import cross_entropy

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(shape, *, dtype=torch.float32, device="cpu"):
    """logits, labels of which some are ignored, and the gradient of the losses."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels.view(-1)[1::3] = -100
    return logits.to(device, dtype), labels.to(device), torch.randn(shape[:-1], generator=generator).to(device)


def run(logits, labels, dlosses, backend) -> dict[str, torch.Tensor]:
    logits = logits.detach().requires_grad_()
    losses = cross_entropy(logits, labels, backend=backend)
    return {"losses": losses, "dlogits": torch.autograd.grad(losses, logits, dlosses)[0]}


def check_against_float64(logits, labels, dlosses) -> None:
    actual = run(logits, labels, dlosses, "triton")
    expected = run(logits.double(), labels, dlosses.double(), "torch")
    assert relative_error(actual["losses"], expected["losses"]) < 1e-5  # whatever the dtype: sums are in float32
    assert relative_error(actual["dlogits"], expected["dlogits"]) <= TOLERANCE[logits.dtype]
    assert actual["losses"].dtype == torch.float32
    assert actual["dlogits"].dtype == logits.dtype
    assert not actual["losses"][labels == -100].any()
    assert not actual["dlogits"][labels == -100].any()


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 9), offset=st.floats(-1e3, 1e3))
def test_reference_is_the_definition(size, offset):
    logits, labels, _ = random_inputs((4, size), dtype=torch.float64)
    logits, labels = logits + offset, labels.clamp_min(0)
    expected = (logits - logits.gather(1, labels[:, None])).exp().sum(-1).log()
    torch.testing.assert_close(cross_entropy(logits, labels), expected, rtol=1e-9, atol=1e-9)


def test_reference_has_right_gradients():
    logits, labels, _ = random_inputs((2, 3, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: cross_entropy(logits, labels), logits.requires_grad_())


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 7), (3, 1000), (2, 2, 5003)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_reference(shape, dtype, device):
    check_against_float64(*random_inputs(shape, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("vocab_size", [50264, 50257, 128256])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_reference_on_gpu(vocab_size, dtype, device):
    check_against_float64(*random_inputs((300, vocab_size), dtype=dtype, device=device))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forbidden_logits(backend, device):
    """A whole first block of -inf, and large numbers after it."""
    logits = torch.full((1, 5000), float("-inf"), device=device)
    logits[0, 4998:] = torch.tensor([300.0, 301.0])
    found = run(logits, torch.tensor([4998], device=device), torch.ones(1, device=device), backend)
    assert found["losses"].item() == pytest.approx(1.3132617, rel=1e-5)
    torch.testing.assert_close(found["dlogits"][0, 4998:].cpu(), torch.tensor([-0.7310586, 0.7310586]), rtol=1e-4, atol=0)
    assert not found["dlogits"][0, :4998].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_another_ignored_label(backend, device):
    logits, labels, _ = random_inputs((6, 10), device=device)
    labels = torch.where(labels == -100, 3, labels)
    losses = cross_entropy(logits, labels, ignore_index=3, backend=backend)
    assert torch.equal(losses == 0, labels == 3)


def test_label_that_is_no_id_shows(device):
    logits, labels, _ = random_inputs((3, 10), device=device)
    labels[0] = 10
    losses = cross_entropy(logits, labels, backend="triton")
    assert losses.isnan().tolist() == [True, False, False]


def test_strided_inputs(device):
    logits, labels, _ = random_inputs((2, 6, 10), device=device)
    ones = torch.ones((), device=device).expand(2, 6)
    actual = run(logits.mT.contiguous().mT, labels.mT.contiguous().mT, ones, "triton")
    for name, expected in run(logits, labels, ones, "torch").items():
        assert relative_error(actual[name], expected) < 1e-5, name


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.cross_entropy; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_empty_inputs(device):
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    assert cross_entropy(torch.randn(0, 5, device=device), labels).shape == (0,)


def test_operators_follow_the_rules_of_custom_ops(device):
    logits, labels, dlosses = random_inputs((3, 8), device=device)
    torch.library.opcheck(op._cross_entropy, (logits.clone().requires_grad_(), labels, -100))
    logsumexp = op._cross_entropy(logits, labels, -100)[1]
    torch.library.opcheck(op._cross_entropy_backward, (dlosses, logits, labels, logsumexp, -100))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile(backend, device):
    logits, labels, dlosses = random_inputs((3, 8), device=device)
    compiled = torch.compile(lambda logits: cross_entropy(logits, labels, backend=backend), fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    losses = compiled(leaf)
    expected = run(logits, labels, dlosses, backend)
    assert relative_error(losses, expected["losses"]) < 1e-6
    assert relative_error(torch.autograd.grad(losses, leaf, dlosses)[0], expected["dlogits"]) < 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(labels=torch.tensor([1])), r"logits have shape \(2, 4\) and labels \(1,\)"),
        (dict(logits=torch.randn(2), labels=torch.tensor(1)), r"give \[..., vocab_size\]"),
        (dict(logits=torch.ones(2, 4, dtype=torch.int64)), "logits have dtype torch.int64"),
        (dict(labels=torch.tensor([1.0, 2.0])), "labels have dtype torch.float32"),
        (dict(labels=torch.empty(2, dtype=torch.int64, device="meta")), "move them to one device"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(dict(logits=torch.randn(2, 4), labels=torch.tensor([1, 2])) | changes))
