"""The table of families: the mixer of each, and the sizes it comes in.

A new family is a :class:`backbones.mixers.Mixer` subclass in ``mixers/`` and a line in ``TABLE``.
"""

from dataclasses import dataclass

from backbones import mixers
from backbones.mixers import Mixer

# embed_dim and depths of tiny and base are Table 8's, heads are Swin's, and so are small and large,
# in which the paper has no family.
SIZES = {
    "nano": dict(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(2, 4, 8, 16)),
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}


@dataclass(frozen=True)
class Family:
    """A line of :data:`TABLE`.

    Attributes:
        mixer: the mixer class; the keyword-only arguments of its ``at`` become model arguments.
        sizes: keys of :data:`SIZES`.
    """

    mixer: type[Mixer]
    sizes: tuple[str, ...] = ("nano", "tiny", "base")


TABLE = {
    "swin": Family(mixers.WindowAttention, ("nano", "tiny", "small", "base", "large")),
    "swin_local_mlp": Family(mixers.LocalMLP),
    "dw_conv": Family(mixers.DepthwiseConv),
    "d_dw_conv": Family(mixers.DynamicDepthwiseConv),
    "i_d_dw_conv": Family(mixers.InhomogeneousDynamicDepthwiseConv),
}


def map_channels(name: str) -> tuple[int, ...]:
    """The channels of a model's maps, of strides 4, 8, 16 and 32.

    >>> map_channels("swin_tiny")
    (96, 192, 384, 768)

    Args:
        name: one of ``backbones.MODEL_NAMES``.
    """
    size = SIZES[name.rpartition("_")[2]]
    return tuple(size["embed_dim"] * 2**stage for stage in range(len(size["depths"])))


FAMILIES = tuple(TABLE)
MODEL_NAMES = tuple(f"{name}_{size}" for name, family in TABLE.items() for size in family.sizes)
