"""Swin's options: sliding attention (Table 5), no position bias, and appendix C's convolutions."""

import io

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import backbones
from backbones import mixers, ops
from backbones.layouts import LAYOUTS, family_of, from_ours
from backbones.mixers.sliding_attention import CONVOLUTIONS, PreConvolution
from dense.analysis import complexity
from dense.backbone import DenseBackbone
from tests.support import build

OPTIONS = [
    dict(sliding=True),
    dict(position_bias=False),
    dict(sliding=True, position_bias=False),
    *(dict(conv=conv) for conv in CONVOLUTIONS),
    dict(conv="post", position_bias=False),
]


def scattered(model: nn.Module) -> nn.Module:
    """In evaluation, with values for all parameters and statistics that a mistake would show in."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                near = 1.0 if "norm" in name and name.endswith(("weight", "var")) else 0.0
                value.add_(0.1 * torch.randn_like(value)).add_(0.2 * near)
    return model.eval()


def test_gradients_reach_the_middle_of_the_bias_table_alone():
    mixer = mixers.SlidingAttention(8, 2, 7)
    mixer(torch.randn(1, 9, 9, 8)).square().sum().backward()
    reached = mixer.relative_position_bias_table.grad.any(1).reshape(13, 13)
    expected = torch.zeros(13, 13, dtype=torch.bool)
    expected[3:10, 3:10] = True
    assert reached.equal(expected)


@pytest.mark.parametrize("conv", [None, *CONVOLUTIONS])
@pytest.mark.parametrize("window, said", [(12, "12"), ((7, 4), r"\(7, 4\)")])
def test_an_even_window_is_refused(conv, window, said):
    with pytest.raises(ValueError, match=f"window_size={said}: .* odd"):
        build("swin_nano", sliding=True, conv=conv, window_size=window)
    model = build("swin_nano", sliding=True, conv=conv)
    with pytest.raises(ValueError, match=f"window_size={said}: .* odd"):
        model.set_input_size(window_size=window)


def test_an_unknown_convolution_is_refused():
    known = "static, post, pre, pre_depthwise, pre_full and None"
    with pytest.raises(ValueError, match=f"conv='middle': {known} are valid"):
        build("swin_nano", conv="middle")


# Millions of parameters and G of multiply-adds of tiny, appendix C's with the table of 169 rows.
COUNTS = {
    "sliding": (dict(sliding=True), 28.288, 4.509),
    "sliding, no position bias": (dict(sliding=True, position_bias=False), 28.265, 4.509),
    "no position bias": (dict(position_bias=False), 28.265, 4.509),
    "static": (dict(conv="static"), 28.505, 4.58),
    "post": (dict(conv="post"), 28.290, 4.53),
    "pre": (dict(conv="pre"), 28.298, 4.52),
    "pre_depthwise": (dict(conv="pre_depthwise"), 28.337, 4.52),
    "pre_full": (dict(conv="pre_full"), 47.707, 7.63),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    options, parameters, flops = COUNTS[name]
    with torch.device("meta"):
        model = timm.create_model("swin_tiny", **options)
    assert complexity.parameters(model) / 1e6 == pytest.approx(parameters, abs=1.01e-3)
    assert complexity.flops(model, (1, 3, 224, 224)) / 1e9 == pytest.approx(flops, abs=6e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_and_loaded(options, tmp_path):
    model = scattered(build("swin_nano", **options))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = build("swin_nano", seed=1, **options).eval()
    report = backbones.load_checkpoint(other, tmp_path / "model.pth")
    assert not (report.missing or report.unexpected or report.resized)
    with torch.no_grad():
        for size in ((20, 131), (4, 4)):
            x = torch.randn(2, 3, *size)
            assert other(x).equal(model(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_another_window(options, tmp_path):
    """Set on a model, built, and from a checkpoint."""
    model = scattered(build("swin_nano", window_size=5, **options))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    resized = build("swin_nano", **options).eval()
    backbones.load_checkpoint(resized, tmp_path / "model.pth")
    model.set_input_size(window_size=7)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in resized.state_dict().items()
    }
    x = torch.randn(1, 3, 70, 50)
    with torch.no_grad():
        torch.testing.assert_close(model(x), resized(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_in_mixed_precision(options, channels_last):
    model = build("swin_nano", in_chans=4, **options)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 60, 36)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    expected = model.eval()(x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert (model(x) - expected).abs().max() < 0.1 * expected.abs().max() + 0.02


def two_stages(**options) -> nn.Module:
    arguments = dict(norm="BN", out_indices=(0, 1), depths=(2, 1, 1, 1))
    return scattered(DenseBackbone("swin_nano", **arguments, **options))


def agree(run, backbone: nn.Module) -> None:
    for size in ((64, 100), (101, 68)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            for got, expected in zip(run(x), backbone(x), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


CAPTURED = [
    dict(sliding=True),
    dict(conv="static"),
    *(pytest.param(dict(conv=conv), marks=pytest.mark.e2e) for conv in ("post", "pre")),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", CAPTURED, ids=str)
def test_one_compiled_graph_for_changing_sizes(options):
    backbone = two_stages(**options)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    agree(torch.compile(backbone, fullgraph=True, dynamic=True, backend=counter), backbone)
    assert counter.frame_count == 1


def changing() -> dict:
    return {2 + i: torch.export.Dim(f"side{i}", min=60, max=4096) for i in range(2)}


@pytest.mark.slow
@pytest.mark.parametrize("options", CAPTURED, ids=str)
def test_torch_export(options):
    backbone = two_stages(**options)
    program = torch.export.export(
        backbone,
        (torch.randn(1, 3, 63, 92),),
        dynamic_shapes=(changing(),),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    agree(program.module(), backbone)
    assert not [n for n in program.graph.nodes if "dense" in str(n.target)]


@pytest.mark.e2e
def test_onnx():
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone, x = two_stages(sliding=True), torch.randn(1, 3, 63, 92)
    shapes = (changing(),)
    program = torch.onnx.export(backbone, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = ort.InferenceSession(file.getvalue())
    (name,) = (i.name for i in session.get_inputs())
    agree(
        lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})], backbone
    )


# Transforms of functions, and tensors without values


@pytest.mark.parametrize("options", CAPTURED, ids=str)
def test_per_sample_gradients_and_forward_mode(options):
    torch.manual_seed(0)
    mixer = block(**options)
    parameters = {name: p.detach() for name, p in mixer.named_parameters()}
    x, direction = torch.randn(2, 3, 9, 8, 12).double()

    def loss(parameters, x):
        return torch.func.functional_call(mixer, parameters, (x[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        mixer.zero_grad()
        loss(dict(mixer.named_parameters()), one).backward()
        for name, parameter in mixer.named_parameters():
            torch.testing.assert_close(got[name][i], parameter.grad)

    _, tangent = torch.func.jvp(mixer, (x,), (direction,))
    (gradient,) = torch.autograd.grad(mixer(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(tangent.sum(), (gradient * direction).sum())


@pytest.mark.parametrize("options", CAPTURED, ids=str)
def test_gradients_of_gradients_are_refused_in_a_line(options):
    mixer, x = block(**options), torch.randn(1, 9, 8, 12).double().requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice|no autograd formula"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("options", CAPTURED, ids=str)
def test_what_fake_tensors_and_inference_leave_serves_training(options):
    """In windows of a size that nothing else has: no constant of it is kept yet."""
    from torch._subclasses import FakeTensorMode

    options = options | {"window_size": 11}
    with FakeTensorMode():
        at(**options)(torch.randn(1, 9, 8, 12)).sum().backward()
    mixer, x = at(**options), torch.randn(1, 9, 8, 12)
    with torch.inference_mode():
        expected = mixer(x)
    out = mixer(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    with FakeTensorMode():
        at(**options)(torch.randn(1, 9, 8, 12)).sum().backward()
    with torch.device("meta"):
        assert at(**options)(torch.randn(1, 9, 8, 12)).shape == (1, 9, 8, 12)


def at(**options) -> mixers.Mixer:
    return mixers.WindowAttention.at(12, 0, 1, (9, 8), num_heads=(3,), **options).eval()


def block(**options) -> mixers.Mixer:
    return at(**options).double()


def test_pytorchs_counter_agrees():
    """Two FLOPs for a multiply-add; the backward pass has five products for two."""
    qkv, bias = torch.randn(2, 9, 8, 36, requires_grad=True), torch.randn(3, 25)
    with FlopCounterMode(display=False) as counter:
        out = ops.sliding_attention(qkv, bias, 3, (5, 5))
        products = 2 * 2 * 9 * 8 * 12 * 25
        assert counter.get_total_flops() == 2 * products
        out.sum().backward()
    assert counter.get_total_flops() == 7 * products


# Checkpoints


@pytest.mark.parametrize("layout", ["ours", "original", "timm", "openmmlab"])
@pytest.mark.parametrize("options", [dict(sliding=True), dict(conv="static"), dict(conv="post")])
def test_swins_weights_load_as_they_are(options, layout, tmp_path):
    """And give what sliding attention gives."""
    swin = scattered(build("swin_nano"))
    torch.save(from_ours(swin.state_dict(), LAYOUTS[layout]), tmp_path / "swin.pth")
    model, sliding = (build("swin_nano", **given).eval() for given in (options, dict(sliding=True)))
    backbones.load_checkpoint(model, tmp_path / "swin.pth")
    sliding.load_state_dict(swin.state_dict())
    x = torch.randn(1, 3, 70, 50)
    with torch.no_grad():
        features, expected = model.forward_features(x), sliding.forward_features(x)
    if layout == "openmmlab":  # which has norms of the stages instead of the final one
        features, expected = (
            m.forward_intermediates(x, intermediates_only=True)[-1] for m in (model, sliding)
        )
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_a_network_without_position_bias_names_what_a_file_has_more(tmp_path):
    swin, plain = build("swin_nano"), build("swin_nano", position_bias=False)
    extra = swin.state_dict().keys() - plain.state_dict().keys()
    assert {name.rsplit(".", 1)[1] for name in extra} == {"relative_position_bias_table"}
    assert plain.state_dict().keys() < swin.state_dict().keys() and len(extra) == 5
    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    with pytest.raises(
        backbones.CheckpointError,
        match=r"(?s)entries match.*unexpected: .*mixer\.relative_position_bias_table",
    ):
        backbones.load_checkpoint(plain, tmp_path / "swin.pth")
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(
        backbones.CheckpointError, match=r"missing: .*mixer\.relative_position_bias_table"
    ):
        backbones.load_checkpoint(swin, tmp_path / "plain.pth")


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_convolutional_forms_are_swins_and_no_others_layout_holds_them(conv):
    entries = build("swin_nano", conv=conv).state_dict()
    assert family_of(entries) == "swin"
    with pytest.raises(ValueError, match="not swin as"):
        from_ours(entries, LAYOUTS["timm"])
    # What changes the memory layout, or looks like Local-MLP's, takes no parameter for an image.
    for name, value in entries.items():
        assert not name.endswith("mixer.weight")
        assert value.ndim < 4 or name.endswith(("proj.weight", "pre.conv.weight"))


# Convolutions before attention


@pytest.mark.parametrize("kind, number", [("shared", 1), ("depthwise", 6), ("full", 6)])
def test_the_convolution_before_attention(kind, number):
    """Read by an operator, called because of a hook, and folded: the same."""
    torch.manual_seed(0)
    pre = PreConvolution(6, kind).double()
    weight = pre.conv.weight
    assert weight.shape == (number, 6 if kind == "full" else 1, 3, 3)
    nn.init.uniform_(pre.norm.weight, 0.5, 2)
    nn.init.normal_(pre.norm.bias)
    pre(torch.randn(4, 5, 7, 6).double())
    pre.eval()
    x = torch.randn(2, 5, 8, 6).double()
    images, groups = x.permute(0, 3, 1, 2), 1 if kind == "full" else 6
    dense = weight if kind == "full" else weight.expand(6, -1, -1, -1)
    convolved = nn.functional.conv2d(images, dense, padding=1, groups=groups)
    expected = pre.norm(convolved).relu().permute(0, 2, 3, 1)
    torch.testing.assert_close(pre(x), expected)
    called = []
    handle = pre.conv.register_forward_hook(lambda *given: called.append(given))
    torch.testing.assert_close(pre(x), expected)
    assert called
    handle.remove()
    pre.fold()
    assert isinstance(pre.norm, nn.Identity)
    torch.testing.assert_close(pre(x), expected)
