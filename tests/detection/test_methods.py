"""Recipes that people compare with: Detectron2's own by number, and ten iterations of each."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.model_zoo import get_config

from dense.detection import PyramidBackbone
from dense.detection.backbone import last_level_p6p7
from dense.detection.config import load_config
from dense.recipes import RECIPES
from tests.support import MISSING, differences

from .test_settings import FULL, detectron2s, plain
from .test_train import losses, main

METHODS = RECIPES / "detection/methods"
# Ours, and Detectron2's model and schedule.
ZOO = {
    "mask_rcnn_1x_coco": ("mask_rcnn_fpn", 1),
    "mask_rcnn_3x_coco": ("mask_rcnn_fpn", 3),
    "cascade_mask_rcnn_1x_coco": ("cascade_rcnn", 1),
    "retinanet_1x_coco": ("retinanet", 1),
}


def config(name, *overrides):
    return load_config(str(METHODS / f"{name}.py"), overrides)


def test_there_are_no_others():
    assert {path.stem for path in METHODS.glob("*.py")} == set(ZOO)


# What every recipe has otherwise than Detectron2's: RGB, a mapper that says which file is faulty,
# AdamW with Swin's weight decay, sizes of --tta.
OURS = {
    **{key: value for key, value in FULL.items() if key.startswith(("data.", "dataloader."))},
    **{key: value for key, value in FULL.items() if key.startswith(("optimizer.", "model.pixel_"))},
    "model.input_format": "RGB",
    "train.amp.precision": "float16",
    "train.checkpointer.max_to_keep": 5,
    "train.seed": -1,
}


@pytest.mark.parametrize("name", ZOO)
def test_the_recipe_is_detectron2s(name):
    model, times = ZOO[name]
    cfg = plain(config(name))
    theirs = detectron2s() | {
        "model": plain(get_config(f"common/models/{model}.py").model),
        "lr_multiplier": plain(get_config("common/coco_schedule.py")[f"lr_multiplier_{times}x"]),
    }
    expected = OURS
    if times == 3:
        expected = expected | {"train.max_iter": 270_000}
    if model == "retinanet":
        expected = expected | {
            "dataloader.train.mapper.use_instance_mask": False,
            "model.backbone.top_block._target_": last_level_p6p7,
            "model.backbone.top_block.name": "${..bottom_up.name}",
            "model.backbone.top_block.in_channels": MISSING,
        }
    assert differences(cfg, theirs, "model.backbone.bottom_up.") == expected
    places = ["res3", "res4", "res5"] if model == "retinanet" else ["res2", "res3", "res4", "res5"]
    assert cfg["model"]["backbone"]["bottom_up"] == dict(
        name="swin_tiny",
        init="ms_in1k",
        out_features=places,
        drop_path_rate=0.2,
        norm="SyncBN",
        _target_=PyramidBackbone,
    )


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("backbone", ["swin_tiny", "i_d_dw_conv_base"])
def test_a_key_names_the_backbone(name, backbone):
    cfg = config(name, f"model.backbone.bottom_up.name={backbone}")
    with torch.device("meta"):
        model = instantiate(cfg.model)
    width = {"swin_tiny": 96, "i_d_dw_conv_base": 128}[backbone]
    assert model.backbone.fpn_lateral5.in_channels == 8 * width
    if name == "retinanet_1x_coco":
        assert model.backbone.top_block.p6.in_channels == 8 * width


@pytest.mark.e2e
@pytest.mark.parametrize("name", ZOO)
def test_ten_iterations_on_photos(name, sample_data, tmp_path, monkeypatch):
    coco, size = Path(sample_data) / "coco", "dataloader.{}.mapper.augmentations.0.{}"
    few = ["model.roi_heads.batch_size_per_image=16"]
    few += ["model.proposal_generator.post_nms_topk=[50,50]"]
    main(
        monkeypatch,
        *("--config-file", str(METHODS / f"{name}.py"), "--output-dir", str(tmp_path)),
        *("--iters", "10", "--train-json", str(coco / "annotations/instances_train2017.json")),
        *("--train-images", str(coco / "train2017")),
        *("model.backbone.bottom_up.name=dw_conv_nano", "model.backbone.bottom_up.init=null"),
        size.format("train", "short_edge_length=[128]"),
        size.format("train", "max_size=192"),
        *("dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"),
        *("train.log_period=1", "train.checkpointer.period=90000"),
        *([] if name.startswith("retinanet") else few),
    )
    found = losses(tmp_path)
    assert sorted(found) == list(range(10)) and all(map(math.isfinite, found.values()))
    lines = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    assert [line["lr"] for line in lines if "lr" in line][-1] <= 1.01e-5
    assert (tmp_path / "model_final.pth").is_file()
