"""Tools that look into a network find PyTorch's own modules, each of them called."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import backbones
from backbones.mixers import Mixer

FAMILY = pytest.mark.parametrize("family", backbones.FAMILIES)
SIZE = (1, 3, 40, 52)
ORDINARY = {nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.GELU, nn.Identity}


def build(family, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f"{family}_nano", num_classes=5, **kwargs)


def images(count=2):
    return torch.randn(count, *SIZE[1:], generator=torch.Generator().manual_seed(1))


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@FAMILY
def test_layers_that_hold_weights_are_pytorchs(family):
    for name, module in build(family).named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and not isinstance(module, Mixer):
            assert type(module) in ORDINARY, name
        assert not (type(module).__module__.startswith("backbones") and module._buffers) or (
            set(module._buffers) == {"relative_position_index"}
        )


@FAMILY
def test_hooks_fire_on_every_module(family):
    model, x = build(family), images()
    expected = model(x)
    wanted = {name for name, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    called, differentiated = set(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        module.register_full_backward_hook(lambda *_, name=name: differentiated.add(name))
    out = model(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert called == wanted
    assert differentiated == wanted


@FAMILY
def test_global_hooks_fire_on_every_module(family):
    model, x = build(family).eval(), images(1)
    wanted = {m for m in model.modules() if not isinstance(m, nn.ModuleList)}
    before, after, back = set(), set(), set()
    module = torch.nn.modules.module
    handles = [
        module.register_module_forward_pre_hook(lambda m, _: before.add(m)),
        module.register_module_forward_hook(lambda m, *_: after.add(m)),
        module.register_module_full_backward_hook(lambda m, *_: back.add(m)),
    ]
    try:
        model(x).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert wanted == before == after == back


@FAMILY
def test_a_layers_own_forward_is_called(family):
    """As tools that wrap a network patch it: on the instance."""
    model, called = build(family).eval(), []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        layer.forward = lambda x, layer=layer: called.append(layer) or type(layer).forward(layer, x)
    model(images(1))
    assert set(called) == set(layers)


@FAMILY
def test_an_activation_that_was_replaced_is_used(family):
    model, x = build(family).eval(), images(1)
    before = model(x)
    for block in model.stages[0].blocks:
        block.mlp.act = nn.ReLU()
    assert not model(x).allclose(before)


@pytest.mark.parametrize("name", ["in_act", "mid_act"])
@pytest.mark.parametrize("family", ["dw_conv", "d_dw_conv", "i_d_dw_conv"])
def test_a_mixers_activation_that_was_replaced_is_used(family, name):
    model, x = build(family).eval(), images(1)
    before = model(x)
    for block in model.stages[0].blocks:
        setattr(block.mixer, name, nn.Tanh())
    after = model(x)
    assert not after.allclose(before)
    with torch.no_grad():
        torch.testing.assert_close(backbones.fuse(model)(x), after, rtol=1e-4, atol=1e-5)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(layer):
    return parametrize.register_parametrization(layer, "weight", Halved())


@FAMILY
@pytest.mark.parametrize("change", [pruned, weight_normed, parametrized])
def test_weights_that_are_computed_train_two_steps(family, change):
    model, x = build(family), images()
    changed = {}
    for name, layer in model.named_modules():
        if type(layer) in (nn.Linear, nn.Conv2d):
            changed[name] = layer
    for layer in changed.values():
        change(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name in changed:
        own = [n for n in start if n.startswith(f"{name}.") and "bias" not in n]
        # Behind a batch norm the length of a weight has no gradient.
        assert any(not model.get_parameter(n).equal(start[n]) for n in own), name


@FAMILY
def test_dynamic_quantisation_takes_every_linear(family):
    model = build(family).eval()
    names = set(linears(model))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = {
        name
        for name, m in quantised.named_modules()
        if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)
    }
    assert found == names and len(names) > 15
    x = images(1)
    assert nn.functional.cosine_similarity(quantised(x), model(x)).item() > 0.95


def test_a_layer_is_plain_or_not():
    from backbones.layers import is_plain

    class Other(nn.Linear):
        pass

    assert is_plain(nn.Linear(2, 2), nn.Linear)
    assert not is_plain(Other(2, 2), nn.Linear)
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        layer = nn.Linear(2, 2)
        handle = getattr(layer, register)(lambda *_: None)
        assert not is_plain(layer, nn.Linear), register
        handle.remove()
        assert is_plain(layer, nn.Linear)
    for change in (pruned, weight_normed, parametrized):
        assert not is_plain(change(nn.Linear(2, 2)), nn.Linear)


# Transforms of functions


@FAMILY
def test_per_sample_gradients(family):
    """vmap of grad: each sample's own, as one sample at a time gives them."""
    model, x = build(family).double().eval(), images(3).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name][i], parameter.grad, rtol=1e-6, atol=1e-9)


@FAMILY
def test_forward_mode_derivatives(family):
    """jvp, of the image and of the weights, against the backward pass."""
    model, x = build(family).double().eval(), images(1).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    g = torch.Generator().manual_seed(2)
    direction = torch.randn(x.shape, generator=g, dtype=x.dtype)
    along = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in parameters.items()}
    weights = torch.randn(1, 5, generator=g, dtype=x.dtype)

    def run(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    _, got = torch.func.jvp(run, (parameters, x), (along, direction))
    (model(x.requires_grad_()) * weights).sum().backward()
    expected = (x.grad * direction).sum()
    expected += sum((p.grad * along[name]).sum() for name, p in model.named_parameters())
    torch.testing.assert_close((got * weights).sum(), expected)

    x = x.detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    _, of_image = torch.func.jvp(lambda x: model(x), (x,), (direction,))
    torch.testing.assert_close(tangent, of_image)


@FAMILY
def test_gradients_of_gradients_are_refused_or_right(family):
    model, x = build(family).double().eval(), images(1).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    try:
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        assert "twice" in message or "no autograd formula" in message
        return
    step = 1e-5 * torch.randn_like(x)

    def slope(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x)[0].square().sum()

    expected = (slope(x + step) - slope(x - step)) / 2
    torch.testing.assert_close((second * step).sum(), expected, rtol=1e-3, atol=0)


# Without values, or with them later


@FAMILY
def test_meta_and_fake_tensors(family):
    from torch._subclasses import FakeTensorMode

    with torch.device("meta"):
        model = build(family)
        assert model(torch.randn(SIZE)).shape == (1, 5)
    with FakeTensorMode():
        model = build(family)
        model(torch.randn(SIZE)).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())


@FAMILY
def test_materialised_networks_are_whole(family):
    source, x = build(family).eval(), images(1)
    with torch.device("meta"):
        model = build(family)
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(source.state_dict())
    assert model(x).equal(source(x))
    # By timm's convention, which transformers calls.
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.relative_position_index.fill_(0)
            module.init_non_persistent_buffers()
    assert model(x).equal(source(x))


# Libraries


@FAMILY
def test_lora_reaches_every_linear(family):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = build(family).eval(), images(1)
    expected, names = model(x), set(linears(model)) - {"head.fc"}
    adapted = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(target_modules=sorted(names), r=2, init_lora_weights=False),
    ).eval()
    layers = {n: m for n, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(layers) == len(names)
    assert not adapted(x).allclose(expected)
    adapted(x).sum().backward()
    for name, layer in layers.items():
        for part in (layer.lora_A, layer.lora_B):
            assert part["default"].weight.grad.abs().max() > 0, name
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-5)


@FAMILY
def test_torchao_quantises_weights(family):
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    model, x = build(family).eval(), images(1)
    expected = model(x)
    torchao.quantization.quantize_(model, Int8WeightOnlyConfig())
    assert nn.functional.cosine_similarity(model(x), expected).item() > 0.99


@FAMILY
def test_transformers_save_and_load(family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    transformers.utils.logging.set_verbosity_error()
    config = TimmWrapperConfig(architecture=f"{family}_nano", num_labels=5, do_pooling=True)
    model, x = TimmWrapperForImageClassification(config).eval(), images(1)
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value), name
    # Not bit for bit: products depend on how the memory of the weights is aligned.
    torch.testing.assert_close(again(x).logits, expected, rtol=1e-5, atol=1e-6)


@FAMILY
def test_torchinfo_counts_every_layer(family):
    torchinfo = pytest.importorskip("torchinfo", reason="torchinfo is not installed")
    model = build(family).eval()
    found = torchinfo.summary(model, SIZE, verbose=0).summary_list
    counted = {info.module for info in found if info.num_params and info.macs}
    layers = {m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert layers <= counted
