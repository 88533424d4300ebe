"""One token of the gated short convolution: against the op for whole sequences, the Triton form against the plain one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geobased.kernels import gated_short_convolution_step as op
from geobased.kernels.gated_short_convolution_reference import gated_short_convolution_reference
from geobased.kernels.gated_short_convolution_step import gated_short_convolution_step

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random_sequence(batch, seq_len, channels, kernel, dtype, device="cpu"):
    """x and gate [batch, seq_len, channels], halves of one tensor; weight."""
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(batch, seq_len, 2 * channels, generator=generator).to(device, dtype).chunk(2, dim=-1)
    return x, gate, torch.randn(channels, kernel, generator=generator).to(device, dtype)


def check_against_sequence(x, gate, weight, backend, state_dtype=None):
    """Token by token from an empty state: what the op for sequences gives, and at the end the last inputs."""
    batch, seq_len, channels = x.shape
    kernel = weight.shape[1]
    state = torch.zeros(batch, channels, kernel, dtype=state_dtype or x.dtype, device=x.device)
    y = torch.stack(
        [gated_short_convolution_step(x[:, t], gate[:, t], weight, state, backend=backend) for t in range(seq_len)], dim=1
    )
    expected = gated_short_convolution_reference(x.double(), gate.double(), weight.double())
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE[x.dtype] and y.dtype == x.dtype
    inputs = torch.cat([x.new_zeros(batch, kernel, channels), x], dim=1)[:, -kernel:].transpose(1, 2)
    assert torch.equal(state, inputs.to(state.dtype))


@pytest.mark.parametrize("kernel", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES.values()], ids=str)
def test_reference_equals_the_op_for_sequences(kernel, dtype):
    check_against_sequence(*random_sequence(2, 7, 5, kernel, dtype), "torch")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "batch, channels, kernel, dtype",
    [(1, 1, 3, "fp32"), (2, 300, 3, "fp16"), (3, 130, 3, "bf16"), (2, 20, 8, "fp32"), (2, 17, 1, "fp32"), (1, 40, 2, "bf16")],
)
def test_matches_the_op_for_sequences(batch, channels, kernel, dtype, device):
    check_against_sequence(*random_sequence(batch, 5, channels, kernel, DTYPES[dtype], device), "triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_state_may_be_wider_than_x(backend, device):
    check_against_sequence(*random_sequence(2, 5, 20, 3, torch.float16, device), backend, torch.float32)


@pytest.mark.parametrize("launch", [1, 2, 8])
def test_number_of_warps(launch, device, monkeypatch):
    from geobased.kernels import gated_short_convolution_step_triton as kernels

    monkeypatch.setattr(kernels, "LAUNCH", dict(num_warps=launch))
    check_against_sequence(*random_sequence(2, 5, 70, 3, torch.float32, device), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch, channels", [(1, 3584), (128, 3584), (1024, 2048)])
def test_matches_on_gpu(batch, channels, dtype, device):
    check_against_sequence(*random_sequence(batch, 6, channels, 3, dtype, device), "triton")


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.gated_short_convolution_step; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_operator_follows_the_rules_of_custom_ops(device):
    x, gate, weight = random_sequence(2, 1, 3, 3, torch.float32, device)
    arguments = (x[:, 0].contiguous(), gate[:, 0].contiguous(), weight, torch.zeros(2, 3, 3, device=device))
    torch.library.opcheck(op._step, arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=torch.randn(2, 1, 4)), "x has shape"),
        (dict(gate=torch.randn(2, 3)), "and gate"),
        (dict(weight=torch.randn(4, 1, 3)), "weight has shape"),
        (dict(weight=torch.randn(5, 3)), r"weight has shape \(5, 3\)"),
        (dict(state=torch.zeros(2, 4, 2)), r"state has shape \(2, 4, 2\)"),
        (dict(state=torch.zeros(2, 3, 4).transpose(1, 2)), "state has strides"),
        (dict(gate=torch.randn(2, 4).half()), "dtypes torch.float32 and torch.float16"),
        (dict(weight=torch.ones(4, 3, dtype=torch.int64)), "weight has dtype torch.int64"),
        (dict(gate=torch.empty(2, 4, device="meta")), "move them to one"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    arguments = dict(x=torch.randn(2, 4), gate=torch.randn(2, 4), weight=torch.randn(4, 3), state=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=message):
        gated_short_convolution_step(**(arguments | changes))


def test_kernels_beyond_the_triton_form(device):
    x, gate, weight = random_sequence(1, 1, 2, 9, torch.float32, device)
    with pytest.raises(ValueError, match="up to 8 taps, not 9"):
        gated_short_convolution_step(x[:, 0], gate[:, 0], weight, torch.zeros(1, 2, 9, device=device), backend="triton")
