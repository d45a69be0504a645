"""Loading: what is taken, what is refused, and what the report says."""

import hashlib
import re
import sys
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

import backbones
from backbones.layouts import LAYOUTS, from_ours
from tests.support import run_forked

X = torch.randn(1, 3, 64, 64)


def build(name: str, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, **{"num_classes": 5, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def released_names(state_dict: dict, family: str) -> dict:
    """Our names as the authors' and Swin's released files have them."""
    released = {}
    for name, value in state_dict.items():
        if match := re.match(r"stages\.(\d)\.downsample\.(.*)", name):
            name = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        name = name.replace("stages.", "layers.").replace("head.fc.", "head.")
        if family == "swin":
            name = name.replace(".mixer.", ".attn.")
        else:
            if "norm2" in name:
                name = name.replace("norm2", "bn")
            for ours, theirs in {
                "in_proj": "conv0",
                "in_norm": "bn0",
                "mid_norm": "bn",
                "out_proj": "conv2",
                "out_norm": "bn2",
                "conv.weight": "conv.weight",
                "conv.bias": "conv.bias",
                "bias": "conv.bias",
                "reduce_norm": "conv.bn" if family == "d_dw_conv" else "conv.conv1.1",
                "reduce": "conv.conv1" if family == "d_dw_conv" else "conv.conv1.0",
                "expand": "conv.conv2" if family == "d_dw_conv" else "conv.conv2.0",
            }.items():
                if re.search(rf"\.mixer\.{re.escape(ours)}(\.|$)", name):
                    name = name.replace(f".mixer.{ours}", f".attn2conv.{theirs}")
                    break
            if "attn2conv" in name and value.ndim == 2:
                value = value[:, :, None, None]
        released[name] = value
    if family == "swin":
        released["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
        released["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return released


@pytest.mark.parametrize("family", ["swin", "dw_conv", "d_dw_conv", "i_d_dw_conv"])
def test_released_names(family, tmp_path):
    source, target = build(f"{family}_nano"), build(f"{family}_nano", seed=1)
    path = tmp_path / "released.pth"
    torch.save({"model": released_names(source.state_dict(), family), "epoch": 299}, path)
    report = backbones.load_checkpoint(target, path)
    assert len(report.matched) == len(source.state_dict())
    assert not (report.missing or report.unexpected or report.resized)
    with torch.no_grad():
        assert target(X).equal(source(X))


@pytest.mark.parametrize("family", backbones.FAMILIES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {"model": sd, "iteration": 7},
        lambda sd: {"state_dict": {f"backbone.{k}": v for k, v in sd.items()}, "meta": {"a": 1}},
        lambda sd: {"model": {f"backbone.bottom_up.{k}": v for k, v in sd.items()}},
        lambda sd: {"state_dict_ema": {f"module.{k}": v for k, v in sd.items()}, "model": {}},
    ],
)
def test_wrappers_and_prefixes(family, wrap, tmp_path):
    source, target = build(f"{family}_nano"), build(f"{family}_nano", seed=1)
    torch.save(wrap(source.state_dict()), tmp_path / "file.pth")
    report = backbones.load_checkpoint(target, tmp_path / "file.pth")
    assert not (report.missing or report.unexpected)
    with torch.no_grad():
        assert target(X).equal(source(X))


def test_safetensors(tmp_path):
    source, target = build("dw_conv_nano"), build("dw_conv_nano", seed=1)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "file.safetensors")
    backbones.load_checkpoint(target, tmp_path / "file.safetensors")
    with torch.no_grad():
        assert target(X).equal(source(X))


def test_timm_loads_a_file_through_the_same_code(tmp_path):
    source = build("d_dw_conv_nano")
    path = tmp_path / "released.pth"
    torch.save({"model": released_names(source.state_dict(), "d_dw_conv")}, path)
    overlay = dict(file=str(path), num_classes=5)
    loaded = timm.create_model(
        "d_dw_conv_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5
    ).eval()
    with torch.no_grad():
        assert loaded(X).equal(source(X))
    with pytest.raises(backbones.CheckpointError, match="d_dw_conv_nano.*swin_nano"):
        timm.create_model(
            "swin_nano", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True
        )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: nn.Sequential(model),
        lambda model: nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": model})}),
    ],
)
def test_the_pyramid_inside_a_module_is_loaded(wrap, tmp_path):
    source, target = build("swin_nano"), build("swin_nano", seed=1)
    torch.save(source.state_dict(), tmp_path / "file.pth")
    backbones.load_checkpoint(wrap(target), tmp_path / "file.pth")
    with torch.no_grad():
        assert target(X).equal(source(X))
    features = timm.create_model("swin_nano", features_only=True, out_indices=(0, 1))
    backbones.load_checkpoint(features, tmp_path / "file.pth")
    with torch.no_grad():
        expected = source.forward_intermediates(X, indices=[1], intermediates_only=True)[0]
        assert features(X)[1].equal(expected)
    with pytest.raises(backbones.CheckpointError, match="Linear holds 0 backbones"):
        backbones.load_checkpoint(nn.Linear(2, 2), tmp_path / "file.pth")
    with torch.device("meta"):
        empty = timm.create_model("swin_nano")
    with pytest.raises(backbones.CheckpointError, match="meta device"):
        backbones.load_checkpoint(empty, tmp_path / "file.pth")


def test_of_several_backbones_the_one_named_or_of_the_family(tmp_path):
    student, teacher, other = (
        build("swin_nano"), build("swin_nano", seed=1), build("dw_conv_nano")
    )  # fmt: skip
    content = {f"student.backbone.{k}": v for k, v in student.state_dict().items()}
    content |= {f"depth.{k}": v for k, v in other.state_dict().items()}
    content["vgg.features.0.0.weight"] = torch.zeros(3)
    torch.save(content, tmp_path / "one.pth")
    target = build("swin_nano", seed=2)
    backbones.load_checkpoint(target, tmp_path / "one.pth")
    with torch.no_grad():
        assert target(X).equal(student(X))

    content |= {f"teacher.backbone.{k}": v for k, v in teacher.state_dict().items()}
    torch.save(content, tmp_path / "two.pth")
    with pytest.raises(backbones.CheckpointError, match="2 backbones, under 'student.backbone.'"):
        backbones.load_checkpoint(target, tmp_path / "two.pth")
    backbones.load_checkpoint(target, tmp_path / "two.pth", prefix="teacher.backbone.")
    with torch.no_grad():
        assert target(X).equal(teacher(X))
    with pytest.raises(backbones.CheckpointError, match="no backbone under the prefix 'x.'"):
        backbones.load_checkpoint(target, tmp_path / "two.pth", prefix="x.")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (dict(name="swin_local_mlp_nano", shared=True), dict(name="swin_local_mlp_tiny")),
        (dict(name="dw_conv_nano", in_chans=4), dict(name="dw_conv_nano", in_chans=1)),
        (dict(name="swin_nano", window_size=(7, 14)), dict(name="swin_nano")),
    ],
)
def test_what_cannot_be_resized_is_refused_by_name(source, target, tmp_path):
    torch.save(build(**source).state_dict(), tmp_path / "file.pth")
    with pytest.raises(backbones.CheckpointError, match="does not fit"):
        backbones.load_checkpoint(build(**target), tmp_path / "file.pth")


def test_half_a_classifier_is_no_classifier(tmp_path):
    state_dict = build("swin_nano", num_classes=21841).state_dict()
    del state_dict["head.fc.bias"]
    torch.save(state_dict, tmp_path / "file.pth")
    report = backbones.load_checkpoint(build("swin_nano", num_classes=1000), tmp_path / "file.pth")
    assert set(report.missing) == {"head.fc.weight", "head.fc.bias"}


def test_other_wrappers_and_suffixes(tmp_path):
    weights = build("dw_conv_nano").state_dict()
    torch.save({"module": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "a.pth")
    torch.save({"model": {"model": weights}}, tmp_path / "b.pth")
    safetensors.torch.save_file(weights, tmp_path / "c.pth")
    for name in "abc":
        assert not backbones.load_checkpoint(
            build("dw_conv_nano"), tmp_path / f"{name}.pth"
        ).missing
    torch.save({1: torch.zeros(2)}, tmp_path / "d.pth")
    with pytest.raises(backbones.CheckpointError, match="no state dict but a mapping with 1"):
        backbones.read_checkpoint(tmp_path / "d.pth")
    (tmp_path / "e.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(
        backbones.CheckpointError, match="e.pth cannot be read: it is no checkpoint"
    ):
        backbones.read_checkpoint(tmp_path / "e.pth")


def test_a_wrong_network_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "dw.pth"
    torch.save(build("dw_conv_nano").state_dict(), path)
    target = build("i_d_dw_conv_nano")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(backbones.CheckpointError) as error:
        backbones.load_checkpoint(target, path)
    message = str(error.value)
    assert "looks like dw_conv_nano" in message and "network like i_d_dw_conv_nano" in message
    assert "mixer.reduce.weight" in message and str(path) in message
    assert all(v.equal(before[k]) for k, v in target.state_dict().items())
    with pytest.raises(backbones.CheckpointError, match=r"C=32.*C=96"):
        backbones.load_checkpoint(timm.create_model("dw_conv_tiny"), path)


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("swin", {}, "heads 2 4 8 16"),
        ("swin", dict(num_heads=(1, 2, 4, 8), se_ratio=1 / 16), "se_ratio, heads 1 2 4 8"),
        ("swin", dict(position_bias=False), "position_bias=False"),
        ("swin", dict(norm_layer="batchnorm"), "norm_layer='batchnorm', heads 2 4 8 16"),
        ("swin", dict(conv="static"), "conv='static', heads 2 4 8 16"),
        ("swin", dict(conv="post"), "conv='post', heads 2 4 8 16"),
        ("swin", dict(conv="pre"), "conv='pre' or another pre-convolution, heads 2 4 8 16"),
        ("dw_conv", dict(norm_layer="layernorm"), "norm_layer='layernorm'"),
        ("dw_conv", dict(norm_layer="centered_batchnorm"), "norm_layer='centered_batchnorm'"),
        ("dw_conv", dict(num_heads=(1, 2, 4, 8)), "num_heads"),
        ("i_d_dw_conv", dict(local_kernel=7), "local_kernel"),
    ],
)
def test_a_refusal_tells_the_options_of_the_file(name, options, told, tmp_path):
    torch.save(build(f"{name}_nano", **options).state_dict(), tmp_path / "a.pth")
    with pytest.raises(backbones.CheckpointError) as error:
        backbones.load_checkpoint(build("d_dw_conv_nano"), tmp_path / "a.pth")
    message = str(error.value)
    assert f"looks like {name}_nano (C=32, depths 1 1 2 1, {told})," in message
    assert "the network like d_dw_conv_nano (C=32, depths 1 1 2 1)." in message


def test_one_missing_weight_is_refused(tmp_path):
    state_dict = build("swin_nano").state_dict()
    del state_dict["stages.2.blocks.1.mlp.fc1.bias"]
    torch.save(state_dict, tmp_path / "file.pth")
    with pytest.raises(backbones.CheckpointError, match="missing: stages.2.blocks.1.mlp.fc1.bias"):
        backbones.load_checkpoint(build("swin_nano"), tmp_path / "file.pth")


def test_another_classifier_is_left_out_and_reported(tmp_path):
    torch.save(build("swin_nano", num_classes=7).state_dict(), tmp_path / "file.pth")
    report = backbones.load_checkpoint(build("swin_nano"), tmp_path / "file.pth")
    assert report.missing == ("head.fc.weight", "head.fc.bias")
    assert "2 missing" in str(report) and "head.fc.weight" in str(report)


@pytest.mark.parametrize("name", ["swin_nano", "dw_conv_nano"])
def test_another_window_is_resized(name, tmp_path):
    source = build(name)
    torch.save(source.state_dict(), tmp_path / "file.pth")
    target = build(name, seed=1, window_size=12)
    report = backbones.load_checkpoint(target, tmp_path / "file.pth")
    assert len(report.resized) == 5 and "5 resized" in str(report)
    source.set_input_size(window_size=12)
    with torch.no_grad():
        torch.testing.assert_close(target(X), source(X))


def test_another_image_resizes_the_window_grid(tmp_path):
    torch.save(build("swin_local_mlp_nano").state_dict(), tmp_path / "file.pth")
    target = build("swin_local_mlp_nano", img_size=448)
    report = backbones.load_checkpoint(target, tmp_path / "file.pth")
    assert len(report.resized) == 5


def test_per_window_weights_start_the_shared_form_and_back(tmp_path):
    source = build("swin_local_mlp_nano")
    torch.save(source.state_dict(), tmp_path / "windows.pth")
    shared = build("swin_local_mlp_nano", seed=1, shared=True)
    report = backbones.load_checkpoint(shared, tmp_path / "windows.pth")
    name = "stages.1.blocks.0.mixer.weight"
    windows = source.state_dict()[name]
    assert len(report.resized) == 5 and name in report.resized
    expected = windows.double().flatten(-2).flatten(0, 1).mean(0).float()
    torch.testing.assert_close(shared.state_dict()[name], expected)

    torch.save(shared.state_dict(), tmp_path / "shared.pth")
    backbones.load_checkpoint(source, tmp_path / "shared.pth")
    with torch.no_grad():
        torch.testing.assert_close(source(X), shared(X))


def test_another_number_of_channels_in_the_image(tmp_path):
    source = build("dw_conv_nano")
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    grey = build("dw_conv_nano", seed=1, in_chans=1)
    report = backbones.load_checkpoint(grey, tmp_path / "rgb.pth")
    assert report.resized == ("patch_embed.proj.weight",)
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(grey(image), source(image.expand(-1, 3, -1, -1)))


def test_mmpretrain_keeps_its_classifier_beside_the_backbone(tmp_path):
    source = build("swin_nano")
    released = from_ours(source.state_dict(), LAYOUTS["openmmlab"])
    released = {f"backbone.{k}": v for k, v in released.items()}
    released |= {f"backbone.norm3.{k}": v for k, v in source.norm.state_dict().items()}
    released |= {f"head.fc.{k}": v for k, v in source.head.fc.state_dict().items()}
    torch.save({"state_dict": released}, tmp_path / "mmpretrain.pth")
    target = build("swin_nano", seed=1)
    report = backbones.load_checkpoint(target, tmp_path / "mmpretrain.pth")
    assert not (report.missing or report.unexpected)
    with torch.no_grad():
        assert target(X).equal(source(X))


def load_without_mmengine(file: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmengine"]:
        sys.modules[name] = None
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file))
    timm.create_model("dw_conv_nano", num_classes=5, **options)
    timm.create_model("dw_conv_nano", features_only=True, out_indices=(1, 2), **options)
    model = timm.create_model("dw_conv_nano", num_classes=5)
    print(len(backbones.load_checkpoint(model, file).matched))


@pytest.mark.slow
def test_mmengine_checkpoints_are_read_where_it_is_not_installed(tmp_path):
    history_buffer = pytest.importorskip("mmengine.logging").HistoryBuffer
    log = history_buffer()
    log.update(1.0)
    weights = {f"backbone.{k}": v for k, v in build("dw_conv_nano").state_dict().items()}
    content = {"state_dict": weights, "message_hub": {"log_scalars": {"loss": log}}}
    torch.save(content, tmp_path / "iter_1.pth")
    file = str(tmp_path / "iter_1.pth")
    (done,) = run_forked(partial(load_without_mmengine, file))
    assert done.stdout.strip() == str(len(weights)), done.stderr


def test_the_averaged_weights_of_mmengine_are_the_ones_taken(tmp_path):
    """Its EMA hook writes them under ``state_dict`` and the others under ``ema_state_dict``."""
    average, other = build("dw_conv_nano").state_dict(), build("dw_conv_nano", seed=1).state_dict()
    others = {f"module.{k}": v for k, v in other.items()} | {"steps": torch.tensor(3)}
    content = {"state_dict": average, "ema_state_dict": others}
    torch.save(content, tmp_path / "ema.pth")
    target = build("dw_conv_nano", seed=2)
    backbones.load_checkpoint(target, tmp_path / "ema.pth")
    assert all(v.equal(average[k]) for k, v in target.state_dict().items())


def test_mmengine_checkpoints_are_read_without_their_logs(tmp_path):
    history_buffer = pytest.importorskip("mmengine.logging").HistoryBuffer
    source = build("dw_conv_nano")
    log = history_buffer()
    log.update(1.0)
    content = {"state_dict": source.state_dict(), "message_hub": {"log_scalars": {"loss": log}}}
    torch.save(content, tmp_path / "iter_1.pth")
    report = backbones.load_checkpoint(build("dw_conv_nano", seed=1), tmp_path / "iter_1.pth")
    assert not report.missing


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"model": build("dw_conv_nano").state_dict(), "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(backbones.CheckpointError, match="cannot be read as weights alone"):
        backbones.load_checkpoint(build("dw_conv_nano"), tmp_path / "evil.pth")
    assert not (tmp_path / "written").exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(backbones.CheckpointError, match="no checkpoint at .*absent.pth"):
        backbones.read_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(backbones.CheckpointError, match="broken.pth cannot be read"):
        backbones.read_checkpoint(tmp_path / "broken.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(backbones.CheckpointError, match="holds no state dict"):
        backbones.read_checkpoint(tmp_path / "list.pth")


# data/map22kto1k.txt of microsoft/Swin-Transformer: each ImageNet-1K class's row in ImageNet-22K.
SWINS_MAP = "4fff66d6f337db6dd0b41d1b6c863e617f9400d37892df630eecfcfa50131aab"
SWINS_ROWS = {0: 359, 499: 5672, 718: 9212, 852: 11186, 997: 21200, 999: 21817}
TEDDY = 850  # n04399382 is no class of ImageNet-22K; Swin's map has row 5564 there.
# n03933933, the 718th of ImageNet-1K, is row 9211 of the sorted list.
SORTED_ROW = 9211


def rows_of(tmp_path, names_of="ours", family="swin", outputs=1000, meta=None, **kwargs):
    """The rows that a network takes from a classifier of 21841 rows."""
    state_dict = build(f"{family}_nano", num_classes=21841).state_dict()
    state_dict["head.fc.bias"] = torch.arange(21841.0)
    given = from_ours(state_dict, LAYOUTS[names_of]) if names_of != "ours" else state_dict
    if names_of == "openmmlab":
        given = {f"backbone.{k}": v for k, v in given.items()}
        given |= {f"head.fc.{k}": state_dict[f"head.fc.{k}"] for k in ("weight", "bias")}
    torch.save({"state_dict": given, "meta": meta or {}}, tmp_path / "22k.pth")
    model = build(f"{family}_nano", seed=1, num_classes=outputs)
    nn.init.zeros_(model.head.fc.bias)
    backbones.load_checkpoint(model, tmp_path / "22k.pth", **kwargs)
    rows = model.head.fc.bias.detach().long()
    taken = rows > 0
    assert model.head.fc.weight[taken].equal(state_dict["head.fc.weight"][rows[taken]])
    return rows.tolist()


@pytest.mark.parametrize("names_of", ["ours", "original", "timm", "torchvision", "openmmlab"])
def test_swins_22k_rows_are_those_of_swins_own_map(names_of, tmp_path):
    rows = rows_of(tmp_path, names_of)
    assert {place: rows[place] for place in SWINS_ROWS} == SWINS_ROWS
    rows[TEDDY] = 5564
    assert hashlib.sha256("\n".join(map(str, rows)).encode()).hexdigest() == SWINS_MAP


def test_a_22k_file_that_names_its_classes_is_believed(tmp_path):
    names = ImageNetInfo("imagenet-22k").label_names()
    assert rows_of(tmp_path, meta={"classes": names})[718] == SORTED_ROW


def test_22k_rows_of_other_families_are_sorted(tmp_path):
    assert rows_of(tmp_path, family="dw_conv")[718] == SORTED_ROW


def test_swins_22k_rows_follow_the_classes_of_a_network_of_as_many(tmp_path):
    names = ImageNetInfo("imagenet-22k").label_names()
    rows = rows_of(tmp_path, outputs=21841, classes=names)
    # Google's list has n03931044 and n09859684 there, which have no images.
    assert (rows[names.index("n15102455")], rows[names.index("n15102894")]) == (9205, 15027)
    assert sum(row != place for place, row in enumerate(rows)) == 12636
    unchanged = list(range(21841))
    assert rows_of(tmp_path, outputs=21841) == unchanged
    assert rows_of(tmp_path, outputs=21841, classes=[str(i) for i in unchanged]) == unchanged
