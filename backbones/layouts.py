"""Convert state dicts between the layouts of different code bases.

A layout is how one code base names and stores the entries of these networks. It is detected from
the names alone, without a model.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from backbones.families import TABLE
from backbones.mixers.base import Mixer, Names
from backbones.ops.windows import is_of_square_window, relative_position_index

STAGES = 4
_INDEX = ".relative_position_index"
# Entries of a pyramid's se_ratio, local_kernel and norm_layer, which no other code base has.
_OF_OPTIONS = re.compile(r"\.blocks\.\d+\.(se|local)\.|\.center$")


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Layout:
    """How a code base names the entries of a network.

    Attributes:
        name: its key in :data:`LAYOUTS`.
        description: the code base.
        blocks: its prefix for our ``stages.i.blocks.``, for each stage i.
        merging: its prefix for our ``stages.i.downsample.``, for each stage from i = 1.
        around: (our, its) prefixes of the other entries, where they differ.
        drops: our prefixes of entries that it lacks.
        index_buffer: converts ``relative_position_index`` to the buffer in its state dict; None if
            it has no such buffer.
        to_ours: reorders the patch merging's channels, ``(..., 4*C)``, from its order to ours.
        from_ours: the inverse.
        wrapper: the key that its loaders expect the weights under; None for a bare state dict.
    """

    name: str
    description: str
    blocks: tuple[str, ...]
    merging: tuple[str, ...]
    around: Names = ()
    drops: tuple[str, ...] = ()
    index_buffer: Callable[[Tensor], Tensor] | None = None
    to_ours: Callable[[Tensor], Tensor] = _same
    from_ours: Callable[[Tensor], Tensor] = _same
    wrapper: str | None = None

    @property
    def inner(self) -> dict[str, Names]:
        """For each family that the layout can hold, the (our, its) prefixes within a block."""
        names = {name: self.names_of(family.mixer) for name, family in TABLE.items()}
        return {name: pairs for name, pairs in names.items() if pairs is not None}

    def names_of(self, mixer: type[Mixer]) -> Names | None:
        """The (our, its) prefixes within a block with a mixer; None if it cannot hold that."""
        return () if self.name == "ours" else mixer.names.get(self.name)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The (our, its) prefixes outside the blocks."""
        yield from self.around
        for i, theirs in enumerate(self.merging, start=1):
            yield f"stages.{i}.downsample.", theirs


_NORMS = tuple((f"norms.{i}.", f"norm{i}.") for i in range(STAGES))
_HEAD = (("head.fc.", "head."),)
_LAYERS = tuple(f"layers.{i}.blocks." for i in range(STAGES))
_AT_THE_END = tuple(f"layers.{i}.downsample." for i in range(STAGES - 1))
_AT_THE_START = tuple(f"layers.{i}.downsample." for i in range(1, STAGES))


def _to_column_by_column(value: Tensor) -> Tensor:
    """From ``nn.Unfold``'s ``(C, row, column)`` order of the 2x2 to our ``(column, row, C)``."""
    return value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


def _to_channel_by_channel(value: Tensor) -> Tensor:
    return value.unflatten(-1, (2, 2, -1)).transpose(-1, -3).flatten(-3)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "ours",
            "this package",
            tuple(f"stages.{i}.blocks." for i in range(STAGES)),
            tuple(f"stages.{i}.downsample." for i in range(1, STAGES)),
        ),
        Layout(
            "original",
            "the authors' DW-Conv files and Swin's own",
            _LAYERS,
            _AT_THE_END,
            around=_NORMS + _HEAD,
            index_buffer=_same,
            wrapper="model",
        ),
        Layout(
            "timm",
            "timm's swin_*_patch4_window7_224",
            _LAYERS,
            _AT_THE_START,
            drops=("norms.",),
        ),
        Layout(
            "torchvision",
            "torchvision's swin_t and swin_b",
            tuple(f"features.{2 * i + 1}." for i in range(STAGES)),
            tuple(f"features.{2 * i}." for i in range(1, STAGES)),
            around=(
                ("patch_embed.proj.", "features.0.0."),
                ("patch_embed.norm.", "features.0.2."),
                *_HEAD,
            ),
            drops=("norms.",),
            index_buffer=Tensor.flatten,
        ),
        Layout(
            "openmmlab",
            "MMSegmentation's, MMDetection's and MMPretrain's SwinTransformer",
            tuple(f"stages.{i}.blocks." for i in range(STAGES)),
            tuple(f"stages.{i}.downsample." for i in range(STAGES - 1)),
            around=(("patch_embed.proj.", "patch_embed.projection."), *_NORMS),
            drops=("norm.", "head."),
            index_buffer=_same,
            to_ours=_to_column_by_column,
            from_ours=_to_channel_by_channel,
            wrapper="state_dict",
        ),
        Layout(
            "detectron2",
            "Detectron2's SwinTransformer",
            _LAYERS,
            _AT_THE_END,
            around=_NORMS,
            drops=("norm.", "head."),
            index_buffer=_same,
            wrapper="model",
        ),
    )
}
# The patch embedding's weight in each layout; what precedes it in a name is the backbone's prefix.
ANCHORS = ("patch_embed.proj.weight", "patch_embed.projection.weight", "features.0.0.weight")


def layout_of(names: Mapping[str, Tensor]) -> Layout:
    """Detect the layout of a state dict without prefixes; the default is ``"ours"``."""
    if "features.0.0.weight" in names:
        return LAYOUTS["torchvision"]
    if "patch_embed.projection.weight" in names:
        return LAYOUTS["openmmlab"]
    if not any(name.startswith("layers.") for name in names):
        return LAYOUTS["ours"]
    merges_at = {name.split(".")[1] for name in names if ".downsample." in name}
    # Detectron2's names are those of "original", so one entry reads both.
    return LAYOUTS["original" if "0" in merges_at or not merges_at else "timm"]


def family_of(names: Mapping[str, Tensor]) -> str | None:
    """Detect the family of a state dict in any layout; None if no family's marks are complete.

    If the marks of several families are complete, the family with the most marks is taken.
    """
    found = _form_of(names)
    return found[0] if found else None


def _form_of(names: Mapping[str, Tensor]) -> tuple[str, type[Mixer]] | None:
    """The family of a state dict, and which of its mixer classes it has."""
    layout = layout_of(names)
    below = {place[2] for name in names if (place := _in_block(layout, name))}
    best, most = None, 0
    for family, line in TABLE.items():
        for mixer in (line.mixer, *line.mixer.forms):
            inner = layout.names_of(mixer)
            if inner is None:
                continue
            marks = {_replaced(f".mixer.{mark}", inner) for mark in mixer.marks}
            if marks <= below and len(marks) > most:
                best, most = (family, mixer), len(marks)
    return best


def _in_block(layout: Layout, name: str) -> tuple[int, str, str] | None:
    """Stage, block, and the rest of a name with its leading dot; None outside the blocks."""
    for i, blocks in enumerate(layout.blocks):
        if name.startswith(blocks):
            number, dot, rest = name.removeprefix(blocks).partition(".")
            return i, number, dot + rest
    return None


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of any layout to ours; unknown names are kept.

    Buffers that our networks compute (``relative_position_index``, ``attn_mask``) are removed.
    """
    layout = layout_of(state_dict)
    found = _form_of(state_dict)
    inner = layout.names_of(found[1]) if found else ()
    return dict(
        _entry_to_ours(layout, inner, name, value)
        for name, value in state_dict.items()
        if not name.endswith((_INDEX, ".attn_mask"))
    )


def from_ours(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Convert a state dict of ours to another layout.

    Args:
        state_dict: of a :class:`backbones.Pyramid` or a ``DenseBackbone``.
        layout: a value of :data:`LAYOUTS`.

    Raises:
        ValueError: the layout cannot hold the family or its options, or a window is not square.
    """
    found = _form_of(state_dict)
    inner = layout.names_of(found[1]) if found else None
    options = [name for name in state_dict if _OF_OPTIONS.search(name)]
    if inner is None or (options and layout.name != "ours"):
        what = _described(*found) if found else "what this file holds"
        raise ValueError(
            f"the {layout.name} layout ({layout.description}) holds {', '.join(layout.inner)}, "
            f"not {what}{f' with {options[0]}' if options else ''}"
        )
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.startswith(layout.drops):
            continue
        theirs, value = _entry_from_ours(layout, inner, name, value)
        converted[theirs] = value
        if layout.index_buffer and name.endswith("relative_position_bias_table"):
            if not is_of_square_window(value):
                raise ValueError(f"{name}: the {layout.name} layout needs square windows")
            side = (round(value.shape[0] ** 0.5) + 1) // 2
            index = layout.index_buffer(relative_position_index((side, side)))
            converted[theirs.rsplit(".", 1)[0] + _INDEX] = index
    return converted


def _described(family: str, mixer: type[Mixer]) -> str:
    return family if mixer is TABLE[family].mixer else f"{family} as {mixer.__name__}"


def _entry_to_ours(layout: Layout, inner: tuple, name: str, value: Tensor) -> tuple[str, Tensor]:
    if place := _in_block(layout, name):
        stage, number, rest = place
        rest = _replaced(rest, ((theirs, ours) for ours, theirs in inner))
        # Our convolutional mixers have linear layers for the authors' 1x1 convolutions.
        if ".mixer." in rest and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        return f"stages.{stage}.blocks.{number}{rest}", value
    ours = _replaced(name, ((theirs, ours) for ours, theirs in layout.pairs()))
    if ".downsample." in ours:
        value = layout.to_ours(value)
    return ours, value


def _entry_from_ours(layout: Layout, inner: tuple, name: str, value: Tensor) -> tuple[str, Tensor]:
    if place := _in_block(LAYOUTS["ours"], name):
        stage, number, rest = place
        rest = _replaced(rest, inner)
        if ".attn2conv." in rest and value.ndim == 2:
            value = value[:, :, None, None]
        return f"{layout.blocks[stage]}{number}{rest}", value
    if ".downsample." in name:
        value = layout.from_ours(value)
    return _replaced(name, layout.pairs()), value


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
