"""One token over a ring buffer: the plain form against attention over the whole sequence, the Triton form against the plain one.

Without a GPU the Triton kernel runs in Triton's interpreter. `pytest -m gpu tests/kernels` runs the larger shapes on a GPU.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geobased.kernels import sliding_window_attention_step as op
from geobased.kernels.sliding_window_attention_reference import sliding_window_attention_reference
from geobased.kernels.sliding_window_attention_step import sliding_window_attention_step
from geobased.kernels.sliding_window_attention_step_reference import rotate

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def random_sequence(batch, seq_len, heads, head_dim, dtype, device, seed=0):
    """q, k, v [batch, seq_len, heads, head_dim], views of one projection; cos, sin [seq_len, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(batch, seq_len, 3 * heads * head_dim, generator=generator).to(device, dtype)
    q, k, v = (x.view(batch, seq_len, heads, head_dim) for x in projected.chunk(3, dim=-1))
    angles = 6 * torch.rand(seq_len, head_dim, generator=generator)
    return q, k, v, angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def new_rings(batch, heads, window, head_dim, dtype, device):
    """Slots that no token has filled hold NaN: nobody may read them."""
    return [torch.full((batch, heads, window, head_dim), float("nan"), device=device, dtype=dtype) for _ in range(2)]


def decode(sequence, window, *, rotary=True, backend="torch", **options):
    """-> y [batch, seq_len, heads, head_dim], token by token, and the rings."""
    q, k, v, cos, sin = sequence
    batch, seq_len, heads, head_dim = q.shape
    rings = new_rings(batch, heads, window, head_dim, q.dtype, q.device)
    outputs = []
    for t in range(seq_len):
        if rotary:
            options.update(cos=cos[t : t + 1], sin=sin[t : t + 1])
        position = torch.full([1], t, dtype=torch.int32, device=q.device)
        tokens = (x[:, t] for x in (q, k, v))
        outputs.append(sliding_window_attention_step(*tokens, *rings, position, backend=backend, **options))
        assert outputs[-1].is_contiguous() and outputs[-1].dtype == q.dtype and position.item() == t
    return torch.stack(outputs, dim=1), rings


def rotated(sequence):
    q, k, v, cos, sin = sequence
    q, k = (torch.stack([rotate(x[:, t], cos[t : t + 1], sin[t : t + 1]) for t in range(x.shape[1])], 1) for x in (q, k))
    return q, k, v


# --- the plain form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5, 30])
@pytest.mark.parametrize("rotary", [False, True])
def test_reference_equals_attention_over_the_sequence(window, rotary):
    sequence = random_sequence(2, 13, 3, 6, torch.float64, "cpu")
    y, _ = decode(sequence, window, rotary=rotary)
    q, k, v = rotated(sequence) if rotary else sequence[:3]
    assert relative_error(y, sliding_window_attention_reference(q, k, v, window=window)) <= 1e-12


def test_reference_skips_left_padding():
    sequence, window, padding = random_sequence(3, 13, 2, 4, torch.float64, "cpu"), 5, [0, 3, 13]
    y, _ = decode(sequence, window, first_valid=torch.tensor(padding, dtype=torch.int32))
    mask = torch.arange(13) >= torch.tensor(padding)[:, None]
    expected = sliding_window_attention_reference(*rotated(sequence), window=window, attention_mask=mask)
    for row, first in enumerate(padding):
        assert relative_error(y[row, first:], expected[row, first:]) <= 1e-12
        assert not y[row, :first].any()  # padding sees nothing


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rotary_embedding_is_that_of_whole_sequences(dtype):
    from geobased.kernels.rotary_embedding_reference import rotary_embedding_reference

    q, k, _, cos, sin = random_sequence(2, 5, 3, 8, dtype, "cpu")
    for x, expected in zip((q, k), rotary_embedding_reference(q, k, cos[None], sin[None]), strict=True):
        for t in range(5):
            assert torch.equal(rotate(x[:, t], cos[t : t + 1], sin[t : t + 1]), expected[:, t])


# --- the Triton form --------------------------------------------------------------------------------------------------


def check_against_reference(sequence, window, tolerance, **options):
    expected, expected_rings = decode(sequence, window, **options)
    y, rings = decode(sequence, window, backend="triton", **options)
    assert relative_error(y, expected) <= tolerance
    for ring, expected_ring in zip(rings, expected_rings, strict=True):
        assert torch.equal(ring.isnan(), expected_ring.isnan())
        assert relative_error(ring.nan_to_num(), expected_ring.nan_to_num()) <= tolerance


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "batch, heads, head_dim, window, tokens, dtype",
    [
        (1, 2, 6, 1, 3, "fp32"),
        (2, 1, 16, 2, 6, "fp16"),
        (2, 2, 20, 5, 13, "fp32"),
        (1, 1, 112, 17, 20, "bf16"),
        (1, 1, 64, 40, 44, "fp16"),
        (70, 2, 8, 3, 2, "fp32"),
    ],
)
def test_matches_reference(batch, heads, head_dim, window, tokens, dtype, device):
    sequence = random_sequence(batch, tokens, heads, head_dim, DTYPES[dtype], device)
    # the interpreter rounds to bfloat16 towards zero
    check_against_reference(sequence, window, TOLERANCE[DTYPES[dtype]])


@pytest.mark.usefixtures("poisoned_empty")
def test_options(device):
    sequence = random_sequence(3, 9, 1, 6, torch.float32, device)
    first_valid = torch.tensor([0, 4, 9], device=device)
    check_against_reference(sequence, 4, 1e-5, first_valid=first_valid, softmax_scale=0.3)
    check_against_reference(sequence, 4, 1e-5, rotary=False)


def test_every_launch(device, monkeypatch):
    from geobased.kernels import sliding_window_attention_step_triton as kernels

    sequence = random_sequence(1, 12, 1, 10, torch.float32, device)
    for options in [options for _, options in kernels.LAUNCHES] + [
        dict(BLOCK_W=4, PREFETCH=p, num_warps=1) for p in (False, True)
    ]:
        monkeypatch.setattr(kernels, "LAUNCHES", ((2**62, options),))
        check_against_reference(sequence, 10, 1e-5)


def test_each_sequence_may_have_its_own_rotary_embedding(device):
    q, k, v, cos, sin = (x.to(device) for x in random_sequence(4, 4, 2, 6, torch.float32, "cpu"))
    results = []
    for backend in ("torch", "triton"):
        rings = [x.transpose(1, 2).contiguous() for x in (k, v)]
        position = torch.full([1], 9, device=device)
        results.append(
            sliding_window_attention_step(q[:, 0], k[:, 0], v[:, 0], *rings, position, cos=cos, sin=sin, backend=backend)
        )
    assert relative_error(results[1], results[0]) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch, head_dim, window", [(1, 112, 129), (8, 64, 65), (40, 112, 129), (3, 128, 300), (2, 256, 20)])
def test_matches_reference_on_gpu(batch, head_dim, window, dtype, device):
    sequence = random_sequence(batch, window + 20, 16, head_dim, dtype, device)
    first_valid = torch.arange(batch, dtype=torch.int32, device=device) % 5
    check_against_reference(sequence, window, {torch.bfloat16: 8e-3}.get(dtype, TOLERANCE[dtype]), first_valid=first_valid)


# --- interface --------------------------------------------------------------------------------------------------------


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.sliding_window_attention_step; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_operator_follows_the_rules_of_custom_ops(device):
    q, k, v, cos, sin = random_sequence(1, 1, 1, 4, torch.float32, device)
    rings = [torch.zeros(1, 1, 3, 4, device=device) for _ in range(2)]
    position = torch.zeros(1, dtype=torch.int32, device=device)
    tokens = [x[:, 0].contiguous() for x in (q, k, v)]
    torch.library.opcheck(op._step, (*tokens, *rings, position, cos, sin, None, 0.5))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=torch.randn(2, 6)), "q, k and v have shapes"),
        (dict(k=torch.randn(2, 1, 6)), "q, k and v have shapes"),
        (dict(ring_v=torch.randn(2, 3, 4, 6)), "ring_v has shape"),
        (dict(ring_k=torch.randn(2, 3, 5, 4)), "ring_k has shape"),
        (dict(ring_k=torch.randn(2, 5, 3, 6).transpose(1, 2)), "ring_k has strides"),
        (dict(ring_k=torch.randn(2, 3, 5, 6).half()), "cast them to one floating point dtype"),
        (dict(position=torch.zeros(2, dtype=torch.int32)), r"position has shape \(2,\)"),
        (dict(position=torch.zeros(1)), "position has dtype torch.float32"),
        (dict(first_valid=torch.zeros(3, dtype=torch.int32)), r"must be \[batch\] = \[2\]"),
        (dict(first_valid=torch.zeros(2)), "first_valid has dtype torch.float32"),
        (dict(cos=torch.randn(1, 6)), "sin is missing"),
        (dict(cos=torch.randn(3, 6), sin=torch.randn(3, 6)), "cos and sin have shapes"),
        (dict(cos=torch.randn(1, 6), sin=torch.randn(1, 6).half()), "one dtype"),
        (dict(v=torch.empty(2, 3, 6, device="meta")), "move them to one device"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    arguments = {name: torch.randn(2, 3, 6) for name in ("q", "k", "v")}
    arguments |= {name: torch.randn(2, 3, 5, 6) for name in ("ring_k", "ring_v")}
    with pytest.raises(ValueError, match=message):
        sliding_window_attention_step(**(arguments | dict(position=torch.zeros(1, dtype=torch.int32)) | changes))


@pytest.mark.parametrize("head_dim, window, message", [(257, 2, "head_dim up to 256"), (2, 4097, "windows up to 4096")])
def test_shapes_beyond_the_triton_form(head_dim, window, message, device):
    tokens = torch.randn(3, 1, 1, head_dim, device=device)
    rings = torch.zeros(2, 1, 1, window, head_dim, device=device)
    position = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=message):
        sliding_window_attention_step(*tokens, *rings, position, backend="triton")
    torch.testing.assert_close(sliding_window_attention_step(*tokens, *rings, position, backend="torch"), tokens[2])
