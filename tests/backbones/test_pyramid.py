"""How a pyramid behaves: any size, what is padded, half precision, checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones.mixers import InhomogeneousDynamicDepthwiseConv
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
