"""How a pyramid behaves: any size, what is padded, half precision, checkpointing."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import backbones
from backbones.families import TABLE
from backbones.layers import Mlp, SqueezeExcite, ceil_div
from backbones.layouts import LAYOUTS, from_ours
from backbones.mixers import DepthwiseConv, InhomogeneousDynamicDepthwiseConv
from backbones.pyramid import Block, LocalConv, PatchEmbed, Pyramid, Stage
from dense.backbone import DenseBackbone
from tests.support import NANO, build

CONVOLUTIONAL = ("dw_conv_nano", "d_dw_conv_nano", "i_d_dw_conv_nano")


def maps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return model.forward_intermediates(x, intermediates_only=True)


@pytest.mark.parametrize("name", NANO)
def test_any_size_from_32(name):
    """Sizes are ``ceil(H / stride)``; what is missing to a patch is zeros right and below."""
    model = build(name).eval()
    for height, width in ((32, 32), (33, 47), (130, 61), (229, 34)):
        x = torch.randn(1, 3, height, width)
        got = maps(model, x)
        for i, features in enumerate(got):
            stride = 4 * 2**i
            expected = ((height - 1) // stride + 1, (width - 1) // stride + 1)
            assert features.shape == (1, 32 * 2**i, *expected)
            assert features.isfinite().all()
        whole_patches = F.pad(x, (0, -width % 4, 0, -height % 4))
        for features, again in zip(got, maps(model, whole_patches), strict=True):
            assert features.equal(again)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutions_see_no_padding(name):
    """The map that is mixed, normalised and pooled has exactly the positions of its stage."""
    model = build(name)
    seen = {}

    def note(norm, inputs):
        seen.setdefault(names[norm], inputs[0].shape[-2:])

    names = {m: n for n, m in model.named_modules() if n.endswith(("in_norm", "mid_norm"))}
    for norm in names:
        norm.register_forward_pre_hook(note)
    model(torch.randn(2, 3, 75, 101))
    assert len(seen) == 10
    for norm_name, size in seen.items():
        stride = 4 * 2 ** int(norm_name.split(".")[1])
        assert tuple(size) == ((75 - 1) // stride + 1, (101 - 1) // stride + 1), norm_name


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    """Training in half precision: finite, and as far from float32 as the precision says."""
    model = build(name)
    x = torch.randn(4, 3, 128, 160)
    expected = [f.detach() for f in model.forward_intermediates(x, intermediates_only=True)]
    with torch.autocast("cpu", dtype):
        features = model.forward_intermediates(x, intermediates_only=True)
        loss = model(x).float().square().mean()
    for got, reference in zip(features, expected, strict=True):
        error = (got.float() - reference).norm() / reference.norm()
        assert error < 20 * torch.finfo(dtype).eps
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("large", ["reduce", "reduce_norm"])
def test_i_d_dw_predicts_its_kernels_in_float32_under_float16_autocast(large, hooked):
    """Numbers over 65504 before the predictor's norm, or after it; by the operator or by layers."""
    mixer = InhomogeneousDynamicDepthwiseConv(32)
    with torch.no_grad():
        getattr(mixer, large).weight.mul_(1e7)
        if large == "reduce_norm":
            mixer.expand.weight.mul_(1e-7)
    if hooked:
        mixer.expand.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 9, 9, 32)
    expected = mixer(x)
    with torch.autocast("cpu", torch.float16):
        got = mixer(x)
    assert got.dtype == torch.float16
    assert (got - expected).norm() / expected.norm() < 0.02
    got.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", ["swin_nano", "d_dw_conv_nano"])
@pytest.mark.parametrize("batch", [1, 2])
def test_checkpointing_repeats_the_dropped_paths(name, batch):
    """One image too, where D-DW's pooled norm goes another way."""
    results = []
    for checkpointed in (False, True):
        model = build(name, drop_path_rate=0.6)
        model.set_grad_checkpointing(checkpointed)
        x = torch.randn(batch, 3, 64, 64, requires_grad=True)
        torch.manual_seed(1)
        model(x).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append((gradients, x.grad, model.state_dict()))
    (gradients, at_x, state), (others, other_at_x, other_state) = results
    torch.testing.assert_close(others, gradients)
    torch.testing.assert_close(other_at_x, at_x)
    assert all(value.equal(other_state[key]) for key, value in state.items())


def test_a_shorter_backbone_keeps_the_schedule_of_the_whole():
    backbone = DenseBackbone("swin_nano", drop_path_rate=0.4, out_indices=(0, 2))
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in backbone.stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


# What is built without options, and initial values


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_by_itself_a_pyramid_is_tiny(family):
    """Table 8's, with the heads of Swin, without any of the options."""
    with torch.device("meta"):
        model, tiny = Pyramid(TABLE[family].mixer.at), timm.create_model(f"{family}_tiny")
    assert str(model) == str(tiny)
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, tiny))
    assert shapes == expected and shapes["head.fc.weight"] == (1000, 768)
    assert (
        model.feature_info
        == tiny.feature_info
        == [dict(num_chs=96 * 2**i, reduction=4 * 2**i, module=f"stages.{i}") for i in range(4)]
    )
    assert (model.in_chans, model.num_classes, model.global_pool) == (3, 1000, "avg")
    assert model.num_features == model.head_hidden_size == 768
    assert model.head.drop.p == 0 and not any("DropPath" in str(m) for m in model.modules())
    assert not any(stage.grad_checkpointing for stage in model.stages)
    if family.startswith("swin"):
        blocks = [block for stage in model.stages for block in stage.blocks]
        assert [block.mixer.num_heads for block in blocks] == [3, 3, 6, 6, *[12] * 6, 24, 24]
        assert [block.mixer.shifted for block in blocks] == [False, True] * 6


def test_options_reach_their_place():
    model = build(
        "dw_conv_nano",
        img_size=(70, 133),
        in_chans=2,
        global_pool="max",
        depths=(1, 2),
        mlp_ratio=1.5,
        drop_rate=0.25,
        drop_path_rate=0.5,
        num_heads=(1, 2),
        shared=False,
    )
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [tuple(b.mixer.kernels.shape[:3]) for b in blocks] == [(18, 34, 1), *[(9, 17, 2)] * 2]
    assert [b.mlp.fc1.out_features for b in blocks] == [48, 96, 96]
    assert [getattr(b.drop_path, "drop_prob", None) for b in blocks] == [None, 0.25, 0.5]
    assert model.head.drop.p == 0.25 and model.head.global_pool.pool_type == "max"
    assert model.global_pool == "max" and model.in_chans == 2
    assert model.patch_embed.proj.weight.shape == (32, 2, 4, 4)
    # One block has the rate 0, whatever is given.
    (one,) = build("dw_conv_nano", depths=(1,), drop_path_rate=0.5).stages[0].blocks
    assert type(one.drop_path) is nn.Identity
    two = build("dw_conv_nano", depths=(1, 1), drop_path_rate=0.5).stages[1].blocks[0]
    assert two.drop_path.drop_prob == 0.5


@pytest.mark.parametrize("name", NANO)
def test_initial_values(name):
    """Swin's: truncated normal of 0.02, zeros. Linears of convolutional mixers have PyTorch's."""
    for place, module in build(name, embed_dim=64).named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "bias_table" in "".join(own):
            table = own["relative_position_bias_table"]
            assert 0.015 < table.std() < 0.025 and table.abs().max() < 0.11
        if ".mixer" in place and not name.startswith("swin"):
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                assert 0.9 * bound < module.weight.abs().max() <= bound, place
                assert module.bias is None or 0 < module.bias.abs().max() <= bound
        elif isinstance(module, nn.Linear):
            assert 0.018 < module.weight.std() < 0.022, place
            assert 0.05 < module.weight.abs().max() < 0.11
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
        elif place.endswith("mixer") and "weight" in own:
            # Local-MLP's, of 49 inputs.
            assert 0.99 / 7 < own["weight"].max() <= 1 / 7 and -1 / 7 <= own["weight"].min() < -0.14
        if place.endswith("mixer") and name == "d_dw_conv_nano":
            assert not own["bias"].any()


def test_parts_by_themselves():
    torch.manual_seed(0)
    block = Block(8, DepthwiseConv(8, 3), Mlp(8, 16), 0.0)
    assert block.se is block.local is None and type(block.drop_path) is nn.Identity
    block.add(8)
    assert block.se is block.local is None
    assert type(block.norm1) is nn.Identity and type(block.norm2) is nn.BatchNorm2d
    stage, x = Stage(nn.Identity(), [block]).eval(), torch.randn(2, 5, 6, 8)
    assert stage(x).equal(block(x)) and block.mixer.copies == 1
    Stage(nn.Identity(), [block], 4)
    assert block.mixer.copies == 16
    assert SqueezeExcite(48).fc1.out_features == 3
    se = SqueezeExcite(32, 1 / 32)
    assert se.fc1.weight.shape == (1, 32) and SqueezeExcite(2, 1).fc1.weight.shape == (2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert se(torch.randn(1, 4, 5, 32).bfloat16()).dtype == torch.bfloat16
    for ratio in (1 / 33, 1.01, 0):
        with pytest.raises(ValueError, match=f"^se_ratio={ratio}: 32 channels need 0.03125 to 1,"):
            SqueezeExcite(32, ratio)
    # Images become channels-last before the first convolution.
    embed, seen = PatchEmbed(3, 8), []
    embed.proj.register_forward_hook(lambda _, given, out: seen.extend((*given, out)))
    assert embed(torch.randn(2, 3, 9, 6)).is_contiguous()
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)
    assert LocalConv(4, 1, nn.LayerNorm).conv.kernel_size == (1, 1)
    with pytest.raises(ValueError, match="^local_kernel=0: 1 or more is needed, or 0 for none$"):
        LocalConv(4, 0, nn.LayerNorm)
    assert [ceil_div(length, 4) for length in (1, 3, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]


# timm's interface


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_of_learning_rates_are_timms(coarse):
    """By its own Swin, whose names are those of its layout."""
    ours = build("swin_nano", num_classes=7)
    theirs = timm.models.swin_transformer.SwinTransformer(
        embed_dim=32, depths=(1, 1, 2, 1), num_heads=(2, 4, 8, 16), num_classes=7
    )
    renamed = {name: torch.tensor(i) for i, name in enumerate(ours.state_dict())}
    renamed = {int(v): k for k, v in from_ours(renamed, LAYOUTS["timm"]).items()}
    names = dict(zip(ours.state_dict(), (renamed[i] for i in range(len(renamed))), strict=True))
    expected = timm.models.group_parameters(theirs, theirs.group_matcher(coarse))
    got = timm.models.group_parameters(ours, ours.group_matcher(coarse))
    assert {k: sorted(names[n] for n in v) for k, v in got.items()} == {
        k: sorted(v) for k, v in expected.items()
    }
    assert ours.group_matcher() == ours.group_matcher(False) != ours.group_matcher(True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("indices", [None, 1, [0, 2], [2, -1]])
def test_intermediates(indices, stop_early, norm):
    model, x = build("swin_nano").eval(), torch.randn(1, 3, 40, 70)
    nn.init.normal_(model.norm.weight)
    with torch.no_grad():
        every, y = [], model.patch_embed(x)
        for stage in model.stages:
            every.append(y := stage(y))
        final = model.norm(y)
        taken = (
            [0, 1, 2, 3] if indices is None else [3] if indices == 1 else [i % 4 for i in indices]
        )
        given = dict(indices=indices, norm=norm, stop_early=stop_early)
        features, got = model.forward_intermediates(x, output_fmt="NHWC", **given)
        assert features.equal(every[2] if stop_early and taken == [0, 2] else final)
        for i, found in zip(taken, got, strict=True):
            assert found.equal(final if norm and i == 3 else every[i])
        alone = model.forward_intermediates(x, intermediates_only=True, **given)
        assert all(a.equal(b.permute(0, 3, 1, 2)) for a, b in zip(alone, got, strict=True))
    plain, maps = model.forward_intermediates(x)
    assert plain.equal(final) and maps[3].permute(0, 2, 3, 1).equal(every[3])
    with pytest.raises(ValueError, match="^output_fmt='NLC': NCHW and NHWC are valid$"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize(
    "options, stages, norm, head",
    [
        ({}, 4, True, False),
        (dict(indices=[1, 3]), 4, True, False),
        (dict(indices=[3], prune_head=False), 4, True, True),
        (dict(indices=[3], prune_norm=True, prune_head=False), 4, False, True),
        (dict(indices=[0, 2], prune_head=False), 3, False, False),
        (dict(indices=[-4]), 1, False, False),
    ],
)
def test_what_is_pruned(options, stages, norm, head):
    model, x = build("dw_conv_nano").eval(), torch.randn(1, 3, 64, 64)
    expected = maps(model, x)
    taken = model.prune_intermediate_layers(**options)
    assert taken == [i % 4 for i in options.get("indices", [3])]
    assert len(model.stages) == stages and model.num_features == 32 * 2 ** (stages - 1)
    assert type(model.norm) is (nn.LayerNorm if norm else nn.Identity)
    assert isinstance(model.head.fc, nn.Linear) == head and model.num_classes == (5 if head else 0)
    assert model.global_pool == ("avg" if head else "")
    for got, wanted in zip(maps(model, x), expected, strict=False):
        assert got.equal(wanted)
    side = 64 // 2 ** (stages + 1)
    with torch.no_grad():
        assert model(x).shape == ((1, 5) if head else (1, side, side, model.num_features))


@pytest.mark.parametrize(
    "enabled, training, gradients, runs",
    [(True, True, True, 2), (False, True, True, 1), (True, False, True, 1), (True, True, False, 1)],
)
def test_blocks_run_again_in_a_checkpointed_training_alone(enabled, training, gradients, runs):
    model, calls = build("swin_nano", depths=(1, 1)).train(training), []
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(enabled)
    for stage in model.stages:
        stage.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(gradients):
        out = model(torch.randn(1, 3, 32, 32))
    if gradients:
        out.sum().backward()
    assert len(calls) == 2 * runs


def test_a_pooling_of_another_classifier():
    model = build("dw_conv_nano", num_classes=7)
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(3)
    assert (model.num_classes, model.global_pool, model.head_hidden_size) == (3, "avg", 256)
    model.reset_classifier(2, "max")
    assert (model.num_classes, model.global_pool) == (2, "max")
    assert model.head.global_pool.pool_type == "max"
    x = torch.randn(1, 3, 64, 64)
    features = model.eval().forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.equal(features.amax((1, 2)))
    assert model(x).equal(model.forward_head(features)) and model(x).shape == (1, 2)
