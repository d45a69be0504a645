"""The one table of families: what mixes the pixels in each, and the sizes it comes in.

Everything that depends on a family asks its mixer (:class:`backbones.mixers.Mixer`): a new family
is a file in ``mixers/`` and a line here.
"""

from dataclasses import dataclass

from backbones import mixers
from backbones.mixers import Mixer

# C of the first stage and depths as Table 8, heads as Swin; nano is for tests and small data.
SIZES = {
    "nano": dict(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(2, 4, 8, 16)),
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


@dataclass(frozen=True)
class Family:
    """A line of the table.

    Attributes:
        mixer: what mixes the pixels; its options become those of the models.
        sizes: keys of :data:`SIZES`.
    """

    mixer: type[Mixer]
    sizes: tuple[str, ...] = ("nano", "tiny", "base")


TABLE = {
    "swin": Family(mixers.WindowAttention),
    "swin_local_mlp": Family(mixers.LocalMLP),
    "dw_conv": Family(mixers.DepthwiseConv),
    "d_dw_conv": Family(mixers.DynamicDepthwiseConv),
    "i_d_dw_conv": Family(mixers.InhomogeneousDynamicDepthwiseConv),
}
FAMILIES = tuple(TABLE)
MODEL_NAMES = tuple(f"{name}_{size}" for name, family in TABLE.items() for size in family.sizes)
