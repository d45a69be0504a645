"""The named models: five families in nano, tiny and base, registered with timm."""

from collections.abc import Callable

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)

from backbones import mixers
from backbones.checkpoints import checkpoint_filter_fn
from backbones.ops.window import Size
from backbones.pyramid import Pyramid
from backbones.reading import CheckpointError, fetch
from backbones.released import RELEASED, Released, names_with_weights

# C and depths as Table 8, heads as Swin; nano is for tests, demos and small data.
_SIZES = {
    "nano": dict(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(2, 4, 8, 16)),
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
FAMILIES = ("swin", "swin_local_mlp", "dw_conv", "d_dw_conv", "i_d_dw_conv")
MODEL_NAMES = tuple(f"{family}_{size}" for family in FAMILIES for size in _SIZES)


def swin(
    num_heads: tuple[int, ...] = (3, 6, 12, 24), window_size: int | Size = 7, **kwargs
) -> Pyramid:
    """Swin: window attention, shifted in every second block.

    Args:
        num_heads: attention heads in each stage.
        window_size: rows and columns of a window, in positions.
        **kwargs: those of :class:`backbones.pyramid.Pyramid`.
    """

    def mixer(dim, stage, block, feat_size):
        return mixers.WindowAttention(dim, num_heads[stage], window_size, shifted=block % 2 == 1)

    return Pyramid(mixer, **kwargs)


def swin_local_mlp(
    num_heads: tuple[int, ...] = (3, 6, 12, 24),
    window_size: int | Size = 7,
    shared: bool = False,
    **kwargs,
) -> Pyramid:
    """Swin-Local-MLP: Swin's windows with learned weights instead of attention.

    Args:
        num_heads: weight matrices in each stage; channels of a head share one. ``embed_dim`` times
            the stage's width gives every channel its own (Table 4).
        window_size: rows and columns of a window, in positions.
        shared: one matrix a head for all windows (Table 4, 24.3M in tiny) instead of one a window
            of the training image (Table 2, 26.15M in tiny).
        **kwargs: those of :class:`backbones.pyramid.Pyramid`.
    """

    def mixer(dim, stage, block, feat_size):
        shifted = block % 2 == 1
        return mixers.LocalMLP(dim, num_heads[stage], window_size, shifted, feat_size, shared)

    return Pyramid(mixer, **kwargs)


def dw_conv(window_size: int | Size = 7, **kwargs) -> Pyramid:
    """DW-Conv: depth-wise convolution; ``window_size`` is its kernel size."""

    def mixer(dim, stage, block, feat_size):
        return mixers.DepthwiseConv(dim, window_size)

    return Pyramid(mixer, **kwargs)


def d_dw_conv(window_size: int | Size = 7, **kwargs) -> Pyramid:
    """D-DW-Conv: depth-wise convolution, kernels predicted per image."""

    def mixer(dim, stage, block, feat_size):
        return mixers.DynamicDepthwiseConv(dim, window_size)

    return Pyramid(mixer, **kwargs)


def i_d_dw_conv(window_size: int | Size = 7, num_groups: int = 32, **kwargs) -> Pyramid:
    """I-D-DW-Conv: kernels predicted per position, one for each of ``num_groups`` groups."""

    def mixer(dim, stage, block, feat_size):
        return mixers.InhomogeneousDynamicDepthwiseConv(dim, window_size, num_groups)

    return Pyramid(mixer, **kwargs)


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
    """Where timm is to take weights from: a file here, read by :meth:`Pyramid.load_pretrained`.

    Raises:
        CheckpointError: no weights of this name were released, or they cannot be downloaded.
    """
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
    if not (cfg.has_weights or cfg.state_dict):
        raise CheckpointError(
            f"no weights of {name} were released; there are {names_with_weights()}. Your own are "
            f"loaded by pretrained_cfg_overlay=dict(file=...) or backbones.load_checkpoint"
        )
    if cfg.url and not (cfg.file or cfg.state_dict or cfg.hf_hub_id):
        overlay["file"] = str(fetch(cfg.url))
    return kwargs | {"pretrained_cfg_overlay": overlay | {"custom_load": True}}


def _released(name: str, pretrained_cfg: object) -> Released | None:
    """The released weights that a tag names, if it names some."""
    return RELEASED.get(name, {}).get(pretrained_cfg) if isinstance(pretrained_cfg, str) else None


def _register(family: Callable[..., Pyramid], size: str) -> None:
    """Register one family in one size as a timm entry point."""
    has_heads = family in (swin, swin_local_mlp)
    fixed = {k: v for k, v in _SIZES[size].items() if has_heads or k != "num_heads"}

    def entry(pretrained: bool = False, **kwargs) -> Pyramid:
        name = entry.__name__
        if pretrained:
            kwargs = _with_weights(name, kwargs)
        released = _released(name, kwargs.get("pretrained_cfg"))
        if released and released.window_size != 7:
            kwargs.setdefault("window_size", released.window_size)
        return build_model_with_cfg(
            family,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            **fixed | kwargs,
        )

    entry.__name__ = f"{family.__name__}_{size}"
    entry.__qualname__ = entry.__name__
    entry.__module__ = __name__
    entry.__doc__ = f"{family.__doc__.splitlines()[0]} {size.capitalize()}: {_SIZES[size]}."
    globals()[entry.__name__] = register_model(entry)


for _family in (swin, swin_local_mlp, dw_conv, d_dw_conv, i_d_dw_conv):
    for _size in _SIZES:
        _register(_family, _size)
