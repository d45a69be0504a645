"""Linear layers by oneDNN: values, gradients of both orders, and who else wants a call."""

from importlib import import_module

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from backbones import ops
from backbones.layers import Linear, Mlp
from backbones.ops import native
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


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_second_derivatives(kind):
    """A penalty on gradients reaches the weights as PyTorch's own layers have it."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, requires_grad=True)
    ours, theirs = {
        "linear": (Linear(5, 4), nn.Linear(5, 4)),
        "mlp": (Mlp(5, 20), timm.layers.Mlp(5, 20)),
    }[kind]
    theirs.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, theirs):
        first = torch.autograd.grad(
            layer(x).tanh().sum(), [x, *layer.parameters()], create_graph=True
        )
        penalty = sum(grad.square().sum() for grad in first)
        found.append([*first, *torch.autograd.grad(penalty, [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_of_functions():
    layer, mlp, x = Linear(5, 4), Mlp(5, 20), torch.randn(3, 5)
    got = torch.func.grad(lambda x: layer(x).square().sum())(x)
    weight = layer.weight.detach()
    torch.testing.assert_close(got, 2 * layer(x).detach() @ weight)
    got = torch.func.grad(lambda x: mlp(x).square().sum())(x)
    x.requires_grad_()
    plain = mlp.fc2(F.gelu(mlp.fc1(x))).square().sum()
    torch.testing.assert_close(got, *torch.autograd.grad(plain, x))


@pytest.mark.parametrize("grad_mode", [True, False])
def test_what_does_not_fit_is_named(grad_mode):
    layer, block = Linear(5, 4), Mlp(5, 4)
    with torch.set_grad_enabled(grad_mode):
        for call in (layer, block):
            with pytest.raises(RuntimeError, match="2x6 and 5x4"):
                call(torch.randn(2, 6))
        block.fc2.weight = nn.Parameter(torch.randn(5, 3))
        with pytest.raises(RuntimeError, match="2x4 and 3x5"):
            block(torch.randn(2, 5))
        with pytest.raises(RuntimeError, match="dtype"):
            layer.double()(torch.randn(2, 5))


@pytest.mark.usefixtures("unforced")
def test_what_takes_which():
    assert explain("linear", "cpu", torch.float32)[0] == "onednn"
    for dtype in (torch.float64, torch.bfloat16):
        assert explain("linear", "cpu", dtype)[0] == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert explain("linear", "cpu", torch.float32)[0] == "torch"
        assert Linear(5, 4)(torch.randn(2, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 5, 8), (7, 8)])
def test_mlp_by_pieces(shape, bias, compiler, monkeypatch):
    """Pieces of two rows: outputs and gradients of PyTorch's own layers in float64."""
    module = import_module("backbones.ops.linear")
    monkeypatch.setattr(module, "_HIDDEN", 2 * 21)
    if not compiler:
        monkeypatch.setattr(module.native, "missing", lambda: "none for this test")
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 21, bias), nn.GELU(), nn.Linear(21, 6, bias))
    parts = [layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias]
    x = torch.randn(*shape[:-1], 16)[..., ::2]
    grad = torch.randn(6).expand(*shape[:-1], 6)
    with torch.no_grad(), ops.force("onednn"):
        inferred = ops.mlp(x, *parts)
    inputs = [p for p in (x.requires_grad_(), *parts) if p is not None]
    with ops.force("onednn"):
        got = ops.mlp(x, *parts)
        ours = torch.autograd.grad(got, inputs, grad)
    layers.double()
    true = x.detach().double().requires_grad_()
    expected = layers(true)
    theirs = torch.autograd.grad(expected, [true, *layers.parameters()], grad.double())
    for a, b in zip((inferred, got, *ours), (expected, expected, *theirs), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_mlp_of_few_rows_by_large_weights():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(1040, 1040), nn.GELU(), nn.Linear(1040, 1040))
    parts = layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias
    x, grad = torch.randn(3, 1040, requires_grad=True), torch.randn(3, 1040)
    with ops.force("onednn"):
        ours = torch.autograd.grad(ops.mlp(x, *parts), [x, *parts], grad)
    layers.double()
    true = x.detach().double().requires_grad_()
    theirs = torch.autograd.grad(layers(true), [true, *layers.parameters()], grad.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", range(5))
def test_mlp_with_something_frozen(frozen):
    torch.manual_seed(0)
    mlp, x = Mlp(8, 20), torch.randn(5, 8)
    inputs = [x, *mlp.parameters()]
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i != frozen)
    learned = [t for t in inputs if t.requires_grad]
    ours = torch.autograd.grad(mlp(x).square().sum(), learned)
    theirs = torch.autograd.grad(mlp.fc2(F.gelu(mlp.fc1(x))).square().sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layer", [Linear(8, 8), Mlp(8, 32)])
def test_outputs_may_be_modified_in_place(layer):
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    (expected,) = torch.autograd.grad((layer(x) * 2 + x).sum(), x)
    (got,) = torch.autograd.grad(layer(x).mul_(2).add_(x).sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("unforced")
def test_mlp_keeps_one_hidden_map_for_gradients():
    x, mlp, kept = torch.randn(50, 8, requires_grad=True), Mlp(8, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        mlp(x)
    assert kept.count((50, 32)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 7, 8, 1000])
def test_gelu_in_c(dtype, count):
    if native.missing() is not None:
        pytest.skip(native.missing())
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-20, 20, count), torch.randn(count)]).to(dtype)
    x[count] = 0
    grad, out = torch.randn_like(x), torch.empty_like(x)
    true = x.double()
    # By erfc: 1 + erf loses what is left far below zero.
    below = torch.special.erfc(-true / 2**0.5) / 2
    density = (-true.square() / 2).exp() / (2 * torch.pi) ** 0.5
    expected = grad.double() * (below + true * density)
    native.call("gelu_backward", x, grad, out, x.numel())
    rtol = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(out.double(), true * below, rtol=5 * rtol, atol=1e-37)
    torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=rtol)


def test_gelu_in_c_of_what_is_not_finite():
    if native.missing() is not None:
        pytest.skip(native.missing())
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 3e38, -3e38, 0.0])
    grad, out = torch.ones_like(x), torch.empty_like(x)
    expected = torch.ops.aten.gelu_backward(grad, x)
    native.call("gelu_backward", x, grad, out, x.numel())
    torch.testing.assert_close(out, F.gelu(x.double()).float(), equal_nan=True)
    torch.testing.assert_close(grad, expected, equal_nan=True)


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
