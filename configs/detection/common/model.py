"""Cascade Mask R-CNN with an FPN over one of our backbones (section 3.2, appendix E)."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers

from dense.detection import PyramidBackbone

# Detectron2's cascade, changed below to the paper's settings.
model = get_config("common/models/cascade_rcnn.py").model

model.input_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]

model.backbone.bottom_up = L(PyramidBackbone)(
    name="???",
    out_features=["res2", "res3", "res4", "res5"],
    init=None,
    drop_path_rate=0.0,
    frozen_stages=-1,
    norm="SyncBN",
    grad_checkpointing=False,
    window_size=None,
    fuse=False,
)

# Each stage: 4 convolutions with SyncBN, one linear layer, GIoU box loss of weight 10.
model.roi_heads.update(
    box_heads=[
        L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels="${model.backbone.out_channels}", height=7, width=7),
            conv_dims=[256, 256, 256, 256],
            fc_dims=[1024],
            conv_norm="SyncBN",
        )
        for _ in range(3)
    ],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=1024),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=[w, w, w / 2, w / 2]),
            cls_agnostic_bbox_reg=True,
            box_reg_loss_type="giou",
            loss_weight=dict(loss_cls=1.0, loss_box_reg=10.0),
            num_classes="${model.roi_heads.num_classes}",
        )
        for w in (10.0, 20.0, 30.0)
    ],
)
# Four convolutions and the transposed convolution that doubles the resolution.
model.roi_heads.mask_head.update(
    input_shape=L(ShapeSpec)(channels="${model.backbone.out_channels}", height=14, width=14),
    conv_dims=[256, 256, 256, 256, 256],
)
model.proposal_generator.head.in_channels = "${model.backbone.out_channels}"
