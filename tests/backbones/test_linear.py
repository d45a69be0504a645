"""Products for inference by oneDNN: values, and what is left to PyTorch's own functions."""

import pickle
from copy import deepcopy
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from backbones import ops
from backbones.inference import InferenceLinear, InferenceMlp
from backbones.layers import Mlp
from backbones.ops import dispatch
from backbones.ops.dispatch import explain
from backbones.ops.linear import Kept

BACKENDS = ["torch", "onednn"]
THEN = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", THEN)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (1, 7, 9, 5), (0, 4, 5)])
def test_values(backend, bias, activation, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape), torch.randn(11, 5)
    b = torch.randn(11) if bias else None
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    expected = THEN[activation](expected)
    with ops.force(backend):
        for grad_mode, packed in product((True, False), (Kept(), None)):
            with torch.set_grad_enabled(grad_mode):
                got = ops.linear(x, weight, b, activation, packed)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", THEN)
@pytest.mark.parametrize("autocast", [True, False])
def test_values_in_bfloat16(backend, activation, autocast):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(40, 50), torch.randn(30, 50) / 7, torch.randn(30)
    expected = THEN[activation](F.linear(x.double(), weight.double(), bias.double()))
    given = (x, weight, bias) if autocast else [t.bfloat16() for t in (x, weight, bias)]
    half = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with ops.force(backend), torch.no_grad(), half:
        for packed in (Kept(), None):
            got = ops.linear(*given, activation, packed)
            assert got.dtype == torch.bfloat16
            assert (got - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_give_the_same(backend):
    x, weight = torch.randn(6, 4, 8), torch.randn(8, 5).t()
    turned = x.transpose(0, 1)
    with ops.force(backend), torch.no_grad():
        torch.testing.assert_close(ops.linear(turned, weight), F.linear(turned, weight))
        torch.testing.assert_close(
            ops.linear(x[..., ::2], weight[:, ::2]), x[..., ::2] @ weight[:, ::2].t()
        )


@pytest.mark.parametrize("activation", THEN)
def test_few_rows_by_a_large_weight(activation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 1, 1, 512), torch.randn(2100, 512), torch.randn(2100)
    with ops.force("onednn"), torch.no_grad():
        for b, packed in product((bias, None), (Kept(), None)):
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
            got = ops.linear(x, weight, b, activation, packed)
            torch.testing.assert_close(
                got.double(), THEN[activation](expected), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 5, 8), (7, 8), (0, 8)])
def test_mlp_by_pieces(shape, bias, pieces, monkeypatch):
    """Pieces of two rows: the outputs of PyTorch's own layers in float64."""
    if pieces:
        monkeypatch.setattr(import_module("backbones.ops.linear"), "_HIDDEN", 4 * 2 * 21)
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
    for dtype in (torch.float32, torch.bfloat16):
        assert explain("linear", "cpu", dtype)[0] == "onednn"
    for dtype in (torch.float64, torch.float16):
        assert explain("linear", "cpu", dtype)[0] == "torch"
    linear = InferenceLinear(nn.Linear(5, 4))
    for dtype, backend in {torch.bfloat16: "onednn", torch.float16: "torch"}.items():
        with torch.autocast("cpu", dtype):
            assert explain("linear", "cpu", torch.float32)[0] == backend
            assert explain("linear", "cpu", torch.float64)[0] == "torch"
            for grad_mode in (True, False):
                with torch.set_grad_enabled(grad_mode):
                    assert linear(torch.randn(2, 5)).dtype == dtype


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
    for known in (dispatch._no_linear_pointwise, dispatch.no_packing):
        known.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for known in (dispatch._no_linear_pointwise, dispatch.no_packing):
        known.cache_clear()


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
            torch.testing.assert_close(ops.linear(x, weight, None, "gelu"), expected)
    said = [str(w.message) for w in recwarn if "mkldnn" in str(w.message)]
    assert len(said) == 1 and said[0].endswith("F.linear is used")
    assert "does not do what F.linear does" in dispatch.explain("linear", "cpu", x.dtype)[1]


@pytest.mark.parametrize("given", [lambda weight: 2 * weight, None])
@pytest.mark.usefixtures("unforced")
def test_a_private_layout_that_changed_is_said_once_and_left(unknown, recwarn, given):
    if given is None:
        op = torch.ops.mkldnn._linear_pointwise
        unknown.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=op))
    else:
        unknown.setattr(torch.ops.mkldnn, "_reorder_linear_weight", given)
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ops.linear(x, weight, packed=Kept()), F.linear(x, weight))
    said = [str(w.message) for w in recwarn if "mkldnn" in str(w.message)]
    assert len(said) == 1 and said[0].endswith("weights keep their layout")


@pytest.mark.usefixtures("unforced")
def test_packed_weights_follow_the_weights():
    """Changed in place, replaced, moved, loaded, in another dtype, and on another thread."""
    torch.manual_seed(0)
    layer, x = InferenceLinear(nn.Linear(6, 5)), torch.randn(4, 6)

    def agrees(by: float = 1e-5):
        with torch.no_grad():
            expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
            got = layer(x.to(layer.bias.dtype))
            assert (got - expected).abs().max() < by * expected.abs().max()

    agrees()
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.mul_(-3)
            agrees()
    layer.load_state_dict({name: t + 1 for name, t in layer.state_dict().items()})
    agrees()
    layer.load_state_dict({n: t + 1 for n, t in layer.state_dict().items()}, assign=True)
    agrees()
    layer.weight_t = nn.Parameter(torch.randn(6, 5))
    agrees()
    # Through bfloat16 and back, a tensor may lie where its unrounded values did.
    layer.bfloat16()
    agrees(1e-2)
    layer.float()
    agrees()
    layer.weight_t.data = torch.randn(6, 5)
    agrees()
    with torch.inference_mode():
        agrees()
        layer.bias.add_(1)
        agrees()
    agrees()


@pytest.mark.usefixtures("unforced")
def test_packed_weights_are_kept_and_never_copied():
    layer, x = InferenceLinear(nn.Linear(6, 5)), torch.randn(4, 6)
    with torch.no_grad():
        layer(x)
        kept = layer.packed._kept
        layer(x)
        assert layer.packed._kept is kept and kept[2][0].layout == torch._mkldnn
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
            assert layer.packed._kept[2][0].dtype == torch.bfloat16
    for twin in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.packed._kept is None and twin.state_dict().keys() == layer.state_dict().keys()
        with torch.no_grad():
            assert twin(x).equal(layer(x))
    assert not any(t.is_mkldnn for t in layer.state_dict().values())


def test_a_kept_value_can_be_freed():
    kept, weight, made = Kept(), torch.ones(2), []
    for _ in range(2):
        assert kept.of((weight, None), "key", lambda: made.append(1) or weight * 2).equal(
            weight * 2
        )
    kept.of((weight, None), "other", lambda: made.append(1))
    assert len(made) == 2
    kept.clear()
    kept.of((weight, None), "other", lambda: made.append(1))
    assert len(made) == 3


def test_pieces_fit_the_cache():
    """Of 4 MB: the rows times the hidden channels, in the dtype of the products."""
    pieces = import_module("backbones.ops.linear").pieces
    x = torch.empty(2, 16, 32, 5, device="cpu")
    found = [pieces(x, hidden) for hidden in (1, 1024, 1535, 1537, 2048, 4096)]
    assert found == [1, 1, 1, 2, 2, 4]
    assert pieces(x.bfloat16(), 4096) == 2 and pieces(x.double(), 4096) == 8
    with torch.autocast("cpu", torch.bfloat16):
        assert pieces(x, 4096) == 2


@pytest.mark.usefixtures("unforced")
def test_a_product_that_is_prepared():
    prepared = import_module("backbones.ops.linear").prepared
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    for activation, then in THEN.items():
        with torch.no_grad():
            run = prepared(x[:1], weight, bias, activation, Kept())
            expected = then(F.linear(x.double(), weight.double(), bias.double()))
            torch.testing.assert_close(run(x).double(), expected, rtol=1e-5, atol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                run = prepared(x[:1], weight, bias, activation, Kept())
                assert run(x).dtype == run(x.bfloat16()).dtype == torch.bfloat16
    message = "expected x to have the weight's dtype, torch.float32, not torch.bfloat16"
    with pytest.raises(RuntimeError, match=message):
        prepared(x.bfloat16(), weight, bias, "none", Kept())
    with pytest.raises(RuntimeError, match="not torch.float32"):
        prepared(x, weight, bias.double(), "none", Kept())


@pytest.mark.usefixtures("unforced")
def test_which_products_are_onednn_s():
    """Not those of no rows, of other sizes or dtypes, nor with gradients."""
    module = import_module("backbones.ops.linear")
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    assert not module.by_onednn(x, weight)
    with torch.no_grad():
        assert module.by_onednn(x, weight) and not module.by_onednn(x[:0], weight)
        assert not module.by_onednn(x.double(), weight.double())
    fit = module._fit
    assert fit(x, weight, bias) and fit(x, weight, None) and fit(x[0], weight, bias)
    assert not fit(x[:, :5], weight, bias) and not fit(x, weight, bias[:4])
    assert not fit(torch.tensor(1.0), weight, None) and not fit(x, weight, bias.double())
    assert not fit(x.bfloat16(), weight, bias) and not fit(x, weight.bfloat16(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert fit(x.bfloat16(), weight, bias) and fit(x, weight.bfloat16(), bias)
        assert not fit(x, weight, bias.double()) and not fit(x, weight.long(), None)
