"""Folding changes no output and leaves no norm that could have gone."""

import pytest
import timm
import torch
from torch import nn

import backbones
from dense.backbone import DenseBackbone


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
@pytest.mark.parametrize("size", [(64, 64), (75, 101)])
def test_outputs_stay(family, size):
    model = spread(timm.create_model(f"{family}_nano", num_classes=7)).double()
    before = norms(model)
    fused = backbones.fuse(model)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-9)
        single = backbones.fuse(model.float())(x.float())
        scale = expected.abs().max()
        assert (single - expected).abs().max() < 1e-5 * scale
    assert norms(model) == before
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
