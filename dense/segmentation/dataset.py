"""A folder of images and one of masks as a data set of MMSegmentation."""

from pathlib import Path

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from dense.segmentation.data import image_mask_pairs


@DATASETS.register_module()
class FolderDataset(BaseSegDataset):
    """Images of any usual format, masks as PNG with one class index a pixel, paired by name.

    Takes :class:`mmseg.datasets.BaseSegDataset`'s arguments; ``data_prefix`` names the two folders,
    ``metainfo`` the classes, and ``ignore_index`` a value that counts nowhere (255 never does).
    """

    def load_data_list(self) -> list[dict]:
        """One entry an image, sorted by path."""
        # The loader subtracts one first where 0 is no label.
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
