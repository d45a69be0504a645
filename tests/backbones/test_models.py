"""The networks against the paper's counts, torchvision's Swin, and timm's protocol."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import backbones
from backbones.__main__ import main
from backbones.families import map_channels
from backbones.hosts import HOST_NAMES
from backbones.models import _with_weights
from backbones.released import RELEASED, Released
from tests.support import NANO, build, run_python

# Counted in the paper's tables to three decimals, in millions, at 1000 classes.
PARAMETERS = {
    "swin_tiny": 28.288,
    "swin_base": 87.768,
    "swin_local_mlp_tiny": 26.156,
    "swin_local_mlp_base": 78.549,
    "dw_conv_tiny": 24.173,
    "dw_conv_base": 74.347,
    "d_dw_conv_tiny": 51.132,
    "d_dw_conv_base": 161.598,
    "i_d_dw_conv_tiny": 26.244,
    "i_d_dw_conv_base": 80.254,
}


def test_names():
    convolutional = ("dw_conv", "d_dw_conv", "i_d_dw_conv")
    assert backbones.FAMILIES == ("swin", "swin_local_mlp", *convolutional)
    sizes = {family: ("nano", "tiny", "base") for family in backbones.FAMILIES}
    sizes["swin"] = ("nano", "tiny", "small", "base", "large")
    names = tuple(f"{family}_{size}" for family, its in sizes.items() for size in its)
    assert names == backbones.MODEL_NAMES and all(map(timm.is_model, (*names, *HOST_NAMES)))
    assert HOST_NAMES == ("volo_d1_local_attention", "volo_d1_dw_conv", "twins_svt_small_dw_conv")


def count(model: nn.Module) -> float:
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 3)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_papers(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count(model) == PARAMETERS[name]


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_swin_is_timms(size):
    """Every weight of timm's, by its names and shapes, has one of ours."""
    with torch.device("meta"):
        ours = timm.create_model(f"swin_{size}")
        theirs = timm.create_model(f"swin_{size}_patch4_window7_224")
    assert count(ours) == count(theirs)
    shapes = [
        sorted(tuple(value.shape) for value in model.state_dict().values() if value.dim() > 1)
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_forms_of_local_mlp():
    """Table 4: one matrix a head; one a channel, the bias table then 169 x C."""
    with torch.device("meta"):
        shared = timm.create_model("swin_local_mlp_tiny", shared=True)
        own = timm.create_model("swin_local_mlp_tiny", shared=True, num_heads=(96, 192, 384, 768))
    assert count(shared) == 24.298
    assert round(count(own), 1) == 35.3


def to_torchvision(state_dict: dict) -> dict:
    """Our names of Swin to torchvision's."""
    renamed = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            name = f"features.0.{0 if parts[1] == 'proj' else 2}.{parts[2]}"
        elif parts[0] == "stages" and parts[2] == "downsample":
            name = f"features.{2 * int(parts[1])}.{'.'.join(parts[3:])}"
        elif parts[0] == "stages":
            rest = ".".join(parts[4:])
            rest = rest.replace("mixer", "attn").replace("fc1", "0").replace("fc2", "3")
            name = f"features.{2 * int(parts[1]) + 1}.{parts[3]}.{rest}"
        else:
            name = name.replace("head.fc", "head")
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("size", [(224, 224), (36, 260)])
def test_swin_is_torchvisions(size):
    """Any multiple of 4: padding, shifting and masking in the order that torchvision has."""
    ours = build("swin_nano", depths=(2, 2, 2, 2)).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = torchvision.models.SwinTransformer(
        [4, 4], 32, [2, 2, 2, 2], [2, 4, 8, 16], [7, 7], num_classes=5
    ).eval()
    state_dict = to_torchvision(ours.state_dict())
    missing, unexpected = theirs.load_state_dict(state_dict, strict=False)
    assert not unexpected and all("relative_position_index" in name for name in missing)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NANO)
def test_a_small_image_leaves_later_ones_alone(name):
    model = build(name).eval()
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        before = model(x)
        model(torch.randn(1, 3, 32, 32))
        assert model(x).equal(before)


@pytest.mark.parametrize("name", ["dw_conv_nano", "i_d_dw_conv_nano"])
def test_convolutions_do_not_pad_to_windows(name):
    """Far from the border, a shift of the image by a patch shifts the stage-1 map, no more."""
    model = build(name, features_only=True, out_indices=(0,)).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        whole = model(x)[0]
        shifted = model(x[..., 4:, 4:])[0]
    torch.testing.assert_close(whole[..., 8:16, 8:16], shifted[..., 7:15, 7:15])


@pytest.mark.parametrize("name", NANO)
def test_gradient_checkpointing_changes_nothing(name):
    plain, checkpointed = build(name), build(name)
    checkpointed.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    outputs = []
    for model in (plain, checkpointed):
        output = model(x)
        output.square().sum().backward()
        outputs.append(output)
    assert outputs[0].equal(outputs[1])
    others = dict(checkpointed.named_parameters())
    for parameter_name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, others[parameter_name].grad)
    for key, value in plain.state_dict().items():
        assert value.equal(checkpointed.state_dict()[key]), key


def test_drop_path_grows_linearly():
    model = build("swin_tiny", drop_path_rate=0.22)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])


@pytest.mark.parametrize("name", NANO)
def test_timm_protocol(name):
    model = build(name)
    x = torch.randn(1, 3, 64, 96)
    model.eval()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, norm=True)
        assert final.shape == (1, 2, 3, 256) and final.equal(model.forward_features(x))
        assert maps[-1].permute(0, 2, 3, 1).equal(final)
        assert maps[0].is_contiguous(memory_format=torch.channels_last)

        two = build(name, features_only=True, out_indices=(1, 3)).eval()
        assert two.feature_info.channels() == [64, 256]
        assert two.feature_info.reduction() == [8, 32]
        assert [o.shape for o in two(x)] == [(1, 64, 8, 12), (1, 256, 2, 3)]
        for got, expected in zip(
            two(x), model.forward_intermediates(x, [1, 3], intermediates_only=True), strict=True
        ):
            assert got.equal(expected)

    layers = timm.models.group_parameters(model, model.group_matcher())
    assert sum(map(len, layers.values())) == len(list(model.parameters()))
    tables = {n for n, _ in model.named_parameters() if "bias_table" in n}
    assert model.no_weight_decay() == tables
    assert bool(tables) == name.startswith("swin")
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.get_classifier().out_features == 3
    there = copy.deepcopy(model).to("meta", torch.float64)
    there.reset_classifier(0)
    there.reset_classifier(5)
    assert {(p.device.type, p.dtype) for p in there.parameters()} == {("meta", torch.float64)}
    model.reset_classifier(0)
    assert model(x).shape == (1, 256)
    assert model.pretrained_cfg["architecture"] == name
    assert model.train() is model and model.eval() is model
    assert pickle.loads(pickle.dumps(model))(x).equal(copy.deepcopy(model)(x))


def test_input_size_resizes_what_depends_on_it():
    model = build("swin_local_mlp_nano").eval()
    x = torch.randn(1, 3, 448, 224)
    with torch.no_grad():
        on_the_fly = model(x)
        model.set_input_size((448, 224))
        assert model.stages[0].blocks[0].mixer.weight.shape[:2] == (16, 8)
        torch.testing.assert_close(model(x), on_the_fly)


def test_timm_is_told_the_new_size():
    model = build("swin_nano")
    model.set_input_size(96, window_size=3)
    assert timm.models.get_model_input_config(model)["input_size"] == (3, 96, 96)
    arguments = timm.models.get_model_args(model)
    assert arguments["img_size"] == (96, 96) and arguments["window_size"] == 3
    model.set_input_size(window_size=2)
    arguments = timm.models.get_model_args(model)
    assert arguments["img_size"] == (96, 96) and arguments["window_size"] == 2


def test_stages_are_taken_by_number():
    model, x = build("dw_conv_nano").eval(), torch.randn(1, 3, 32, 32)
    for indices, channels in ((None, [32, 64, 128, 256]), (2, [128, 256]), ([-3, 0], [32, 64])):
        maps = model.forward_intermediates(x, indices, intermediates_only=True)
        assert [m.shape[1] for m in maps] == channels
    for indices in (0, 5, [4], [-5], []):
        with pytest.raises(IndexError, match="from -4 to 3"):
            model.forward_intermediates(x, indices)


def test_window_size_upsamples():
    """Table 14: bias tables and kernels grow from 7 to 12; predicted kernels cannot."""
    x = torch.randn(1, 3, 96, 96)
    for name in ("swin_nano", "dw_conv_nano"):
        model = build(name)
        model.set_input_size(window_size=12)
        resized = {k: v.shape for k, v in model.state_dict().items()}
        assert resized == {k: v.shape for k, v in build(name, window_size=12).state_dict().items()}
        assert model(x).shape == (1, 5)
    for name in ("swin_local_mlp_nano", "d_dw_conv_nano", "i_d_dw_conv_nano"):
        with pytest.raises(ValueError, match="12"):
            build(name).set_input_size(window_size=12)
        assert build(name, window_size=12)(torch.randn(2, 3, 96, 96)).shape == (2, 5)


def test_wrong_heads_and_groups_are_named():
    with pytest.raises(ValueError, match="num_heads=5 does not divide the 32"):
        build("swin_nano", num_heads=(5, 4, 8, 16))
    with pytest.raises(ValueError, match="num_groups=24 does not divide the 32"):
        build("i_d_dw_conv_nano", num_groups=24)


@pytest.mark.parametrize("family", backbones.FAMILIES)
@pytest.mark.parametrize("kwargs", [{}, {"shared": True}])
def test_memory_format_of_the_whole_model(family, kwargs):
    """What training scripts do for speed: ``model.to(memory_format=torch.channels_last)``."""
    if kwargs and family != "swin_local_mlp":
        pytest.skip("an option of Swin-Local-MLP")
    model = timm.create_model(f"{family}_nano", num_classes=3, **kwargs).eval()
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("family", ["swin", "swin_local_mlp", "dw_conv"])
def test_another_size_keeps_what_is_frozen(family):
    model = timm.create_model(f"{family}_nano", num_classes=0).requires_grad_(False)
    if family == "swin_local_mlp":
        model.set_input_size(window_size=7)
        model.set_input_size(img_size=448)
    else:
        model.set_input_size(window_size=9)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["swin_nano", "swin_local_mlp_nano", "dw_conv_nano"])
@pytest.mark.parametrize("num_heads", [4, (1, 2), (0, 0, 0, 0), (1, -2, 4, 8)])
def test_heads_that_are_no_number_for_each_stage_are_refused(name, num_heads):
    with pytest.raises(ValueError, match="num_heads=.*: a number from 1 for each stage, as"):
        timm.create_model(name, num_heads=num_heads)


def test_a_script_knows_the_names(tmp_path):
    """timm's own train.py is in no package; this one asks timm for a model as it does."""
    code = "import sys, timm, beside; print(timm.is_model(sys.argv[2]), beside.value, __name__)"
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text(code)
    (scripts / "beside.py").write_text("value = 5")
    # Python, too, finds what lies beside the file, not beside a link to it.
    (tmp_path / "link.py").symlink_to(scripts / "train.py")
    done = run_python("-m", "backbones", tmp_path / "link.py", "--model", "dw_conv_tiny")
    assert done.stdout == "True 5 __main__\n", done.stderr[-2000:]
    done = run_python("-m", "backbones", tmp_path / "trian.py")
    assert done.returncode == 1 and "trian.py is no file; python -m" in done.stderr


@pytest.mark.parametrize(
    "words, given",
    [([], ""), (["absent.py"], "absent.py is no file; "), ([".", "x"], ". is no file; ")],
)
def test_a_script_is_needed(words, given, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["backbones", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == f"backbones: {given}python -m backbones SCRIPT ARGUMENTS..."


@pytest.mark.parametrize("words", [[], ["--model"]])
def test_a_script_finds_what_it_would_alone(words, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys; json.dump([sys.argv, sys.path, __name__], open('seen.json', 'w'))"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["backbones", "script.py", *words])
    monkeypatch.setattr(sys, "path", ["before", *sys.path])
    main()
    argv, path, name = json.loads((tmp_path / "seen.json").read_text())
    assert argv == ["script.py", *words] and name == "__main__"
    assert path == [str(tmp_path), *sys.path[1:]] and "before" not in path


# timm's configs and builders


@pytest.mark.parametrize("name", backbones.MODEL_NAMES)
def test_timms_config_is_that_of_its_swin(name):
    """As its own of the same image size has it, with another license and at any size."""
    size = name.rpartition("_")[2]
    for tag, released in RELEASED.get(name, {"": Released("")}).items():
        like = "base_patch4_window12_384" if released.img_size == 384 else "tiny_patch4_window7_224"
        theirs = vars(timm.get_pretrained_cfg(f"swin_{like}"))
        ours = vars(timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name))
        told = dict(
            architecture=name,
            tag=tag or None,
            url=released.url or None,
            num_classes=released.num_classes,
            fixed_input_size=False,
            license="apache-2.0",
            description=released.description if tag else None,
        )
        elsewhere = ("hf_hub_id", "origin_url", "paper_ids", "notes")
        assert ours | {key: theirs[key] for key in elsewhere} == theirs | told
        window = 12 if released.img_size == 384 else 7
        assert (released.window_size, released.img_size) in ((7, 224), (12, 384))
        assert ours["pool_size"] == (window, window)
        if tag:
            data = "1K" if released.num_classes == 1000 else "22K"
            accuracy = f", top-1 {released.top1}" if released.top1 else ""
            sides = f"{released.img_size}x{released.img_size}, window {window}"
            assert released.description == f"ImageNet-{data}, {sides}{accuracy}"
    entry = timm.models.model_entrypoint(name)
    assert entry.__module__ == "backbones.models" and f" {size.capitalize()}: " in entry.__doc__


@pytest.mark.parametrize("size, depths", [("nano", (1, 1, 2, 1)), ("tiny", (2, 2, 6, 2))])
@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_channels_of_maps_and_depths(family, size, depths):
    with torch.device("meta"):
        model = timm.create_model(f"{family}_{size}", num_classes=0)
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    channels = map_channels(f"{family}_{size}")
    assert channels == tuple(stage.blocks[0].norm2.weight.numel() for stage in model.stages)


@pytest.mark.parametrize(
    "overlay, fetched",
    [
        ({}, True),
        ({"file": "mine.pth"}, False),
        ({"state_dict": {"a": torch.zeros(1)}}, False),
        ({"hf_hub_id": "a/b"}, False),
    ],
)
def test_weights_at_hand_are_not_downloaded(overlay, fetched, monkeypatch):
    monkeypatch.setattr("backbones.models.fetch", lambda url: Path("cache", url.rpartition("/")[2]))
    given = {"pretrained_cfg_overlay": {"url": "http://a.b/c.pth", **overlay}, "other": 1}
    got = _with_weights("dw_conv_nano", given)
    file = {"file": "cache/c.pth"} if fetched else {}
    told = {"url": "http://a.b/c.pth", **overlay, **file, "custom_load": True}
    assert got == {"pretrained_cfg_overlay": told, "other": 1}
    assert "custom_load" not in given["pretrained_cfg_overlay"]
    # The released ones, those of a tag, and what is given without an address.
    url = RELEASED["swin_tiny"]["ms_in22k"].url.rpartition("/")[2]
    got = _with_weights("swin_tiny", {"pretrained_cfg": "ms_in22k"})["pretrained_cfg_overlay"]
    assert got == {"file": f"cache/{url}", "custom_load": True}
    if overlay:
        got = _with_weights("dw_conv_nano", {"pretrained_cfg_overlay": overlay})
        assert got == {"pretrained_cfg_overlay": overlay | {"custom_load": True}}


def test_weights_in_memory_are_loaded():
    source = build("dw_conv_nano", seed=1)
    overlay = dict(state_dict=source.state_dict(), num_classes=5)
    model = build("dw_conv_nano", pretrained=True, pretrained_cfg_overlay=overlay)
    # By itself an entry point makes a network of random weights.
    assert timm.models.model_entrypoint("dw_conv_nano")(num_classes=2).num_classes == 2
    assert all(v.equal(source.state_dict()[k]) for k, v in model.state_dict().items())
