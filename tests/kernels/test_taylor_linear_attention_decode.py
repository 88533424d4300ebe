"""Decoding with a deferred fold: the plain form against the step that updates its state at every token, Triton against it.

Without a GPU the Triton kernels run in Triton's interpreter. `pytest -m gpu tests/kernels` runs the larger shapes on a GPU.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from geobased.kernels import backend as backend_module
from geobased.kernels import taylor_linear_attention_decode as op
from geobased.kernels.taylor_linear_attention_decode import (
    make_deferred_state,
    taylor_linear_attention_deferred_step,
    taylor_linear_attention_fold,
    to_running_state,
)
from geobased.kernels.taylor_linear_attention_reference import (
    packed_feature_count,
    taylor_linear_attention_reference,
    taylor_linear_attention_step_reference,
)

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1e-2}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def random_token(batch, heads, d, dv, dtype, device, generator):
    """q, k, v as strided views of one projection."""
    projected = torch.randn(batch, heads * (2 * d + dv), generator=generator).to(device, dtype)
    q, k, v = projected.split([heads * d, heads * d, heads * dv], dim=-1)
    return q.view(batch, heads, d), k.view(batch, heads, d), v.view(batch, heads, dv)


def prompt_state(batch, heads, d, dv, device="cpu", dtype=torch.float64):
    """The state after some tokens: with arbitrary numbers the denominators could vanish."""
    generator = torch.Generator().manual_seed(7)
    k = torch.randn(batch, 9, heads, d, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, 9, heads, dv, generator=generator, dtype=torch.float64)
    return taylor_linear_attention_reference(k, k, v, output_final_state=True)[1].to(device, dtype)


def decode(batch, heads, d, dv, dtype, state_dtype, *, capacity, tokens, backend, device="cpu", scale=None):
    """-> worst relative error of y, relative error of the state at the end."""
    generator = torch.Generator().manual_seed(0)
    running = prompt_state(batch, heads, d, dv, device)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    state = make_deferred_state(running.to(precise), capacity=capacity, dtype=state_dtype, input_dtype=dtype)
    count, worst = torch.zeros(1, dtype=torch.int32, device=device), 0.0
    for _ in range(tokens):
        q, k, v = random_token(batch, heads, d, dv, dtype, device, generator)
        expected = taylor_linear_attention_step_reference(q.double(), k.double(), v.double(), running, scale=scale)
        y = taylor_linear_attention_deferred_step(q, k, v, state, count, scale=scale, backend=backend)
        assert y.dtype == dtype and y.is_contiguous()
        worst = max(worst, relative_error(y, expected))
        count += 1
        if count.item() == capacity:
            taylor_linear_attention_fold(state, count, scale=scale, backend=backend)
            count.zero_()
    return worst, relative_error(to_running_state(state, count, scale=scale), running)


# --- the plain form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("d, capacity", [(1, 3), (16, 4), (5, 1)])
def test_reference_equals_the_step_that_updates_its_state(d, capacity, dtype, state_dtype):
    error, state_error = decode(2, 3, d, 10, dtype, state_dtype, capacity=capacity, tokens=2 * capacity + 3, backend="torch")
    assert error <= (TOLERANCE[dtype] if state_dtype == torch.float32 else 1e-2)
    assert state_error <= (1e-6 if state_dtype == torch.float32 else 2e-5)


def test_reference_in_float64():
    error, state_error = decode(2, 2, 6, 5, torch.float64, torch.float64, capacity=4, tokens=11, backend="torch", scale=0.7)
    assert error <= 1e-12 and state_error <= 1e-12


def test_a_bfloat16_state_keeps_growing():
    """The sum of 2,000 equal tokens: bfloat16 alone stands still at 256 of them."""
    state = make_deferred_state(torch.zeros(1, 1, 6, 2), capacity=8, dtype=torch.bfloat16)
    state.recent_k.fill_(1.0)
    state.recent_v.fill_(1.0)
    for _ in range(250):
        taylor_linear_attention_fold(state, torch.full([1], 8), backend="torch")
    total = to_running_state(state, 0)
    assert abs(total[0, 0, 0, 0].item() - 2000) < 1 and abs(total[0, 0, 0, 1].item() - 2000) < 1e-3


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_states_go_there_and_back(state_dtype):
    running = prompt_state(2, 3, 4, 5, dtype=torch.float32)
    state = make_deferred_state(running, capacity=4, dtype=state_dtype)
    assert (state.low is None) == (state_dtype == torch.float32)
    back = to_running_state(state, 0)
    assert back.dtype == torch.float32
    assert relative_error(back, running) <= (0 if state_dtype == torch.float32 else 1e-5)


def test_buffers_are_reused():
    first = prompt_state(2, 3, 4, 5, dtype=torch.float32)
    state = make_deferred_state(first, capacity=4)
    pointers = [t.data_ptr() for t in state]
    state.recent_k.fill_(float("nan"))  # left over from another prompt
    again = make_deferred_state(2 * first, out=state)
    assert [t.data_ptr() for t in again] == pointers
    out = torch.full_like(first, float("nan"))
    assert to_running_state(again, torch.zeros(1, dtype=torch.int32), out=out) is out
    assert relative_error(out, 2 * first) <= 1e-5
    with pytest.raises(ValueError, match="make a new one without out"):
        make_deferred_state(first[:1], out=state)
    with pytest.raises(ValueError, match="out has shape"):
        to_running_state(state, 0, out=out[:1])


# --- the Triton form --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "batch, heads, d, dv, dtype, state_dtype, capacity",
    [
        (2, 2, 16, 20, "fp16", "bf16", 3),
        (1, 2, 16, 112, "bf16", "bf16", 2),
        (2, 1, 5, 33, "fp32", "fp32", 3),
        (1, 3, 1, 1, "fp32", "fp32", 4),
        (1, 1, 24, 48, "bf16", "fp32", 1),
        (1, 1, 32, 16, "fp32", "bf16", 2),
        (3, 2, 8, 64, "fp32", "fp32", 1),
    ],
)
def test_matches_reference(batch, heads, d, dv, dtype, state_dtype, capacity, device):
    dtype, state_dtype = DTYPES[dtype], DTYPES[state_dtype]
    tokens = min(2 * capacity + 2, 200 // (batch * heads))
    options = dict(capacity=capacity, tokens=tokens, backend="triton", device=device)
    error, state_error = decode(batch, heads, d, dv, dtype, state_dtype, **options)
    # the interpreter rounds to bfloat16 towards zero
    assert error <= (TOLERANCE[dtype] if state_dtype == torch.float32 else 1e-2)
    assert state_error <= (1e-5 if state_dtype == torch.float32 else 5e-5)


@pytest.mark.parametrize("launch", range(4))
def test_every_launch(launch, device, monkeypatch):
    from geobased.kernels import taylor_linear_attention_decode_triton as kernels

    launches = [options for entry_bytes, _, options in kernels.STEP_LAUNCHES if entry_bytes == 2]
    monkeypatch.setattr(kernels, "STEP_LAUNCHES", ((2, 2**62, launches[launch % len(launches)]),))
    error, _ = decode(1, 1, 16, 40, torch.float16, torch.bfloat16, capacity=2, tokens=3, backend="triton", device=device)
    assert error <= 1e-2


def test_only_the_slot_of_the_token_is_written(device):
    running = prompt_state(2, 2, 4, 6, device, torch.float32)
    state = make_deferred_state(running, capacity=4, dtype=torch.float32)
    for recent in (state.recent_k, state.recent_v):
        recent[:, :, :2].normal_()
        recent[:, :, 2:] = float("nan")  # nobody may read what no token has filled
    before = [t.clone() for t in state if t is not None]
    count = torch.full([1], 2, dtype=torch.int32, device=device)
    q, k, v = random_token(2, 2, 4, 6, torch.float32, device, torch.Generator().manual_seed(3))
    y = taylor_linear_attention_deferred_step(q, k, v, state, count, backend="triton")
    assert y.isfinite().all() and count.item() == 2
    for old, new in zip(before, (t for t in state if t is not None), strict=True):
        if new is state.recent_k or new is state.recent_v:
            assert torch.equal(new[:, :, 2], k if new is state.recent_k else v)
            assert torch.equal(new[:, :, :2], old[:, :, :2]) and new[:, :, 3].isnan().all()
        else:
            assert torch.equal(new, old)


def test_a_full_buffer_is_not_overrun(device):
    state = make_deferred_state(prompt_state(1, 1, 2, 3, device, torch.float32), capacity=2, dtype=torch.float32)
    before = state.recent_v.clone()
    q, k, v = random_token(1, 1, 2, 3, torch.float32, device, torch.Generator().manual_seed(3))
    count = torch.full([1], 2, dtype=torch.int32, device=device)
    assert taylor_linear_attention_deferred_step(q, k, v, state, count, backend="triton").isfinite().all()
    assert torch.equal(state.recent_v, before)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_fold_matches_reference(count, state_dtype, device):
    states = []
    for backend in ("torch", "triton"):
        state = make_deferred_state(
            prompt_state(2, 1, 3, 7, device, torch.float32), capacity=5, dtype=state_dtype, input_dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(3)
        for recent in (state.recent_k, state.recent_v):
            recent.copy_(torch.randn(recent.shape, generator=generator))
            recent[:, :, count:] = float("nan")
        taylor_linear_attention_fold(state, torch.full([1], count, device=device), scale=0.3, backend=backend)
        states.append(to_running_state(state, 0))
    assert relative_error(states[1], states[0]) <= (1e-6 if state_dtype == torch.float32 else 3e-5)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch, d, dv", [(1, 16, 112), (40, 16, 112), (4, 8, 48), (4, 24, 96), (4, 32, 128), (600, 16, 64)])
def test_matches_reference_on_gpu(batch, d, dv, dtype, state_dtype, device):
    options = dict(capacity=32, tokens=40, backend="triton", device=device)
    error, state_error = decode(batch, 16, d, dv, dtype, state_dtype, **options)
    assert error <= (TOLERANCE[dtype] if state_dtype == torch.float32 else 1e-2)
    assert state_error <= (1e-6 if state_dtype == torch.float32 else 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, state_dtype, tolerance", [("bf16", "bf16", 1e-2), ("fp32", "fp32", 1e-5)])
def test_4096_tokens_on_gpu(dtype, state_dtype, tolerance, device):
    torch.manual_seed(1)
    q, k = torch.randn(2, 2, 4096, 4, 16, device=device).to(DTYPES[dtype])
    v = torch.randn(2, 4096, 4, 112, device=device).to(DTYPES[dtype])
    expected = taylor_linear_attention_reference(q.double(), k.double(), v.double())
    empty = torch.zeros(2, 4, 153, 113, device=device)
    state = make_deferred_state(empty, dtype=DTYPES[state_dtype], input_dtype=DTYPES[dtype])
    count, outputs = torch.zeros(1, dtype=torch.int32, device=device), []
    for t in range(4096):
        outputs.append(taylor_linear_attention_deferred_step(q[:, t], k[:, t], v[:, t], state, count))
        count += 1
        if t % 32 == 31:
            taylor_linear_attention_fold(state, count)
            count.zero_()
    y = torch.stack(outputs, dim=1)
    assert relative_error(y, expected) <= tolerance
    assert relative_error(y[:, -256:], expected[:, -256:]) <= tolerance


@pytest.mark.gpu
def test_cuda_graph_on_gpu(device):
    running = prompt_state(2, 4, 16, 112, device)
    state = make_deferred_state(running.float(), input_dtype=torch.bfloat16)
    q, k, v = (t.clone() for t in random_token(2, 4, 16, 112, torch.bfloat16, device, torch.Generator().manual_seed(0)))
    count = torch.zeros(1, dtype=torch.int32, device=device)
    taylor_linear_attention_deferred_step(q, k, v, state, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = taylor_linear_attention_deferred_step(q, k, v, state, count)
        count += 1
    for _ in range(5):
        for t, new in zip((q, k, v), random_token(2, 4, 16, 112, torch.bfloat16, device, torch.Generator()), strict=True):
            t.copy_(new)
        expected = taylor_linear_attention_step_reference(q.double(), k.double(), v.double(), running)
        graph.replay()
        assert relative_error(y, expected) <= 1e-2
    assert count.item() == 5


# --- interface --------------------------------------------------------------------------------------------------------


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.taylor_linear_attention_decode; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels/torch-ext", check=False).returncode == 0


def test_operators_follow_the_rules_of_custom_ops(device):
    state = make_deferred_state(prompt_state(1, 1, 2, 3, device, torch.float32), capacity=2, input_dtype=torch.float32)
    q, k, v = (t.contiguous() for t in random_token(1, 1, 2, 3, torch.float32, device, torch.Generator()))
    count = torch.ones(1, dtype=torch.int32, device=device)
    recent = (state.recent_k, state.recent_v, count)
    torch.library.opcheck(op._step, (q, k, v, state.high, state.norm, *recent, 0.5, 1e-12))
    torch.library.opcheck(op._fold_with_remainder, (state.high, state.low, state.norm, *recent, 0.5))
    torch.library.opcheck(op._fold, (state.high.float(), state.norm, *recent, 0.5))


def test_empty_batch(device):
    state = make_deferred_state(torch.zeros(0, 2, 15, 6, device=device), dtype=torch.float32)
    q, v = torch.randn(0, 2, 4, device=device), torch.randn(0, 2, 5, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    assert taylor_linear_attention_deferred_step(q, q, v, state, count).shape == v.shape
    taylor_linear_attention_fold(state, count)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=torch.randn(2, 4)), "q, k and v have shapes"),
        (dict(v=torch.randn(2, 2, 7)), r"state.high has shape \(2, 2, 15, 5\)"),
        (dict(q=torch.randn(2, 2, 3), k=torch.randn(2, 2, 3)), r"must be \[batch, heads, P, head_dim\] = \(2, 2, 10, 5\)"),
        (dict(v=torch.randn(2, 2, 5).half()), "the waiting tokens torch.float32: cast them"),
        (dict(count=torch.zeros(2, dtype=torch.int32)), r"count has shape \(2,\)"),
        (dict(count=torch.zeros(1)), "dtype torch.float32: it must be one int32 or int64"),
        (dict(count=torch.zeros(1, dtype=torch.int32, device="meta")), "count is on meta"),
        (dict(q=torch.empty(2, 2, 4, device="meta")), "move them to one"),
        (dict(scale=-1.0), "scale=-1.0 must be positive"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_inputs(changes, message):
    state = make_deferred_state(torch.zeros(2, 2, 15, 6), capacity=3, dtype=torch.float32)
    arguments = dict(q=torch.randn(2, 2, 4), k=torch.randn(2, 2, 4), v=torch.randn(2, 2, 5), state=state)
    with pytest.raises(ValueError, match=message):
        taylor_linear_attention_deferred_step(**(arguments | dict(count=torch.zeros(1, dtype=torch.int32)) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(high=torch.zeros(2, 15, 2, 5).transpose(1, 2)), "state.high has strides"),
        (dict(low=torch.zeros(2, 2, 15, 5)), "state.low is there"),
        (dict(high=torch.zeros(2, 2, 15, 5).bfloat16()), "state.low is missing"),
    ],
)
def test_bad_states(changes, message):
    state = make_deferred_state(torch.zeros(2, 2, 15, 6), capacity=3, dtype=torch.float32)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        taylor_linear_attention_fold(state, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    "state, options, message",
    [
        (torch.zeros(2, 15, 6), {}, r"state has shape \(2, 15, 6\)"),
        (torch.zeros(2, 2, 14, 6), {}, "state has 14 rows"),
        (torch.zeros(2, 2, 15, 6).half(), {}, "dtype torch.float16"),
        (torch.zeros(2, 2, 15, 6), dict(capacity=0), "capacity=0"),
        (torch.zeros(2, 2, 15, 6), dict(dtype=torch.float16), "dtype=torch.float16"),
    ],
)
def test_bad_running_states(state, options, message):
    with pytest.raises(ValueError, match=message):
        make_deferred_state(state, **options)


@pytest.mark.parametrize("d, dv, capacity, message", [(33, 4, 2, "to 32"), (2, 129, 2, "to 128"), (2, 4, 129, "128 tokens")])
def test_shapes_beyond_the_triton_form(d, dv, capacity, message, device, monkeypatch):
    state = make_deferred_state(
        torch.zeros(1, 1, packed_feature_count(d), dv + 1, device=device), capacity=capacity, dtype=torch.float32
    )
    q, k, v = random_token(1, 1, d, dv, torch.float32, device, torch.Generator())
    count = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=message):
        taylor_linear_attention_deferred_step(q, k, v, state, count, backend="triton")
    monkeypatch.setattr(op, "resolve_backend", lambda backend, tensor: "triton")  # as on a GPU
    backend_module._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=message):
        y = taylor_linear_attention_deferred_step(q, k, v, state, count)
    torch.testing.assert_close(y, v)  # alone it sees itself
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taylor_linear_attention_fold(state, count)
