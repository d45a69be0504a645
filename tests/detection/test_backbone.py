"""By name into Detectron2's own detectors, in both config systems."""

import logging
import math

import pytest
import timm
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config, get_config_file
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils import logger as detectron2_logger

import backbones
from backbones import FAMILIES
from dense.backbone import DenseBackbone
from dense.detection import PyramidBackbone, add_dense_config
from dense.detection.backbone import last_level_p6p7
from tests.support import foreign_operators, run_without

from .steps import eval_step, sample, train_step

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def stock(yaml: str, name: str, **dense):
    """A YAML of Detectron2's, with nothing but the backbone changed."""
    cfg = get_cfg()
    add_dense_config(cfg)
    cfg.merge_from_file(get_config_file(yaml))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.BACKBONE.NAME = name
    for key, value in dense.items():
        cfg.MODEL.DENSE[key] = value
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("yaml", [MASK_RCNN, RETINANET])
def test_stock_yaml_trains_a_step(yaml, family):
    torch.manual_seed(0)
    model = build_model(stock(yaml, f"{family}_nano_fpn"))
    batch = sample(count=2)
    assert math.isfinite(train_step(model, batch))
    # DDP stops at a parameter without a gradient.
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert eval_step(model, batch).image_size == (96, 128)


def test_lazy_mask_rcnn_trains_a_step():
    model_config = get_config("common/models/mask_rcnn_fpn.py").model
    model_config.backbone.bottom_up = L(PyramidBackbone)(
        name="i_d_dw_conv_nano", out_features=("res2", "res3", "res4", "res5"), norm="BN"
    )
    model = instantiate(model_config)
    assert math.isfinite(train_step(model, sample()))


def test_every_name_is_registered_with_and_without_a_pyramid():
    for name in backbones.MODEL_NAMES:
        assert name in BACKBONE_REGISTRY
        assert f"{name}_fpn" in BACKBONE_REGISTRY


@pytest.mark.parametrize("name", ["swin_nano", "dw_conv_nano"])
def test_features_have_ceil_sizes_and_the_shapes_said(name):
    backbone = build_backbone(stock(MASK_RCNN, name)).eval()
    features = backbone(torch.rand(2, 3, 70, 97))
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for key, shape in backbone.output_shape().items():
        size = (math.ceil(70 / shape.stride), math.ceil(97 / shape.stride))
        assert features[key].shape == (2, shape.channels, *size)


def test_the_network_is_timms():
    model = timm.create_model("d_dw_conv_nano", num_classes=0)
    backbone = PyramidBackbone("d_dw_conv_nano", norm="BN")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("norm.")}
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(k.startswith("norms.") for k in missing)
    x = torch.rand(1, 3, 64, 96)
    stages = model.eval().forward_intermediates(x, intermediates_only=True)
    ours = PyramidBackbone.forward(backbone.eval(), x)
    for i, (stage, key) in enumerate(zip(stages, ours, strict=True)):
        torch.testing.assert_close(backbone.norms[str(i)](stage), ours[key])


def test_subset_of_features():
    backbone = PyramidBackbone("swin_nano", out_features=["res3", "res5"])
    assert list(backbone(torch.rand(1, 3, 64, 64))) == ["res3", "res5"]
    assert backbone.output_shape()["res5"] == ShapeSpec(channels=256, stride=32)


@pytest.mark.parametrize("features", [[], ["res1"], ["res4", "res3"], ["p2"]])
def test_wrong_features_name_the_valid_ones(features):
    with pytest.raises(ValueError, match="res2, res3, res4, res5"):
        PyramidBackbone("swin_nano", out_features=features)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="swin_tny.*swin_tiny"):
        PyramidBackbone("swin_tny")


def test_pyramid_of_features_that_are_not_built():
    cfg = stock(MASK_RCNN, "swin_nano_fpn", OUT_FEATURES=["res2", "res3"])
    with pytest.raises(ValueError, match="MODEL.FPN.IN_FEATURES.*MODEL.DENSE.OUT_FEATURES"):
        build_backbone(cfg)


def test_input_is_rgb_with_imagenets_statistics():
    model = build_model(stock(MASK_RCNN, "dw_conv_nano_fpn"))
    assert model.input_format == "RGB"
    expected = timm.create_model("dw_conv_nano").pretrained_cfg
    for ours, theirs in ((model.pixel_mean, "mean"), (model.pixel_std, "std")):
        torch.testing.assert_close(
            ours.flatten() / 255, torch.tensor(expected[theirs]), atol=1e-3, rtol=0
        )


def test_the_keys_of_a_yacs_config():
    cfg = get_cfg()
    add_dense_config(cfg)
    dense = dict(cfg.MODEL.DENSE)
    assert dense == {
        **{"OUT_FEATURES": ["res2", "res3", "res4", "res5"], "INIT": "", "DROP_PATH_RATE": 0.0},
        **{"FROZEN_STAGES": -1, "NORM": "SyncBN", "GRAD_CHECKPOINTING": False},
        **{"WINDOW_SIZE": None, "FUSE": False, "OPTIONS": {}},
    }
    cfg.merge_from_other_cfg(CfgNode({"MODEL": {"DENSE": {"OPTIONS": {"output_stride": 8}}}}))
    assert cfg.MODEL.DENSE.OPTIONS == {"output_stride": 8} and cfg.INPUT.FORMAT == "RGB"
    with pytest.raises(KeyError, match="OTHER"):
        cfg.merge_from_other_cfg(CfgNode({"MODEL": {"DENSE": {"OTHER": 8}}}))
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def test_a_pyramid_is_of_the_config():
    cfg = stock(MASK_RCNN, "dw_conv_nano_fpn", FUSE=True)
    cfg.MODEL.FPN.update(NORM="GN", FUSE_TYPE="avg", OUT_CHANNELS=64)
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    fpn = build_backbone(cfg)
    assert fpn._fuse_type == "avg" and isinstance(fpn.top_block, LastLevelMaxPool)
    # A feature that is not used would have a norm without gradients.
    assert list(fpn.bottom_up.output_shape()) == ["res3", "res4"] == list(fpn.in_features)
    assert list(fpn.output_shape()) == ["p3", "p4", "p5"] and fpn.bottom_up.fuse is True
    assert {shape.channels for shape in fpn.output_shape().values()} == {64}
    assert sum(isinstance(m, torch.nn.GroupNorm) for m in fpn.modules()) == 4
    cfg = stock(RETINANET, "dw_conv_nano_fpn")
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    top = build_backbone(cfg).top_block
    assert isinstance(top, LastLevelP6P7) and (top.p6.in_channels, top.in_feature) == (128, "res4")
    assert (top.p6.out_channels, top.num_levels) == (256, 2)
    other = last_level_p6p7("dw_conv_nano", 32)
    assert (other.p6.in_channels, other.p6.out_channels, other.in_feature) == (256, 32, "res5")
    cfg.MODEL.FPN.IN_FEATURES = []
    with pytest.raises(ValueError, match="one or more"):
        build_backbone(cfg)


def test_weights_are_read_once(init, monkeypatch):
    read = []
    backbone = PyramidBackbone("dw_conv_nano", init=str(init))
    monkeypatch.setattr(DenseBackbone, "init_weights", lambda self: read.append(self))
    for _ in range(2):
        backbone.train()(torch.rand(2, 3, 64, 64))
    PyramidBackbone("dw_conv_nano").train()(torch.rand(2, 3, 64, 64))
    assert read == [backbone]
    # A state dict with a part of the parameters leaves it to be read.
    other = PyramidBackbone("dw_conv_nano", init=str(init))
    state = other.state_dict()
    other.load_state_dict({k: v for k, v in state.items() if "norms.3" not in k}, strict=False)
    assert other._needs_init
    other.load_state_dict({k: v for k, v in state.items() if "running" not in k}, strict=False)
    assert not other._needs_init
    yacs = build_backbone(stock(MASK_RCNN, "dw_conv_nano"))
    assert yacs.init is None and not yacs._needs_init and yacs.fuse is False


def test_yacs_keys_reach_the_backbone():
    cfg = stock(
        MASK_RCNN,
        "dw_conv_nano",
        OUT_FEATURES=["res4"],
        INIT="weights.pth",
        DROP_PATH_RATE=0.5,
        FROZEN_STAGES=1,
        NORM="FrozenBN",
        GRAD_CHECKPOINTING=True,
        WINDOW_SIZE=5,
    )
    backbone = build_backbone(cfg)
    assert backbone.out_indices == (2,)
    assert backbone.init == "weights.pth"
    assert backbone.frozen_stages == 1
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules())
    assert [p.shape[-1] for n, p in backbone.named_parameters() if p.ndim == 4][-1] == 5
    rates = [m.drop_prob for m in backbone.modules() if hasattr(m, "drop_prob")]
    assert max(rates) > 0


def test_yacs_options_are_the_models_own(tmp_path):
    yaml = tmp_path / "dilated.yaml"
    yaml.write_text("MODEL: {DENSE: {OPTIONS: {output_stride: 16, shared: true}}}")
    cfg = stock(MASK_RCNN, "swin_local_mlp_nano")
    cfg.merge_from_file(str(yaml))
    backbone = build_backbone(cfg)
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 16, 16]
    # One set of weights for all windows: (heads, window^2, window^2).
    assert backbone.state_dict()["stages.0.blocks.0.mixer.weight"].shape == (2, 49, 49)


def test_frozen_stages_neither_learn_nor_count():
    torch.manual_seed(0)
    model = build_model(stock(MASK_RCNN, "dw_conv_nano_fpn", FROZEN_STAGES=2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_step(model, sample())
    bottom_up = "backbone.bottom_up."
    frozen = tuple(bottom_up + part for part in ("patch_embed", "stages.0", "stages.1"))
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert not [k for k in changed if k.startswith(frozen)]
    assert [k for k in changed if k.startswith(bottom_up + "stages.2")]


def test_freeze_at_is_ignored_and_that_is_said_once(caplog):
    detectron2_logger._LOG_COUNTER.clear()
    with caplog.at_level(logging.INFO, logger="dense"):
        for _ in range(2):
            backbone = build_backbone(stock(MASK_RCNN, "dw_conv_nano"))
    assert all(p.requires_grad for p in backbone.parameters())
    assert caplog.text.count("FREEZE_AT (2) is ignored") == 1
    # Of other values again.
    with caplog.at_level(logging.INFO, logger="dense"):
        build_backbone(stock(MASK_RCNN, "dw_conv_nano", FROZEN_STAGES=1))
    said = [record for record in caplog.records if "is ignored" in record.getMessage()]
    assert [record.name for record in said] == ["dense.detection.backbone"] * 2
    assert said[1].getMessage() == (
        "MODEL.BACKBONE.FREEZE_AT (2) is ignored: MODEL.DENSE.FROZEN_STAGES (1) is used instead"
    )


def test_config_without_our_keys():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "dw_conv_nano"
    with pytest.raises(ValueError, match="add_dense_config"):
        build_backbone(cfg)


@pytest.fixture
def init(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "imagenet.pth"
    torch.save({"model": timm.create_model("dw_conv_nano").state_dict()}, path)
    return path


def weight(backbone):
    return backbone.stages[0].blocks[0].mixer.in_proj.weight.detach().clone()


def test_init_is_read_when_training_starts(init):
    backbone = PyramidBackbone("dw_conv_nano", init=str(init))
    random = weight(backbone)
    x = torch.rand(2, 3, 64, 64)
    backbone.eval()(x)
    assert torch.equal(weight(backbone), random)
    backbone.train()(x)
    saved = torch.load(init, weights_only=True)["model"]
    assert torch.equal(weight(backbone), saved["stages.0.blocks.0.mixer.in_proj.weight"])


def test_init_is_not_read_after_a_checkpoint_brought_all(init):
    trained = torch.nn.Sequential(PyramidBackbone("dw_conv_nano"))
    model = torch.nn.Sequential(PyramidBackbone("dw_conv_nano", init=str(init)))
    model.load_state_dict(trained.state_dict())
    init.unlink()
    model.train()(torch.rand(2, 3, 64, 64))
    assert torch.equal(weight(model[0]), weight(trained[0]))


def test_init_that_does_not_exist():
    with pytest.raises(backbones.CheckpointError, match="nowhere.pth"):
        PyramidBackbone("dw_conv_nano", init="nowhere.pth").init_weights()


@pytest.mark.slow
def test_import_needs_no_openmmlab_package():
    result = run_without(
        ("mmcv", "mmengine", "mmseg", "mmdet"),
        "import dense.detection, dense.detection.engine, dense.detection.data\n"
        "print(dense.detection.PyramidBackbone('dw_conv_nano').channels)",
    )
    assert result.returncode == 0, result.stderr
    assert "(32, 64, 128, 256)" in result.stdout


def test_public_names_of_the_adapter_and_of_the_error():
    from dense.detection import backbone, config

    assert PyramidBackbone is backbone.PyramidBackbone
    assert config.ConfigError is config.LazyConfigError


@pytest.mark.slow
def test_missing_detectron2_is_named_with_the_command():
    result = run_without(("detectron2",), "import dense.detection")
    assert "ImportError: detectron2 is not installed: run pip install" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_operators_read_our_layout(family):
    """Maps stay channels-last in Detectron2: its compiled operators must not misread them."""
    torch.manual_seed(0)
    model = build_model(stock(MASK_RCNN, f"{family}_nano_fpn"))
    with foreign_operators() as seen:
        train_step(model, sample(count=2))
        assert seen == {
            "torchvision::nms",
            "torchvision::roi_align",
            "torchvision::_roi_align_backward",
        }
        seen.clear()
        eval_step(model, sample())
        assert seen == {"torchvision::nms", "torchvision::roi_align"}
