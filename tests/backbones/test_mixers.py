"""Mixers by themselves: their defaults, and how their weights take another size or form."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import nn

from backbones import folding, mixers
from backbones.mixers import norm as norms
from backbones.mixers.attention import Attention
from backbones.mixers.base import Mixer, heads_of
from backbones.mixers.conv import resized, square
from backbones.mixers.sliding_attention import CONVOLUTIONS
from tests.support import NANO, build

TABLE = "relative_position_bias_table"
SWIN = ("WindowAttention", "SlidingAttention")


def shapes(mixer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in mixer.named_parameters()}


def scattered(mixer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter)
    return mixer


@pytest.mark.parametrize(
    "mixer, expected",
    [
        (mixers.WindowAttention(64, 2), {TABLE: (169, 2), "qkv.weight": (192, 64)}),
        (mixers.SlidingAttention(64, 2), {TABLE: (169, 2), "proj.weight": (64, 64)}),
        (mixers.LocalMLP(64, 2), {TABLE: (169, 2), "weight": (8, 8, 2, 49, 7, 7)}),
        (mixers.LocalMLP(64, 2, (3, 5), True, (10, 11)), {"weight": (4, 3, 2, 15, 3, 5)}),
        (mixers.LocalMLP(64, 2, shared=True), {"weight": (2, 49, 49)}),
        (mixers.DepthwiseConv(64), {"conv.weight": (64, 1, 7, 7), "conv.bias": (64,)}),
        (mixers.SharedDepthwiseConv(64, 2), {"kernels": (2, 7, 7), "bias": (64,)}),
        (
            mixers.SharedDepthwiseConv(64, 2, shared=False),
            {"kernels": (56, 56, 2, 1, 7, 7), "bias": (64,)},
        ),
        (
            mixers.DynamicDepthwiseConv(64),
            {"reduce.weight": (16, 64), "expand.weight": (64 * 49, 16), "bias": (64,)},
        ),
        (
            mixers.InhomogeneousDynamicDepthwiseConv(64),
            {"reduce.bias": (16,), "expand.weight": (32 * 49, 16)},
        ),
        (CONVOLUTIONS["static"](64, 2), {TABLE: (169, 2), "theta": (2, 49, 32)}),
        (CONVOLUTIONS["post"](64, 2), {TABLE: (169, 2), "post": (2, 3, 3)}),
        (CONVOLUTIONS["pre"](64, 2), {TABLE: (169, 2), "pre.conv.weight": (1, 1, 3, 3)}),
        (CONVOLUTIONS["pre_depthwise"](64, 2), {"pre.conv.weight": (64, 1, 3, 3)}),
        (CONVOLUTIONS["pre_full"](64, 2), {"pre.conv.weight": (64, 64, 3, 3)}),
        (
            mixers.sliding_attention.PreConvolutionalAttention(64, 2),
            {TABLE: (169, 2), "pre.conv.weight": (1, 1, 3, 3)},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_mixer_is_by_itself(mixer, expected):
    """Windows of 7, not shifted, of a map of 56, with position bias."""
    found = shapes(mixer)
    assert expected.items() <= found.items()
    if hasattr(mixer, "window_size"):
        assert mixer.window_size == ((3, 5) if expected.get("weight", ())[:2] == (4, 3) else (7, 7))
        assert mixer.shifted == (mixer.window_size == (3, 5))
    else:
        assert mixer.kernel_size == 7
    assert mixer.no_weight_decay() == ({TABLE} if TABLE in found else set())
    assert mixer.training and mixer.copies == 1
    x = torch.randn(2, 5, 6, 64)
    assert mixer(x).shape == x.shape


@pytest.mark.parametrize("family", ["WindowAttention", "LocalMLP"])
def test_heads_of_stages_are_swins_and_every_second_block_is_shifted(family):
    for stage, heads in enumerate((3, 6, 12, 24)):
        for block in (0, 1, 2, 3):
            mixer = getattr(mixers, family).at(48, stage, block, (15, 16))
            assert (mixer.num_heads, mixer.shifted) == (heads, block in (1, 3))
            assert mixer.window_size == (7, 7) and not isinstance(mixer, mixers.SlidingAttention)
    if family == "LocalMLP":
        assert mixer.weight.shape[:2] == (3, 3) and not mixer.shared


def test_options_of_a_block():
    at = mixers.WindowAttention.at
    assert type(at(48, 0, 1, (9, 9), sliding=True)) is mixers.SlidingAttention
    assert at(48, 0, 1, (9, 9), window_size=(3, 5)).window_size == (3, 5)
    assert TABLE not in shapes(at(48, 0, 1, (9, 9), position_bias=False))
    for name, kind in CONVOLUTIONS.items():
        made = at(48, 1, 1, (9, 9), conv=name, window_size=5, position_bias=False)
        alike = kind(48, 6, 5, False)
        assert type(made) is type(alike) and shapes(made) == shapes(alike)
        assert made.num_heads == 6 and made.window_size == (5, 5)
    at = mixers.DepthwiseConv.at
    assert type(at(48, 0, 0, (9, 8))) is mixers.DepthwiseConv
    assert at(48, 0, 0, (9, 8), window_size=5).kernel_size == 5
    assert at(48, 1, 0, (9, 8), num_heads=(3, 6), window_size=5).kernels.shape == (6, 5, 5)
    own = at(48, 1, 0, (9, 8), num_heads=(3, 6), shared=False)
    assert own.kernels.shape == (9, 8, 6, 1, 7, 7)
    for kind in (mixers.DynamicDepthwiseConv, mixers.InhomogeneousDynamicDepthwiseConv):
        assert kind.at(64, 3, 0, (9, 8)).kernel_size == 7
        assert kind.at(64, 3, 0, (9, 8), window_size=3).kernel_size == 3
    groups = mixers.InhomogeneousDynamicDepthwiseConv.at(64, 3, 0, (9, 8), num_groups=4)
    assert groups.expand.weight.shape == (4 * 49, 16)
    assert Mixer.pre_norm and Mixer.norm_layer is nn.LayerNorm
    assert not mixers.DepthwiseConv.pre_norm


def test_heads_of_a_stage():
    assert [heads_of([3, 6, 1], stage) for stage in range(3)] == [3, 6, 1]
    for wrong, stage in (((3, 6), 2), ((3, 0), 1), (4, 0), ((), 0)):
        with pytest.raises(ValueError, match="a number from 1 for each stage, as"):
            heads_of(wrong, stage)


def test_kernels_are_square():
    assert square(5) == square((5, 5)) == mixers.DepthwiseConv(8, (5, 5)).kernel_size == 5
    with pytest.raises(ValueError, match="^kernels must be square, not 5x7$"):
        square((5, 7))
    with pytest.raises(ValueError, match="^kernels must be square, not 3x4$"):
        mixers.DepthwiseConv(8).set_input_size(None, (3, 4))


# Another size


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("given", [5, (3, 9)])
@pytest.mark.parametrize("name", [*SWIN, *CONVOLUTIONS])
def test_attention_of_another_window(name, given, frozen):
    """The table by timm's resizing, theta by PyTorch's; a map's size says nothing."""
    kind = CONVOLUTIONS.get(name) or getattr(mixers, name)
    mixer = scattered(kind(8, 2)).requires_grad_(not frozen)
    before = {k: v.detach().clone() for k, v in mixer.named_parameters()}
    for unchanged in ((None, None), ((20, 20), None), ((20, 20), 7), (None, (7, 7))):
        mixer.set_input_size(*unchanged)
        assert all(v.equal(before[k]) for k, v in mixer.named_parameters())
    mixer.set_input_size((20, 20), given)
    rows, columns = window = (given, given) if given == 5 else given
    assert mixer.window_size == window
    wanted = resize_rel_pos_bias_table(
        before[TABLE],
        new_window_size=window,
        new_bias_shape=((2 * rows - 1) * (2 * columns - 1), 2),
        old_window_size=(7, 7),
    )
    assert mixer.relative_position_bias_table.equal(wanted)
    if name == "static":
        planes = before["theta"].permute(0, 2, 1).reshape(2, 4, 7, 7)
        planes = F.interpolate(planes, window, mode="bicubic", align_corners=False)
        torch.testing.assert_close(mixer.theta, planes.reshape(2, 4, -1).permute(0, 2, 1))
    assert all(p.requires_grad != frozen for p in mixer.parameters())
    fresh = kind(8, 2, window)
    assert shapes(mixer) == shapes(fresh)
    assert mixer.relative_position_index.equal(fresh.relative_position_index)
    fresh.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 10, 11, 8)
    assert mixer.eval()(x).equal(fresh.eval()(x))


def test_theta_of_half_precision_and_an_index_without_values():
    """Resized as float32 is; what is on the meta device stays there."""
    mixer = scattered(CONVOLUTIONS["static"](8, 2))
    half = copy.deepcopy(mixer).bfloat16()
    mixer.load_state_dict(half.state_dict())
    for each in (mixer, half):
        each.set_input_size(None, 5)
    assert half.theta.dtype == torch.bfloat16 and half.theta.equal(mixer.theta.bfloat16())
    with torch.device("meta"):
        empty = mixers.WindowAttention(8, 2)
    empty.set_input_size(None, 5)
    assert empty.relative_position_index.is_meta
    assert empty.relative_position_index.shape == (25, 25)


def test_convolutions_of_another_kernel():
    for mixer, name in (
        (mixers.DepthwiseConv(6), "conv.weight"),
        (mixers.SharedDepthwiseConv(6, 2), "kernels"),
        (mixers.SharedDepthwiseConv(6, 2, feat_size=(3, 4), shared=False), "kernels"),
    ):
        before = mixer.state_dict()[name].clone()
        mixer.requires_grad_(False)
        for unchanged in ((None, None), ((3, 4), None), (None, 7), (None, (7, 7))):
            mixer.set_input_size(*unchanged)
            assert mixer.state_dict()[name].equal(before)
        mixer.set_input_size(None, (4, 4))
        flat = F.interpolate(before.reshape(-1, 1, 7, 7), (4, 4), mode="bicubic")
        expected = flat.reshape(*before.shape[:-2], 4, 4)
        torch.testing.assert_close(mixer.state_dict()[name], expected)
        assert mixer.kernel_size == 4 and not any(p.requires_grad for p in mixer.parameters())
        torch.testing.assert_close(resized(before.reshape(-1, 1, 7, 7), 4), flat)
        x = torch.randn(1, 3, 4, 6)
        assert mixer.eval()(x).shape == x.shape
    assert mixers.DepthwiseConv(6, 3).conv.kernel_size == (3, 3)
    for kind in (mixers.DynamicDepthwiseConv, mixers.InhomogeneousDynamicDepthwiseConv):
        mixer = kind(32)
        mixer.set_input_size((5, 5), 7)
        with pytest.raises(ValueError, match=f"^{kind.__name__} predicts .* from 7 to 5: build it"):
            mixer.set_input_size((5, 5), (5, 5))
    Mixer().set_input_size((5, 5))
    with pytest.raises(ValueError, match="^Mixer has no window_size$"):
        Mixer().set_input_size(None, 7)


def test_windows_of_another_map():
    mixer = scattered(mixers.LocalMLP(8, 2, (2, 3), feat_size=(4, 7))).requires_grad_(False)
    before = mixer.weight.clone()
    mixer.set_input_size(None, (2, 3))
    mixer.set_input_size(None)
    assert mixer.weight.equal(before) and before.shape[:2] == (2, 3)
    mixer.set_input_size((9, 7), (2, 3))
    assert mixer.weight.shape == (5, 3, 2, 6, 2, 3) and not mixer.weight.requires_grad
    with pytest.raises(ValueError, match=r"cannot change from \(2, 3\) to 2: "):
        mixer.set_input_size(None, 2)
    shared = mixers.LocalMLP(8, 2, 3, shared=True)
    shared.set_input_size((9, 7), 3)
    assert shared.weight.shape == (2, 9, 9)
    kernels = scattered(mixers.SharedDepthwiseConv(8, 2, 3, (4, 5), shared=False))
    kernels.set_input_size((6, 3), 5)
    assert kernels.kernels.shape == (6, 3, 2, 1, 5, 5)


# A checkpoint's tensors


@pytest.mark.parametrize(
    "mixer, name, given, fits",
    [
        (mixers.WindowAttention(8, 2), TABLE, (81, 2), True),
        (mixers.WindowAttention(8, 2), TABLE, (81, 4), False),
        (mixers.WindowAttention(8, 2), TABLE, (13 * 27, 2), False),
        (mixers.WindowAttention(8, 2), "qkv.weight", (24, 2), False),
        (mixers.SlidingAttention(8, 2, (5, 3)), TABLE, (81, 2), True),
        (CONVOLUTIONS["static"](8, 2), "theta", (2, 25, 4), True),
        (CONVOLUTIONS["static"](8, 2), "theta", (2, 24, 4), False),
        (CONVOLUTIONS["static"](8, 2), "theta", (1, 25, 4), False),
        (CONVOLUTIONS["static"](8, 2), "theta", (2, 25, 8), False),
        (CONVOLUTIONS["static"](8, 2), "theta", (2, 25), False),
        (CONVOLUTIONS["static"](8, 2), TABLE, (81, 2), True),
        (mixers.DepthwiseConv(8), "conv.weight", (8, 1, 5, 5), True),
        (mixers.DepthwiseConv(8), "conv.weight", (4, 1, 5, 5), False),
        (mixers.DepthwiseConv(8), "conv.bias", (8, 1, 5, 5), False),
        (mixers.SharedDepthwiseConv(8, 2), "kernels", (2, 5, 5), True),
        (mixers.SharedDepthwiseConv(8, 2), "kernels", (4, 5, 5), False),
        (mixers.SharedDepthwiseConv(8, 2), "kernels", (4, 1, 7, 7), True),
        (mixers.SharedDepthwiseConv(8, 2), "kernels", (5, 1, 7, 7), False),
        (mixers.SharedDepthwiseConv(8, 2), "kernels", (3, 4, 2, 1, 5, 5), True),
        (mixers.SharedDepthwiseConv(8, 2), "kernels", (3, 2, 4, 1, 5, 5), False),
        (mixers.SharedDepthwiseConv(8, 2), "kernels", (2, 1, 1, 5, 5), False),
        (mixers.SharedDepthwiseConv(8, 2), "bias", (2, 5, 5), False),
        (mixers.SharedDepthwiseConv(8, 2, 7, (3, 4), False), "kernels", (2, 5, 5), True),
        (mixers.SharedDepthwiseConv(8, 2, 7, (3, 4), False), "kernels", (5, 5, 2, 1, 7, 7), True),
        (mixers.SharedDepthwiseConv(8, 2, 7, (3, 4), False), "kernels", (4, 1, 5, 5), True),
        (mixers.LocalMLP(8, 2, 3, False, (9, 6)), "weight", (2, 4, 2, 9, 3, 3), True),
        (mixers.LocalMLP(8, 2, 3, False, (9, 6)), "weight", (2, 4, 1, 9, 3, 3), False),
        (mixers.LocalMLP(8, 2, 3, False, (9, 6)), "weight", (2, 9, 9), True),
        (mixers.LocalMLP(8, 2, 3, False, (9, 6)), "weight", (1, 9, 9), False),
        (mixers.LocalMLP(8, 2, 3, False, (9, 6)), "weight", (2, 9), False),
        (mixers.LocalMLP(8, 2, 3, False, (9, 6)), TABLE, (81, 2), True),
        (mixers.LocalMLP(8, 2, 3, shared=True), "weight", (2, 4, 2, 9, 3, 3), True),
        (mixers.LocalMLP(8, 2, 3, shared=True), "weight", (2, 4, 4), False),
        (Mixer(), "weight", (2,), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_fits_after_resizing(mixer, name, given, fits):
    """Anything else comes back as it is, for the load to refuse."""
    value = torch.randn(given)
    got = mixer.fit(name, value)
    if fits:
        assert got.shape == mixer.state_dict()[name].shape and got.dtype == value.dtype
        assert mixer.fit(name, torch.ones(given)).mean() == pytest.approx(1, abs=0.02)
    else:
        assert got is value


def test_other_forms_of_an_entry():
    entries = {"qkv.weight": torch.zeros(1), "theta": torch.ones(1)}
    assert Mixer().adapt(entries) == entries and Mixer().adapt(entries) is not entries
    static, post = CONVOLUTIONS["static"](8, 2), CONVOLUTIONS["post"](8, 2)
    assert static.adapt(entries)["theta"] is entries["theta"]
    theta = static.adapt({"qkv.weight": torch.zeros(1)})["theta"]
    assert theta.shape == (2, 49, 4) and not theta.any()
    centre = torch.zeros(2, 3, 3)
    centre[:, 1, 1] = 1
    assert post.adapt(entries)["post"].equal(centre) and post.post.equal(centre)
    # Only Swin's entries ask for one.
    assert static.adapt({"a": theta}).keys() == post.adapt({"a": theta}).keys() == {"a"}
    shared = mixers.SharedDepthwiseConv(8, 2)
    given = {"conv.weight": 1, "conv.bias": 2, "in_norm.bias": 3}
    assert shared.adapt(given) == {"kernels": 1, "bias": 2, "in_norm.bias": 3}


@pytest.mark.parametrize("name", ["WindowAttention", *CONVOLUTIONS])
def test_without_a_table_the_bias_is_zero(name):
    kind = CONVOLUTIONS.get(name) or mixers.WindowAttention
    mixer = kind(8, 2, (3, 5), position_bias=False)
    bias = mixer.bias_of(torch.zeros(1, dtype=torch.float64))
    assert bias.shape == ((2, 15, 15) if name == "WindowAttention" else (2, 15))
    assert not bias.any() and bias.dtype == torch.float64
    assert mixer.relative_position_index is None and mixer.no_weight_decay() == set()
    mixer.set_input_size(None, 5)
    assert mixer.window_size == (5, 5)
    assert Attention(8, 2, 3, True, True).bias_of(bias).shape == (2, 9, 9)


# Norms


def test_folding_alone_keeps_sizes():
    torch.manual_seed(0)
    linear = nn.Linear(3, 5).double()
    after, before = (nn.BatchNorm1d(n).double() for n in (5, 3))
    for norm in (after, before):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.eps = 0.1
        norm.eval()
    x = torch.randn(4, 3).double()
    for bias in (True, False):
        if not bias:
            linear.bias = None
        for folded, expected in (
            (folding.linear_before(linear, after), after(linear(x))),
            (folding.linear_after(before, linear), linear(before(x))),
        ):
            torch.testing.assert_close(folded(x), expected)
            assert (folded.in_features, folded.out_features) == (3, 5) and not folded.training
    plain = nn.BatchNorm1d(5, affine=False).double().eval()
    nn.init.normal_(plain.running_mean)
    torch.testing.assert_close(folding.linear_before(linear, plain)(x), plain(linear(x)))
    half = folding.linear_before(linear.requires_grad_(False).bfloat16(), after)
    assert half.weight.dtype == torch.bfloat16 and not half.weight.requires_grad
    assert not folding.foldable(nn.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize("size, alone", [(1, True), (2, False)])
def test_statistics_of_several_processes(size, alone, monkeypatch):
    synced, asked = nn.SyncBatchNorm(4), []
    synced.process_group = "group"
    assert norms._alone(synced) and norms._alone(nn.BatchNorm2d(4))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: asked.append(group) or size)
    assert norms._alone(synced) == alone and asked == ["group"]
    assert norms._alone(nn.BatchNorm2d(4)) and asked == ["group"]


@pytest.mark.parametrize("images, copies", [(1, 1), (2, 1), (4, 4), (4, 2), (8, 4)])
@pytest.mark.parametrize("several", [False, True])
def test_the_norm_of_pooled_maps(images, copies, several, monkeypatch):
    """One image, in whatever copies, has no statistics of its own, but with those of others."""
    monkeypatch.setattr(norms, "_alone", lambda norm: not several)
    norm, plain = (nn.BatchNorm2d(3) for _ in range(2))
    nn.init.normal_(norm.running_mean)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(images, 3)
    if several and images == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norms.pooled_batch_norm(norm, x, copies)
        return
    got = norms.pooled_batch_norm(norm, x, copies)
    plain.train(images != copies or several)
    assert got.equal(plain(x[:, :, None, None])[:, :, 0, 0]) and norm.training
    assert norm.running_mean.equal(plain.running_mean)
    assert norm.num_batches_tracked == plain.num_batches_tracked
    if copies == 1:
        assert norms.pooled_batch_norm(norm.eval(), x).equal(norms.pooled_batch_norm(norm, x, 1))


def test_paused_norms_go_on_as_before():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.BatchNorm2d(3, momentum=0.3)
            self.other = nn.BatchNorm2d(3, track_running_stats=False, momentum=0.2)

    model, x = Two(), torch.randn(4, 3, 2, 2)
    model.one(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError), norms.paused_statistics(model):
        model.one(x), model.other(x)
        assert model.other.momentum == 0.2
        raise KeyError
    assert model.state_dict().keys() == before.keys()
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert model.one.momentum == 0.3 and model.one.num_batches_tracked == 1


def test_a_centered_norm_by_its_formula():
    norm, x = norms.CenteredBatchNorm2d(4).double().eval(), torch.randn(2, 4, 5, 6).double()
    nn.init.normal_(norm.center)
    nn.init.normal_(norm.norm.running_mean)
    expected = norm.norm(x + norm.center[:, None, None] * x.mean((2, 3), keepdim=True))
    torch.testing.assert_close(norm(x), expected)
    # The mean of a map of bfloat16 is not rounded before it is scaled.
    torch.manual_seed(0)
    norm = norms.CenteredBatchNorm2d(64).eval()
    nn.init.normal_(norm.center)
    seen = []
    norm.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = (3 + torch.randn(1, 64, 9, 9)).bfloat16()
    norm(x)
    mean = x.float().mean((2, 3), keepdim=True)
    assert seen[0].equal(x + (norm.center[:, None, None] * mean).bfloat16())
    # A checkpoint's entries are on the CPU.
    norm = norms.CenteredBatchNorm2d(4).to("meta")
    adapted = norm.adapt({"running_var": 1, "weight": 2})
    assert {k: v for k, v in adapted.items() if k != "center"} == {
        "norm.running_var": 1,
        "norm.weight": 2,
    }
    assert adapted["center"].equal(torch.zeros(4)) and norm.adapt({"a": 1}) == {"a": 1}


@pytest.mark.parametrize("name", NANO)
def test_weights_that_do_not_decay(name):
    model = build(name, depths=(1, 2))
    tables = [f"stages.{i}.blocks.{j}.mixer.{TABLE}" for i, j in ((0, 0), (1, 0), (1, 1))]
    assert model.no_weight_decay() == (set(tables) if name.startswith("swin") else set())
