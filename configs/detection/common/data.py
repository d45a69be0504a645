"""COCO 2017 in the folder DETECTRON2_DATASETS, or your own COCO-style files named in ``data``."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import DatasetMapperTTA

from dense.detection.mapper import PhotoMapper

# Your own COCO-style files; if all are None, COCO is used. ``classes`` selects category names.
data = dict(train_json=None, train_images=None, val_json=None, val_images=None, classes=None)

# DETR's augmentation, as in Swin: flip, crop with probability 0.5, resize.
_crop = [
    L(T.ResizeShortestEdge)(
        short_edge_length=[400, 500, 600], max_size=1333, sample_style="choice"
    ),
    L(T.RandomCrop)(crop_type="absolute_range", crop_size=[384, 600]),
]

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(PhotoMapper)(
            is_train=True,
            augmentations=[
                L(T.RandomFlip)(horizontal=True),
                L(T.RandomApply)(tfm_or_aug=L(T.AugmentationList)(augs=_crop), prob=0.5),
                L(T.ResizeShortestEdge)(
                    short_edge_length=[*range(480, 801, 32)], max_size=1333, sample_style="choice"
                ),
            ],
            image_format="RGB",
            use_instance_mask=True,
            # As in MMDetection, a box is cropped with the image. True: the box of the cropped mask.
            recompute_boxes=False,
        ),
        total_batch_size=16,
        num_workers=4,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(PhotoMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
            image_format="${...train.mapper.image_format}",
        ),
        num_workers=4,
    ),
    # --eval-only --tta: Detectron2's sizes, each mirrored too.
    tta=L(DatasetMapperTTA)(min_sizes=[*range(400, 1201, 100)], max_size=4000, flip=True),
    evaluator=L(COCOEvaluator)(
        dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}/inference"
    ),
)
