"""One name in OpenMMLab's registry, by their conventions, without anybody else's framework."""

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, Registry
from mmseg.registry import MODELS as MMSEG_MODELS

import backbones
import dense.segmentation  # noqa: F401
from dense.openmmlab import config
from dense.recipes import RECIPES
from tests.support import run_without


@pytest.fixture(scope="module")
def elsewhere():
    """The registry of a package that knows nothing of us, as MMDetection's is."""
    return Registry("model", parent=MODELS, scope="another_package")


@pytest.mark.parametrize("name", backbones.MODEL_NAMES)
def test_every_openmmlab_package_sees_the_name(name, elsewhere):
    assert MMSEG_MODELS.get(name) is MODELS.get(name) is elsewhere.get(name) is not None


def test_a_config_builds_what_timm_builds():
    cfg = dict(
        type="i_d_dw_conv_nano",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
        frozen_stages=-1,
        norm="SyncBN",
    )
    backbone = MMSEG_MODELS.build(cfg)
    classifier = timm.create_model("i_d_dw_conv_nano", drop_path_rate=0.3)
    ours = {k: v.shape for k, v in backbone.state_dict().items() if not k.startswith("norms.")}
    theirs = {k: v.shape for k, v in classifier.state_dict().items() if k in ours}
    assert ours == theirs
    assert backbone.train() is backbone and backbone.eval() is backbone
    assert [o.shape[1] for o in backbone(torch.rand(1, 3, 50, 60))] == [32, 64, 128, 256]


@pytest.mark.slow
def test_mmengine_alone_suffices():
    code = (
        "import dense.segmentation, torch\n"
        "from mmengine.registry import MODELS\n"
        "print(len(MODELS.build(dict(type='dw_conv_nano'))(torch.rand(1, 3, 64, 64))))"
    )
    done = run_without(("detectron2", "mmseg", "mmcv", "mmdet"), code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("4")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "pretraining"])
def test_a_saved_config_imports_its_hooks(task):
    """The frameworks' own tools import what the config names, and no more of ours."""
    cfg = Config.fromfile(RECIPES / task / "_base_/default_runtime.py", lazy_import=False)
    code = (
        "import importlib\nfrom mmengine.registry import HOOKS\n"
        f"for name in {list(cfg.custom_imports.imports)}: importlib.import_module(name)\n"
        f"print([name for name in {list(config._HOOKS)} if HOOKS.get(name) is None])"
    )
    done = run_without((), code)
    assert done.stdout.endswith("[]\n"), done.stderr


def test_public_names_of_the_adapter_and_of_the_errors():
    from dense.openmmlab.backbone import OpenMMLabBackbone
    from dense.openmmlab.config import ConfigError
    from dense.segmentation import data

    assert dense.segmentation.PyramidBackbone is OpenMMLabBackbone
    assert isinstance(MODELS.build(dict(type="swin_nano")), dense.segmentation.PyramidBackbone)
    assert data.ConfigError is ConfigError


@pytest.mark.slow
def test_missing_frameworks_are_named_with_the_command():
    done = run_without(("mmengine",), "import dense.segmentation")
    assert "mmengine is not installed" in done.stderr
    assert "pip install 'dense-backbones[segmentation]'" in done.stderr
    code = "import dense.segmentation as s; s.load_predictor('config.py', 'weights.pth')"
    done = run_without(("mmseg",), code)
    assert "mmseg is not installed" in done.stderr


@pytest.mark.parametrize("spelling", ["init", "init_cfg", "pretrained"])
def test_init_is_read_by_init_weights_only(spelling, tmp_path):
    file = str(tmp_path / "weights.pth")
    backbone = MODELS.build(
        dict(
            type="dw_conv_nano",
            **{spelling: dict(type="Pretrained", checkpoint=file)}
            if spelling == "init_cfg"
            else {spelling: file},
        )
    )
    classifier = timm.create_model("dw_conv_nano")
    torch.save({"state_dict": classifier.state_dict()}, file)
    weights = classifier.state_dict()
    shared = [key for key in backbone.state_dict() if key in weights]
    assert len(shared) > 100
    before = backbone.state_dict()["patch_embed.proj.weight"]
    assert not before.equal(weights["patch_embed.proj.weight"])
    backbone.init_weights()
    for key in shared:
        torch.testing.assert_close(backbone.state_dict()[key], weights[key], rtol=0, atol=0)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(timm.create_model("swin_nano").state_dict(), tmp_path / "swin.pth")
    backbone = MODELS.build(dict(type="dw_conv_nano", init=str(tmp_path / "swin.pth")))
    with pytest.raises(backbones.CheckpointError, match=r"swin_nano.*dw_conv_nano"):
        backbone.init_weights()


def test_one_source_of_weights_may_be_named_twice():
    checkpoint = dict(type="Pretrained", checkpoint="a.pth", prefix="x", map_location="cpu")
    for given in (
        dict(init="a.pth", pretrained="a.pth", init_cfg=checkpoint),
        dict(init_cfg=checkpoint),
        dict(pretrained="a.pth", init_cfg=None),
    ):
        assert MODELS.build(dict(type="dw_conv_nano", **given)).init == "a.pth"
    assert MODELS.build(dict(type="dw_conv_nano")).init is None


@pytest.mark.parametrize(
    "init_cfg",
    [
        *("a.pth", dict(checkpoint="a.pth"), dict(type="Pretrained")),
        *(dict(type="Normal", checkpoint="a.pth"), dict(type="Pretrained", checkpoint="")),
        dict(type="Pretrained", checkpoint="a.pth", std=0.1),
    ],
)
def test_another_init_cfg_is_refused(init_cfg):
    with pytest.raises(ValueError) as error:
        MODELS.build(dict(type="dw_conv_nano", init_cfg=init_cfg))
    assert str(error.value).endswith(
        f"init_cfg={init_cfg!r}: dict(type='Pretrained', checkpoint=...) is valid; leave init_cfg "
        "out to start from random weights"
    )


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_maps_are_contiguous_whatever_the_photos_are(size):
    backbone = MODELS.build(dict(type="dw_conv_nano", out_indices=(1, 3))).eval()
    photos = torch.rand(1, 3, *size).contiguous(memory_format=torch.channels_last)
    maps = backbone(photos)
    assert len(maps) == 2
    for found in maps:
        _, channels, height, width = found.shape
        assert found.stride() == (channels * height * width, height * width, width, 1)


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="different weights"):
        MODELS.build(dict(type="dw_conv_nano", init="a.pth", pretrained="b.pth"))
    with pytest.raises(ValueError, match=r"dict\(type='Pretrained', checkpoint=...\) is valid"):
        MODELS.build(dict(type="dw_conv_nano", init_cfg=dict(type="Normal", std=0.1)))
    with pytest.raises(ValueError, match=r"0, 1, 2, 3"):
        MODELS.build(dict(type="dw_conv_nano", out_indices=(0, 4)))
