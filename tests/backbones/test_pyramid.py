"""How a pyramid behaves: any size, what is padded, half precision, checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones.mixers import InhomogeneousDynamicDepthwiseConv, LocalMLP
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


@pytest.mark.parametrize("size", [(5, 7), (3, 8), (2, 2)])
def test_local_mlp_position_by_position(size):
    """Padded, shifted, mixed where no seam lies between, and cropped, in that order."""
    torch.manual_seed(0)
    (height, width), (rows, columns) = size, (3, 2)
    mixer = LocalMLP(4, 2, (rows, columns), shifted=True, shared=True).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, height, width, 4, dtype=torch.float64)
    down, across = -(-height // rows) * rows, -(-width // columns) * columns
    # An axis that one window covers is not shifted.
    shift = (rows // 2 if down > rows else 0, columns // 2 if across > columns else 0)

    value = torch.zeros(down, across, 4, dtype=torch.float64)
    value[:height, :width] = x[0]
    value = value @ mixer.value.weight.T + mixer.value.bias

    def place(y, x):
        """Window, side of the seam and index inside the window of a position before shifting."""
        y, x = (y - shift[0]) % down, (x - shift[1]) % across
        window = (y // rows, x // columns)
        side = (y >= down - shift[0], x >= across - shift[1])
        return window, side, (y % rows, x % columns)

    def weight(head, into, source):
        table = mixer.relative_position_bias_table
        offset = (into[0] - source[0] + rows - 1) * (2 * columns - 1)
        offset += into[1] - source[1] + columns - 1
        index = [y * columns + x for y, x in (into, source)]
        return mixer.weight[head, index[0], index[1]] + table[offset, head]

    out = torch.zeros(height, width, 4, dtype=torch.float64)
    everywhere = [(y, x) for y in range(down) for x in range(across)]
    for y, x_ in [(y, x) for y in range(height) for x in range(width)]:
        *home, into = place(y, x_)
        for v, u in everywhere:
            *there, source = place(v, u)
            if home == there:
                for channel in range(4):
                    out[y, x_, channel] += weight(channel // 2, into, source) * value[v, u, channel]
    expected = out @ mixer.proj.weight.T + mixer.proj.bias
    torch.testing.assert_close(mixer(x)[0], expected)


def test_per_window_weights_that_agree_are_the_shared_form():
    shared = build("swin_local_mlp_nano", shared=True).eval()
    for parameter in shared.parameters():
        nn.init.normal_(parameter, std=0.2)
    own = build("swin_local_mlp_nano").eval()
    state = shared.state_dict()
    for name, value in own.state_dict().items():
        if name.endswith("mixer.weight"):
            state[name] = state[name].unflatten(-1, (7, 7)).expand(value.shape)
    own.load_state_dict(state)
    for size in ((224, 224), (64, 116), (300, 250)):
        x = torch.randn(1, 3, *size)
        for a, b in zip(maps(own, x), maps(shared, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_halved_grid_of_windows_averages_neighbours():
    """What bilinear resizing of 8x8 to 4x4 windows (224 to 112 pixels) means, by hand."""
    large = build("swin_local_mlp_nano").eval()
    small = build("swin_local_mlp_nano", img_size=112).eval()
    state = large.state_dict()
    for name, value in small.state_dict().items():
        weight = state[name]
        if name.endswith("mixer.weight") and weight.shape != value.shape:
            state[name] = (
                weight[::2, ::2] + weight[1::2, ::2] + weight[::2, 1::2] + weight[1::2, 1::2]
            ) / 4
    small.load_state_dict(state)
    x = torch.randn(1, 3, 112, 112)
    for a, b in zip(maps(large, x), maps(small, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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
