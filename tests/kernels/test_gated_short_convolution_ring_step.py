"""One token of the gated short convolution over a ring: against the op that shifts its state, Triton and plain form."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geobased.kernels import gated_short_convolution_ring_step as op
from geobased.kernels.gated_short_convolution_ring_step import gated_short_convolution_ring_step
from geobased.kernels.gated_short_convolution_step import gated_short_convolution_step

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random_sequence(batch, seq_len, channels, kernel, dtype, device="cpu"):
    """x and gate [batch, seq_len, channels], halves of one tensor; weight."""
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(batch, seq_len, 2 * channels, generator=generator).to(device, dtype).chunk(2, dim=-1)
    return x, gate, torch.randn(channels, kernel, generator=generator).to(device, dtype)


def position_tensor(position, device, dtype=torch.int32):
    return torch.full([1], position, dtype=dtype, device=device)


def check_against_step(x, gate, weight, backend, ring_dtype=None, first=0, position_dtype=torch.int32):
    """Token by token from zeros at position `first`: what the op with a shifted state gives, in y and in the ring."""
    batch, seq_len, channels = x.shape
    kernel = weight.shape[1]
    ring = torch.zeros(batch, kernel, channels, dtype=ring_dtype or x.dtype, device=x.device)
    state = torch.zeros(batch, channels, kernel, dtype=torch.float64, device=x.device)
    for t in range(seq_len):
        position = position_tensor(first + t, x.device, position_dtype)
        y = gated_short_convolution_ring_step(x[:, t], gate[:, t], weight, ring, position, backend=backend)
        expected = gated_short_convolution_step(x[:, t].double(), gate[:, t].double(), weight.double(), state, backend="torch")
        error = ((y.double() - expected).norm() / expected.norm()).item()
        assert error <= TOLERANCE[x.dtype] and y.dtype == x.dtype and y.is_contiguous()
        slots = [(first + t + 1 + tap) % kernel for tap in range(kernel)]  # oldest first
        assert torch.equal(ring[:, slots].transpose(1, 2), state.to(ring.dtype)) and position.item() == first + t


@pytest.mark.parametrize("kernel", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES.values()], ids=str)
def test_reference_equals_the_step(kernel, dtype):
    check_against_step(*random_sequence(2, 2 * kernel + 1, 5, kernel, dtype), "torch")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("kernel", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch, channels", [(1, 1), (1, 40), (3, 301), (18, 130)])
def test_matches_the_step(batch, channels, dtype, kernel, device):
    check_against_step(*random_sequence(batch, kernel + 2, channels, kernel, dtype, device), "triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_ring_may_be_wider_than_x(backend, device):
    check_against_step(*random_sequence(2, 5, 20, 3, torch.float16, device), backend, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("first, dtype", [(7, torch.int32), (2**31 - 4, torch.int32), (2**40, torch.int64)])
def test_any_first_position(first, dtype, backend, device):
    check_against_step(*random_sequence(2, 4, 20, 4, torch.float32, device), backend, first=first, position_dtype=dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_repeated_call_gives_the_same(backend, device):
    x, gate, weight = random_sequence(2, 1, 20, 3, torch.float32, device)
    ring = torch.randn(2, 3, 20, device=device)
    arguments = (x[:, 0], gate[:, 0], weight, ring, position_tensor(4, device))
    first, stored = gated_short_convolution_ring_step(*arguments, backend=backend), ring.clone()
    assert torch.equal(gated_short_convolution_ring_step(*arguments, backend=backend), first) and torch.equal(ring, stored)
    ring[:, 4 % 3] = torch.nan
    assert torch.equal(gated_short_convolution_ring_step(*arguments, backend=backend), first) and torch.equal(ring, stored)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_inputs(backend, device):
    x, gate, weight = random_sequence(20, 5, 20, 3, torch.float32, device)
    check_against_step(x.transpose(0, 2), gate.transpose(0, 2), weight.t().contiguous().t(), backend)


@pytest.mark.parametrize(
    "launch",
    [
        dict(BLOCK_C=32, ROWS=1, num_warps=1),
        dict(BLOCK_C=64, ROWS=2, num_warps=2),
        dict(BLOCK_C=512, ROWS=8, num_warps=8),
    ],
    ids=str,
)
def test_launch_parameters(launch, device, monkeypatch):
    from geobased.kernels import gated_short_convolution_ring_step_triton as kernels

    monkeypatch.setattr(kernels, "LAUNCH", ((2**62, launch),))
    check_against_step(*random_sequence(3, 5, 70, 3, torch.float32, device), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel", [3, 4, 8])
@pytest.mark.parametrize("batch, channels", [(1, 3584), (8, 3584), (128, 3584), (1023, 2048), (30, 2047)])
def test_matches_on_gpu(batch, channels, kernel, dtype, device):
    check_against_step(*random_sequence(batch, kernel + 3, channels, kernel, dtype, device), "triton")


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.gated_short_convolution_ring_step; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_operator_follows_the_rules_of_custom_ops(device):
    x, gate, weight = random_sequence(2, 1, 3, 3, torch.float32, device)
    ring = torch.zeros(2, 3, 3, device=device)
    torch.library.opcheck(op._step, (x[:, 0].contiguous(), gate[:, 0].contiguous(), weight, ring, position_tensor(0, device)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=torch.randn(2, 1, 4)), "x has shape"),
        (dict(gate=torch.randn(2, 3)), "and gate"),
        (dict(weight=torch.randn(4, 1, 3)), "weight has shape"),
        (dict(weight=torch.randn(5, 3)), r"weight has shape \(5, 3\)"),
        (dict(ring=torch.zeros(2, 4, 3)), r"ring has shape \(2, 4, 3\).*= \(2, 3, 4\)"),
        (dict(ring=torch.zeros(2, 4, 3).transpose(1, 2)), "ring has strides"),
        (dict(gate=torch.randn(2, 4).half()), "dtypes torch.float32 and torch.float16"),
        (dict(weight=torch.ones(4, 3, dtype=torch.int64)), "weight has dtype torch.int64"),
        (dict(ring=torch.zeros(2, 3, 4, dtype=torch.int64)), "ring has dtype torch.int64"),
        (dict(position=torch.zeros(2, dtype=torch.int32)), r"position has shape \(2,\)"),
        (dict(position=torch.zeros(1)), "position has dtype torch.float32"),
        (dict(gate=torch.empty(2, 4, device="meta")), "move them to one"),
        (dict(position=torch.empty(1, dtype=torch.int32, device="meta")), "move them to one"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    arguments = dict(x=torch.randn(2, 4), gate=torch.randn(2, 4), weight=torch.randn(4, 3), ring=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=message):
        gated_short_convolution_ring_step(**(arguments | dict(position=position_tensor(0, "cpu")) | changes))


def test_kernels_beyond_the_triton_form(device):
    x, gate, weight = random_sequence(1, 1, 2, 9, torch.float32, device)
    ring = torch.zeros(1, 9, 2, device=device)
    with pytest.raises(ValueError, match="up to 8 taps, not 9"):
        gated_short_convolution_ring_step(x[:, 0], gate[:, 0], weight, ring, position_tensor(0, device), backend="triton")
