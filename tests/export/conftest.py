"""A small trained classifier, segmentor and detector, as their trainings leave them."""

import numpy as np
import pytest
from PIL import Image

from dense.export import files
from tests.support import load_tool


def exported(checkpoint, photos, folder, kind: str, *words: str):
    """The file that tools/export.py writes."""
    out = folder / f"file{files.FORMATS[kind]}"
    args = [str(checkpoint), "--to", kind, "--photos", str(photos), "--out", str(out), *words]
    assert load_tool("export").main(args) == 0
    return out


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of three photos: smooth colours with edges."""
    folder = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[:150, :200]
    for number in range(3):
        waves = [np.sin((x * (1 + c) + y * number) / 23) for c in range(3)]
        image = np.stack(waves, -1) * 60 + 128 + 50 * ((x // 40 + y // 30) % 2)[..., None]
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The checkpoint of a classifier of three classes for 64x64 pixels, with its config."""
    pytest.importorskip("mmengine")
    import timm
    import torch
    from mmengine.config import Config

    from dense.recipes import RECIPES
    from tests.backbones.test_export import scattered

    folder = tmp_path_factory.mktemp("classifier")
    cfg = Config.fromfile(RECIPES / "pretraining/dw_conv_nano.py")
    cfg.model.update(num_classes=3, img_size=64, depths=[1, 1, 2, 1])
    cfg.val_dataloader.dataset.transform.update(input_size=64)
    cfg.dump(folder / "small.py")
    torch.manual_seed(0)
    network = timm.create_model("dw_conv_nano", num_classes=3, img_size=64, depths=[1, 1, 2, 1])
    weights = {f"network.{k}": v for k, v in scattered(network).state_dict().items()}
    meta = {"dataset_meta": {"classes": ["n01440764", "b", "c"]}}
    torch.save({"state_dict": weights, "meta": meta}, folder / "epoch_1.pth")
    (folder / "last_checkpoint").write_text("/moved/away/epoch_1.pth")
    return folder / "epoch_1.pth"


@pytest.fixture(scope="session")
def segmentor(tmp_path_factory):
    """The checkpoint of a UPerNet of three classes with Swin, with its config."""
    pytest.importorskip("mmseg")
    import torch
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    from dense.backbone import revert_sync_batchnorm
    from dense.recipes import RECIPES

    register_all_modules()
    folder = tmp_path_factory.mktemp("segmentor")
    cfg = Config.fromfile(RECIPES / "segmentation/swin_nano_upernet.py")
    cfg.model.backbone.update(depths=[1, 1, 2, 1])
    cfg.model.data_preprocessor.size = (96, 128)
    for head in ("decode_head", "auxiliary_head"):
        cfg.model[head].num_classes = 3
    # What MMSegmentation's inference reads.
    cfg.test_pipeline[1:1] = [dict(type="Resize", scale=(160, 96), keep_ratio=True)]
    cfg.dump(folder / "upernet.py")
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    # Statistics of its own maps: labels would be of one class otherwise.
    with torch.no_grad():
        model.train()
        for _ in range(8):
            model._forward(torch.randn(2, 3, 64, 64))
    meta = {"classes": ["sky", "road", "tree"], "palette": [[9, 9, 9], [99, 9, 9], [9, 99, 9]]}
    content = {"state_dict": model.state_dict(), "meta": {"dataset_meta": meta}}
    torch.save(content, folder / "iter_1.pth")
    return folder / "iter_1.pth"


@pytest.fixture(scope="session")
def segmentor_file(segmentor, photos, tmp_path_factory):
    """The segmentor as ONNX."""
    return exported(segmentor, photos, tmp_path_factory.mktemp("onnx"), "onnx")


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """The checkpoint of a Cascade Mask R-CNN of three classes, with its config."""
    pytest.importorskip("detectron2")
    return make_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="session")
def detector_file(detector, photos, tmp_path_factory):
    """The detector as ONNX."""
    return exported(detector, photos, tmp_path_factory.mktemp("onnx"), "onnx")


def make_detector(folder, *options: str):
    """Of one block in each stage, with a threshold so high that some images have no detection."""
    from dense.analysis.random_detectors import write_detector

    small = ["+model.backbone.bottom_up.depths=[1,1,1,1]"]
    small += ["model.roi_heads.box_predictors.2.test_score_thresh=0.9"]
    return write_detector(folder, "dw_conv", *small, *options)
