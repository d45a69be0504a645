"""What segmentation_models_pytorch asks of ``tu-`` encoders: timm's ``features_only`` networks.

Its depth 5 is all four stages, its depth 2 the first alone: it counts the image and a map of stride
2, which networks that start at stride 4 do not have. Where it is installed, it builds them itself.
"""

import pytest
import timm
import torch
from timm.layers import get_channel_dim
from torch import nn

from tests.backbones.test_export import scattered
from tests.support import NANO

CHANNELS, STRIDES = (32, 64, 128, 256), (4, 8, 16, 32)


def encoder(name: str, depth: int = 5, in_channels: int = 3, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    given = dict(in_chans=in_channels, out_indices=tuple(range(depth - 1)), pretrained=False)
    return timm.create_model(name, features_only=True, **given, **kwargs)


def sides(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return tuple(-(-side // stride) for side in size)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_depths(name, depth):
    model = encoder(name, depth)
    assert model.feature_info.channels() == list(CHANNELS[: depth - 1])
    assert model.feature_info.reduction() == list(STRIDES[: depth - 1])
    maps = model(torch.randn(2, 3, 64, 96))
    for features, channels, stride in zip(maps, CHANNELS, STRIDES, strict=False):
        assert features.shape == (2, channels, *sides((64, 96), stride))
    # No stage is built that nothing comes from: DDP asks for a gradient of every parameter.
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_channels_of_the_image(name, in_channels):
    model = encoder(name, in_channels=in_channels)
    x = torch.randn(2, in_channels, 64, 64, requires_grad=True)
    maps = model(x)
    assert [m.shape[1] for m in maps] == list(CHANNELS)
    sum(m.square().mean() for m in maps).backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_dilated(name, output_stride):
    model = encoder(name, output_stride=output_stride).eval()
    with torch.no_grad():
        for size in ((64, 64), (97, 131)):
            maps = model(torch.randn(1, 3, *size))
            strides = [min(stride, output_stride) for stride in STRIDES]
            assert [m.shape[2:] for m in maps] == [sides(size, s) for s in strides]


@pytest.mark.slow
@pytest.mark.parametrize("name", NANO)
def test_compiled(name):
    model = scattered(encoder(name, output_stride=16))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NANO)
def test_made_on_the_meta_device(name):
    """It builds a network there first, to see the strides."""
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
    assert model.feature_info.reduction() == list(STRIDES) and model.output_fmt == "NCHW"


@pytest.mark.parametrize("name", NANO)
def test_device_and_dtype(name):
    """As timm's own models take them."""
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.is_meta and tensor.dtype in (torch.bfloat16, torch.int64)
    assert model(torch.randn(2, 3, 64, 64, device="meta", dtype=torch.bfloat16)).is_meta


def test_another_classifier():
    """It is made where the network is, in its dtype and mode, for the channels that a head has."""
    model = timm.create_model("dw_conv_nano", dtype=torch.float64).eval()
    model.reset_classifier(0)
    model.reset_classifier(7, "catavgmax")
    assert model.head_hidden_size == 512 and not model.head.fc.training
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert model(x).dtype == torch.float64 and model(x).shape == (1, 7)
    model.prune_intermediate_layers([1])
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3) and model.head_hidden_size == 64


@pytest.mark.parametrize("name", NANO)
def test_in_segmentation_models_pytorch(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    images = torch.randn(2, 4, 64, 96)
    for depth in (3, 4, 5):
        built = smp.encoders.get_encoder(f"tu-{name}", in_channels=4, depth=depth, weights=None)
        assert built.out_channels == [4, 0, *CHANNELS[: depth - 1]]
        assert [f.shape[1] for f in built(images)] == built.out_channels
    options = dict(encoder_name=f"tu-{name}", encoder_weights=None, in_channels=4, classes=3)
    for model in (smp.Unet(**options), smp.DeepLabV3Plus(encoder_output_stride=16, **options)):
        out = model(images)
        assert out.shape == (2, 3, 64, 96)
        out.square().mean().backward()


@pytest.mark.parametrize("name", NANO)
def test_the_channels_of_a_classifiers_features(name):
    """Where timm looks for them in a network that is not made of features alone."""
    model = timm.create_model(name, num_classes=5, global_pool="").eval()
    axis = get_channel_dim(model.output_fmt)
    assert model.forward_features(torch.randn(1, 3, 64, 96)).shape[axis] == model.num_features
