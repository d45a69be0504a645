"""A trained segmentor as a function of one image."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from backbones import CheckpointError
from dense.backbone import revert_sync_batchnorm
from dense.recipes import RECIPES
from dense.segmentation import load_predictor, predictor

ABOUT = dict(classes=["a", "b"], palette=[[1, 2, 3], np.array([4, 5, 6])])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: the predictor of a checkpoint that says something of its classes."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = Config.fromfile(RECIPES / "segmentation/dw_conv_nano_upernet.py")
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.num_classes = 2
    cfg.dump(folder / "net.py")
    init_default_scope("mmseg")
    weights = revert_sync_batchnorm(MODELS.build(cfg.model)).state_dict()

    def call(about, device="cpu"):
        content = dict(state_dict=weights, meta=dict(dataset_meta=about))
        torch.save(content, folder / "a.pth")
        return load_predictor(str(folder / "net.py"), str(folder / "a.pth"), device)

    return call


def test_a_predictor_knows_its_classes(trained, monkeypatch):
    about = dict(ABOUT, palette=[[1.0, 2.0, 3.0], [4, 5, 6]])
    fuse, fused = predictor.fuse, []
    monkeypatch.setattr(predictor, "fuse", lambda m, **k: fused.append(m) or fuse(m, **k))
    predict = trained(about)
    assert predict.classes == ("a", "b") and predict.palette == ((1, 2, 3), (4, 5, 6))
    assert all(type(value) is int for colour in predict.palette for value in colour)
    assert predict.report.matched and predict.report.source.endswith("a.pth")
    assert not predict.segmentor.training
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in predict.segmentor.modules())
    assert fused == [predict.segmentor]
    given = []

    def infer(model, image):
        given.append((model, image))
        return inference(model, image)

    inference = predictor.inference_model
    monkeypatch.setattr(predictor, "inference_model", infer)
    image = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    found = predict(image)
    assert found.shape == (40, 70) and found.dtype == np.int32 and set(found.flat) <= {0, 1}
    [(model, seen)] = given
    assert model is predict.segmentor and seen.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(seen, image[..., ::-1])
    with pytest.raises(ValueError, match=r"\(H, W, 3\), uint8"):
        predict(image[..., 0])


def test_another_number_of_names_is_refused(trained):
    with pytest.raises(CheckpointError, match=r"a.pth names 3 classes, the model has 2$"):
        trained(dict(classes=["a", "b", "c"], palette=[[0, 0, 0]] * 3))


def test_a_predictor_runs_where_it_is_asked_to(trained):
    predict = trained(dict(ABOUT, palette=[[1, 2, 3]] * 2), "meta")
    assert {value.device.type for value in predict.segmentor.parameters()} == {"meta"}
