"""Test-time augmentation: the average of six sizes and their mirrors, computed by hand beside."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image

from dense.backbone import revert_sync_batchnorm
from dense.openmmlab.config import ConfigError
from dense.recipes import RECIPES
from dense.segmentation.config import load_config, set_short_side, use_own_data, use_tta

CONFIGS = RECIPES / "segmentation"
# Section 4.3 of the Swin paper.
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def averaged(model, path: Path, sizes) -> np.ndarray:
    """The classes of a photo, from the mean of its probabilities at sizes ``(H, W)``."""
    image = cv2.imread(str(path))
    mean, std = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    total = 0
    for height, width in sizes:
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        pixels = (resized[..., ::-1].astype(np.float32) - np.float32(mean)) / np.float32(std)
        pixels = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
        for mirrored in (False, True):
            seen = pixels.flip(3) if mirrored else pixels
            with torch.no_grad():
                logits = model.decode_head(model.backbone(seen))
            for side in ((height, width), image.shape[:2]):
                logits = F.interpolate(logits, side, mode="bilinear", align_corners=False)
            total = total + (logits.flip(3) if mirrored else logits).softmax(1)
    return total.argmax(1)[0].numpy()


@pytest.mark.parametrize(("name", "short"), [("ade20k", 512), ("cityscapes", 1024)])
def test_sizes_are_swins_ratios_of_the_tests(name, short):
    cfg = Config.fromfile(CONFIGS / f"_base_/datasets/{name}.py")
    [resizes] = [step.transforms[0] for step in cfg.tta_pipeline if step.type == "TestTimeAug"]
    scales = [tuple(step.scale) for step in resizes]
    assert scales == [(int(2048 * ratio), int(short * ratio)) for ratio in RATIOS]
    assert all(step.type == "Resize" and step.keep_ratio for step in resizes)


@pytest.fixture
def trained(nano_cfg, tmp_path):
    """The config of a training on own data as it is saved, a checkpoint, and its network."""
    cfg = nano_cfg("dw_conv")
    cfg.vis_backends = cfg.visualizer.vis_backends = []
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    model.init_weights()
    # Batch norms after training pass on what differs in photos; the heads' deviation is 0.01.
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "net.pth")
    cfg.dump(tmp_path / "net.py")
    return tmp_path / "net.py", tmp_path / "net.pth", model


@pytest.mark.slow
def test_it_is_the_mean_over_sizes_and_mirrors(monkeypatch, tools, trained, shapes, tmp_path):
    config, checkpoint, model = trained
    argv = ["tool", str(config), str(checkpoint), "--tta", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    tools.test.main()
    sizes = [(int(64 * ratio + 0.5), int(80 * ratio + 0.5)) for ratio in RATIOS]
    plain_differs = 0
    for path in sorted(Path(shapes["val_images"]).iterdir()):
        written = np.asarray(Image.open(tmp_path / f"out/{path.stem}.png"))
        expected = averaged(model, path, sizes)
        assert len(np.unique(expected)) > 1
        # A pixel may tie within float32's accuracy.
        assert (written == expected).mean() > 0.999
        plain_differs += (written != averaged(model, path, sizes[2:3])).mean()
    assert plain_differs > 0.01


def resizes(cfg):
    first, flips, *_ = cfg.tta_pipeline[1]["transforms"]
    assert [(flip["type"], flip["prob"]) for flip in flips] == [("RandomFlip", p) for p in (0, 1)]
    return [{k: v for k, v in step.items() if k != "type"} for step in first]


def test_sizes_are_swins_of_the_short_side_of_the_test():
    cfg = load_config(CONFIGS / "dw_conv_tiny_upernet_8xb2-160k_ade20k-512x512.py")
    shorts = (256, 384, 512, 640, 768, 896)
    assert resizes(cfg) == [dict(scale=(4 * s, s), keep_ratio=True) for s in shorts]
    cfg = load_config(CONFIGS / "methods/upernet_4xb2-80k_cityscapes-512x1024.py")
    assert resizes(cfg) == [dict(scale=(4 * s, 2 * s), keep_ratio=True) for s in shorts]
    cfg = load_config(CONFIGS / "dw_conv_nano_upernet.py")
    assert resizes(cfg) == [dict(scale_factor=r, keep_ratio=True) for r in RATIOS]
    set_short_side(cfg, 96)
    shorts = (48, 72, 96, 120, 144, 168)
    assert resizes(cfg) == [dict(scale=(4 * s, s), keep_ratio=True) for s in shorts]


def test_own_data_are_read_as_in_training(shapes):
    cfg = load_config(CONFIGS / "dw_conv_nano_upernet.py")
    cfg.tta_pipeline[1].transforms[2][0].reduce_zero_label = True
    use_own_data(cfg, shapes)
    read, augment = cfg.tta_pipeline
    assert read == dict(type="ReadImage")
    assert augment["transforms"][2] == [dict(type="LoadAnnotations")]
    classes = cfg.test_dataloader.dataset.metainfo.classes
    use_tta(cfg)
    assert cfg.model.type == "SegTTAModel"
    assert cfg.model.module.decode_head.num_classes == len(classes)
    assert [step["type"] for step in cfg.test_dataloader.dataset.pipeline] == [
        *("ReadImage", "TestTimeAug")
    ]


def test_a_config_without_it_is_refused():
    cfg = load_config(CONFIGS / "dw_conv_nano_upernet.py")
    cfg.pop("tta_model")
    with pytest.raises(ConfigError, match="--tta: .*nano_upernet.py has no tta_model"):
        use_tta(cfg)
