"""``output_stride`` 8 and 16: shifted copies of a stage's input, interleaved outputs."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from dense.analysis import complexity
from dense.backbone import DenseBackbone
from tests.backbones.test_export import agree, exported, scattered
from tests.backbones.test_tracing import traced_right
from tests.support import NANO, build

STRIDES = {32: (4, 8, 16, 32), 16: (4, 8, 16, 16), 8: (4, 8, 8, 8)}


def maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return model.forward_intermediates(x, intermediates_only=True)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_first_phase_is_the_strided_network(name, output_stride):
    strided = scattered(build(name))
    model = build(name, seed=1, output_stride=output_stride).eval()
    model.load_state_dict(strided.state_dict())
    for size in ((64, 96), (97, 131), (230, 33)):
        x = torch.randn(2, 3, *size)
        for i, (got, expected) in enumerate(zip(maps(model, x), maps(strided, x), strict=True)):
            stride = STRIDES[output_stride][i]
            assert got.shape[2:] == tuple(-(-side // stride) for side in size)
            step = 4 * 2**i // stride
            torch.testing.assert_close(got[..., ::step, ::step], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("dilation", [2, 4])
def test_every_phase_is_the_stage_of_a_shifted_map(name, dilation):
    stage = scattered(build(name)).stages[2]
    for size in ((12, 8), (13, 10), (3, 1)):
        x = torch.randn(2, *size, 64)
        rows, columns = (2 * -(-side // dilation) for side in size)
        with torch.no_grad():
            stage.dilation = dilation
            got = stage(x)
            stage.dilation = 1
            assert got.shape == (2, *size, 128)
            for a in range(min(dilation, size[0])):
                for b in range(min(dilation, size[1])):
                    copy = x[:, a :: dilation // 2, b :: dilation // 2][:, :rows, :columns]
                    more = rows - copy.shape[1], columns - copy.shape[2]
                    expected = stage(F.pad(copy, (0, 0, 0, more[1], 0, more[0])))
                    phase = got[:, a::dilation, b::dilation]
                    expected = expected[:, : phase.shape[1], : phase.shape[2]]
                    torch.testing.assert_close(phase, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NANO)
def test_training(name):
    """Gradient checkpointing, drop path and gradients of all parameters."""
    model = build(name, output_stride=8, drop_path_rate=0.1)
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 50, 70)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_batch_statistics_cover_all_phases():
    model = build("dw_conv_nano", output_stride=16)
    seen = []
    norm = model.stages[3].blocks[0].mixer.in_norm
    norm.register_forward_hook(lambda norm, inputs, out: seen.append(inputs[0]))
    model(torch.randn(2, 3, 64, 64))
    (x,) = seen
    assert x.shape == (8, 256, 2, 2)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))


def test_copies_of_one_image_are_no_batch():
    """The pooled maps of four copies hardly differ; D-DW-Conv takes one image's way."""
    for images, changes in ((1, False), (2, True)):
        model = build("d_dw_conv_nano", output_stride=16)
        norm = model.stages[3].blocks[0].mixer.reduce_norm
        before = norm.running_var.clone()
        model(torch.randn(images, 3, 64, 64)).sum().backward()
        assert norm.running_var.equal(before) != changes


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_who_reports_the_strides(output_stride):
    strides = list(STRIDES[output_stride])
    options = dict(output_stride=output_stride)
    features = timm.create_model("swin_nano", features_only=True, **options).eval()
    assert features.feature_info.reduction() == strides
    x = torch.randn(1, 3, 97, 64)
    with torch.no_grad():
        for out, stride in zip(features(x), strides, strict=True):
            assert out.shape[2:] == (-(-97 // stride), 64 // stride)
    backbone = DenseBackbone("dw_conv_nano", norm="BN", out_indices=(1, 2, 3), **options)
    assert backbone.strides == tuple(strides[1:])
    with torch.no_grad():
        assert [m.shape[2] for m in backbone(x)] == [-(-97 // s) for s in strides[1:]]


def test_detectron2_is_told():
    pytest.importorskip("detectron2")
    from dense.detection import PyramidBackbone

    backbone = PyramidBackbone("dw_conv_nano", norm="BN", output_stride=16)
    told = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert told == dict(res2=4, res3=8, res4=16, res5=16)


def test_openmmlab_is_told():
    pytest.importorskip("mmengine")
    from mmengine.registry import MODELS

    from dense.openmmlab.backbone import register

    if "dw_conv_nano" not in MODELS:
        register()
    backbone = MODELS.build(dict(type="dw_conv_nano", norm="BN", output_stride=8)).eval()
    assert backbone.strides == (4, 8, 8, 8)


def test_counts():
    """The last stage costs four times as much, and the final norm sees four times the map."""
    counts = [
        complexity.classifier("dw_conv_nano", output_stride=output_stride)
        for output_stride in (32, 16)
    ]
    assert counts[0].parameters == counts[1].parameters
    stage = timm.create_model("dw_conv_nano").stages[3]
    norm = 5 * 256 * (14**2 - 7**2)
    more = 3 * complexity.flops(stage, (1, 14, 14, 128)) + norm
    assert counts[1].flops - counts[0].flops == more


@pytest.mark.parametrize("name", NANO)
def test_fused_saved_and_loaded(name, tmp_path):
    model = scattered(build(name, output_stride=16))
    x = torch.randn(1, 3, 75, 101)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = build(name, seed=1, output_stride=16).eval()
    backbones.load_checkpoint(other, tmp_path / "model.pth")
    with torch.no_grad():
        expected = model(x)
        assert other(x).equal(expected)
        torch.testing.assert_close(backbones.fuse(model)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced(tmp_path):
    model = scattered(build("swin_local_mlp_nano", output_stride=8))
    x = torch.randn(1, 3, 97, 64)
    with torch.no_grad():
        assert torch.fx.symbolic_trace(model)(x).equal(model(x))
    traced_right(model, torch.randn(1, 3, 96, 96), tmp_path / "model.pt")


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["swin", "dw_conv"])
def test_exported(family):
    backbone = scattered(DenseBackbone(f"{family}_nano", norm="BN", output_stride=8))
    agree(exported(backbone, 232).module(), backbone, [(301, 450), (256, 288)])


@pytest.mark.parametrize("output_stride", [4, 0, 64, "16"])
def test_unknown_values(output_stride):
    with pytest.raises(ValueError, match=r"output_stride=.*8, 16 and 32 are valid"):
        build("dw_conv_nano", output_stride=output_stride)
