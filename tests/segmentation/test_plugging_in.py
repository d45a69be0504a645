"""Heads that are not ours take a backbone by name: MMSegmentation's stock configs train a step."""

from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import dense.segmentation  # noqa: F401
from backbones import FAMILIES
from dense.backbone import revert_sync_batchnorm
from tests.support import foreign_operators

STOCK = Path(mmseg.__file__).parent / ".mim/configs"
CHANNELS = [32, 64, 128, 256]


def data_batch(size=64, num_classes=150):
    samples = []
    for _ in range(2):
        shape = (size, size)
        sample = SegDataSample(metainfo=dict(ori_shape=shape, img_shape=shape))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, num_classes, (1, size, size)))
        samples.append(sample)
    images = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in samples]
    return dict(inputs=images, data_samples=samples)


def stock(path, backbone, **heads):
    cfg = Config.fromfile(STOCK / path)
    cfg.merge_from_dict(dict(model=dict(pretrained=None, **heads)))
    cfg.model.backbone = backbone
    cfg.model.data_preprocessor.size = (64, 64)
    return cfg


@pytest.mark.parametrize(
    "path, heads",
    [
        ("sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py", dict(neck=dict(in_channels=CHANNELS))),
        (
            "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
            dict(decode_head=dict(in_channels=CHANNELS)),
        ),
    ],
    ids=["fpn", "segformer"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_heads_train_a_step(path, heads, family):
    torch.manual_seed(0)
    cfg = stock(path, dict(type=f"{family}_nano"), **heads)
    init_default_scope("mmseg")
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    for _ in range(2):
        losses = model.train_step(data_batch(), optim_wrapper)
    assert losses["loss"].isfinite()
    assert {n for n, p in model.backbone.named_parameters() if p.equal(before[n])} == set()

    batch = data_batch()
    (result,) = model.eval().test_step({k: v[:1] for k, v in batch.items()})
    assert result.pred_sem_seg.data.shape == (1, 64, 64)


def test_stock_pretrained_is_not_read_in_silence():
    cfg = stock("sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py", dict(type="dw_conv_nano"))
    cfg.model.neck.in_channels = CHANNELS
    cfg.model.pretrained = "open-mmlab://resnet50_v1c"
    init_default_scope("mmseg")
    with pytest.raises(RuntimeError, match="open-mmlab://resnet50_v1c"):
        MODELS.build(cfg.model).init_weights()


@pytest.mark.parametrize(
    "path, heads",
    [
        ("sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py", dict(neck=dict(in_channels=CHANNELS))),
        (
            "upernet/upernet_r50_4xb4-80k_ade20k-512x512.py",
            dict(decode_head=dict(in_channels=CHANNELS), auxiliary_head=dict(in_channels=128)),
        ),
    ],
    ids=["fpn", "upernet"],
)
def test_these_heads_call_no_operators_but_pytorchs(path, heads):
    """None, then, that could misread the memory layout of our maps."""
    cfg = stock(path, dict(type="i_d_dw_conv_nano"), **heads)
    init_default_scope("mmseg")
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    with foreign_operators() as seen:
        data = model.data_preprocessor(data_batch(), training=True)
        model.parse_losses(model(**data, mode="loss"))[0].backward()
        model.eval().test_step({k: v[:1] for k, v in data_batch().items()})
    assert seen == set()
