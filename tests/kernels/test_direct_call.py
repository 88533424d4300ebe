"""Direct calls of custom ops: who gets the op's own function, and that gradients are the same either way."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from geobased.kernels.direct_call import direct_call

calls: list[str] = []


@torch.library.custom_op("geobased_tests::scaled_square", mutates_args=())
def scaled_square(x: torch.Tensor, factor: float) -> torch.Tensor:
    calls.append(f"forward of a {type(x).__name__}")
    return factor * x * x


@scaled_square.register_fake
def _(x, factor):
    return torch.empty_like(x)


def setup_context(ctx, inputs, output):
    x, ctx.factor = inputs
    ctx.save_for_backward(x)


def backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return 2 * ctx.factor * x * dy, None


scaled_square.register_autograd(backward, setup_context=setup_context)
run = direct_call(scaled_square, setup_context, backward)


@pytest.fixture
def dispatched(monkeypatch):
    """Counts calls that go through the registered op."""
    count = []
    original = type(scaled_square).__call__
    monkeypatch.setattr(type(scaled_square), "__call__", lambda self, *args: (count.append(1), original(self, *args))[1])
    return count


def test_gradients_are_those_of_the_op(dispatched):
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (direct,) = torch.autograd.grad(run(x, 3.0).sum(), x)
    assert not dispatched
    (expected,) = torch.autograd.grad(scaled_square(x, 3.0).sum(), x)
    assert dispatched and torch.equal(direct, expected) and torch.equal(direct, 6 * x)


def test_without_gradients_the_function_itself_runs(dispatched):
    y = run(torch.ones(3), 2.0)
    with torch.no_grad():
        z = run(torch.ones(3, requires_grad=True), 2.0)
    assert not dispatched and not y.requires_grad and not z.requires_grad


without_gradient = direct_call(scaled_square)


def test_second_derivatives_are_those_of_the_op():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(run(x, 1.0).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert torch.equal(second, torch.full((3,), 2.0))


def test_an_op_without_gradient_is_not_taken_for_a_constant(dispatched):
    without_gradient(torch.ones(3, requires_grad=True), 2.0)
    assert len(dispatched) == 1
    without_gradient(torch.ones(3), 2.0)
    assert len(dispatched) == 1


class Marked(torch.Tensor):
    pass


def test_everything_else_gets_the_op(dispatched):
    run(torch.ones(3).as_subclass(Marked), 2.0)
    assert len(dispatched) == 1
    traced = make_fx(lambda x: run(x, 2.0), tracing_mode="fake")(torch.ones(3))
    assert len(dispatched) == 2
    assert any(node.target is torch.ops.geobased_tests.scaled_square.default for node in traced.graph.nodes)
    compiled = torch.compile(lambda x: run(x, 2.0), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.full((3,), 3.0)), torch.full((3,), 18.0))
