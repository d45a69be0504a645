"""MMSegmentation data set of a folder of images and a folder of masks, and its image reader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

from dense.images import Skipped, UnreadableImage, read_image
from dense.segmentation.data import colour_code, image_mask_pairs


@TRANSFORMS.register_module()
class ReadImage(BaseTransform):
    """``LoadImageFromFile`` by :func:`dense.images.read_image`, which prediction uses too.

    It differs for 16-bit images, of which it takes the upper 8 bits, and for damaged ones.

    >>> pipeline = [dict(type="ReadImage"), dict(type="LoadAnnotations")]

    Raises:
        UnreadableImage: the file cannot be read; :class:`FolderDataset` skips it in training.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``img``, ``(H, W, 3)`` uint8 BGR, and its shapes."""
        image = np.ascontiguousarray(read_image(results["img_path"])[..., ::-1])
        results["img"] = image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


@TRANSFORMS.register_module()
class ReadColouredMask(BaseTransform):
    """``LoadAnnotations`` of masks whose colours are classes.

    >>> pipeline = [dict(type="ReadImage"), dict(type="ReadColouredMask", palette=[(128, 64, 128)])]

    Args:
        palette: the colours ``(R, G, B)`` of the classes, by index; any other is ignored.
    """

    def __init__(self, palette: Sequence[Sequence[int]]):
        codes = np.array([colour_code(colour) for colour in palette])
        self._order = codes.argsort()
        self._codes = codes[self._order]

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``gt_seg_map``, ``(H, W)`` uint8, 255 where pixels are ignored."""
        with Image.open(results["seg_map_path"]) as mask:
            codes = np.asarray(mask.convert("RGB")).astype(np.int32) @ [1 << 16, 1 << 8, 1]
        place = self._codes.searchsorted(codes).clip(max=len(self._codes) - 1)
        known = self._codes[place] == codes
        results["gt_seg_map"] = np.where(known, self._order[place], 255).astype(np.uint8)
        results["seg_fields"].append("gt_seg_map")
        return results


@DATASETS.register_module()
class FolderDataset(BaseSegDataset):
    """Images in common formats with PNG or TIFF masks of class indices, paired by name.

    >>> folders = dict(img_path="images", seg_map_path="masks")
    >>> FolderDataset(data_prefix=folders, metainfo=dict(classes=("road", "tree")))

    The arguments are those of :class:`mmseg.datasets.BaseSegDataset`; mask values ``ignore_index``
    and 255 are ignored. In training an image that cannot be read is named and replaced by another,
    up to one in a thousand (one at least).

    Raises:
        TooManyUnreadable: more images cannot be read.
        UnreadableImage: an image to test on cannot be read.
    """

    def prepare_data(self, idx: int) -> Any:
        """The sample, or None for MMEngine to take another."""
        try:
            return super().prepare_data(idx)
        except UnreadableImage as error:
            if self.test_mode:
                raise
            self._skipped.note(self.get_data_info(idx)["img_path"], error)
            return None

    def full_init(self) -> None:
        """List the images."""
        super().full_init()
        if not hasattr(self, "_skipped"):
            self._skipped = Skipped(len(self))

    def load_data_list(self) -> list[dict]:
        """One entry per image, sorted by path."""
        # label_map applies after LoadAnnotations has subtracted 1 for reduce_zero_label.
        ignored = self.ignore_index - int(self.reduce_zero_label)
        label_map = {ignored: 255} if self.ignore_index != 255 and ignored >= 0 else None
        images, masks = (Path(self.data_prefix[key]) for key in ("img_path", "seg_map_path"))
        return [
            dict(
                img_path=str(image),
                seg_map_path=str(mask),
                label_map=label_map,
                reduce_zero_label=self.reduce_zero_label,
                seg_fields=[],
            )
            for image, mask in image_mask_pairs(images, masks)
        ]
