"""Folding changes no output and leaves no norm that could have gone."""

import itertools
import pickle
import threading
from copy import deepcopy
from importlib import import_module

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import backbones
from dense.backbone import _FOLDED, DenseBackbone


def spread(model: nn.Module) -> nn.Module:
    """Norms whose factors, of both signs, and summands matter."""
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "running_var"):
            with torch.no_grad():
                module.weight.copy_(torch.randn_like(module.weight) + 0.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "running_var")]


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_norms_are_folded(family):
    """All that can be; ``test_references.py`` compares what the network gives."""
    model = timm.create_model(f"{family}_nano", num_classes=7)
    before = norms(model)
    fused = backbones.fuse(model)
    assert norms(model) == before
    assert not any(module.training for module in fused.modules())
    left = [name for name in norms(fused) if not name.endswith("mid_norm")]
    assert not left and (family == "i_d_dw_conv" or not norms(fused))


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_dense_backbone_keeps_the_norms_of_its_outputs(norm):
    model = spread(DenseBackbone("d_dw_conv_nano", norm=norm))
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        expected = model(x)
        fused = backbones.fuse(model, inplace=True)
        assert fused is model
        for ours, theirs in zip(fused(x), expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert norms(fused) == [f"norms.{i}" for i in range(4)]


def test_a_model_in_training_is_left_in_training():
    model = spread(timm.create_model("dw_conv_nano", num_classes=0)).train()
    assert not backbones.fuse(model).training and model.training


def test_the_adapters_flag_follows_what_is_learned_and_loaded():
    plain = spread(DenseBackbone("dw_conv_nano"))
    fused = DenseBackbone("dw_conv_nano", fuse=True).eval()
    x = torch.randn(1, 3, 64, 96)
    fused(x)
    with torch.no_grad():
        before = fused(x)
        assert not set(norms(_FOLDED[fused])) and norms(fused)
    fused.load_state_dict(plain.state_dict())
    assert fused.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for ours, theirs, old in zip(fused(x), plain(x), before, strict=True):
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
            assert not ours.allclose(old)
    # With gradients it is the network itself.
    fused(x)[0].sum().backward()
    assert fused.stages[0].blocks[0].mixer.in_proj.weight.grad is not None
    fused.train()
    with torch.no_grad():
        fused.stages[0].blocks[0].mixer.in_proj.weight.mul_(2)
        changed = fused.eval()(x)[0]
        assert not changed.allclose(plain(x)[0])
        twin = fused.double()(x.double())[0]
        assert (twin - changed).abs().max() < 1e-4 * changed.abs().max()
    copied = deepcopy(fused)
    with torch.no_grad():
        torch.testing.assert_close(copied(x.double())[0], fused(x.double())[0])
    pickle.loads(pickle.dumps(fused))


def test_folding_twice_is_folding_once():
    model = spread(DenseBackbone("i_d_dw_conv_nano", fuse=True))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = DenseBackbone.forward(model, x)
        for ours, theirs in zip(backbones.fuse(model, inplace=True)(x), expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_a_fused_network_is_saved_and_loaded(family, tmp_path):
    """safetensors takes contiguous tensors only."""
    fused = backbones.fuse(spread(timm.create_model(f"{family}_nano", num_classes=7)))
    safetensors.torch.save_file(fused.state_dict(), tmp_path / "fused.safetensors")
    other = backbones.fuse(timm.create_model(f"{family}_nano", num_classes=7))
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "fused.safetensors"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert other(x).equal(fused(x))


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_layers_that_somebody_changed_stay(family):
    """A replaced, hooked or parametrized layer says what it says in the fused network, too."""

    class Doubled(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 2 * self.layer(x)

    model = spread(timm.create_model(f"{family}_nano", num_classes=7)).double()
    for block in model.stages[2].blocks:
        for name, child in list(block.mixer.named_children()):
            if isinstance(child, nn.Linear | nn.Conv2d):
                setattr(block.mixer, name, Doubled(child))
    mlp = model.stages[0].blocks[0].mlp
    mlp.act = nn.ReLU()
    model.stages[1].blocks[0].mlp.fc1 = Doubled(model.stages[1].blocks[0].mlp.fc1)
    model.stages[3].blocks[0].mlp.fc2.register_forward_hook(lambda module, args, out: out + 1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(backbones.fuse(model)(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_compiler_sees_the_network_itself():
    model = spread(DenseBackbone("dw_conv_nano", fuse=True))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[3]
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)[3]
        assert (compiled - expected).abs().max() < 1e-4 * expected.abs().max()
        exported = torch.export.export(model, (x,))
    assert len(exported.constants) == 0
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(DenseBackbone("dw_conv_nano")))


SIZES = [(64, 64), (97, 131), (230, 64)]


@pytest.fixture(params=[2**22, 2**14], ids=["whole", "pieces"])
def pieces(request, monkeypatch):
    """How many bytes of a hidden map the fused networks compute at a time."""
    monkeypatch.setattr(import_module("backbones.ops.linear"), "_HIDDEN", request.param)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", backbones.FAMILIES)
@pytest.mark.usefixtures("pieces")
def test_pieces_of_maps_in_both_dtypes(family, size):
    """Windows that wrap around, that are padded, and that one piece has or many; two images."""
    given = dict(num_classes=0, img_size=size, depths=(2, 2))
    model = spread(timm.create_model(f"{family}_nano", **given))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = deepcopy(model).double().forward_features(x.double())
        fused = backbones.fuse(model)

        def error(network: nn.Module, image: torch.Tensor) -> float:
            out = network.forward_features(image)
            return (out - expected).abs().max() / expected.abs().max()

        assert error(fused, x) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert error(fused, x) < 3e-2
            assert fused.forward_features(x).dtype == torch.bfloat16
        assert error(fused, x) < 1e-5
        assert error(fused.bfloat16(), x.bfloat16()) < 3e-2


@pytest.mark.parametrize(
    "options", [dict(se_ratio=0.25), dict(local_kernel=3), dict(output_stride=8)]
)
@pytest.mark.parametrize("family", ["swin", "dw_conv"])
@pytest.mark.usefixtures("pieces")
def test_pieces_of_other_blocks(family, options):
    model = spread(timm.create_model(f"{family}_nano", num_classes=0, **options)).double()
    x = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        expected = model.forward_features(x.double())
        got = backbones.fuse(model).float().forward_features(x)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_a_network_that_has_run_follows_its_weights(family):
    model = spread(timm.create_model(f"{family}_nano", num_classes=7))
    other, x = (
        backbones.fuse(timm.create_model(f"{family}_nano", num_classes=7)),
        torch.randn(1, 3, 64, 64),
    )
    with torch.no_grad():
        expected = model(x)
        other(x)
        other.load_state_dict(backbones.fuse(model).state_dict())
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
        for tensor in other.parameters():
            tensor.mul_(1.1)
        torch.testing.assert_close(other(x), deepcopy(other)(x), rtol=0, atol=0)
        other.bfloat16()(x.bfloat16())
        torch.testing.assert_close(other.float()(x), deepcopy(other)(x), rtol=0, atol=0)
    assert not any(t.is_mkldnn for t in other.state_dict().values())
    pickle.loads(pickle.dumps(other))


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_two_threads_call_one_network(family):
    """Both find nothing packed, or what the other packed."""
    fused = backbones.fuse(spread(timm.create_model(f"{family}_nano", num_classes=7)))
    images = torch.randn(2, 2, 3, 64, 64)
    start, got = threading.Barrier(2), {}

    def call(number: int) -> None:
        start.wait()
        with torch.no_grad():
            got[number] = [fused(images[number]) for _ in range(3)]

    with torch.no_grad():
        expected = [deepcopy(fused)(x) for x in images]
    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate(expected):
        for out in got[number]:
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["swin", "dw_conv"])
def test_hooks_of_a_fused_network_see_whole_maps(family):
    fused = backbones.fuse(spread(timm.create_model(f"{family}_nano", num_classes=7)))
    block, x, seen = fused.stages[0].blocks[0], torch.randn(1, 3, 64, 64), []
    with torch.no_grad():
        expected = fused(x)
        for part in (block.norm2, block.mlp, block.mixer):
            handle = part.register_forward_hook(lambda module, args, out: seen.append(out.shape))
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
            handle.remove()
    assert seen == [(1, 16, 16, block.mlp.fc2.bias.numel())] * 3


@pytest.mark.slow
@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_graphs_of_a_fused_network_have_pytorchs_operators_only(family):
    fused = backbones.fuse(spread(timm.create_model(f"{family}_nano", num_classes=7)))
    x, calls = torch.randn(1, 3, 64, 64), []

    def recorded(graph: torch.fx.GraphModule, _):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        expected = fused(x)
        compiled = torch.compile(fused, backend=recorded, fullgraph=True)(x)
        exported = torch.export.export(fused, (x,))
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-5)
    calls.extend(str(node.target) for node in exported.graph.nodes)
    assert calls and not any("mkldnn" in call for call in calls)
    assert all("dense" not in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_pieces_need_less_memory(family, monkeypatch):
    """No map of queries, keys and values or of an MLP, and no sum beside its summands."""
    monkeypatch.setattr(import_module("backbones.ops.linear"), "_HIDDEN", 2**16)
    model = spread(timm.create_model(f"{family}_nano", num_classes=0, depths=(2,), img_size=448))
    fused, x = backbones.fuse(model), torch.randn(1, 3, 448, 448)
    with torch.no_grad():
        assert peak(lambda: fused(x)) < peak(lambda: model(x)) / 2


def peak(step) -> int:
    step()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes))
