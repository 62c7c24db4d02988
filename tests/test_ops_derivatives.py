"""Derivatives beyond one backward pass: of the fused operators they are refused, never wrong."""

import pytest
import torch
from torch.autograd import forward_ad

from dive_fast.errors import InputError
from dive_fast.ops import linear_cross_entropy, steer


def loss_of(hidden, **options):
    torch.manual_seed(0)
    weight, targets = torch.randn(11, 6).to(hidden.dtype), torch.arange(len(hidden)) % 11
    return linear_cross_entropy(hidden, weight, targets, **options)


def steered(residual, **options):
    torch.manual_seed(0)
    down, up = torch.randn(2, 6), torch.randn(6, 2)
    return steer(residual, down=down.to(residual.dtype), up=up.to(residual.dtype), **options)


@pytest.mark.parametrize("function", [loss_of, lambda x, **options: steered(x, **options).square().sum()])
def test_a_second_backward_is_refused_and_the_references_is_right(function):
    hidden = torch.randn(5, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(hidden, backend="native"), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.square().sum().backward()
    double = hidden.detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: function(x, backend="reference"), double)


@pytest.mark.parametrize("function", [loss_of, steered])
def test_derivatives_forward_are_the_references(function):
    hidden, tangent = torch.randn(5, 6), torch.randn(5, 6)
    for run in (function, lambda x: function(x, backend="reference")):
        _, found = torch.func.jvp(run, (hidden,), (tangent,))
        double, wide = hidden.double(), tangent.double()
        _, true = torch.func.jvp(function, (double,), (wide,))
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level(), pytest.raises(InputError, match="no derivatives forward"):
        function(forward_ad.make_dual(hidden, tangent), backend="native")


def test_gradients_of_residual_and_update_add_up_apart():
    """As leaves both are added to in place, by every backward pass."""
    residual, update = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    for _ in range(3):
        steered(residual, update=update, backend="native").square().sum().backward()
    once = torch.autograd.grad(steered(residual, update=update, backend="reference").square().sum(), (residual, update))
    torch.testing.assert_close(residual.grad, 3 * once[0])
    torch.testing.assert_close(update.grad, 3 * once[1])


@pytest.fixture
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default_dtype", [torch.float64, torch.bfloat16], ids=str, indirect=True)
def test_the_processs_default_dtype_changes_nothing(default_dtype):
    single = {"dtype": torch.float32}
    residual = torch.randn(40, 64, **single).requires_grad_()
    adapter = {"down": torch.randn(16, 64, **single), "up": torch.randn(64, 16, **single)}
    adapter = {name: value.requires_grad_() for name, value in adapter.items()}
    found = {}
    for backend in ("native", "reference"):
        output = steer(residual, **adapter, backend=backend)
        found[backend] = torch.autograd.grad(output.square().sum(), (residual, *adapter.values()))
    for ours, theirs in zip(found["native"], found["reference"], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
