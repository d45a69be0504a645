"""Table 12: the three norms of the blocks, centering-calibrated batch norm among them."""

import copy

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones.mixers.norm import CenteredBatchNorm2d, freeze_batch_norms, normalise
from dense.backbone import DenseBackbone
from dense.optim import no_weight_decay
from tests.support import build

NORMS = {
    "layernorm": nn.LayerNorm,
    "batchnorm": nn.BatchNorm2d,
    "centered_batchnorm": CenteredBatchNorm2d,
}
FAMILIES = ("swin", "dw_conv")
# Blocks 1 1 2 1: norm1 and norm2 of Swin; three in the mixer of DW-Conv, and norm2.
PLACES = {"swin": ("norm1", "norm2"), "dw_conv": ("in_norm", "mid_norm", "out_norm", "norm2")}


def spread(model: nn.Module) -> nn.Module:
    """Statistics and factors that matter, ``center`` included."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, CenteredBatchNorm2d):
            nn.init.normal_(module.center)
    return model.eval()


def test_centering_keeps_the_type_of_the_map():
    """Under autocast ``center`` is float32, which must not make the map float32."""
    norm = spread(CenteredBatchNorm2d(8))
    x = torch.randn(2, 20, 20, 8).bfloat16()
    expected = normalise(norm, x.float())
    with torch.autocast("cpu", torch.bfloat16):
        half = normalise(norm, x)
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_of_the_blocks_alone_are_replaced(family, name):
    model = build(f"{family}_nano", norm_layer=name)
    plain = build(f"{family}_nano")
    inner = {f"{place}.norm" for place, m in model.named_modules() if type(m) is NORMS[name]}
    inner = inner if name == "centered_batchnorm" else set()
    found = {
        place: type(module)
        for place, module in model.named_modules()
        if ".blocks." in place and isinstance(module, tuple(NORMS.values())) and place not in inner
    }
    assert len(found) == 5 * len(PLACES[family])
    assert {place.rsplit(".", 1)[1] for place in found} == set(PLACES[family])
    assert set(found.values()) == {NORMS[name]}
    around = [m for p, m in model.named_modules() if ".blocks." not in p and "norm" in p]
    assert around and all(type(m) is nn.LayerNorm for m in around)
    # The order of the random draws is the family's.
    values = dict(model.named_parameters())
    for key, value in plain.named_parameters():
        if "norm" not in key:
            assert value.equal(values[key]), key


def test_naming_the_familys_norm_changes_nothing():
    x = torch.randn(2, 3, 40, 50)
    for family, name in (("swin", "layernorm"), ("dw_conv", "batchnorm")):
        named, plain = build(f"{family}_nano", norm_layer=name), build(f"{family}_nano")
        assert str(named) == str(plain) and list(named.state_dict()) == list(plain.state_dict())
        assert named(x).equal(plain(x))


@pytest.mark.parametrize("family", ["d_dw_conv", "i_d_dw_conv"])
def test_the_norm_of_a_kernel_predictor_stays(family):
    model = build(f"{family}_nano", norm_layer="centered_batchnorm")
    for stage in model.stages:
        for block in stage.blocks:
            assert type(block.mixer.reduce_norm) is nn.BatchNorm2d
            assert type(block.mixer.in_norm) is CenteredBatchNorm2d


def test_an_unknown_norm_is_named():
    message = "norm_layer='groupnorm': layernorm, batchnorm, centered_batchnorm are valid"
    with pytest.raises(ValueError, match=message):
        build("swin_nano", norm_layer="groupnorm")


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_norms_weights_start_centered_ones(family, tmp_path):
    """With ``center`` 0: the same outputs, and nothing is missing."""
    plain = spread(build(f"{family}_nano", norm_layer="batchnorm"))
    torch.save(plain.state_dict(), tmp_path / "bn.pth")
    centered = spread(build(f"{family}_nano", seed=1, norm_layer="centered_batchnorm"))
    report = backbones.load_checkpoint(centered, tmp_path / "bn.pth")
    assert not (report.missing or report.unexpected or report.resized)
    x = torch.randn(2, 3, 37, 50)
    with torch.no_grad():
        torch.testing.assert_close(centered(x), plain(x))
    # Its own file keeps the centers.
    spread(centered)
    torch.save(centered.state_dict(), tmp_path / "centered.pth")
    other = build(f"{family}_nano", seed=2, norm_layer="centered_batchnorm").eval()
    assert not backbones.load_checkpoint(other, tmp_path / "centered.pth").missing
    assert other(x).equal(centered(x))
    # Layer norm has no statistics to start from; batch norm has no place for the centers.
    torch.save(build(f"{family}_nano", norm_layer="layernorm").state_dict(), tmp_path / "ln.pth")
    with pytest.raises(backbones.CheckpointError, match="missing: .*norm.*center"):
        backbones.load_checkpoint(other, tmp_path / "ln.pth")
    with pytest.raises(backbones.CheckpointError, match="unexpected: .*norm.*center"):
        backbones.load_checkpoint(plain, tmp_path / "centered.pth")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_a_dense_backbone_keeps_the_norms_of_its_outputs(family, norm):
    own = DenseBackbone(f"{family}_nano", norm=norm)
    backbone = DenseBackbone(f"{family}_nano", norm=norm, norm_layer="centered_batchnorm")
    assert str(backbone.norms) == str(own.norms)
    # The converters keep the centers; freezing freezes them.
    centers = [m.center for m in backbone.modules() if isinstance(m, CenteredBatchNorm2d)]
    assert len(centers) == 5 * len(PLACES[family])
    assert all(center.requires_grad == (norm != "FrozenBN") for center in centers)
    before = copy.deepcopy(backbone.state_dict())
    features = backbone(torch.randn(2, 3, 70, 101))
    sum(f.square().sum() for f in features).backward()
    assert all((c.grad is not None and c.grad.any()) == c.requires_grad for c in centers)
    moved = [k for k, v in backbone.state_dict().items() if not v.equal(before[k])]
    assert bool(moved) == (norm != "FrozenBN") and all("running" in k or "num" in k for k in moved)


def test_converters_to_sync_bn_and_frozen_bn_keep_the_centers():
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norms):
        model = spread(build("dw_conv_nano", norm_layer="centered_batchnorm"))
        x = torch.randn(2, 3, 37, 50)
        expected = model(x)
        convert(model)
        types = {type(m.norm).__name__ for m in model.modules() if hasattr(m, "center")}
        assert types <= {"SyncBatchNorm", "FrozenBatchNorm2d"} and types
        if convert is freeze_batch_norms:
            torch.testing.assert_close(model(x), expected)


def test_centers_have_no_weight_decay():
    model = build("swin_nano", norm_layer="centered_batchnorm")
    centers = {name for name, _ in model.named_parameters() if name.endswith(".center")}
    assert len(centers) == 10 and centers <= no_weight_decay(model)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_folded(family, name):
    """``test_references.py`` compares what the network gives."""
    fused = backbones.fuse(build(f"{family}_nano", norm_layer=name))
    left = sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    # Swin's norm2 folds into the MLP, norm1 has a mixer behind it; DW-Conv's fold all.
    expected = {("swin", "batchnorm"): 5, ("dw_conv", "batchnorm"): 0}
    count = 5 * len(PLACES[family]) if name == "centered_batchnorm" else 0
    assert left == expected.get((family, name), count)


def test_checkpointed_blocks_update_the_statistics_once():
    results = []
    for checkpointed in (False, True):
        model = build("swin_nano", norm_layer="centered_batchnorm")
        model.set_grad_checkpointing(checkpointed)
        x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
        model(x).square().sum().backward()
        results.append(model.state_dict())
    assert all(value.equal(results[1][key]) for key, value in results[0].items())


def test_counts_are_table_12s():
    """24 norms of Swin-T, 48 of DW-T: a parameter a channel more; batch norm has layer norm's."""
    expected = {
        "swin": dict(layernorm=28.288, batchnorm=28.288, centered_batchnorm=28.297),
        "dw_conv": dict(layernorm=24.173, batchnorm=24.173, centered_batchnorm=24.190),
    }
    for family, counts in expected.items():
        for name, count in counts.items():
            with torch.device("meta"):
                model = timm.create_model(f"{family}_tiny", norm_layer=name)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == count
