"""Detectron2's test-time augmentation of a LazyConfig."""

from detectron2.config import get_cfg, instantiate
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn

from dense.detection.config import LazyConfigError


def check_tta(cfg: DictConfig, eval_only: bool) -> None:
    """Check that a config can be evaluated with test-time augmentation.

    Raises:
        LazyConfigError: it is to be trained, names no augmentation, or has a detector that
            Detectron2 cannot augment.
    """
    if not eval_only:
        raise LazyConfigError("--tta is for --eval-only: training augments as the config says")
    if "tta" not in cfg.dataloader:
        raise LazyConfigError(
            "--tta: the config has no dataloader.tta, such as that of configs/detection: "
            "L(DatasetMapperTTA)(min_sizes=[...], max_size=..., flip=True)"
        )
    detector = cfg.model.get("_target_")
    # In a config.yaml it is the name of the class.
    detector = locate(detector) if isinstance(detector, str) else detector
    if detector is not GeneralizedRCNN:
        raise LazyConfigError(
            "--tta: Detectron2 augments detectors of two stages only (GeneralizedRCNN)"
        )


def with_tta(cfg: DictConfig, model: GeneralizedRCNN) -> nn.Module:
    """The detector, with the mean of its results at the sizes of ``dataloader.tta``.

    Photos reach it at their own size, not resized twice.

    >>> results = engine.evaluate(cfg, with_tta(cfg, model))

    Args:
        cfg: the detector's config; ``dataloader.test.mapper.augmentations`` is emptied.
        model: on its device.
    """
    cfg.dataloader.test.mapper.augmentations = []
    heads = model.roi_heads
    predictor = heads.box_predictor
    predictor = predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor
    # What GeneralizedRCNNWithTTA reads of a config of its older kind.
    node = get_cfg()
    node.MODEL.MASK_ON = bool(heads.mask_on)
    node.MODEL.ROI_HEADS.NUM_CLASSES = heads.num_classes
    node.MODEL.ROI_HEADS.NMS_THRESH_TEST = predictor.test_nms_thresh
    node.TEST.DETECTIONS_PER_IMAGE = predictor.test_topk_per_image
    return GeneralizedRCNNWithTTA(node, model, instantiate(cfg.dataloader.tta))
