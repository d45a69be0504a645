"""Recipes that people compare with: MMDetection's own by number, and ten iterations of each."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.config import Config

import dense.segmentation  # noqa: F401
from dense.openmmlab.backbone import fit_channels
from dense.recipes import RECIPES
from tests.support import assert_channels_said, flat, recipes
from tests.test_mmdetection import mmdetection

METHODS = RECIPES / "mmdetection/methods"
# MMDetection's config with Swin, where it has one.
THEIRS = {
    "mask-rcnn_fpn_8xb2-1x_coco": "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco",
    "mask-rcnn_fpn_8xb2-ms-crop-3x_coco": "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco",
    "cascade-mask-rcnn_fpn_8xb2-1x_coco": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco",
    "retinanet_fpn_8xb2-1x_coco": "swin/retinanet_swin-t-p4-w7_fpn_1x_coco",
}


def configs(name):
    import mmdet

    package = Path(mmdet.__file__).parent / ".mim/configs"
    ours = Config.fromfile(METHODS / f"{name}.py")
    return ours, Config.fromfile(package / f"{THEIRS[name]}.py")


def fields(node, *left_out):
    # Where a config is a base of another package's, MMEngine notes it.
    left_out += ("_scope_",)
    found = flat(node.to_dict() if hasattr(node, "to_dict") else dict(node))
    return {k: v for k, v in found.items() if v is not None and not k.startswith(left_out)}


def test_there_are_no_others():
    assert {path.stem for path in METHODS.glob("*.py")} == set(THEIRS)


@pytest.mark.parametrize("name", THEIRS)
def test_the_recipe_is_mmdetections(name):
    """But for the backbone; Cascade's and RetinaNet's have SGD there, AdamW as Swin's here."""
    ours, theirs = configs(name)
    assert fields(ours.model, "backbone", "neck.in_channels") == fields(
        theirs.model, "backbone", "neck.in_channels"
    )
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        left_out = ("num_workers", "dataset.pipeline.0.backend_args", "dataset.backend_args")
        assert fields(ours[loader], *left_out) == fields(theirs[loader], *left_out)
    assert fields(ours.train_cfg) == fields(theirs.train_cfg)
    metric = theirs.val_evaluator.metric
    assert ours.val_evaluator.metric == metric
    swin, _ = configs("mask-rcnn_fpn_8xb2-1x_coco")[::-1]
    network = ours.model.backbone
    assert (network.init, network.norm) == ("ms_in1k", "SyncBN")
    assert network.out_indices == theirs.model.backbone.out_indices
    assert network.drop_path_rate == swin.model.backbone.drop_path_rate
    assert ours.optim_wrapper.type == "OptimWrapper"
    assert ours.optim_wrapper.optimizer == swin.optim_wrapper.optimizer
    assert ours.param_scheduler[0] == swin.param_scheduler[0]
    assert dict(ours.param_scheduler[1]) == dict(theirs.param_scheduler[1])


@pytest.mark.parametrize("path", recipes(METHODS.parent), ids=lambda path: path.stem)
def test_a_recipe_says_the_channels_that_its_backbone_has(path):
    assert_channels_said(path)


def test_settings_of_every_run_are_mmdetections():
    """But for what a run keeps, and logs for TensorBoard."""
    import mmdet

    package = Path(mmdet.__file__).parent / ".mim/configs"
    ours, theirs = (
        Config.fromfile(folder / "_base_/default_runtime.py")
        for folder in (METHODS.parent, package)
    )
    kept = tuple(f"checkpoint.{key}" for key in ("max_keep_ckpts", "save_best", "rule"))
    assert fields(ours.env_cfg) == fields(theirs.env_cfg)
    assert fields(ours.default_hooks, *kept) == fields(theirs.default_hooks)
    assert [ours.default_hooks.checkpoint[key.split(".")[1]] for key in kept] == [
        *(3, "coco/bbox_mAP", "greater")
    ]
    assert ours.log_processor.by_epoch and ours.default_scope == theirs.default_scope


@pytest.mark.parametrize("name", THEIRS)
def test_a_key_names_the_backbone(name):
    cfg, _ = configs(name)
    assert cfg.model.neck.in_channels == [96, 192, 384, 768][-len(cfg.model.neck.in_channels) :]
    cfg.model.backbone.type = "swin_large"
    fit_channels(cfg.model)
    maps = [192, 384, 768, 1536]
    assert cfg.model.neck.in_channels == (maps[1:] if "retinanet" in name else maps)


@pytest.mark.e2e
@pytest.mark.parametrize("name", THEIRS)
def test_ten_iterations_on_photos(name, tmp_path, sample_data):
    root, annotations = f"{sample_data}/coco/", f"{sample_data}/coco/annotations"
    options = [
        *("model.backbone.type=dw_conv_nano", "model.backbone.init=None"),
        *(f"{split}_dataloader.dataset.data_root={root}" for split in ("train", "val", "test")),
        f"val_evaluator.ann_file={annotations}/instances_val2017.json",
        *("train_dataloader.dataset.indices=20", "train_cfg.max_epochs=1", "val_cfg=None"),
        *("val_dataloader=None", "val_evaluator=None", "default_hooks.checkpoint.save_best=None"),
        *("train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"),
        "default_hooks.logger.interval=1",
    ]
    if "3x" in name:
        branches = "train_dataloader.dataset.pipeline.3.transforms"
        options += [f"{branches}.{place}.scales=[(160,256)]" for place in ("0.0", "1.2")]
    else:
        options += ["train_dataloader.dataset.pipeline.2.scale=(256,160)"]
    if "mask" in name:
        options.append("model.train_cfg.rpn_proposal.max_per_img=50")
        stages = [f".{stage}" for stage in range(3)] if "cascade" in name else [""]
        options += [f"model.train_cfg.rcnn{stage}.sampler.num=16" for stage in stages]
    mmdetection("train", METHODS / f"{name}.py", "--work-dir", tmp_path, "--cfg-options", *options)
    [log] = tmp_path.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 10 and all(math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "epoch_1.pth").is_file()
