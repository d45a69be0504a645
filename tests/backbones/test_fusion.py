"""Folding changes no output and leaves no norm that could have gone."""

import pickle
from copy import deepcopy

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
