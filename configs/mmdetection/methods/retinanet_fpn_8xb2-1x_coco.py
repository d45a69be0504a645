"""RetinaNet, COCO, MMDetection's 1x; ``model.backbone.type`` takes any backbone."""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "../_base_/coco_boxes_1x.py",
    "../_base_/schedule_1x.py",
    "../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        _delete_=True,
        type="swin_tiny",
        init="ms_in1k",
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        norm="SyncBN",
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
