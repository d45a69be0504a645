"""Table 4's DW-Conv: kernels of a head, shared by all positions or not."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import backbones
from backbones.layouts import LAYOUTS, family_of, from_ours
from backbones.mixers import DepthwiseConv, SharedDepthwiseConv
from tests.support import build

HEADS = (1, 2, 4, 8)
FORMS = [dict(num_heads=HEADS), dict(num_heads=HEADS, shared=False)]
X = torch.randn(2, 3, 61, 90)


def mixers(model: nn.Module) -> list[SharedDepthwiseConv]:
    return [m for m in model.modules() if isinstance(m, SharedDepthwiseConv)]


def test_only_the_kernels_differ_from_dw_conv():
    plain = build("dw_conv_nano").state_dict()
    for form in FORMS:
        state = build("dw_conv_nano", **form).state_dict()
        added = {name for name in state if name not in plain}
        assert added == {n for n in state if n.endswith(("mixer.kernels", "mixer.bias"))}
        gone = {name for name in plain if name not in state}
        assert gone == {n for n in plain if n.endswith(("conv.weight", "conv.bias"))}
    with pytest.raises(ValueError, match="shared=False: kernels of positions need num_heads"):
        build("dw_conv_nano", shared=False)
    with pytest.raises(ValueError, match="num_heads=5 does not divide the 32 channels"):
        build("dw_conv_nano", num_heads=(5, 5, 5, 5))


@pytest.mark.parametrize("form", FORMS)
def test_initialisation_is_a_convolutions(form):
    model = build("dw_conv_tiny", **form | dict(num_heads=(3, 6, 12, 24)))
    kernels = torch.cat([m.kernels.flatten() for m in mixers(model)])
    biases = torch.cat([m.bias for m in mixers(model)])
    for values in (kernels, biases):
        assert values.abs().max() <= 1 / 7
        assert abs(values.std() - 1 / 7 / 3**0.5) < 0.005


def test_counts_are_those_of_the_kernels_alone():
    """Of 24.173M, 49 x 4416 kernels go and 49 x 138 come, or 49 x 44,688 of positions and heads."""
    for form, count in ((dict(), 23.963), (dict(shared=False), 26.146)):
        with torch.device("meta"):
            model = timm.create_model("dw_conv_tiny", num_heads=(3, 6, 12, 24), **form)
            plain = timm.create_model("dw_conv_tiny")
        counted, before = (sum(p.numel() for p in m.parameters()) for m in (model, plain))
        kernels = 49 * (44_688 if form else 138)
        assert counted == before - 49 * 4416 + kernels
        assert round(counted / 1e6, 3) == count


@pytest.mark.parametrize("form", FORMS)
def test_mixed_precision(form):
    model = build("dw_conv_nano", **form)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(X)
    error = (half.float() - model(X)).norm() / model(X).norm()
    assert error < 0.2


def test_another_image_resizes_the_grid_of_kernels(tmp_path):
    source = build("dw_conv_nano", **FORMS[1]).eval()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        on_the_fly = source(x)
        torch.save(source.state_dict(), tmp_path / "224.pth")
        source.set_input_size((96, 128))
        assert source.stages[0].blocks[0].mixer.kernels.shape == (24, 32, 1, 1, 7, 7)
        torch.testing.assert_close(source(x), on_the_fly)
    target = build("dw_conv_nano", seed=1, img_size=(96, 128), **FORMS[1]).eval()
    report = backbones.load_checkpoint(target, tmp_path / "224.pth")
    assert len(report.resized) == 5 and not report.missing
    with torch.no_grad():
        torch.testing.assert_close(target(x), on_the_fly)
    # By PyTorch's bilinear resizing of one tap of a head.
    first = build("dw_conv_nano", **FORMS[1]).state_dict()["stages.2.blocks.0.mixer.kernels"]
    plane = F.interpolate(first[None, None, :, :, 3, 0, 2, 5], (6, 8), mode="bilinear")[0, 0]
    got = target.state_dict()["stages.2.blocks.0.mixer.kernels"][:, :, 3, 0, 2, 5]
    torch.testing.assert_close(got, plane)


@pytest.mark.parametrize("form", FORMS)
def test_another_kernel_size_is_bicubic(form, tmp_path):
    source = build("dw_conv_nano", **form)
    before = source.stages[2].blocks[1].mixer.kernels.detach().clone()
    torch.save(source.state_dict(), tmp_path / "7.pth")
    target = build("dw_conv_nano", seed=1, window_size=9, **form).eval()
    assert len(backbones.load_checkpoint(target, tmp_path / "7.pth").resized) == 5
    source.eval().set_input_size(window_size=9)
    with torch.no_grad():
        torch.testing.assert_close(target(X), source(X))
    place = () if before.ndim == 3 else (3, 4)
    one = before[place][2].reshape(1, 1, 7, 7)
    expected = F.interpolate(one, (9, 9), mode="bicubic", align_corners=False)
    got = source.stages[2].blocks[1].mixer.kernels[place][2]
    torch.testing.assert_close(got.reshape(1, 1, 9, 9), expected)
    assert source.stages[2].blocks[1].mixer.kernel_size == 9


@pytest.mark.parametrize("form", FORMS)
def test_dw_convs_weights_start_it_by_their_mean(form, tmp_path):
    plain = build("dw_conv_nano")
    torch.save({"model": from_ours(plain.state_dict(), LAYOUTS["original"])}, tmp_path / "dw.pth")
    model = build("dw_conv_nano", seed=1, **form).eval()
    report = backbones.load_checkpoint(model, tmp_path / "dw.pth")
    assert not (report.missing or report.unexpected)
    assert report.resized == tuple(n for n in model.state_dict() if n.endswith(".kernels"))
    for ours, theirs in zip(
        mixers(model), (m for m in plain.modules() if isinstance(m, DepthwiseConv)), strict=True
    ):
        heads = len(theirs.conv.weight) // 32
        mean = torch.stack(
            [theirs.conv.weight[32 * h : 32 * h + 32, 0].mean(0) for h in range(heads)]
        )
        if not ours.shared:
            mean = mean[:, None].expand(ours.kernels.shape)
        torch.testing.assert_close(ours.kernels.data, mean.data)
        assert ours.bias.equal(theirs.conv.bias)
    # Kernels that agree within a head give DW-Conv's outputs.
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, DepthwiseConv):
                module.conv.weight.copy_(module.conv.weight[:1].expand_as(module.conv.weight))
    torch.save(plain.state_dict(), tmp_path / "agreeing.pth")
    backbones.load_checkpoint(model, tmp_path / "agreeing.pth")
    with torch.no_grad():
        torch.testing.assert_close(model(X), plain.eval()(X), rtol=1e-4, atol=1e-5)


def test_one_form_starts_the_other(tmp_path):
    shared, own = (build("dw_conv_nano", **form).eval() for form in FORMS)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    backbones.load_checkpoint(shared, tmp_path / "own.pth")
    for a, b in zip(mixers(shared), mixers(own), strict=True):
        torch.testing.assert_close(a.kernels, b.kernels.mean((0, 1)).squeeze(1))
    torch.save(shared.state_dict(), tmp_path / "shared.pth")
    backbones.load_checkpoint(own, tmp_path / "shared.pth")
    with torch.no_grad():
        torch.testing.assert_close(own(X), shared(X), rtol=1e-4, atol=1e-5)
    other = build("dw_conv_nano", num_heads=(2, 4, 8, 16))
    with pytest.raises(backbones.CheckpointError, match="shape: .*kernels"):
        backbones.load_checkpoint(other, tmp_path / "shared.pth")


@pytest.mark.parametrize("form", FORMS)
def test_its_files_are_dw_convs_and_of_our_layout_alone(form, tmp_path):
    state = build("dw_conv_nano", **form).state_dict()
    assert family_of(state) == "dw_conv"
    with pytest.raises(ValueError, match="original .*not dw_conv as SharedDepthwiseConv"):
        from_ours(state, LAYOUTS["original"])
    torch.save(state, tmp_path / "shared.pth")
    with pytest.raises(backbones.CheckpointError, match="looks like dw_conv_nano"):
        backbones.load_checkpoint(build("swin_nano"), tmp_path / "shared.pth")


@pytest.mark.parametrize("form", FORMS)
def test_fused_outputs_stay_and_the_norm_after_the_kernels_too(form):
    model = build("dw_conv_nano", **form)
    model(X)
    model = model.eval().double()
    fused = backbones.fuse(model)
    x = torch.randn(1, 3, 33, 36, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    left = [n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == 5 and all(name.endswith("mid_norm") for name in left)


@pytest.mark.slow
def test_compiled_for_all_sizes():
    model = build("dw_conv_nano", **FORMS[1]).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((61, 90), (96, 64)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_memory_format_of_images_leaves_the_kernels_alone():
    for form in FORMS:
        model = build("dw_conv_nano", **form).eval()
        with torch.no_grad():
            expected = model(X)
            model.to(memory_format=torch.channels_last)
            torch.testing.assert_close(model(X), expected)
