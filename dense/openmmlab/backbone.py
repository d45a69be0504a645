"""The dense backbone with OpenMMLab's conventions, registered in MMEngine."""

from functools import partial
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

import backbones
from backbones.families import map_channels
from dense.backbone import DenseBackbone

_INIT_CFG_KEYS = {"type", "checkpoint", "prefix", "map_location"}


class OpenMMLabBackbone(DenseBackbone):
    """:class:`dense.backbone.DenseBackbone` that also takes OpenMMLab's initialisation arguments.

    >>> backbone = MODELS.build(dict(type="dw_conv_nano", out_indices=(1, 2, 3)))

    Args:
        name: one of ``backbones.MODEL_NAMES``; in a config it is the ``type``.
        init: a file, URL or tag of released weights, loaded by ``init_weights()``.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``, the same as ``init=...``; its
            ``prefix`` is ignored, since prefixes are detected.
        pretrained: the same as ``init``; MMSegmentation passes ``model.pretrained`` here.
        **kwargs: other arguments of ``DenseBackbone``.

    Raises:
        ValueError: two different sources of weights, or an ``init_cfg`` of another type.
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
        """``(B, 3, H, W)`` to a ``(B, C, ceil(H/stride), ceil(W/stride))`` per selected stage.

        The maps are contiguous: mmcv's compiled operators such as RoIAlign ignore strides
        (open-mmlab/mmcv#2203), and necks pass on the memory format of their input.
        """
        # Not contiguous(): it keeps channels-last strides if a map has a single position.
        return tuple(m.clone(memory_format=torch.contiguous_format) for m in super().forward(x))


def register() -> None:
    """Register all backbones in MMEngine's root registry, which all OpenMMLab packages search."""
    for name in backbones.MODEL_NAMES:
        MODELS.register_module(name=name, module=partial(OpenMMLabBackbone, name))


def fit_channels(model: dict[str, Any]) -> None:
    """Set the ``in_channels`` of a model's neck, or heads without one, to our backbone's maps.

    One config thereby serves all backbones: ``model.backbone.type`` alone names another.

    Args:
        model: the config of a model, with test-time augmentation around it or not; changed in
            place. One with another backbone stays as it is.
    """
    model = model.get("module", model)
    backbone = model.get("backbone")
    if not isinstance(backbone, dict) or backbone.get("type") not in backbones.MODEL_NAMES:
        return
    if "embed_dim" in backbone:
        # Its widths are not the name's: the config has to say them.
        return
    channels = map_channels(backbone["type"])
    maps = [c for i, c in enumerate(channels) if i in backbone.get("out_indices", range(4))]
    neck = model.get("neck")
    neck = neck[0] if isinstance(neck, list) else neck
    if neck:
        if isinstance(neck.get("in_channels"), list | tuple):
            neck["in_channels"] = maps
        return
    for key in ("decode_head", "auxiliary_head"):
        heads = model.get(key) or []
        for head in heads if isinstance(heads, list) else [heads]:
            places = head.get("in_index", range(len(maps)))
            indices = [places] if isinstance(places, int) else places
            if not set(indices) <= set(range(-len(maps), len(maps))):
                # The backbone or the head says what is wrong.
                continue
            if isinstance(head.get("in_channels"), list | tuple):
                head["in_channels"] = [maps[i] for i in places]
            elif isinstance(places, int):
                head["in_channels"] = maps[places]


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
            f"init_cfg={init_cfg!r}: dict(type='Pretrained', checkpoint=...) is valid; leave "
            "init_cfg out to start from random weights"
        )
    return init_cfg["checkpoint"]
