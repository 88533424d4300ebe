"""Taylor linear attention: the plain form against the official implementation's numbers, the Triton form against the plain one.

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

from geobased.kernels import taylor_linear_attention as op
from geobased.kernels import taylor_linear_attention_launch as launch
from geobased.kernels.taylor_linear_attention import taylor_linear_attention, taylor_linear_attention_step
from geobased.kernels.taylor_linear_attention_reference import (
    packed_feature_count,
    taylor_feature_map,
    taylor_linear_attention_reference,
    unpack_state,
)
from geobased.kernels.taylor_linear_attention_states_triton import make_chunks

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 9e-3}
FIXTURE_CASES = ("B1H1T1d16dv64", "B2H3T7d16dv16", "B2H2T65d16dv64")


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape, name
    error = ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"  # NaN fails too


def random_inputs(batch, seq_len, heads, d, dv, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, seq_len, heads, width) for width in (d, d, dv)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def random_state(sequences, heads, d, dv, device="cpu", seed=1):
    """The state after some tokens: with arbitrary numbers the denominators could vanish."""
    _, k, v = random_inputs(sequences, 30, heads, d, dv, seed=seed)
    return taylor_linear_attention_reference(k, k, v, output_final_state=True)[1].to(device)


def run(inputs, dy, dfinal, backend, dtype, state_dtype, *, initial_state=None, **options) -> dict[str, torch.Tensor]:
    """Values and gradients by name; the loss touches y, and the final state where `dfinal` is given."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    if initial_state is not None:
        initial_state = initial_state.detach().to(state_dtype).requires_grad_()
    y, final = taylor_linear_attention(*leaves, initial_state=initial_state, output_final_state=True, backend=backend, **options)
    loss = (y * dy.to(dtype)).sum()
    if dfinal is not None:
        loss = loss + (final * dfinal.to(state_dtype)).sum()
    names = ["dq", "dk", "dv"]
    if initial_state is not None:
        leaves.append(initial_state)
        names.append("d_initial_state")
    gradients = torch.autograd.grad(loss, leaves)
    return {"y": y, "final_state": final, **dict(zip(names, gradients, strict=True))}


def check_against_float64(case: str, device: str) -> None:
    """case like B2-T65-H3-d16-dv112-fp32[-mask][-states][-varlen]."""
    parts = case.split("-")
    batch, seq_len, heads, d, dv = (int(part.lstrip("BTHdv")) for part in parts[:5])
    dtype = DTYPES[parts[5]]
    inputs = random_inputs(batch, seq_len, heads, d, dv, dtype, device)
    dy = random_inputs(batch, seq_len, heads, d, dv, dtype, device, seed=2)[2]
    options, sequences = {}, batch
    if "mask" in parts:
        mask = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
        mask[0, : seq_len // 3] = False
        mask[-1, seq_len // 2] = False
        options["attention_mask"] = mask
    if "varlen" in parts:
        bounds = sorted({0, seq_len // 7, seq_len // 7 + 1, seq_len // 2, seq_len})
        options["cu_seqlens"] = torch.tensor([*bounds, seq_len], dtype=torch.int32, device=device)  # the last one is empty
        sequences = len(bounds)
    dfinal = None
    if "states" in parts:
        options["initial_state"] = random_state(sequences, heads, d, dv, device)
        dfinal = 0.1 * random_state(sequences, heads, d, dv, device, seed=3)
    expected = run(inputs, dy, dfinal, "torch", torch.float64, torch.float64, **options)
    actual = run(inputs, dy, dfinal, "triton", dtype, torch.float32, **options)
    assert actual["y"].dtype == dtype and actual["final_state"].dtype == torch.float32
    for name in expected:
        if seq_len == 1 and "states" not in parts and name in ("dq", "dk"):
            continue  # y = v: these gradients are zero
        assert_close(name, actual[name], expected[name], TOLERANCE[dtype])


# --- the plain form ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(reference_tensors):
    return reference_tensors("based/modules_fp64")


@pytest.mark.parametrize("case", FIXTURE_CASES)
def test_reference_matches_official(official, case):
    def get(name):
        return official[f"linattn.{case}.{name}"]

    q, k, v = (get(name).transpose(1, 2).requires_grad_() for name in "qkv")
    y, state = taylor_linear_attention(q, k, v, output_final_state=True)
    gradients = torch.autograd.grad(y, (q, k, v), get("do").transpose(1, 2))
    unpacked = unpack_state(state, q.shape[-1])
    assert_close("y", y.transpose(1, 2), get("y"), 1e-12)
    assert_close("kv_state", unpacked[..., :-1].transpose(-1, -2).unsqueeze(2), get("kv_state"), 1e-12)
    assert_close("k_state", unpacked[..., -1].unsqueeze(2).unsqueeze(2), get("k_state"), 1e-12)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        # with one token y = v, and dq, dk are rounding errors around zero
        if q.shape[1] > 1 or name == "dv":
            assert_close(name, gradient.transpose(1, 2), get(name), 1e-12)


@pytest.mark.parametrize("d", [8, 16])
def test_feature_map_matches_official(official, d):
    x, phi = official[f"taylor.d{d}.x"], official[f"taylor.d{d}.phi"]
    assert_close("phi", taylor_feature_map(x, packed=False), phi, 1e-12)
    packed = taylor_feature_map(x)
    assert packed.shape[-1] == packed_feature_count(d)
    assert_close("phi.phi", packed @ packed.transpose(-1, -2), phi @ phi.transpose(-1, -2), 1e-12)


shapes = st.tuples(st.integers(1, 2), st.integers(2, 40), st.integers(1, 2), st.integers(1, 6), st.integers(1, 5))
properties = settings(max_examples=20, deadline=None)


@properties
@given(shapes, st.integers(0, 2**16), st.floats(-3, 3))
def test_reference_is_linear_in_v(shape, seed, factor):
    q, k, v = random_inputs(*shape, dtype=torch.float64, seed=seed)
    w = random_inputs(*shape, dtype=torch.float64, seed=seed + 1)[2]
    y = taylor_linear_attention_reference(q, k, v + factor * w, chunk_size=16)
    parts = [taylor_linear_attention_reference(q, k, x, chunk_size=16) for x in (v, w)]
    torch.testing.assert_close(y, parts[0] + factor * parts[1])


@properties
@given(shapes, st.integers(0, 2**16), st.data())
def test_reference_is_causal(shape, seed, data):
    inputs = random_inputs(*shape, dtype=torch.float64, seed=seed)
    cut = data.draw(st.integers(1, shape[1] - 1))
    changed = [torch.cat([x[:, :cut], x[:, cut:] + 1], dim=1) for x in inputs]
    y, y_changed = (taylor_linear_attention_reference(*x, chunk_size=16) for x in (inputs, changed))
    torch.testing.assert_close(y[:, :cut], y_changed[:, :cut], rtol=0, atol=0)


@properties
@given(shapes, st.integers(0, 2**16), st.integers(1, 20))
def test_reference_ignores_left_padding(shape, seed, padding):
    inputs = random_inputs(*shape, dtype=torch.float64, seed=seed)
    padded = [torch.cat([torch.full_like(x[:, :1], 7.0).repeat(1, padding, 1, 1), x], dim=1) for x in inputs]
    mask = torch.arange(padding + shape[1]).expand(shape[0], -1) >= padding
    expected = taylor_linear_attention_reference(*inputs, output_final_state=True, chunk_size=16)
    actual = taylor_linear_attention_reference(*padded, attention_mask=mask, output_final_state=True, chunk_size=16)
    torch.testing.assert_close(actual[0][:, padding:], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


# --- the Triton form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        "B1-T1-H1-d8-dv1-fp32",
        "B2-T65-H3-d16-dv112-fp32",
        "B2-T63-H2-d12-dv24-fp16-mask",
        "B2-T40-H1-d32-dv128-bf16-states",
        "B1-T300-H2-d16-dv16-fp32-mask-states",
        "B1-T300-H1-d16-dv64-bf16",
        "B1-T513-H1-d8-dv16-fp32-states",
        "B1-T513-H1-d24-dv16-fp16-mask",
        "B1-T600-H1-d8-dv16-fp32-varlen-states",
        "B1-T600-H1-d8-dv16-bf16-varlen-mask",
    ],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_triton_matches_reference(case, device):
    check_against_float64(case, device)


@pytest.mark.parametrize("case", ["B2-T600-H1-d8-dv16-fp32-states", "B2-T513-H1-d16-dv16-bf16-mask"])
@pytest.mark.usefixtures("poisoned_empty")
def test_one_program_walks_a_whole_sequence(case, device, monkeypatch):
    """Where there are many sequences the running sums need no scan; the small cases above have too few."""
    monkeypatch.setattr(launch, "WALK_PROGRAMS", 1)
    check_against_float64(case, device)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=5), st.sampled_from([64, 256]))
def test_chunks_of_packed_sequences(lengths, size):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = lengths + [1] * 300 if sum(lengths) % 3 == 0 else lengths  # more sequences than one block of the kernel
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device)
    if bounds[-1] == 0:
        return
    chunks = make_chunks(1, int(bounds[-1]), bounds, size, bounds.device)
    expected, first = [], [0]
    for start, end in zip(bounds.tolist()[:-1], bounds.tolist()[1:], strict=True):
        starts = range(start, end, size)
        expected += [[x, min(x + size, end), n, len(starts) - 1 - n] for n, x in enumerate(starts)]
        first.append(len(expected))
    expected += [[0, 0, 0, 0]] * (chunks.count - len(expected))
    assert chunks.table.tolist() == expected
    assert chunks.first.tolist() == first


@pytest.mark.parametrize("bounds", [[0, 40, 30, 70], [0, 30], [1, 70]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a failed assertion on the device ends the process")
def test_wrong_bounds_are_found_without_reading_them(bounds):
    with pytest.raises(RuntimeError, match="rise from 0 to the number of tokens, 70"):
        make_chunks(1, 70, torch.tensor(bounds), 64, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        "B4-T1024-H16-d16-dv64",
        "B2-T2048-H16-d16-dv112",
        "B1-T4096-H16-d16-dv112",
        "B2-T513-H16-d8-dv16",
        "B2-T1000-H4-d12-dv80",
        "B1-T777-H16-d24-dv128",
        "B2-T300-H16-d32-dv128",
        "B1-T4096-H4-d32-dv64",
        "B3-T63-H5-d9-dv7",
        "B8-T1-H16-d16-dv64",
    ],
)
@pytest.mark.parametrize("features", ["", "-mask", "-states", "-mask-states"])
@pytest.mark.usefixtures("poisoned_empty")
def test_triton_matches_reference_on_gpu(shape, dtype, features, device):
    check_against_float64(f"{shape}-{dtype}{features}", device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["B1-T4096-H16-d16-dv112", "B1-T3001-H4-d32-dv128", "B1-T50-H16-d16-dv64"])
@pytest.mark.parametrize("features", ["", "-mask", "-states"])
@pytest.mark.usefixtures("poisoned_empty")
def test_triton_matches_reference_on_gpu_packed_sequences(shape, dtype, features, device):
    check_against_float64(f"{shape}-{dtype}-varlen{features}", device)


@pytest.mark.gpu
def test_bfloat16_forward_is_as_precise_as_plain_bfloat16():
    q, k, v = random_inputs(1, 2048, 16, 16, 112, torch.bfloat16, "cuda")
    expected = taylor_linear_attention_reference(*(x.double() for x in (q, k, v)))
    s = 0.25 * torch.einsum("bthd,bshd->bhts", q, k)
    a = (1 + s + 0.5 * s * s).tril()
    plain = torch.einsum("bhts,bshd->bthd", a, v) / a.sum(-1).transpose(1, 2).unsqueeze(-1)
    errors = [((y.double() - expected).norm() / expected.norm()).item() for y in (taylor_linear_attention(q, k, v), plain)]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.gpu
def test_long_offsets():
    """More than 2^31 elements: 32-bit offsets would wrap."""
    q, k, v = (torch.randn(1, 70_000 + 2**17, 128, width, device="cuda", dtype=torch.bfloat16) for width in (16, 16, 112))
    assert v.numel() > 2**31
    y, final = taylor_linear_attention(q, k, v, output_final_state=True)
    alone = [x[:, :, -1:].contiguous() for x in (q, k, v)]
    y_alone, final_alone = taylor_linear_attention(*alone, output_final_state=True)
    assert_close("y", y[:, :, -1:], y_alone, 1e-6)
    assert_close("final_state", final[:, -1:], final_alone, 1e-6)


def test_packed_sequences_match_separate_ones(device):
    q, k, v = random_inputs(1, 330, 1, 8, 16, device=device)
    y, state = taylor_linear_attention(
        q, k, v, cu_seqlens=torch.tensor([0, 30, 330], device=device), output_final_state=True, backend="triton"
    )
    for n, piece in enumerate((slice(0, 30), slice(30, 330))):
        y_piece, state_piece = taylor_linear_attention(
            q[:, piece], k[:, piece], v[:, piece], output_final_state=True, backend="triton"
        )
        assert_close("y", y[:, piece], y_piece, 1e-6)
        assert_close("state", state[n : n + 1], state_piece, 1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_carried_state_continues_the_sequence(backend, device):
    q, k, v = random_inputs(2, 100, 2, 12, 20, device=device)
    whole, state_whole = taylor_linear_attention(q, k, v, output_final_state=True, backend=backend)
    state, pieces = None, []
    for piece in (slice(0, 37), slice(37, 100)):
        y, state = taylor_linear_attention(
            q[:, piece], k[:, piece], v[:, piece], initial_state=state, output_final_state=True, backend=backend
        )
        pieces.append(y)
    assert_close("y", torch.cat(pieces, dim=1), whole, 1e-6)
    assert_close("final_state", state, state_whole, 1e-6)


def test_strided_and_scaled_inputs(device):
    """Slices of one fused projection, an expanded gradient, a scale of our own."""
    fused = torch.randn(2, 70, 3, 16 + 16 + 24, generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for backend in ("torch", "triton"):
        leaf = fused.clone().requires_grad_()
        y = taylor_linear_attention(*leaf.split([16, 16, 24], dim=-1), scale=0.4, backend=backend)
        y.mean().backward()
        results.append((y, leaf.grad))
    assert_close("y", results[1][0], results[0][0], 1e-5)
    assert_close("gradient", results[1][1], results[0][1], 1e-5)


def test_padding_may_hold_anything(device):
    q, k, v = random_inputs(1, 40, 1, 8, 16, device=device)
    mask = torch.arange(40, device=device)[None] >= 9
    expected = taylor_linear_attention(q, k, v, attention_mask=mask, backend="triton")
    k[:, :9], v[:, :9] = float("nan"), float("inf")
    y = taylor_linear_attention(q, k, v, attention_mask=mask.int(), backend="triton")
    assert torch.equal(y, expected)
    assert not y[:, :9].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss_on_the_final_state_alone(backend, device):
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 20, 1, 8, 16, device=device))
    _, state = taylor_linear_attention(q, k, v, output_final_state=True, backend=backend)
    dq, dk, dv = torch.autograd.grad(state.square().sum(), (q, k, v), allow_unused=True)
    assert dq is None or not dq.any()
    assert dk.any() and dv.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("seq_len", [0, 1])
def test_short_sequences(seq_len, backend, device):
    q, k, v = random_inputs(2, seq_len, 2, 8, 16, device=device)
    y, state = taylor_linear_attention(q, k, v, output_final_state=True, backend=backend)
    assert_close("y", y, v, 1e-6)
    assert state.shape == (2, 2, 45, 17)
    assert bool(state.any()) == (seq_len > 0)


# --- one token --------------------------------------------------------------------------------------------------------


def check_step(batch, seq_len, heads, d, dv, dtype, device, backend):
    q, k, v = random_inputs(batch, seq_len, heads, d, dv, dtype, device)
    expected, expected_state = taylor_linear_attention_reference(*(x.double() for x in (q, k, v)), output_final_state=True)
    state = torch.zeros(batch, heads, packed_feature_count(d), dv + 1, device=device)
    steps = [taylor_linear_attention_step(q[:, t], k[:, t], v[:, t], state, backend=backend) for t in range(seq_len)]
    assert steps[0].dtype == dtype
    assert_close("y", torch.stack(steps, dim=1), expected, TOLERANCE[dtype])
    assert_close("state", state, expected_state, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 5, 3, 16, 112), "fp32"), ((1, 3, 2, 24, 128), "fp16"), ((1, 4, 1, 12, 1), "bf16"), ((1, 150, 1, 8, 16), "fp32")],
    ids=["B2-T5-H3-d16-dv112-fp32", "B1-T3-H2-d24-dv128-fp16", "B1-T4-H1-d12-dv1-bf16", "B1-T150-H1-d8-dv16-fp32"],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_steps_match_parallel(shape, dtype, backend, device):
    check_step(*shape, DTYPES[dtype], device, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4096, 16, 16, 112), (3, 300, 4, 32, 128), (5, 300, 16, 12, 80)])
def test_steps_match_parallel_on_gpu(shape, dtype, device):
    check_step(*shape, DTYPES[dtype], device, "triton")


def test_step_takes_a_slice_of_a_larger_state(device):
    q, k, v = (x[:, 0] for x in random_inputs(2, 1, 2, 8, 16, device=device))
    store = torch.zeros(2, 5, 2, 45, 17, device=device)
    taylor_linear_attention_step(q, k, v, store[:, 3], backend="triton")
    expected = torch.zeros(2, 2, 45, 17, device=device)
    taylor_linear_attention_step(q, k, v, expected, backend="torch")
    assert_close("state", store[:, 3], expected, 1e-6)
    assert not store[:, [0, 1, 2, 4]].any()


# --- interface --------------------------------------------------------------------------------------------------------


def test_importing_does_not_import_triton():
    code = "import sys, geobased_kernels.taylor_linear_attention; sys.exit('triton' in sys.modules)"
    environment = {"PYTHONPATH": str(ROOT / "kernels/torch-ext")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 4, 2, 9)}, r"\(1, 4, 2, 9\)"),
        ({"v": torch.zeros(1, 5, 2, 16)}, r"\(1, 5, 2, 16\)"),
        ({"v": torch.zeros(1, 4, 2, 16, dtype=torch.float16)}, "float16"),
        ({"v": torch.zeros(1, 4, 2, 16, device="meta")}, "meta"),
        ({"scale": -0.5}, "scale=-0.5"),
        ({"attention_mask": torch.ones(1, 5)}, r"\(1, 5\)"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"\[0, 3\]"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "float32"),
        ({"initial_state": torch.zeros(1, 2, 45, 16)}, r"\(1, 2, 45, 16\)"),
        ({"initial_state": torch.zeros(1, 2, 45, 17, dtype=torch.bfloat16)}, "bfloat16"),
        ({"cu_seqlens": torch.tensor([0, 2, 4]), "initial_state": torch.zeros(1, 2, 45, 17)}, r"\(2, 2, 45, 17\)"),
        ({"backend": "cuda"}, "cuda"),
    ],
)
def test_bad_inputs(change, message):
    q, k, v = random_inputs(1, 4, 2, 8, 16)
    with pytest.raises(ValueError, match=message):
        taylor_linear_attention(**({"q": q, "k": k, "v": v} | change))


def test_cu_seqlens_needs_batch_one():
    with pytest.raises(ValueError, match="batch 1, not 2"):
        taylor_linear_attention(*random_inputs(2, 4, 2, 8, 16), cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 9)}, r"\(1, 2, 9\)"),
        ({"state": torch.zeros(1, 2, 45, 16)}, r"\(1, 2, 45, 16\)"),
        ({"state": torch.zeros(1, 2, 45, 17, dtype=torch.bfloat16)}, "bfloat16"),
    ],
)
def test_bad_step_inputs(change, message):
    inputs = {"q": torch.zeros(1, 2, 8), "k": torch.zeros(1, 2, 8), "v": torch.zeros(1, 2, 16)}
    with pytest.raises(ValueError, match=message):
        taylor_linear_attention_step(**({**inputs, "state": torch.zeros(1, 2, 45, 17)} | change))


@pytest.mark.parametrize(("d", "dv", "message"), [(4, 16, "feature_dim .* not 4"), (33, 16, "not 33"), (8, 129, "not 129")])
def test_shapes_the_triton_form_does_not_take(d, dv, message, device, monkeypatch):
    inputs = random_inputs(1, 3, 1, d, dv, device=device)
    with pytest.raises(ValueError, match=message):
        taylor_linear_attention(*inputs, backend="triton")
    monkeypatch.setattr(op, "resolve_backend", lambda backend, tensor: "triton")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = taylor_linear_attention(*inputs)
    assert_close("y", y, taylor_linear_attention_reference(*inputs), 1e-6)
    assert len([w for w in caught if "Triton form" in str(w.message)]) == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_into_one_graph(backend, device):
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 20, 2, 8, 16, device=device))

    def loss(q, k, v):
        y, state = taylor_linear_attention(q, k, v, output_final_state=True, backend=backend)
        return y.square().sum() + state.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    actual = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for name, a, b in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert_close(name, a, b, 1e-5)


def test_custom_ops_are_well_formed(device):
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 9, 1, 8, 16, device=device))
    state = random_state(1, 1, 8, 16, device)
    mask = torch.arange(9, device=device)[None] >= 2
    torch.library.opcheck(op._attention, (q, k, v, mask, state.requires_grad_(), None, 0.25, 1e-12, True))
    torch.library.opcheck(op._attention, (q, k, v, None, None, torch.tensor([0, 4, 9], device=device), 0.25, 1e-12, False))
    token = [x[:, 0].detach() for x in (q, k, v)]
    torch.library.opcheck(op._step, (*token, state.detach().clone(), 0.25, 1e-12))
