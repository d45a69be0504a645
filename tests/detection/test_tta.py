"""Test-time augmentation: what is known of its results without computing them."""

import json
import sys

import pytest
import torch
from detectron2.config import instantiate

from dense.backbone import revert_sync_batchnorm
from dense.detection.config import LazyConfigError, load_config
from dense.detection.tta import check_tta, with_tta
from dense.recipes import RECIPES
from tests.support import load_tool

from .steps import eval_step, sample

CONFIGS = RECIPES / "detection"
NANO = str(CONFIGS / "cascade_mask_rcnn_dw_conv_nano.py")


def config(*overrides):
    return load_config(NANO, ["model.roi_heads.num_classes=2", *overrides])


def detector(cfg):
    """A detector whose detections differ from place to place, in evaluation."""
    torch.manual_seed(0)
    model = revert_sync_batchnorm(instantiate(cfg.model)).eval()
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
    return model


@pytest.fixture
def photo():
    torch.manual_seed(0)
    return sample((90, 128))[0]


def assert_same(one, two):
    """The same detections; near ties may change their order, and which of two NMS keeps."""
    assert len(one) == len(two) > 20
    rows, columns = (
        torch.cat([i.pred_boxes.tensor, 1e3 * i.scores[:, None], 1e3 * i.pred_classes[:, None]], 1)
        for i in (one, two)
    )
    distance, nearest = torch.cdist(rows, columns, p=torch.inf).min(1)
    same = distance < 0.2
    assert same.float().mean() > 0.9
    assert (one.pred_masks == two.pred_masks[nearest])[same].float().mean() > 0.999


@pytest.mark.parametrize("shared", ["true", "false"])
def test_one_size_without_mirror_is_the_plain_evaluation(photo, shared):
    cfg = config(f"model.roi_heads.shared_heads={shared}")
    cfg.dataloader.tta.update(min_sizes=[90], max_size=4000, flip=False)
    # The last stage's, and not the defaults, which Detectron2 would take from a config of its older
    # kind.
    cfg.model.roi_heads.box_predictors[-1].update(test_nms_thresh=0.3, test_topk_per_image=40)
    model = detector(cfg)
    plain = eval_step(model, [photo])
    assert len(plain) == 40
    augmented = with_tta(cfg, model)
    assert_same(eval_step(augmented, [photo]), plain)
    # Of one size, merging changes nothing; it would show with several.
    heads = augmented.cfg.MODEL.ROI_HEADS
    assert (heads.NUM_CLASSES, heads.NMS_THRESH_TEST) == (2, 0.3)
    assert augmented.cfg.TEST.DETECTIONS_PER_IMAGE == 40
    assert len(cfg.dataloader.test.mapper.augmentations) == 0


def test_a_mirrored_photo_has_the_mirrored_results(photo):
    cfg = config()
    # The photo's own: resizing rounds pixels, and random weights make much of that.
    cfg.dataloader.tta.min_sizes = [90]
    model = detector(cfg)
    mirrored = {**photo, "image": photo["image"].flip(2)}

    def found(network, image, mirror=False):
        instances = eval_step(network, [image])
        if mirror:
            left, top, right, bottom = instances.pred_boxes.tensor.clone().unbind(1)
            instances.pred_boxes.tensor = torch.stack([128 - right, top, 128 - left, bottom], 1)
            instances.pred_masks = instances.pred_masks.flip(2)
        return instances

    with pytest.raises(AssertionError):
        assert_same(found(model, photo), found(model, mirrored, mirror=True))
    augmented = with_tta(cfg, model)
    assert_same(found(augmented, photo), found(augmented, mirrored, mirror=True))


def test_sizes_are_detectron2s():
    """Of its default config, ``detectron2/config/defaults.py``."""
    cfg = load_config(str(CONFIGS / "cascade_mask_rcnn_dw_conv_tiny_3x_coco.py"))
    tta = instantiate(cfg.dataloader.tta)
    assert list(tta.min_sizes) == [400, 500, 600, 700, 800, 900, 1000, 1100, 1200]
    assert (tta.max_size, tta.flip) == (4000, True)


@pytest.mark.slow
def test_from_the_command_line(coco_files, tmp_path, monkeypatch, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    torch.save({"model": detector(config()).state_dict()}, tmp_path / "net.pth")
    data = coco_files.arguments()[2:]

    def evaluated(folder, *options):
        words = ["--config-file", NANO, "--eval-only", *data, "--output-dir", str(folder)]
        words += [f"train.init_checkpoint={tmp_path / 'net.pth'}", "dataloader.test.num_workers=0"]
        monkeypatch.setattr(sys, "argv", ["train_detector.py", *words, *options])
        load_tool("train_detector").main()
        found = json.loads((folder / "inference/coco_instances_results.json").read_text())
        assert "bbox" in json.loads((folder / "results.json").read_text())
        return {(d["image_id"], round(d["score"], 4)) for d in found}

    assert evaluated(out) != evaluated(again, "--tta")


def test_what_cannot_be_augmented_is_one_line():
    cfg = config()
    check_tta(cfg, True)
    with pytest.raises(LazyConfigError, match="--tta is for --eval-only"):
        check_tta(cfg, False)
    cfg.model._target_ = "detectron2.modeling.meta_arch.retinanet.RetinaNet"
    with pytest.raises(LazyConfigError, match="detectors of two stages only"):
        check_tta(cfg, True)
    del cfg.dataloader.tta
    with pytest.raises(LazyConfigError, match="the config has no dataloader.tta"):
        check_tta(cfg, True)
