"""Recipes that people compare with: Detectron2's own by number, and ten iterations of each."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.model_zoo import get_config
from omegaconf import OmegaConf

from dense.detection.config import load_config
from dense.recipes import RECIPES
from tests.support import flat

from .test_train import losses, main

METHODS = RECIPES / "detection/methods"
# Ours, and Detectron2's model and schedule.
ZOO = {
    "mask_rcnn_1x_coco": ("mask_rcnn_fpn", 1),
    "mask_rcnn_3x_coco": ("mask_rcnn_fpn", 3),
    "cascade_mask_rcnn_1x_coco": ("cascade_rcnn", 1),
    "retinanet_1x_coco": ("retinanet", 1),
}
_BRACKETS = str.maketrans("[]", "()")


def config(name, *overrides):
    return load_config(str(METHODS / f"{name}.py"), overrides)


def fields(node, *left_out):
    found = flat(OmegaConf.to_container(node))
    return {k: repr(v) for k, v in found.items() if not k.startswith(left_out)}


def test_there_are_no_others():
    assert {path.stem for path in METHODS.glob("*.py")} == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_the_recipe_is_detectron2s(name):
    """But for the backbone, its colours, and AdamW with Swin's rate and weight decay."""
    model, times = ZOO[name]
    cfg = config(name)
    ours = ("backbone.bottom_up", "backbone.top_block", "pixel_", "input_format")
    theirs = get_config(f"common/models/{model}.py").model
    assert fields(cfg.model, *ours) == fields(theirs, *ours)
    schedule = get_config("common/coco_schedule.py")[f"lr_multiplier_{times}x"]
    assert fields(cfg.lr_multiplier) == fields(schedule)
    assert cfg.train.max_iter == 90_000 * times
    common = get_config("common/train.py").train
    for key in ("eval_period", "checkpointer.period", "amp.enabled"):
        assert OmegaConf.select(cfg.train, key) == OmegaConf.select(common, key)
    data = get_config("common/data/coco.py").dataloader
    assert cfg.dataloader.train.total_batch_size == data.train.total_batch_size == 16
    for split in ("train", "test"):
        mine, other = (
            [repr(instantiate(step)) for step in loader[split].mapper.augmentations]
            for loader in (cfg.dataloader, data)
        )
        # A list there, a tuple here.
        assert [text.translate(_BRACKETS) for text in mine] == [
            text.translate(_BRACKETS) for text in other
        ]
    network = cfg.model.backbone.bottom_up
    assert (network.init, network.drop_path_rate, network.norm) == ("ms_in1k", 0.2, "SyncBN")
    assert network.out_features == cfg.model.backbone.in_features
    assert cfg.model.input_format == "RGB"
    assert cfg.model.pixel_mean == [123.675, 116.28, 103.53]
    assert cfg.model.pixel_std == [58.395, 57.12, 57.375]
    optimizer = {k: v for k, v in cfg.optimizer.items() if k not in ("_target_", "params")}
    assert optimizer == {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.05}
    assert cfg.optimizer._target_ is torch.optim.AdamW


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
