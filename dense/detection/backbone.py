"""The dense backbone as a Detectron2 ``Backbone``, for LazyConfig and for yacs."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.logger import log_first_n
from torch import Tensor

from backbones import MODEL_NAMES
from backbones.families import map_channels
from dense.backbone import DenseBackbone

FEATURES = ("res2", "res3", "res4", "res5")
# ImageNet's RGB mean and standard deviation, for pixel values from 0 to 255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class PyramidBackbone(DenseBackbone, Backbone):
    """A :class:`dense.backbone.DenseBackbone` with Detectron2's interface and feature names.

    >>> PyramidBackbone("dw_conv_nano", out_features=("res4", "res5"))(images)["res5"]

    The backbone takes any image size (``size_divisibility`` is 0). An FPN over it sets
    ``size_divisibility`` to the stride of its last input, so that upsampled maps match.

    Args:
        name: one of ``backbones.MODEL_NAMES``.
        out_features: some of ``"res2"`` to ``"res5"`` (strides 4, 8, 16, 32), in that order.
        init: see :class:`dense.backbone.DenseBackbone`. Loaded by :meth:`init_weights` or the first
            forward pass in training mode, unless a state dict with all parameters was loaded
            before: resuming, evaluation and prediction do not need the file.
        **kwargs: other arguments of ``DenseBackbone``: ``drop_path_rate``, ``frozen_stages``,
            ``norm``, ``grad_checkpointing``, ``window_size``, ``fuse``, and the model's own.

    Raises:
        ValueError: an unknown name, feature or option; the message lists the valid ones.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = FEATURES,
        init: str | None = None,
        **kwargs,
    ):
        super().__init__(name, out_indices=_stages(out_features), init=init, **kwargs)
        self._out_features = list(out_features)
        self._out_feature_channels = dict(zip(out_features, self.channels, strict=True))
        self._out_feature_strides = dict(zip(out_features, self.strides, strict=True))
        self._needs_init = init is not None
        self.register_load_state_dict_pre_hook(_note_loaded)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` to ``{feature: (B, C, ceil(H/stride), ceil(W/stride))}``."""
        if self.training and self._needs_init:
            self.init_weights()
        return dict(zip(self._out_features, super().forward(x), strict=True))

    def init_weights(self) -> None:
        """Load ``init``, if given; raises :class:`backbones.CheckpointError`."""
        super().init_weights()
        self._needs_init = False


def add_dense_config(cfg: CfgNode) -> None:
    """Add ``MODEL.DENSE`` and set RGB input with ImageNet's mean and standard deviation (0 to 255).

    A YAML file may put any other argument of the model under ``MODEL.DENSE.OPTIONS``, by the name
    it has in Python: ``output_stride: 16``.

    >>> cfg = get_cfg()
    >>> add_dense_config(cfg)  # before cfg.merge_from_file(), which may change the values
    >>> cfg.MODEL.BACKBONE.NAME = "i_d_dw_conv_tiny_fpn"
    """
    cfg.MODEL.DENSE = CfgNode(
        {
            "OUT_FEATURES": list(FEATURES),
            "INIT": "",
            "DROP_PATH_RATE": 0.0,
            "FROZEN_STAGES": -1,
            "NORM": "SyncBN",
            "GRAD_CHECKPOINTING": False,
            "WINDOW_SIZE": None,
            "FUSE": False,
        }
    )
    # Within the dictionary above it would be made anew, without new_allowed.
    cfg.MODEL.DENSE.OPTIONS = CfgNode(new_allowed=True)
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = list(PIXEL_MEAN)
    cfg.MODEL.PIXEL_STD = list(PIXEL_STD)


def _stages(out_features: Sequence[str]) -> tuple[int, ...]:
    stages = [FEATURES.index(f) for f in out_features if f in FEATURES]
    if len(stages) != len(out_features) or not stages or stages != sorted(set(stages)):
        raise ValueError(
            f"out_features={list(out_features)}: one or more of {', '.join(FEATURES)}, "
            "in that order, are valid"
        )
    return tuple(stages)


def _note_loaded(module: PyramidBackbone, state_dict: dict, prefix: str, *_) -> None:
    if all(prefix + name in state_dict for name, _ in module.named_parameters()):
        module._needs_init = False


def _from_yacs(name: str, cfg: CfgNode, used: Sequence[str] = FEATURES) -> PyramidBackbone:
    if "DENSE" not in cfg.MODEL:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {name}: call dense.detection.add_dense_config(cfg) on get_cfg() "
            "before merging the config file"
        )
    dense = cfg.MODEL.DENSE
    log_first_n(
        logging.INFO,
        f"MODEL.BACKBONE.FREEZE_AT ({cfg.MODEL.BACKBONE.FREEZE_AT}) is ignored: "
        f"MODEL.DENSE.FROZEN_STAGES ({dense.FROZEN_STAGES}) is used instead",
        name=__name__,
        key="message",
    )
    options = {key.lower(): value for key, value in dense.items() if key != "OPTIONS"}
    options["out_features"] = [f for f in dense.OUT_FEATURES if f in used]
    options["init"] = dense.INIT or None
    return PyramidBackbone(name, **options, **dense.OPTIONS)


def _fpn_from_yacs(name: str, cfg: CfgNode) -> FPN:
    in_features, channels = cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS
    # Only the used features: DDP raises at parameters without gradients, such as an unused norm.
    bottom_up = _from_yacs(name, cfg, used=in_features)
    if not in_features or not set(in_features) <= set(bottom_up.output_shape()):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES {list(in_features)}: one or more of MODEL.DENSE.OUT_FEATURES "
            f"{list(cfg.MODEL.DENSE.OUT_FEATURES)} are valid"
        )
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        last = in_features[-1]
        top_block = LastLevelP6P7(bottom_up.output_shape()[last].channels, channels, last)
    else:
        top_block = LastLevelMaxPool()
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _register(name: str) -> None:
    def build(cfg, input_shape):
        return _from_yacs(name, cfg)

    def build_fpn(cfg, input_shape):
        return _fpn_from_yacs(name, cfg)

    build.__name__, build_fpn.__name__ = name, f"{name}_fpn"
    BACKBONE_REGISTRY.register(build)
    BACKBONE_REGISTRY.register(build_fpn)


for _name in MODEL_NAMES:
    _register(_name)


def last_level_p6p7(name: str, out_channels: int) -> LastLevelP6P7:
    """RetinaNet's levels P6 and P7, on the last map of one of our backbones.

    Args:
        name: the backbone's, one of ``backbones.MODEL_NAMES``.
        out_channels: the feature pyramid's.
    """
    return LastLevelP6P7(map_channels(name)[-1], out_channels)
