"""MMDetection's predictor and augmentation with detectors of every kind in their places."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.structures import InstanceData

from backbones import CheckpointError
from dense.openmmlab import mmdetection, tta

CONFIG = """
model = dict(type="Detector", backbone=dict(type="dw_conv_nano", init="absent.pth"))
test_dataloader = dict(dataset=dict(type="Data"))
"""


def head(count):
    return SimpleNamespace(num_classes=count)


class Stages(nn.ModuleList):
    def __init__(self, *counts):
        super().__init__(nn.Identity() for _ in counts)
        for stage, count in zip(self, counts, strict=True):
            stage.num_classes = count


HEADS = {
    "one stage": SimpleNamespace(bbox_head=head(2)),
    "two stages": SimpleNamespace(roi_head=SimpleNamespace(bbox_head=head(2))),
    "a cascade": SimpleNamespace(roi_head=SimpleNamespace(bbox_head=Stages(5, 4, 2))),
}


@pytest.fixture
def load(monkeypatch, tmp_path):
    """A function: the predictor of a detector with fixed detections, and what it was built by."""
    (tmp_path / "net.py").write_text(CONFIG)
    done = []

    def call(kind="one stage", names=("cat", "dog"), device="cpu", **fields):
        model = HEADS[kind]
        model.to = lambda device: done.append(device) or model
        found = InstanceData(
            bboxes=torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7], [1, 1, 2, 2]]),
            scores=torch.tensor([0.2, 0.9, 0.5]),
            **dict(labels=torch.tensor([1, 0, 1]), **fields),
        )

        def init(cfg, device):
            assert "init" not in cfg.model.backbone and device == "cpu"
            return model

        def inference(detector, image):
            done.append(image)
            assert detector is model and image.flags["C_CONTIGUOUS"]
            return SimpleNamespace(pred_instances=found)

        def metainfo(content, dataset, registry, needed):
            assert (content, dataset.type, needed) == ("content", "Data", ("classes",))
            assert registry is mmdetection.DATASETS
            return dict(classes=names)

        monkeypatch.setattr(mmdetection, "init_detector", init)
        monkeypatch.setattr(mmdetection, "inference_detector", inference)
        monkeypatch.setattr(mmdetection, "revert_sync_batchnorm", lambda m: done.append("BN") or m)
        monkeypatch.setattr(mmdetection, "fuse", lambda model, inplace: done.append(inplace))
        loaded = mmdetection.checkpoints
        monkeypatch.setattr(loaded, "load_whole", lambda model, path: ("content", f"of {path}"))
        monkeypatch.setattr(loaded, "metainfo", metainfo)
        return mmdetection.load_predictor(str(tmp_path / "net.py"), "a.pth", device), done

    return call


@pytest.mark.parametrize("kind", HEADS)
def test_detections_are_the_best_first(load, kind):
    predict, done = load(kind, device="cuda:1")
    assert done == ["BN", "cuda:1", True] and predict.report == "of a.pth"
    image = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    found = predict(image)
    np.testing.assert_array_equal(done[-1], image[..., ::-1])
    assert found["boxes"].tolist() == [[4, 5, 6, 7], [1, 1, 2, 2], [0, 1, 2, 3]]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5, 0.2])
    assert found["classes"].tolist() == [0, 1, 1] and found["masks"] is None
    assert found["class_names"] == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"\(H, W, 3\), uint8"):
        predict(image[..., :2])


def test_masks_follow_their_boxes(load):
    predict, _ = load(masks=torch.arange(3).view(3, 1, 1).expand(3, 4, 5))
    found = predict(np.zeros((4, 5, 3), np.uint8))
    assert isinstance(found["masks"], np.ndarray) and found["masks"][:, 0, 0].tolist() == [1, 2, 0]


@pytest.mark.parametrize("kind", HEADS)
def test_other_numbers_of_classes_are_refused(load, kind):
    with pytest.raises(CheckpointError) as error:
        load(kind, names=("cat", "dog", "bee"))
    assert str(error.value) == "a.pth names 3 classes, the model has 2"


@pytest.mark.parametrize(
    ("heads", "masked"),
    [
        (SimpleNamespace(with_mask=True, mask_head="head"), True),
        (SimpleNamespace(with_mask=False, mask_head="head"), False),
        (SimpleNamespace(), False),
        (None, False),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_augmentation_leaves_masks_out_for_its_time(monkeypatch, heads, masked, fails):
    seen = []

    def test_step(self, data):
        seen.append((data, getattr(heads, "mask_head", None)))
        if fails:
            raise KeyError
        return "merged"

    monkeypatch.setattr(tta.DetTTAModel, "test_step", test_step)
    model = tta.BoxTTAModel.__new__(tta.BoxTTAModel)
    nn.Module.__init__(model)
    object.__setattr__(model, "module", SimpleNamespace(**{"roi_head": heads} if heads else {}))
    if fails:
        with pytest.raises(KeyError):
            model.test_step("data")
    else:
        assert model.test_step("data") == "merged"
    before = getattr(heads, "mask_head", None)
    assert seen == [("data", None if masked else before)]
    assert before == ("head" if hasattr(heads, "mask_head") else None)
