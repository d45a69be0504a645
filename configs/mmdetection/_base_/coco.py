"""COCO 2017 in ``data/coco``: DETR's scales and crops in training, short side 800 in tests."""

_base_ = "mmdet::_base_/datasets/coco_instance.py"
resize = dict(
    type="RandomChoiceResize",
    scales=[(short, 1333) for short in range(480, 801, 32)],
    keep_ratio=True,
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [resize],
            [
                dict(
                    type="RandomChoiceResize",
                    scales=[(short, 1333) for short in (400, 500, 600)],
                    keep_ratio=True,
                ),
                dict(
                    type="RandomCrop",
                    crop_type="absolute_range",
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                resize,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(batch_size=2, num_workers=4, dataset=dict(pipeline=train_pipeline))
