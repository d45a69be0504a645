"""What a block can have besides: squeeze-and-excitation (Table 15), a convolution (Table 6)."""

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones import ablations
from backbones.layers import SqueezeExcite
from backbones.layouts import LAYOUTS, from_ours
from backbones.pyramid import LocalConv
from tests.support import NANO, build

BOTH = dict(se_ratio=1 / 16, local_kernel=7)
X = torch.randn(2, 3, 61, 90)


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, nn.LayerNorm])
@pytest.mark.parametrize("hooked", [False, True])
def test_the_local_convolution_is_pytorchs_of_the_norm(norm_layer, hooked):
    torch.manual_seed(0)
    kernel = 4
    local = LocalConv(6, kernel, norm_layer).double()
    nn.init.normal_(local.norm.weight)
    nn.init.normal_(local.norm.bias)
    if hooked:
        local.conv.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 9, 8, 6, dtype=torch.float64)
    norm = nn.functional.layer_norm if norm_layer is nn.LayerNorm else nn.functional.batch_norm
    if norm_layer is nn.LayerNorm:
        y = norm(x, (6,), local.norm.weight, local.norm.bias).permute(0, 3, 1, 2)
    else:
        factors = (None, None, local.norm.weight, local.norm.bias)
        y = norm(x.permute(0, 3, 1, 2), *factors, training=True)
    before = (kernel - 1) // 2
    y = nn.functional.pad(y, (before, kernel // 2) * 2)
    y = nn.functional.conv2d(y, local.conv.weight, groups=6)
    torch.testing.assert_close(local(x), y.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", NANO)
def test_all_else_has_the_families_entries_and_draws(name):
    plain, both = build(name), build(name, **BOTH)
    state, values = plain.state_dict(), both.state_dict()
    assert all(value.equal(values[key]) for key, value in state.items())
    added = {key.split(".blocks.")[1].split(".", 1)[1] for key in values if key not in state}
    norm = {"norm.weight", "norm.bias"}
    if not name.startswith("swin"):
        norm |= {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    expected = {f"se.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert added == expected | {f"local.{n}" for n in norm} | {"local.conv.weight"}
    off = build(name, se_ratio=0.0, local_kernel=0)
    assert str(off) == str(plain) and list(off.state_dict()) == list(state)


def test_gates_keep_pytorchs_initialisation():
    """Linears of 0.02 would leave every gate near one half."""
    model = build("swin_tiny", se_ratio=1 / 16)
    model.init_weights()
    for stage, dim in zip(model.stages, (96, 192, 384, 768), strict=True):
        for block in stage.blocks:
            for linear, inputs in ((block.se.fc1, dim), (block.se.fc2, dim // 16)):
                bound = inputs**-0.5
                assert 0.8 * bound < linear.weight.abs().max() <= bound
                assert linear.bias.abs().max() > 0
            assert block.mlp.fc1.weight.std() < 0.025


def test_gates_are_computed_without_autocast():
    """Maps of large numbers whose means differ by less than bfloat16 can say."""
    torch.manual_seed(0)
    se = SqueezeExcite(32, 1 / 4)
    x = 300 + torch.randn(4, 14, 14, 32) / 10
    with torch.no_grad():
        se.fc1.bias -= 300 * se.fc1.weight.sum(1)
        expected = se(x) / x
        with torch.autocast("cpu", torch.bfloat16):
            got = se(x) / x
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", NANO)
def test_fused_parts_stay(name):
    block = backbones.fuse(build(name, **BOTH)).stages[0].blocks[0]
    # The zeros around the map stand after the norm, so it cannot be folded.
    assert type(block.local.norm) in (nn.BatchNorm2d, nn.LayerNorm)
    assert type(block.se.fc1) is nn.Linear


def test_checkpointed_blocks_update_the_local_norms_once():
    results = []
    for checkpointed in (False, True):
        model = build("i_d_dw_conv_nano", **BOTH)
        model.set_grad_checkpointing(checkpointed)
        model(X[..., :40, :40]).square().sum().backward()
        results.append(model.state_dict())
    assert all(value.equal(results[1][key]) for key, value in results[0].items())


def test_files_with_them_have_our_layout_alone(tmp_path):
    for options, entry in (({"se_ratio": 1 / 16}, "se.fc1"), ({"local_kernel": 3}, "local.")):
        state = build("swin_nano", **options).state_dict()
        with pytest.raises(ValueError, match=f"timm .*not swin with .*{entry}"):
            from_ours(state, LAYOUTS["timm"])
        torch.save(state, tmp_path / "with.pth")
        other = build("swin_nano", seed=1, **options)
        assert not backbones.load_checkpoint(other, tmp_path / "with.pth").missing
        with pytest.raises(backbones.CheckpointError, match=f"unexpected: .*{entry}"):
            backbones.load_checkpoint(build("swin_nano"), tmp_path / "with.pth")
    torch.save(build("swin_nano").state_dict(), tmp_path / "without.pth")
    with pytest.raises(backbones.CheckpointError, match="missing: .*local"):
        backbones.load_checkpoint(other, tmp_path / "without.pth")


@pytest.mark.parametrize(
    "row",
    ["swin_se", "dw_conv_se", "i_d_dw_conv_local", "swin_sliding_pre", "swin_sliding_pre_full"],
)
def test_what_the_family_has_is_loaded_if_asked_for(row, tmp_path, caplog):
    """Rows with layers of their own start from their family, but for these layers."""
    family = ablations.ABLATIONS[row].model
    trained = build(f"{family}_nano", seed=1).state_dict()
    torch.save(trained, tmp_path / "family.pth")
    name, options = ablations.ablated(row, f"{family}_nano")
    model = build(name, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(backbones.CheckpointError, match="missing"):
        backbones.load_checkpoint(model, tmp_path / "family.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = backbones.load_checkpoint(model, tmp_path / "family.pth", partial=True)
    assert report.missing and set(report.missing) == before.keys() - trained.keys()
    assert report.missing[0] in caplog.text
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained.get(name, before[name])), name


def test_a_partial_load_leaves_nothing_of_the_file_over(tmp_path):
    torch.save(build("swin_nano").state_dict(), tmp_path / "swin.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    model = build("dw_conv_nano")
    with pytest.raises(backbones.CheckpointError, match="unexpected"):
        backbones.load_checkpoint(model, tmp_path / "swin.pth", partial=True)
    with pytest.raises(backbones.CheckpointError):
        backbones.load_checkpoint(model, tmp_path / "other.pth", partial=True)
    with pytest.raises(backbones.CheckpointError, match="shape"):
        backbones.load_checkpoint(build("swin_tiny"), tmp_path / "swin.pth", partial=True)


@pytest.mark.parametrize("lacking", ["patch_embed", "stages.1.blocks.0.mixer", "norm1"])
def test_a_partial_load_needs_all_of_the_family(lacking, tmp_path):
    """A warning is not enough where the network would be left random."""
    weights = build("swin_nano").state_dict()
    torch.save({k: v for k, v in weights.items() if lacking not in k}, tmp_path / "part.pth")
    model = build("swin_nano", se_ratio=1 / 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(backbones.CheckpointError, match=rf"missing: .*{lacking}"):
        backbones.load_checkpoint(model, tmp_path / "part.pth", partial=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(se_ratio=1 / 64), r"se_ratio=0.015625: 32 channels need 0.03125 to 1, or 0 "),
        (dict(se_ratio=16), "se_ratio=16: 32 channels need"),
        (dict(se_ratio=float("nan")), "se_ratio=nan: 32 channels need"),
        (dict(se_ratio=-1), "se_ratio=-1: 32 channels need"),
        (dict(local_kernel=-3), "local_kernel=-3: 1 or more is needed"),
    ],
)
def test_what_is_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        build("dw_conv_nano", **options)


def test_counts_are_table_15s_and_6s():
    """Two linears of C x C/16 with biases a block; a norm and 49 taps a channel."""
    expected = {
        ("swin_tiny", "se_ratio"): 28.563,
        ("dw_conv_tiny", "se_ratio"): 24.447,
        ("i_d_dw_conv_tiny", "local_kernel"): 26.469,
    }
    for (name, option), count in expected.items():
        with torch.device("meta"):
            model = timm.create_model(name, **{option: BOTH[option]})
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == count
