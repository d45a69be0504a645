"""The base class of mixers.

A family is a subclass of :class:`Mixer` and a line of the table in :mod:`backbones.families`. The
pyramid, ``backbones.fuse``, checkpoint loading and the framework adapters use only this interface.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NoReturn, Self

from timm.layers import trunc_normal_
from torch import Tensor, nn

from backbones.layers import Size
from backbones.ops.common import refuse_scripting

# Pairs of (our, another code base's) prefixes within a block, such as (".mixer.", ".attn.").
Names = tuple[tuple[str, str], ...]


class Mixer(nn.Module):
    """Mixes the positions of a map, ``(B, H, W, C)`` to ``(B, H, W, C)`` at any H and W.

    A ``forward`` that calls linears is decorated with
    :func:`backbones.ops.linear_layer.fast_linears`, without which they are slower on some CPUs.

    Attributes:
        norm_layer: the class of the norms in the blocks, called with C: ``nn.LayerNorm`` or
            ``nn.BatchNorm2d``, which the dense outputs have too; an instance's own value, set by
            :meth:`set_norm_layer`, concerns its block alone.
        pre_norm: whether the block applies ``norm1`` before the mixer.
        copies: the shifted copies of each image in a batch: 1, or more in a stage whose stride was
            taken away (:class:`backbones.pyramid.Stage`).
        marks: entries of the mixer's state dict, such as ``"qkv.weight"``, that identify the family
            of a checkpoint; see :func:`backbones.layouts.family_of`.
        forms: other classes that :meth:`at` builds for some of its options. Their checkpoints are
            the family's, and only those layouts hold them for which they have names.
        read_by_operator: names of linears that ``backbones.fuse`` does not replace, because an
            operator reads their weights.
        names: for each key of :data:`backbones.layouts.LAYOUTS`, the (our, its) prefixes within a
            block; a layout that is absent cannot hold the family.
    """

    norm_layer: type[nn.Module] = nn.LayerNorm
    pre_norm: bool = True
    copies: int = 1
    marks: ClassVar[tuple[str, ...]] = ()
    forms: ClassVar[tuple[type["Mixer"], ...]] = ()
    read_by_operator: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[dict[str, Names]] = {}

    @classmethod
    def at(cls, dim: int, stage: int, block: int, feat_size: Size) -> Self:
        """Build the mixer of one block.

        Keyword-only arguments that a subclass adds become arguments of its models, such as
        ``timm.create_model("swin_tiny", window_size=12)``.

        Args:
            dim: C.
            stage: index of the stage, from 0.
            block: index of the block in its stage, from 0.
            feat_size: rows and columns of the map at the training image size.
        """
        return cls(dim)

    def init_weights(self) -> None:
        """Initialise the linears as Swin does: truncated normal, std 0.02; biases 0."""
        init_linears(self.modules())

    def set_norm_layer(self, norm_layer: type[nn.Module]) -> None:
        """Replace the norms of the mixer and of its block, before training (Table 12).

        Args:
            norm_layer: called with C; see :data:`.norm.NORM_LAYERS`.
        """
        self.norm_layer = norm_layer

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, in addition to norms and biases."""
        return set()

    def fold(self) -> None:
        """Fold the mixer's batch norms into adjacent layers, in place and for evaluation only."""

    def adapt(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a checkpoint's entries of another form of the family to this mixer's names.

        Args:
            entries: the checkpoint's entries of this mixer, by their names in it.

        Returns:
            All entries, those of this form unchanged; :meth:`fit` gets the values of other shapes.
        """
        return dict(entries)

    def fit(self, name: str, value: Tensor) -> Tensor:
        """Resize a checkpoint's tensor to this mixer's window, kernel or window grid.

        Args:
            name: the entry of the mixer's state dict.
            value: the checkpoint's tensor, whose shape differs from the mixer's.

        Returns:
            The resized tensor, or ``value`` if it cannot be resized.
        """
        return value

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Resize the weights in place for another map or window size.

        Args:
            feat_size: rows and columns of the map; None keeps them.
            window_size: side, or rows and columns, of the window or kernel; None keeps it.

        Raises:
            ValueError: the mixer cannot change its window or kernel size once built.
        """
        if window_size is not None:
            raise ValueError(f"{type(self).__name__} has no window_size")

    def __prepare_scriptable__(self) -> NoReturn:
        # TorchScript's hook, called for every module before any is compiled.
        refuse_scripting()


def heads_of(num_heads: Sequence[int], stage: int) -> int:
    """The heads of a stage, from those of all; raises ValueError where there is no such number."""
    if isinstance(num_heads, Sequence) and len(num_heads) > stage and num_heads[stage] > 0:
        return num_heads[stage]
    raise ValueError(f"num_heads={num_heads}: a number from 1 for each stage, as (3, 6, 12, 24)")


def init_linears(modules: Iterable[nn.Module]) -> None:
    """Initialise every linear among ``modules`` as Swin does, in order."""
    for module in modules:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
