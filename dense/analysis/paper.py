"""The results in the paper's tables.

"On the Connection between Local Attention and Dynamic Depth-wise Convolution", ICLR 2022.
Parameters are in millions and FLOPs in billions of multiply-adds, rounded as printed. Tables 3 and
11 have no Swin-Local-MLP.
"""

from typing import NamedTuple


class Classifier(NamedTuple):
    """ImageNet-1K: parameters, FLOPs and top-1 accuracy in percent."""

    parameters: int
    flops: float
    top1: float


class Detector(NamedTuple):
    """COCO, Cascade Mask R-CNN at 1280x800: parameters, FLOPs, box AP and mask AP."""

    parameters: int
    flops: int
    box_ap: float
    mask_ap: float


class Segmentor(NamedTuple):
    """ADE20K, UPerNet at 512x2048: parameters, FLOPs and single-scale mIoU."""

    parameters: int
    flops: int
    miou: float


TABLE_2 = {
    "swin_tiny": Classifier(28, 4.5, 81.3),
    "swin_local_mlp_tiny": Classifier(26, 3.8, 80.3),
    "dw_conv_tiny": Classifier(24, 3.8, 81.3),
    "d_dw_conv_tiny": Classifier(51, 3.8, 81.9),
    "i_d_dw_conv_tiny": Classifier(26, 4.4, 81.8),
    "swin_base": Classifier(88, 15.4, 83.3),
    "swin_local_mlp_base": Classifier(79, 12.9, 82.2),
    "dw_conv_base": Classifier(74, 12.9, 83.2),
    "d_dw_conv_base": Classifier(162, 13.0, 83.2),
    "i_d_dw_conv_base": Classifier(80, 14.3, 83.4),
}
# Pretrained on ImageNet-22K.
TABLE_10 = {
    "swin_base": Classifier(88, 15.4, 85.2),
    "dw_conv_base": Classifier(74, 12.9, 84.8),
    "d_dw_conv_base": Classifier(162, 13.0, 85.0),
    "i_d_dw_conv_base": Classifier(80, 14.3, 85.2),
}
# 384x384, by model name and window or kernel size.
TABLE_14 = {
    ("swin_tiny", 7): Classifier(28, 14.4, 81.8),
    ("swin_tiny", 12): Classifier(28, 14.2, 82.4),
    ("dw_conv_tiny", 7): Classifier(24, 11.1, 82.2),
    ("dw_conv_tiny", 12): Classifier(25, 11.5, 82.1),
}
TABLE_3_DETECTION = {
    "swin_tiny": Detector(86, 747, 50.5, 43.7),
    "dw_conv_tiny": Detector(82, 730, 49.9, 43.4),
    "d_dw_conv_tiny": Detector(108, 730, 50.5, 43.7),
    "i_d_dw_conv_tiny": Detector(84, 741, 50.8, 44.0),
    "swin_base": Detector(145, 986, 51.9, 45.0),
    "dw_conv_base": Detector(132, 924, 51.1, 44.2),
    "d_dw_conv_base": Detector(219, 924, 51.2, 44.4),
    "i_d_dw_conv_base": Detector(137, 948, 51.8, 44.8),
}
TABLE_3_SEGMENTATION = {
    "swin_tiny": Segmentor(60, 947, 44.5),
    "dw_conv_tiny": Segmentor(56, 928, 45.5),
    "d_dw_conv_tiny": Segmentor(83, 928, 45.7),
    "i_d_dw_conv_tiny": Segmentor(58, 939, 46.2),
    "swin_base": Segmentor(121, 1192, 48.1),
    "dw_conv_base": Segmentor(108, 1129, 48.3),
    "d_dw_conv_base": Segmentor(195, 1129, 48.0),
    "i_d_dw_conv_base": Segmentor(114, 1153, 47.8),
}
# Pretrained on ImageNet-22K.
TABLE_11_DETECTION = {
    "swin_base": Detector(145, 986, 53.4, 46.1),
    "dw_conv_base": Detector(132, 924, 52.0, 45.0),
    "d_dw_conv_base": Detector(219, 924, 51.9, 45.0),
    "i_d_dw_conv_base": Detector(137, 948, 52.9, 45.8),
}
TABLE_11_SEGMENTATION = {
    "swin_base": Segmentor(121, 1192, 49.4),
    "dw_conv_base": Segmentor(108, 1129, 50.1),
    "d_dw_conv_base": Segmentor(195, 1129, 49.6),
    "i_d_dw_conv_base": Segmentor(114, 1153, 51.3),
}
# Marks of Table 1 and, below it, those that only Table 7 has: non-local and full sparsity between
# positions, sparsity between channels, weights shared across positions and across channels, dynamic
# weights.
MARKS = ("non-local", "full", "channels", "positions shared", "channels shared", "dynamic")
TABLE_1 = {
    "Local MLP": {"non-local", "channels", "channels shared"},
    "Local attention": {"non-local", "channels", "channels shared", "dynamic"},
    "DW-Conv.": {"non-local", "channels", "positions shared"},
    "D-DW-Conv.": {"non-local", "channels", "positions shared", "dynamic"},
    "Conv.": {"non-local", "positions shared"},
}
TABLE_7 = TABLE_1 | {
    "MLP": set(),
    "Attention": {"channels", "channels shared", "dynamic"},
    "Spatial-mixing MLP": {"channels", "channels shared"},
    "1x1 Conv.": {"full", "positions shared"},
}
