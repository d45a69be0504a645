"""Products for inference by oneDNN: values, and what is left to PyTorch's own functions."""

from importlib import import_module

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from backbones import ops
from backbones.fusion import InferenceLinear, InferenceMlp
from backbones.layers import Mlp
from backbones.ops import dispatch
from backbones.ops.dispatch import explain

BACKENDS = ["torch", "onednn"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (1, 7, 9, 5), (0, 4, 5)])
def test_values(backend, bias, gelu, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape), torch.randn(11, 5)
    b = torch.randn(11) if bias else None
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    expected = F.gelu(expected) if gelu else expected
    with ops.force(backend):
        for grad_mode in (True, False):
            with torch.set_grad_enabled(grad_mode):
                got = ops.linear(x, weight, b, gelu)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_give_the_same(backend):
    x, weight = torch.randn(6, 4, 8), torch.randn(8, 5).t()
    turned = x.transpose(0, 1)
    with ops.force(backend), torch.no_grad():
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


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 5, 8), (7, 8), (0, 8)])
def test_mlp_by_pieces(shape, bias, pieces, monkeypatch):
    """Pieces of two rows: the outputs of PyTorch's own layers in float64."""
    if pieces:
        monkeypatch.setattr(import_module("backbones.ops.linear"), "_HIDDEN", 2 * 21)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 21, bias), nn.GELU(), nn.Linear(21, 6, bias))
    parts = [layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias]
    x = torch.randn(*shape[:-1], 16)[..., ::2]
    with torch.no_grad(), ops.force("onednn"):
        got = ops.mlp(x, *parts)
    torch.testing.assert_close(got.double(), layers.double()(x.double()), rtol=1e-5, atol=1e-5)


def test_gradients_are_pytorchs():
    torch.manual_seed(0)
    mlp, x = Mlp(8, 20), torch.randn(5, 8, requires_grad=True)
    parts = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    with ops.force("onednn"):
        ours = torch.autograd.grad(ops.mlp(x, *parts).square().sum(), [x, *parts])
    theirs = torch.autograd.grad(mlp(x).square().sum(), [x, *parts])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_what_does_not_fit_is_named(grad_mode):
    mlp = Mlp(5, 4)
    linear = InferenceLinear(nn.Linear(5, 4))
    with torch.set_grad_enabled(grad_mode):
        for call in (linear, InferenceMlp(mlp)):
            with pytest.raises(RuntimeError, match="2x6 and 5x4"):
                call(torch.randn(2, 6))
        mlp.fc2 = nn.Linear(3, 5)
        with pytest.raises(RuntimeError, match="2x4 and 3x5"):
            InferenceMlp(mlp)(torch.randn(2, 5))
        with pytest.raises(RuntimeError, match="dtype"):
            linear.double()(torch.randn(2, 5))


@pytest.mark.usefixtures("unforced")
def test_what_takes_which():
    assert explain("linear", "cpu", torch.float32)[0] == "onednn"
    for dtype in (torch.float64, torch.bfloat16):
        assert explain("linear", "cpu", dtype)[0] == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert explain("linear", "cpu", torch.float32)[0] == "torch"
        linear = InferenceLinear(nn.Linear(5, 4))
        assert linear(torch.randn(2, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "layer", [InferenceLinear(nn.Linear(8, 8)), InferenceMlp(Mlp(8, 32))], ids=["linear", "mlp"]
)
def test_outputs_may_be_modified_in_place(layer):
    with torch.no_grad():
        x, out = torch.randn(2, 3, 4, 8), layer(torch.ones(2, 3, 4, 8))
        expected = out + x
    torch.testing.assert_close(out.add_(x.requires_grad_()), expected)


def test_mlp_is_timms():
    torch.manual_seed(0)
    ours, theirs = Mlp(8, 20).eval(), timm.layers.Mlp(8, 20).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(InferenceMlp(ours)(x), theirs(x))


@pytest.fixture
def unknown(monkeypatch):
    """Nothing is known of oneDNN's linear yet."""
    dispatch._no_linear_pointwise.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    dispatch._no_linear_pointwise.cache_clear()


def wrong(x, weight, bias, name, *_):
    """Right without GELU only."""
    return F.linear(x, weight, bias)


def another_signature(x, weight):
    raise AssertionError("is never called")


@pytest.mark.parametrize("given", [wrong, another_signature, None])
@pytest.mark.usefixtures("unforced")
def test_a_private_product_that_changed_is_said_once_and_left(unknown, recwarn, given):
    if given is None:
        unknown.setattr(torch.ops, "mkldnn", object())
    else:
        unknown.setattr(torch.ops.mkldnn, "_linear_pointwise", given)
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    with torch.no_grad():
        for _ in range(2):
            expected = F.gelu(F.linear(x, weight))
            torch.testing.assert_close(ops.linear(x, weight, gelu=True), expected)
    said = [str(w.message) for w in recwarn if "mkldnn" in str(w.message)]
    assert len(said) == 1 and said[0].endswith("F.linear is used")
    assert "does not do what F.linear does" in dispatch.explain("linear", "cpu", x.dtype)[1]
