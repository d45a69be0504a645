"""Linear layers by oneDNN: values, gradients of both orders, and who else wants a call."""

from importlib import import_module

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from backbones import ops
from backbones.layers import Linear, Mlp
from backbones.ops.dispatch import explain

PATHS = ["torch", "onednn"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (1, 7, 9, 5), (0, 4, 5)])
def test_values_and_gradients(path, bias, shape):
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)]
    inputs += [torch.randn(11, dtype=torch.float64)] if bias else []
    grad = torch.randn(*shape[:-1], 11, dtype=torch.float64)
    true = [x.requires_grad_() for x in inputs]
    expected = F.linear(*true)
    lower = [x.detach().float().requires_grad_() for x in inputs]
    with ops.force(path):
        got = ops.linear(*lower)
        ours = torch.autograd.grad(got, lower, grad.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, torch.autograd.grad(expected, true, grad), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mkl_is_fast", [True, False])
@pytest.mark.parametrize(
    ("rows", "dim", "out"), [(1, 3, 5), (130, 35, 9), (67, 9, 70), (50, 33, 1)]
)
def test_weight_gradients_of_odd_sizes(rows, dim, out, mkl_is_fast, monkeypatch):
    monkeypatch.setattr(import_module("backbones.ops.linear"), "_mkl_is_fast", lambda: mkl_is_fast)
    torch.manual_seed(0)
    x, weight = torch.randn(dim, rows).t(), torch.randn(out, dim, requires_grad=True)
    grad = torch.randn(2 * rows, out)[::2]
    with ops.force("onednn"):
        (got,) = torch.autograd.grad(ops.linear(x, weight), weight, grad)
    torch.testing.assert_close(got.double(), grad.double().t() @ x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_views_give_the_same(path):
    x, weight = torch.randn(6, 4, 8), torch.randn(8, 5).t()
    turned = x.transpose(0, 1)
    with ops.force(path), torch.no_grad():
        torch.testing.assert_close(ops.linear(turned, weight), F.linear(turned, weight))
        torch.testing.assert_close(
            ops.linear(x[..., ::2], weight[:, ::2]), x[..., ::2] @ weight[:, ::2].t()
        )


@pytest.mark.parametrize("gelu", [True, False])
def test_few_rows_by_a_large_weight(gelu):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 1, 1, 512), torch.randn(2100, 512), torch.randn(2100)
    with ops.force("onednn"), torch.no_grad():
        for b in (bias, None):
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
            expected = F.gelu(expected) if gelu else expected
            got = ops.linear(x, weight, b, gelu)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_gelu_is_the_exact_one(path):
    x, weight, bias = torch.randn(9, 8), torch.randn(5, 8), torch.randn(5)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    with ops.force(path):
        for grad_mode in (True, False):
            with torch.set_grad_enabled(grad_mode):
                got = ops.linear(x, weight, bias, gelu=True)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_second_derivatives():
    """A penalty on gradients reaches the weights as PyTorch's own layer has it."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, requires_grad=True)
    ours, theirs = Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, theirs):
        (grad,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, layer.weight, layer.bias]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_of_functions():
    layer, x = Linear(5, 4), torch.randn(3, 5)
    got = torch.func.grad(lambda x: layer(x).square().sum())(x)
    weight = layer.weight.detach()
    torch.testing.assert_close(got, 2 * layer(x).detach() @ weight)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_what_does_not_fit_is_named(grad_mode):
    layer, block = Linear(5, 4), Mlp(5, 4)
    with torch.set_grad_enabled(grad_mode):
        for call in (layer, block):
            with pytest.raises(RuntimeError, match="2x6 and 5x4"):
                call(torch.randn(2, 6))
        with pytest.raises(RuntimeError, match="dtype"):
            layer.double()(torch.randn(2, 5))


def test_what_takes_which():
    assert explain("linear", "cpu", torch.float32)[0] == "onednn"
    for dtype in (torch.float64, torch.bfloat16):
        assert explain("linear", "cpu", dtype)[0] == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert explain("linear", "cpu", torch.float32)[0] == "torch"
        assert Linear(5, 4)(torch.randn(2, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 4, 7, 8])
def test_mlp_by_pieces(rows, monkeypatch):
    monkeypatch.setattr(import_module("backbones.ops.linear"), "_HIDDEN", 4 * 20)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 6))
    parts = layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias
    x = torch.randn(3, rows, 16)[..., ::2]
    with torch.no_grad(), ops.force("onednn"):
        torch.testing.assert_close(ops.mlp(x, *parts), layers(x), rtol=1e-5, atol=1e-6)
        bare = ops.mlp(x, parts[0], None, parts[2], None)
        expected = F.gelu(x @ parts[0].t()) @ parts[2].t()
        torch.testing.assert_close(bare, expected, rtol=1e-5, atol=1e-6)


def test_mlp_is_timms():
    torch.manual_seed(0)
    ours, theirs = Mlp(8, 20).eval(), timm.layers.Mlp(8, 20).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, 8)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            torch.testing.assert_close(ours(x), theirs(x))


def test_what_others_put_into_an_mlp_is_called():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    x, mlp = torch.randn(2, 8), Mlp(8, 20).eval()
    with torch.no_grad():
        seen = []
        handle = mlp.fc1.register_forward_hook(lambda m, i, out: seen.append(out))
        plain = mlp(x)
        handle.remove()
        torch.testing.assert_close(seen[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
        mlp.fc1 = Adapted(mlp.fc1)
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))
        assert not mlp(x).allclose(plain)
