"""The contract of a mixer: what a family says about itself, in one file.

A family is a subclass of :class:`Mixer` and a line of the table in :mod:`backbones.families`. The
pyramid, ``backbones.fuse``, checkpoints of every layout, FLOPs and the adapters ask the mixer and
know of no family.
"""

from collections.abc import Iterable
from typing import ClassVar, Self

from timm.layers import trunc_normal_
from torch import Tensor, nn

from backbones.layers import Size

# Names of entries below a block, ours and another code base's: ``(".mixer.", ".attn.")``.
Names = tuple[tuple[str, str], ...]


class Mixer(nn.Module):
    """What mixes the positions of a map, ``(B, H, W, C)`` to ``(B, H, W, C)`` at any H and W.

    Attributes:
        norm_layer: the norm of the family's blocks and dense outputs, called with C:
            ``nn.LayerNorm`` or ``nn.BatchNorm2d``.
        pre_norm: whether the block normalises the map before it is mixed.
        marks: entries of the mixer's state dict, ``"qkv.weight"`` say, that tell its family: of the
            families all of whose marks a checkpoint holds, it is of the one with the most.
        read_by_operator: children whose weights an operator reads, or which few rows meet: they
            stay ordinary layers in what ``backbones.fuse`` returns.
        names: what others call the entries below a block, by the name of their layout (see
            :data:`backbones.layouts.LAYOUTS`); a layout that is absent cannot hold the family.
    """

    norm_layer: type[nn.Module] = nn.LayerNorm
    pre_norm: bool = True
    marks: ClassVar[tuple[str, ...]] = ()
    read_by_operator: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[dict[str, Names]] = {}

    @classmethod
    def at(cls, dim: int, stage: int, block: int, feat_size: Size) -> Self:
        """The mixer of one block.

        A family's options are the keyword-only arguments that it adds here; they become arguments
        of its models, ``timm.create_model("swin_tiny", window_size=12)``.

        Args:
            dim: C.
            stage: the index of the stage, from 0.
            block: the index of the block in its stage, from 0.
            feat_size: rows and columns of the map at the training size.
        """
        return cls(dim)

    def init_weights(self) -> None:
        """Initialise the linears as Swin does: normal of deviation 0.02, truncated; biases 0."""
        init_linears(self.modules())

    def no_weight_decay(self) -> set[str]:
        """The parameters, beside norms and biases, that are never decayed."""
        return set()

    def fold(self) -> None:
        """Fold the batch norms inside into the layers beside them, for evaluation, in place."""

    def fit(self, name: str, value: Tensor) -> Tensor:
        """Another network's tensor for a window, kernel or grid of this one's size.

        Args:
            name: the entry of the mixer's state dict.
            value: the tensor of a checkpoint, of another shape than the mixer's.

        Returns:
            The tensor resized to the mixer's shape, or as it is where nothing corresponds.
        """
        return value

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Adapt what was learned to another map or window.

        Args:
            feat_size: rows and columns of the map; None keeps them.
            window_size: rows and columns of the window or kernel, an int for both; None keeps it.

        Raises:
            ValueError: the window or kernel cannot change once it is built.
        """
        if window_size is not None:
            raise ValueError(f"{type(self).__name__} has no window_size")


def init_linears(modules: Iterable[nn.Module]) -> None:
    """Swin's initialisation of every linear among ``modules``, in their order."""
    for module in modules:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
