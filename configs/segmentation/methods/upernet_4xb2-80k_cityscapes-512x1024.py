"""UPerNet, Cityscapes, MMSegmentation's 80k; ``model.backbone.type`` takes any backbone."""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/cityscapes.py",
    "../_base_/schedules/schedule_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(type="swin_tiny", init="ms_in1k"),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=19),
    auxiliary_head=dict(in_channels=384, num_classes=19),
)
