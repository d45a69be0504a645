"""The dense backbone by OpenMMLab's conventions."""

from functools import partial
from typing import Any

from mmengine.registry import MODELS

import backbones
from dense.backbone import DenseBackbone

_INIT_CFG_KEYS = {"type", "checkpoint", "prefix", "map_location"}


class PyramidBackbone(DenseBackbone):
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


def register() -> None:
    """Put all names into MMEngine's root registry, which every OpenMMLab package looks into."""
    for name in backbones.MODEL_NAMES:
        MODELS.register_module(name=name, module=partial(PyramidBackbone, name))


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
