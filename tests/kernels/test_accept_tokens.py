"""The end of a generation step: both forms against a loop over rows in Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.kernels.accept_tokens import accept_tokens

PAD = 99


def make_state(batch: int, num_ends: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    state = {
        "tokens": torch.zeros(batch, dtype=torch.long),
        "period_tokens": torch.zeros(4, batch, dtype=torch.long),
        "finished": torch.zeros(batch, dtype=torch.bool),
        "ends": torch.arange(num_ends),
        "pad": torch.tensor(PAD),
        "counters": torch.tensor([40, 0, 7], dtype=torch.int32),
        "slot": torch.zeros(1, dtype=torch.long),
        "running": torch.ones(1, dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in state.items()}


def check(batch: int, num_ends: int, steps: list[torch.Tensor], backend: str, device: str = "cpu") -> None:
    state = make_state(batch, num_ends, device)
    finished, slot, running = [False] * batch, 0, True
    rows = [[0] * batch for _ in range(4)]
    for picked in steps:
        accept_tokens(picked.to(device), **state, backend=backend)
        tokens = [PAD if done else token for done, token in zip(finished, picked.tolist(), strict=True)]
        finished = [done or token < num_ends for done, token in zip(finished, tokens, strict=True)]
        rows[slot] = tokens
        slot += running
        running = num_ends == 0 or not all(finished)
        assert state["tokens"].tolist() == tokens
        assert state["finished"].tolist() == finished
        assert state["period_tokens"].tolist() == rows
        assert state["counters"].tolist() == [40 + slot, slot, 7 + slot]
        assert state["slot"].tolist() == [slot]
        assert state["running"].tolist() == [int(running)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**31), st.sampled_from(["torch", "triton"]))
def test_steps(batch, num_ends, seed, backend):
    generator = torch.Generator().manual_seed(seed)
    check(batch, num_ends, [torch.randint(0, 5, (batch,), generator=generator) for _ in range(4)], backend)


def test_larger_than_a_block():
    """The last rows of a batch of several blocks must be waited for too."""
    picked = torch.zeros(2500, dtype=torch.long)
    picked[-1] = 3
    check(2500, 1, [picked, picked, picked.clone().zero_()], "triton")


def test_bad_input():
    state = make_state(3, 1)
    with pytest.raises(ValueError, match=r"tokens is torch.int64 \(3,\): it must be a contiguous torch.int64 \(4,\)"):
        accept_tokens(torch.zeros(4, dtype=torch.long), **state)
    with pytest.raises(ValueError, match=r"slot is torch.int32 \(1,\): it must be a contiguous torch.int64 \(1,\)"):
        accept_tokens(torch.zeros(3, dtype=torch.long), **state | {"slot": state["slot"].int()})


@pytest.mark.gpu
@pytest.mark.parametrize("num_ends", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 128, 2048, 3000])
def test_on_gpu(batch, num_ends):
    generator = torch.Generator().manual_seed(batch)
    steps = [torch.randint(0, 5, (batch,), generator=generator) for _ in range(3)]
    check(batch, num_ends, [*steps, torch.zeros(batch, dtype=torch.long)], "triton", "cuda")
