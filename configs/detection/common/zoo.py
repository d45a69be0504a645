"""Detectron2's own recipes with our backbones: RGB, AdamW as in Swin, else its model zoo's."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from dense.detection import PyramidBackbone

from .data import data, dataloader
from .schedule import optimizer, train

dataloader["train"].mapper.augmentations = [
    L(T.ResizeShortestEdge)(
        short_edge_length=[*range(640, 801, 32)], max_size=1333, sample_style="choice"
    ),
    L(T.RandomFlip)(horizontal=True),
]
train.update(max_iter=90_000, eval_period=5000)
train.checkpointer.update(period=5000)
train.amp.enabled = False


def zoo_model(name, out_features):
    """A model of ``common/models`` over our backbone, ``model.backbone.bottom_up``."""
    model = get_config(f"common/models/{name}.py").model
    model.input_format = "RGB"
    model.pixel_mean = [123.675, 116.28, 103.53]
    model.pixel_std = [58.395, 57.12, 57.375]
    model.backbone.bottom_up = L(PyramidBackbone)(
        name="swin_tiny",
        out_features=out_features,
        init="ms_in1k",
        drop_path_rate=0.2,
        norm="SyncBN",
    )
    return model


def zoo_schedule(times):
    """Detectron2's schedule of ``times`` its 90,000 iterations."""
    return get_config("common/coco_schedule.py")[f"lr_multiplier_{times}x"]
