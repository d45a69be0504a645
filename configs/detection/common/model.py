"""Cascade Mask R-CNN with an FPN over one of our backbones (section 3.2, appendix E).

``model.roi_heads.shared_heads=false`` gives the paper's heads: a mask head in each stage and a box
for each class. ``true``: one mask head and one box for all, as in Detectron2.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers

from dense.detection import PyramidBackbone
from dense.detection.cascade import PaperCascadeROIHeads, mask_heads

# Detectron2's cascade, changed below to the paper's settings, MMDetection's.
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
    _target_=PaperCascadeROIHeads,
    stage_loss_weights=[1.0, 0.5, 0.25],
    shared_heads=True,
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
            # The reciprocals of MMDetection's standard deviations.
            box2box_transform=L(Box2BoxTransform)(weights=[1 / xy, 1 / xy, 1 / wh, 1 / wh]),
            cls_agnostic_bbox_reg="${model.roi_heads.shared_heads}",
            box_reg_loss_type="giou",
            loss_weight=dict(loss_cls=1.0, loss_box_reg=10.0),
            num_classes="${model.roi_heads.num_classes}",
        )
        for xy, wh in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
    ],
)
# Four convolutions and the transposed convolution that doubles the resolution.
model.roi_heads.mask_head.update(
    _target_=mask_heads,
    shared="${model.roi_heads.shared_heads}",
    input_shape=L(ShapeSpec)(channels="${model.backbone.out_channels}", height=14, width=14),
    conv_dims=[256, 256, 256, 256, 256],
)
model.proposal_generator.update(
    post_nms_topk=(2000, 1000),
    # Anchors that cross the image's border are not trained.
    anchor_boundary_thresh=0,
    smooth_l1_beta=1 / 9,
)
model.proposal_generator.head.in_channels = "${model.backbone.out_channels}"
