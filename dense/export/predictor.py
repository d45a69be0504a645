"""Predictors from exported files, which return what those of the checkpoints do."""

import os
from typing import TYPE_CHECKING

import numpy as np

from dense import require
from dense.export.checking import normalised
from dense.export.files import ExportError, Runner
from dense.images import check_rgb

if TYPE_CHECKING:
    from detectron2.structures import Instances


class Classifier:
    """An exported classifier as a function of one image, as
    :class:`dense.pretraining.predictor.Predictor`.

    Args:
        run: the file.

    Attributes:
        classes: class names, by index.
    """

    def __init__(self, run: Runner):
        from timm.data import create_transform

        self._run = run
        self._transform = create_transform(**run.about["transform"])
        self.classes = tuple(run.about["classes"])

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8 RGB to ``(num_classes,)`` float32 probabilities."""
        from PIL import Image

        check_rgb(image)
        (logits,) = self._run(self._transform(Image.fromarray(image))[None].numpy())
        powers = np.exp(logits[0] - logits[0].max())
        return powers / powers.sum()


class Segmentor:
    """An exported segmentor as a function of one image, as
    :class:`dense.segmentation.predictor.Predictor`.

    Args:
        run: the file.

    Attributes:
        classes: class names, by index.
        palette: an RGB colour per class, 0 to 255.
    """

    def __init__(self, run: Runner):
        self._run = run
        self.classes = tuple(run.about["classes"])
        self.palette = tuple(map(tuple, run.about["palette"]))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8 RGB to ``(H, W)`` int32 class indices."""
        import torch
        import torch.nn.functional as F

        check_rgb(image)
        about = self._run.about
        logits = torch.from_numpy(self._run(normalised(self._resized(image), about))[0])
        given = dict(mode="bilinear", align_corners=about["align_corners"])
        logits = F.interpolate(logits, image.shape[:2], **given)
        return logits[0].argmax(0).to(torch.int32).numpy()

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """The photo in the scale of the test pipeline, by OpenCV as MMCV has it."""
        if (scale := self._run.about["resize"]) is None:
            return image
        import cv2

        height, width = image.shape[:2]
        factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
        size = int(width * factor + 0.5), int(height * factor + 0.5)
        return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


class Detector:
    """An exported detector as a function of one image, as
    :func:`dense.detection.predictor.load_predictor` returns it.

    Args:
        run: the file.
    """

    def __init__(self, run: Runner):
        require("detectron2", "detection")
        self._run = run

    def __call__(self, image: np.ndarray) -> dict:
        """``(H, W, 3)`` uint8 RGB to the detections."""
        from detectron2.data.transforms import ResizeShortestEdge
        from detectron2.modeling.postprocessing import detector_postprocess

        check_rgb(image)
        about = self._run.about
        long, short = about["resize"]
        seen = ResizeShortestEdge(short, long).get_transform(image).apply_image(image)
        found = detector_postprocess(instances(self._run, seen), *image.shape[:2])
        return {
            "boxes": found.pred_boxes.tensor.numpy(),
            "scores": found.scores.numpy(),
            "classes": found.pred_classes.numpy(),
            "masks": found.pred_masks.numpy() if found.has("pred_masks") else None,
            "class_names": about["classes"],
        }


def instances(run: Runner, image: np.ndarray) -> "Instances":
    """What a detector's file finds on an image of its size, ``(H, W, 3)`` RGB, as Detectron2's."""
    import torch
    from detectron2.structures import Boxes, Instances

    boxes, scores, classes, *masks = map(torch.from_numpy, run(normalised(image, run.about)))
    found = Instances(image.shape[:2], pred_boxes=Boxes(boxes), scores=scores)
    found.pred_classes = classes
    if masks:
        found.pred_masks = masks[0][:, None]
    return found


_PREDICTORS = {"classification": Classifier, "segmentation": Segmentor, "detection": Detector}


def load_predictor(path: str | os.PathLike) -> Classifier | Segmentor | Detector:
    """Load an exported classifier, segmentor or detector as a function of one image.

    >>> predict = load_predictor("work_dirs/mine/mine.onnx")
    >>> predict(image)  # (H, W, 3) uint8 RGB to (H, W) int32 class indices

    Args:
        path: written by ``tools/export.py``; its metadata says what it is.

    Raises:
        ExportError: the file cannot be read, or is of a backbone.
        ImportError: the engine is not installed.
    """
    run = Runner(path)
    if run.about["task"] not in _PREDICTORS:
        raise ExportError(
            f"{path} has the maps of a backbone alone: nothing is predicted from them"
        )
    return _PREDICTORS[run.about["task"]](run)
