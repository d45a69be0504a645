"""Linear layers as convolutions: values, who computes what, and what stays PyTorch's own."""

import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils._python_dispatch import TorchDispatchMode

from backbones import ops
from backbones.layers import Mlp
from backbones.ops import dispatch, linear_layer, verdicts
from backbones.ops.dispatch import explain
from backbones.ops.linear_layer import convolved, fast_linears
from tests.support import NANO

FORMS = [
    *((name, {}) for name in NANO),
    ("swin_nano", {"sliding": True}),
    ("swin_nano", {"conv": "pre"}),
    ("swin_local_mlp_nano", {"shared": True}),
    ("dw_conv_nano", {"se_ratio": 0.25, "local_kernel": 3}),
]


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv("DENSE_OPS", raising=False)
    monkeypatch.setattr(verdicts, "known", lambda *given: None)


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(linear_layer, "FEWEST_ROWS", 0)
    monkeypatch.setattr(linear_layer, "FEWEST_PRODUCTS", 0)


@pytest.fixture
def cpuinfo(monkeypatch):
    """Sets what Linux says of the processor; None for a system without such a file."""

    def say(text: str | None, capability: str = "AVX512", threads: int = 2) -> None:
        def read(path: Path) -> str:
            assert str(path) == "/proc/cpuinfo"
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(verdicts.Path, "read_text", read)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        for function in (verdicts.halved_by_mkl, verdicts.processor):
            function.cache_clear()

    yield say
    for function in (verdicts.halved_by_mkl, verdicts.processor):
        function.cache_clear()


class Calls(TorchDispatchMode):
    """Counts matrix products with a weight, by linear layers and by convolutions of 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.linears += name in ("addmm", "mm", "linear")
        if name == "convolution":
            self.convolutions += args[1].shape[2:] == (1, 1)
        return func(*args, **(kwargs or {}))


def cpu(vendor: str, family: str, model: str = "Fast") -> str:
    first = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel name\t: {model}"
    second = first.replace(model, "Second").replace(family, "6")
    return f"{first}\nflags\t\t: fpu avx512f\n\n{second}\n"


# Values


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (3, 7, 9, 5), (2, 129, 5)])
def test_a_convolution_is_a_linear_layer(shape, bias):
    torch.manual_seed(0)
    given = [torch.randn(*shape), torch.randn(11, 5), torch.randn(11)][: 3 if bias else 2]
    ours = [t.clone().requires_grad_() for t in given]
    true = [t.double().requires_grad_() for t in given]
    out, expected = convolved(*ours), F.linear(*true)
    assert out.shape == expected.shape and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape)
    got = torch.autograd.grad(out, ours, grad)
    for one, other in zip(got, torch.autograd.grad(expected, true, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
        assert one.shape == other.shape and one.is_contiguous()


def test_maps_in_another_order_of_memory():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 5, 4).permute(0, 2, 3, 1), torch.randn(6, 3).t()
    expected = F.linear(x.double(), weight.double())
    torch.testing.assert_close(convolved(x, weight).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("name, options", FORMS)
def test_a_network_and_all_its_gradients(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).train()
    x = torch.randn(2, 3, 70, 91)
    results = {}
    for backend in ("torch", "onednn"):
        torch.manual_seed(1)
        with ops.force(backend), Calls() as calls:
            out = model(x)
        out.square().sum().backward()
        results[backend] = [out, *(p.grad for p in model.parameters()), calls]
        model.zero_grad()
    first, second = results["torch"].pop(), results["onednn"].pop()
    # The classifier has a row for each image and is not ours.
    few = 1 + 2 * sum(type(m).__name__ == "SqueezeExcite" for m in model.modules())
    few += 2 * sum(type(m).__name__ == "DynamicDepthwiseConv" for m in model.modules())
    assert first.convolutions == 0 and second.linears <= few
    assert second.convolutions >= first.linears - few > 0
    for one, other in zip(results["torch"], results["onednn"], strict=True):
        if one is not None:
            near = 1e-4 * float(one.detach().abs().max())
            torch.testing.assert_close(other, one, rtol=1e-3, atol=near + 1e-6)


# Who computes what


def suits(*given: torch.Tensor) -> bool:
    return linear_layer._suits(*given, *[None] * (3 - len(given)))


def test_which_layers_are_convolutions():
    x, weight, bias = torch.ones(2, 64, 512), torch.ones(256, 512), torch.ones(256)
    assert linear_layer.FEWEST_ROWS == 128 and linear_layer.FEWEST_PRODUCTS == 128 * 256 * 512
    assert suits(x, weight, bias) and suits(x, weight)
    assert suits(x, nn.Parameter(weight), nn.Parameter(bias))
    assert not suits(x[:, :63], weight)
    assert not suits(x, weight[:255])
    many = torch.ones(4, 64, 512)
    assert suits(many, weight, bias) and suits(many[..., :511], weight[:, :511])
    assert not suits(many, weight[:, :511]) and not suits(many, weight, bias[:255])
    assert suits(torch.ones(4, 2, 32, 256), weight[:, :256])
    assert not suits(torch.ones(5, 51, 256), weight[:, :256])
    assert not suits(torch.ones(127, 512), torch.ones(4096, 512))
    assert not suits(x.double(), weight.double()) and not suits(x, weight.double())
    assert not suits(x, weight, bias.bfloat16())
    assert not suits(x.to("meta"), weight.to("meta"))
    assert not suits(torch.tensor(1.0), weight) and not suits(x, torch.ones(2**18))
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(x, weight)

    class Own(torch.Tensor):
        pass

    assert not suits(x.as_subclass(Own), weight) and not suits(x, weight.as_subclass(Own))
    assert not suits(x, weight, bias.as_subclass(Own))


@pytest.mark.usefixtures("any_size")
def test_only_linears_inside_of_the_decorated_function():
    layer = Mlp(8, 16)
    x = torch.randn(3, 8)
    with ops.force("onednn"):
        with Calls() as calls:
            layer(x)
        assert (calls.linears, calls.convolutions) == (0, 2)
        with Calls() as calls:
            layer.fc1(x)
            F.linear(x, layer.fc1.weight)
        assert (calls.linears, calls.convolutions) == (2, 0)
    assert Mlp.forward.__name__ == "forward" and "C" in Mlp.forward.__doc__


@pytest.mark.usefixtures("any_size")
def test_wrong_sizes_get_pytorch_s_error():
    with ops.force("onednn"), pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be"):
        Mlp(8, 16)(torch.randn(3, 7))


@pytest.mark.usefixtures("any_size")
def test_other_functions_get_their_arguments():
    class Both(nn.Module):
        @fast_linears
        def forward(self, x):
            one = F.linear(input=x, weight=torch.ones(2, 3), bias=torch.ones(2))
            return one, torch.sum(x, dim=-1, keepdim=True), x.softmax(-1)

    x = torch.randn(4, 3)
    with ops.force("onednn"), Calls() as calls:
        one, two, three = Both()(x)
    assert calls.convolutions == 1 and calls.linears == 0
    torch.testing.assert_close(one, x.sum(-1, keepdim=True).expand(-1, 2) + 1)
    torch.testing.assert_close(two, x.sum(-1, keepdim=True))
    torch.testing.assert_close(three, x.softmax(-1))


# What looks into modules


@pytest.mark.usefixtures("any_size")
def test_hooks_fire_and_replaced_layers_are_called():
    mlp, seen = Mlp(8, 16), []
    mlp.fc1.register_forward_hook(lambda m, given, out: seen.append(out.shape))
    mlp.fc2.register_full_backward_hook(lambda m, given, out: seen.append(out[0].shape))
    mlp.fc2.register_forward_hook(lambda m, given, out: 2 * out)
    x = torch.randn(3, 5, 8)
    with ops.force("torch"):
        expected = mlp(x)
    seen.clear()
    with ops.force("onednn"):
        out = mlp(x)
        out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert seen == [(3, 5, 16), (3, 5, 8)]
    mlp.fc1 = nn.Sequential(nn.Linear(8, 16), nn.Dropout(1.0))
    with ops.force("onednn"), Calls() as calls:
        torch.testing.assert_close(mlp(x), 2 * mlp.fc2.bias.expand(3, 5, 8))
    assert calls.convolutions == 2


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("kinds", [("Mlp",), ("mixer",), ("PatchMerging",), ("Block",)])
def test_parts_are_computed_again(name, kinds):
    # A recomputation whose saved tensors differ from those of the first raises.
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    with ops.force("onednn"):
        model(x).square().sum().backward()
        expected = [p.grad for p in model.parameters()]
        model.zero_grad()
        mixers = {id(block.mixer) for stage in model.stages for block in stage.blocks}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            apply_activation_checkpointing(
                model,
                check_fn=lambda m: (
                    type(m).__name__ in kinds or ("mixer" in kinds and id(m) in mixers)
                ),
            )
        model(x).square().sum().backward()
    for one, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("any_size")
def test_functional_transforms_and_graphs_see_linear_layers():
    mlp, x = Mlp(4, 8), torch.randn(2, 4)
    parameters = dict(mlp.named_parameters())

    def loss(given: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mlp, given, (x,)).square().sum()

    with ops.force("onednn"):
        with Calls() as calls:
            each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
            torch.func.jvp(mlp, (x,), (x,))
        assert calls.convolutions == 0
        traced = torch.jit.trace(mlp, x)
        assert "aten::linear" in str(traced.inlined_graph)
        assert "convolution" not in str(traced.inlined_graph)
        exported = torch.export.export(mlp, (x,))
        symbolic = torch.fx.symbolic_trace(mlp)
        for graph in (exported.module(), symbolic):
            with Calls() as calls:
                torch.testing.assert_close(graph(x), mlp.fc2(mlp.act(mlp.fc1(x))))
            assert calls.convolutions == 0
        graphs = []

        def keep(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        torch.compile(mlp, backend=keep, fullgraph=True)(x)
        (compiled,) = graphs
        assert "linear" in compiled.code and "conv" not in compiled.code
    assert [node.target for node in symbolic.graph.nodes] == ["x", "fc1", "act", "fc2", "output"]
    both = [torch.autograd.grad(loss(parameters, row), mlp.fc1.weight)[0] for row in x]
    torch.testing.assert_close(each["fc1.weight"], torch.stack(both))


@pytest.mark.usefixtures("any_size")
def test_a_tangent_of_a_weight_is_followed():
    torch.manual_seed(0)
    mlp, x = Mlp(3, 4), torch.randn(2, 3)
    tangent, found = torch.randn(4, 3), []
    for backend in ("torch", "onednn"):
        with ops.force(backend), forward_ad.dual_level():
            dual = forward_ad.make_dual(mlp.fc1.weight.detach(), tangent)
            given = dict(mlp.named_parameters()) | {"fc1.weight": dual}
            out = torch.func.functional_call(mlp, given, (x,))
            found.append(forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0.01


@pytest.mark.usefixtures("any_size")
def test_second_derivatives():
    torch.manual_seed(0)
    mlp = Mlp(3, 4)
    found = {}
    for backend in ("torch", "onednn"):
        x = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()
        with ops.force(backend):
            (first,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
            found[backend] = torch.autograd.grad(first.square().sum(), (x, *mlp.parameters()))
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("any_size")
def test_outputs_may_be_changed_in_place():
    mlp, x = Mlp(3, 4), torch.randn(2, 3, requires_grad=True)
    with ops.force("onednn"):
        mlp(x).add_(1).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16), ops.force("onednn"), Calls() as calls:
        assert mlp(x).dtype == torch.bfloat16
    assert calls.convolutions == 0


# Where

FLOAT, USED = torch.float32, ("onednn", "MKL is half as fast on this processor")
AS_FAST = ("torch", "PyTorch's library is as fast as oneDNN on this processor")


@pytest.mark.parametrize(
    "vendor, family, capability, expected",
    [
        ("AuthenticAMD", "26", "AVX512", USED),
        ("AuthenticAMD", "27", "AVX512", USED),
        ("AuthenticAMD", "25", "AVX512", AS_FAST),
        ("AuthenticAMD", "26", "AVX2", AS_FAST),
        ("GenuineIntel", "26", "AVX512", AS_FAST),
        ("AuthenticAMD", "?", "AVX512", AS_FAST),
    ],
)
def test_on_which_processors(vendor, family, capability, expected, cpuinfo):
    cpuinfo(cpu(vendor, family), capability)
    assert explain("linear_layer", "cpu", FLOAT) == expected
    assert verdicts.processor("cpu") == f"cpu Fast {capability}"


def test_on_other_systems_and_builds(cpuinfo, monkeypatch):
    cpuinfo(None)
    assert explain("linear_layer", "cpu", FLOAT) == AS_FAST
    assert verdicts.processor("cpu") == "cpu AVX512"
    cpuinfo("flags : none\n")
    assert explain("linear_layer", "cpu", FLOAT) == AS_FAST
    assert verdicts.processor("cpu") == "cpu unknown AVX512"
    cpuinfo(cpu("AuthenticAMD", "26"), threads=1)
    reason = "on one thread PyTorch does not give such convolutions to oneDNN"
    assert explain("linear_layer", "cpu", FLOAT) == ("torch", reason)
    cpuinfo(cpu("AuthenticAMD", "26"))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert explain("linear_layer", "cpu", FLOAT) == AS_FAST


def test_what_keeps_convolutions_away(cpuinfo, monkeypatch):
    cpuinfo(cpu("AuthenticAMD", "26"))
    reason = "in bfloat16 PyTorch's linear is oneDNN's"
    assert explain("linear_layer", "cpu", torch.bfloat16) == ("torch", reason)
    with torch.autocast("cpu", torch.bfloat16):
        assert explain("linear_layer", "cpu", FLOAT) == ("torch", reason)
    for device, dtype in (("cpu", torch.float64), ("cuda", FLOAT)):
        why = "oneDNN is used for float32 and bfloat16 on a CPU only"
        assert explain("linear_layer", device, dtype) == ("torch", why)
    with torch.backends.mkldnn.flags(enabled=False):
        why = "torch.backends.mkldnn is not enabled"
        assert explain("linear_layer", "cpu", FLOAT) == ("torch", why)
    # Nothing private is needed.
    monkeypatch.setattr(dispatch, "_no_linear_pointwise", lambda dtype: "differs")
    assert explain("linear_layer", "cpu", FLOAT) == USED
    with ops.force("torch"):
        assert explain("linear_layer", "cpu", FLOAT) == ("torch", "forced by ops.force")
    refuted = verdicts.Verdict("linear_layer", "onednn", "float32", False, "it differed", "cpu")
    asked = []
    monkeypatch.setattr(verdicts, "known", lambda *given: asked.append(given) or refuted)
    assert explain("linear_layer", "cpu", FLOAT) == ("torch", "it differed")
    assert asked == [("linear_layer", "onednn", "cpu", "float32")]
