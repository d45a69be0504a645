"""The dense backbone by OpenMMLab's conventions, in MMEngine's registry."""

from functools import partial
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

import backbones
from dense.backbone import DenseBackbone

_INIT_CFG_KEYS = {"type", "checkpoint", "prefix", "map_location"}


class OpenMMLabBackbone(DenseBackbone):
    """:class:`dense.backbone.DenseBackbone`, initialised as OpenMMLab's backbones are too.

    Args:
        name: one of ``backbones.MODEL_NAMES``; in a config it is the ``type``.
        init: a file, URL or tag of released weights, read by ``init_weights()``.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)`` means ``init=...``; a prefix is found
            without being named.
        pretrained: what ``model.pretrained`` of MMSegmentation hands down; means ``init`` too.
        **kwargs: the dense backbone's others.

    Raises:
        ValueError: two different sources of weights, or an ``init_cfg`` of another kind.
    """

    def __init__(
        self,
        name: str,
        *,
        init: str | None = None,
        init_cfg: dict | None = None,
        pretrained: str | None = None,
        **kwargs: Any,
    ):
        sources = {init, _pretrained_checkpoint(init_cfg), pretrained} - {None}
        if len(sources) > 1:
            raise ValueError(f"init, init_cfg and pretrained name different weights: {sources}")
        super().__init__(name, init=next(iter(sources), None), **kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` to one ``(B, C, ceil(H/stride), ceil(W/stride))`` a chosen stage.

        The maps are contiguous: mmcv's compiled operators, RoIAlign among them, read any tensor as
        if it were (open-mmlab/mmcv#2203), and the layers of necks keep the layout they are given.
        """
        # Not contiguous(), which keeps channels-last strides where a map has a single position.
        return tuple(m.clone(memory_format=torch.contiguous_format) for m in super().forward(x))


def register() -> None:
    """Register all names in MMEngine's root registry, where every OpenMMLab package looks."""
    for name in backbones.MODEL_NAMES:
        MODELS.register_module(name=name, module=partial(OpenMMLabBackbone, name))


def _pretrained_checkpoint(init_cfg: dict | None) -> str | None:
    if init_cfg is None:
        return None
    if (
        not isinstance(init_cfg, dict)
        or init_cfg.get("type") != "Pretrained"
        or not init_cfg.get("checkpoint")
        or not set(init_cfg) <= _INIT_CFG_KEYS
    ):
        raise ValueError(
            f"init_cfg={init_cfg!r}: dict(type='Pretrained', checkpoint=...) is valid; without "
            "weights the pyramid initialises itself"
        )
    return init_cfg["checkpoint"]
