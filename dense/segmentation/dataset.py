"""MMSegmentation data set of a folder of images and a folder of masks."""

from pathlib import Path

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from dense.segmentation.data import image_mask_pairs


@DATASETS.register_module()
class FolderDataset(BaseSegDataset):
    """Images in common formats with PNG masks of class indices, paired by name.

    >>> folders = dict(img_path="images", seg_map_path="masks")
    >>> FolderDataset(data_prefix=folders, metainfo=dict(classes=("road", "tree")))

    The arguments are those of :class:`mmseg.datasets.BaseSegDataset`; mask values ``ignore_index``
    and 255 are ignored.
    """

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
