"""timm entry points: every family of :data:`backbones.families.TABLE` in each of its sizes."""

import inspect
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)

from backbones.checkpoints import checkpoint_filter_fn
from backbones.families import MODEL_NAMES, SIZES, TABLE, Family
from backbones.pyramid import Pyramid
from backbones.reading import CheckpointError, fetch
from backbones.released import RELEASED, Released, names_with_weights


def build(
    family: Family,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> Pyramid:
    """Build a pyramid with the mixer of a family.

    Args:
        family: a value of :data:`backbones.families.TABLE`.
        device: where parameters and buffers are made; None for PyTorch's default.
        dtype: of parameters and statistics; None for PyTorch's default.
        **kwargs: keyword-only arguments of the mixer's ``at``, and :class:`backbones.Pyramid`'s.
    """
    options = {name: kwargs.pop(name) for name in _options(family) if name in kwargs}
    with nullcontext() if device is None else torch.device(device):
        model = Pyramid(partial(family.mixer.at, **options), **kwargs)
    return model if dtype is None else model.to(dtype)


def _options(family: Family) -> dict[str, Any]:
    """The keyword-only arguments of the mixer's ``at``, with their defaults."""
    parameters = inspect.signature(family.mixer.at).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _cfg(released: Released | None = None) -> dict:
    size = released.img_size if released else 224
    cfg = dict(
        num_classes=released.num_classes if released else 1000,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=0.9 if size == 224 else 1.0,
        interpolation="bicubic",
        fixed_input_size=False,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head.fc",
        license="apache-2.0",
    )
    if released:
        cfg |= dict(url=released.url, description=released.description)
    return cfg


default_cfgs = generate_default_cfgs(
    {
        f"{name}.{tag}" if tag else name: _cfg(released)
        for name in MODEL_NAMES
        for tag, released in RELEASED.get(name, {"": None}).items()
    }
)


def _with_weights(name: str, kwargs: dict) -> dict:
    """Download the weights and point timm's config at the file.

    ``custom_load`` makes timm call :meth:`Pyramid.load_pretrained`.
    """
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
    if not (cfg.has_weights or cfg.state_dict):
        raise CheckpointError(
            f"no weights of {name} were released; available are {names_with_weights()}. Load your "
            "own with pretrained_cfg_overlay=dict(file=...) or backbones.load_checkpoint"
        )
    if cfg.url and not (cfg.file or cfg.state_dict or cfg.hf_hub_id):
        overlay["file"] = str(fetch(cfg.url))
    return kwargs | {"pretrained_cfg_overlay": overlay | {"custom_load": True}}


def _register(family: str, size: str) -> None:
    """Register a family in one size as a timm entry point."""
    line = TABLE[family]
    fixed = dict(SIZES[size])
    # DW-Conv has a kernel per channel unless num_heads is given.
    if _options(line).get("num_heads") is None:
        del fixed["num_heads"]

    def entry(pretrained: bool = False, **kwargs) -> Pyramid:
        name = entry.__name__
        if pretrained:
            kwargs = _with_weights(name, kwargs)
        tag = kwargs.get("pretrained_cfg")
        released = RELEASED.get(name, {}).get(tag) if isinstance(tag, str) else None
        if released and released.window_size != 7:
            kwargs.setdefault("window_size", released.window_size)
        return build_model_with_cfg(
            partial(build, line),
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            **fixed | kwargs,
        )

    entry.__name__ = entry.__qualname__ = f"{family}_{size}"
    entry.__module__ = __name__
    entry.__doc__ = f"{line.mixer.__doc__.splitlines()[0]} {size.capitalize()}: {SIZES[size]}."
    globals()[entry.__name__] = register_model(entry)


for _family, _line in TABLE.items():
    for _size in _line.sizes:
        _register(_family, _size)
