"""Detectron2's dataset mapper with the image reader that prediction uses."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from dense.images import Skipped, UnreadableImage, read_image


class PhotoMapper(DatasetMapper):
    """Detectron2's DatasetMapper that reads images by :func:`dense.images.read_image`.

    Detectron2 clips 16-bit images to white; here they keep their upper 8 bits. An image that cannot
    be read is named and replaced by another in training, up to one in a thousand (one at least).

    >>> mapper = PhotoMapper(is_train=True, augmentations=[], image_format="BGR", total=5000)

    Args:
        *args: as in Detectron2.
        total: images of the data set, of which a share may be skipped.
        **kwargs: as in Detectron2; ``image_format`` is ``"RGB"`` or ``"BGR"``.

    Raises:
        ValueError: another ``image_format``.
    """

    def __init__(self, *args: Any, total: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format={self.image_format!r}: RGB or BGR is needed")
        self._skipped = Skipped(total)

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Read, augment and pack one image; None for Detectron2 to take another.

        Raises:
            UnreadableImage: an image to test on cannot be read.
            TooManyUnreadable: too many training images cannot be read.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        try:
            image = read_image(dataset_dict["file_name"])
        except UnreadableImage as error:
            if not self.is_train:
                raise
            self._skipped.note(dataset_dict["file_name"], error)
            return None
        if self.image_format == "BGR":
            image = np.ascontiguousarray(image[..., ::-1])
        utils.check_image_size(dataset_dict, image)

        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        image = augmented.image
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict
