"""Recipes that people compare with: their backbones, and ten iterations of each."""

import json
import math

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.config import Config

import dense.segmentation  # noqa: F401
from dense.openmmlab.backbone import fit_channels
from dense.recipes import RECIPES
from tests.support import assert_channels_said, recipes
from tests.test_mmdetection import mmdetection
from tests.test_mmdetection_configs import THEIRS

METHODS = RECIPES / "mmdetection/methods"


def test_there_are_no_others():
    assert {path.stem for path in METHODS.glob("*.py")} == set(THEIRS)


@pytest.mark.parametrize("path", recipes(METHODS.parent), ids=lambda path: path.stem)
def test_a_recipe_says_the_channels_that_its_backbone_has(path):
    assert_channels_said(path)


@pytest.mark.parametrize("name", THEIRS)
def test_a_key_names_the_backbone(name):
    cfg = Config.fromfile(METHODS / f"{name}.py")
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
