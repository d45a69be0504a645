"""Table 13: timm's VOLO-d1 and Twins-SVT-S with our mixers in place of theirs."""

import logging

import pytest
import timm
import torch

import backbones
from backbones.checkpoints import fit
from backbones.hosts import HOST_NAMES, HOSTS, TokenMixer
from backbones.mixers import DepthwiseConv, WindowAttention

# Table 13: our count in millions, and how many mixers are replaced.
COUNTS = {
    "volo_d1_local_attention": (26.558, 4),
    "volo_d1_dw_conv": (26.299, 4),
    "twins_svt_small_dw_conv": (22.446, 9),
}


# Arguments of timm's networks that make them small.
SMALL = {"volo_d1": dict(mlp_ratio=0.25), "twins_s": dict(depths=(2, 1, 2, 1))}


def small(name: str, seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(
        name, **{"num_classes": 5, "img_size": 64, **SMALL[name[:7]], **kwargs}
    )


@pytest.fixture(scope="module")
def hosts():
    return {name: small(name) for name in HOST_NAMES}


@pytest.mark.parametrize("name", HOST_NAMES)
def test_counts_are_table_13s(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    count, replaced = COUNTS[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == count
    assert len(model.replaced_mixers) == replaced


@pytest.mark.parametrize("name", HOST_NAMES)
def test_only_the_local_mixers_are_replaced(name, hosts):
    model, theirs = hosts[name], small(HOSTS[name].name)
    kinds = {type(model.get_submodule(place)) for place in model.replaced_mixers}
    mixer = WindowAttention if name.endswith("attention") else DepthwiseConv
    assert kinds == {TokenMixer if "twins" in name else mixer}
    shifts = [m.shifted for m in model.modules() if isinstance(m, WindowAttention)]
    assert shifts == ([False, True, False, True] if name.endswith("attention") else [])
    inside = tuple(f"{place}." for place in model.replaced_mixers)
    rest = {n: v.shape for n, v in model.state_dict().items() if not n.startswith(inside)}
    assert rest == {n: v.shape for n, v in theirs.state_dict().items() if not n.startswith(inside)}
    if name.endswith("attention"):
        # As in our pyramid, not as the host's linears.
        weight = model.network[0][1].attn.qkv.weight
        assert 0.018 < weight.std() < 0.022 and weight.abs().max() > 0.06


@pytest.mark.parametrize("name", HOST_NAMES)
def test_a_training_and_an_evaluation_step(name, hosts):
    model = hosts[name].train()
    x = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(x).square().sum().backward()
    inside = [p for n, p in model.named_parameters() if n.startswith(model.replaced_mixers)]
    assert inside and all(p.grad is not None and p.grad.isfinite().all() for p in inside)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, 5) and logits.isfinite().all()
        torch.testing.assert_close(model(x[1:]), logits[1:], rtol=1e-3, atol=1e-4)
    assert model.pretrained_cfg["architecture"] == name


def test_a_mixer_of_maps_in_a_network_of_tokens():
    mixer = DepthwiseConv(6)
    x = torch.randn(2, 5, 7, 6)
    got = TokenMixer(mixer)(x.reshape(2, 35, 6), (5, 7))
    torch.testing.assert_close(got.unflatten(1, (5, 7)), mixer(x))


@pytest.mark.parametrize("name", HOST_NAMES)
def test_the_hosts_weights_fill_all_but_the_replaced_mixers(name, hosts, tmp_path, caplog):
    theirs = small(HOSTS[name].name, seed=1)
    torch.save(theirs.state_dict(), tmp_path / "host.pth")
    inside = tuple(f"{place}." for place in hosts[name].replaced_mixers)
    with caplog.at_level(logging.INFO):
        overlay = dict(file=str(tmp_path / "host.pth"), num_classes=5)
        model = small(name, seed=2, pretrained=True, pretrained_cfg_overlay=overlay)
    given = theirs.state_dict()
    for key, value in model.state_dict().items():
        assert key.startswith(inside) or value.equal(given[key]), key
    fresh = small(name, seed=2).state_dict()
    mixers = [key for key in fresh if key.startswith(inside)]
    assert all(fresh[key].equal(model.state_dict()[key]) for key in mixers)
    assert f"{len(mixers)} missing, 0 unexpected" in caplog.text
    assert "no weights of the replaced mixers" in caplog.text

    # Another number of classes leaves the classifier out.
    other = small(name, seed=3, num_classes=7)
    report = backbones.load_checkpoint(other, tmp_path / "host.pth")
    heads = {key for key in report.missing if "head" in key}
    assert heads and set(report.missing) == heads | set(mixers)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_its_own_file_fills_all(name, hosts, tmp_path):
    """As tools/pretrain.py saves it, under a prefix."""
    model = hosts[name]
    state = {f"network.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "own.pth")
    other = small(name, seed=4)
    report = backbones.load_checkpoint(other, tmp_path / "own.pth")
    assert not (report.missing or report.unexpected)
    assert all(value.equal(model.state_dict()[k]) for k, value in other.state_dict().items())
    report = backbones.load_checkpoint(other, tmp_path / "own.pth", classes=list("abcde"))
    assert not report.missing


def test_what_does_not_fit_is_refused(hosts, tmp_path):
    torch.save(hosts["twins_svt_small_dw_conv"].state_dict(), tmp_path / "twins.pth")
    with pytest.raises(
        backbones.CheckpointError, match="(?s)does not fit VOLO: 1 of .*shape: norm"
    ):
        backbones.load_checkpoint(hosts["volo_d1_dw_conv"], tmp_path / "twins.pth")
    state = hosts["volo_d1_dw_conv"].state_dict()
    del state["network.2.0.attn.qkv.weight"]
    torch.save(state, tmp_path / "volo.pth")
    with pytest.raises(backbones.CheckpointError, match="missing: network.2.0.attn.qkv.weight"):
        backbones.load_checkpoint(hosts["volo_d1_dw_conv"], tmp_path / "volo.pth")


def test_grey_images_take_the_mean_of_the_first_convolution(tmp_path):
    theirs = small("twins_svt_small", seed=1)
    torch.save(theirs.state_dict(), tmp_path / "host.pth")
    grey = small("twins_svt_small_dw_conv", in_chans=1)
    backbones.load_checkpoint(grey, tmp_path / "host.pth")
    expected = theirs.patch_embeds[0].proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embeds[0].proj.weight, expected)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_features_and_config_are_the_hosts(name):
    ours, theirs = (small(n, features_only=True) for n in (name, HOSTS[name].name))
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    x = torch.randn(1, 3, 64, 64)
    assert [m.shape for m in ours(x)] == [m.shape for m in theirs(x)]
    mine, cfg = (vars(timm.get_pretrained_cfg(n)) for n in (name, HOSTS[name].name))
    assert mine == cfg | dict(architecture=name, tag=None)
    entry = timm.models.model_entrypoint(name)
    assert entry(num_classes=2, img_size=64, **SMALL[name[:7]]).num_classes == 2
    assert entry.__module__ == "backbones.hosts" and entry.__doc__ == HOSTS[name].doc


HEADS = {"volo_d1_dw_conv": ("head.", "aux_head."), "twins_svt_small_dw_conv": ("head.",)}


@pytest.mark.parametrize("name", HEADS)
def test_the_whole_report(name, hosts, caplog):
    """Under a prefix and beside others; mixers that are there in part are not taken."""
    own = {k: v.clone() for k, v in hosts[name].state_dict().items()}
    inside = [k for k in own if k.startswith(tuple(f"{p}." for p in hosts[name].replaced_mixers))]
    heads = [k for k in own if k.startswith(HEADS[name])]
    model = small(name, seed=5, num_classes=5)
    stepped = {f"net.{k}": v for k, v in own.items()} | {"optimizer.step": torch.zeros(1)}
    fitting, report = fit(stepped, model, "x.pth")
    assert report.matched == tuple(fitting) == tuple(own) and report.elsewhere == 1
    assert all(value.equal(own[key]) for key, value in fitting.items())
    assert str(report).splitlines()[1:] == ["  1 entries outside the backbone were ignored"]

    assert not caplog.records
    for other_shape in (False, True):
        caplog.clear()
        part = dict(own)
        if other_shape:
            part[inside[0]] = torch.zeros(1)
        else:
            del part[inside[0]]
        _, report = fit(part, model, "x.pth")
        assert set(report.missing) == set(inside) and not report.unexpected
        assert report.elsewhere == 0 and report.classifier == ""
        (record,) = caplog.records
        replaced = [f"{place}." for place in hosts[name].replaced_mixers]
        first = f"x.pth has no weights of the replaced mixers: {', '.join(replaced[:6])}"
        assert record.getMessage() == first

    # Other classes in the same number leave both classifiers out.
    for theirs, ours, left in (
        ("abcde", "abcde", False),
        ("abcde", "abcdf", True),
        ("abcde", None, False),
        (None, "abcde", False),
    ):
        _, report = fit(own, model, "x.pth", theirs, ours)
        assert list(report.missing) == (heads if left else [])
        assert report.classifier == ("left out: the file has other classes" if left else "")


def test_the_whole_refusal(hosts):
    own = hosts["twins_svt_small_dw_conv"].state_dict()
    part = {k: v for k, v in own.items() if k not in ("norm.weight", "blocks.0.0.norm1.bias")}
    part |= {"blocks.0.0.norm1.weight": torch.zeros(3), "more": torch.zeros(1)}
    with pytest.raises(backbones.CheckpointError) as error:
        fit(part, hosts["twins_svt_small_dw_conv"], "x.pth")
    assert str(error.value).splitlines() == [
        f"x.pth does not fit Twins: {len(own) - 3} of {len(own)} entries match.",
        "  shape: blocks.0.0.norm1.weight (3,) instead of (64,)",
        "  missing: blocks.0.0.norm1.weight, blocks.0.0.norm1.bias",
        "  unexpected: more",
    ]
    # timm's own network has nothing of ours.
    plain = timm.create_model("twins_svt_small", num_classes=2, depths=(1, 1, 1, 1))
    assert not fit(plain.state_dict(), plain, "x.pth")[1].missing
    # What no stage depends on may be missing.
    part = {k: v for k, v in own.items() if k != "norm.weight"}
    assert fit(part, hosts["twins_svt_small_dw_conv"], "x.pth")[1].missing == ("norm.weight",)
