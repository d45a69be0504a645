"""Whose names a set of weights has, and those names as ours and back.

A layout is how one code base names and stores the same network. Reading needs no hint: the names
tell the layout. Nothing here knows of a model; the entries alone decide.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from backbones.families import TABLE
from backbones.mixers.base import Names
from backbones.ops.windows import is_of_square_window, relative_position_index

STAGES = 4
_INDEX = ".relative_position_index"


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Layout:
    """How a code base names the network.

    Attributes:
        name: what users call it.
        description: whose files have it.
        blocks: what stands for ``stages.i.blocks.``, by stage.
        merging: what stands for ``stages.i.downsample.``, by stage from the second on.
        around: names outside the stages, ours and theirs.
        drops: prefixes, of ours, of what it has no place for.
        index_buffer: what its attention keeps of ``relative_position_index`` in a state dict,
            None where it keeps nothing.
        to_ours: changes the patch merging's channels, ``(..., 4*C)``, from its order to ours.
        from_ours: the inverse.
        wrapper: the key that its users expect the weights under, None for a bare state dict.
    """

    name: str
    description: str
    blocks: tuple[str, ...]
    merging: tuple[str, ...]
    around: Names = ()
    drops: tuple[str, ...] = ()
    index_buffer: Callable[[Tensor], Tensor] | None = None
    to_ours: Callable[[Tensor], Tensor] = field(default=_same)
    from_ours: Callable[[Tensor], Tensor] = field(default=_same)
    wrapper: str | None = None

    @property
    def inner(self) -> dict[str, Names]:
        """Names below a block, ours and theirs, by family: of all the families it can hold."""
        if self.name == "ours":
            return dict.fromkeys(TABLE, ())
        names = {name: family.mixer.names.get(self.name) for name, family in TABLE.items()}
        return {name: pairs for name, pairs in names.items() if pairs is not None}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Prefixes outside the blocks, ours and theirs."""
        yield from self.around
        for i, theirs in enumerate(self.merging, start=1):
            yield f"stages.{i}.downsample.", theirs


_NORMS = tuple((f"norms.{i}.", f"norm{i}.") for i in range(STAGES))
_HEAD = (("head.fc.", "head."),)
_LAYERS = tuple(f"layers.{i}.blocks." for i in range(STAGES))
_AT_THE_END = tuple(f"layers.{i}.downsample." for i in range(STAGES - 1))
_AT_THE_START = tuple(f"layers.{i}.downsample." for i in range(1, STAGES))


def _to_column_by_column(value: Tensor) -> Tensor:
    """MMCV unfolds the 2x2 positions channel by channel, row by row inside; ours go column by
    column of the 2x2, each with all its channels."""
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
# The names of the patch embedding, one of which every layout has: what stands before it is the
# place of the backbone in the module that was saved.
ANCHORS = ("patch_embed.proj.weight", "patch_embed.projection.weight", "features.0.0.weight")


def layout_of(names: Mapping[str, Tensor]) -> Layout:
    """Whose names these are, without what stands before them; ours where nothing speaks for
    another."""
    if "features.0.0.weight" in names:
        return LAYOUTS["torchvision"]
    if "patch_embed.projection.weight" in names:
        return LAYOUTS["openmmlab"]
    if not any(name.startswith("layers.") for name in names):
        return LAYOUTS["ours"]
    merges_at = {name.split(".")[1] for name in names if ".downsample." in name}
    # Detectron2's are Swin's own names, so that this serves both.
    return LAYOUTS["original" if "0" in merges_at or not merges_at else "timm"]


def family_of(names: Mapping[str, Tensor]) -> str | None:
    """The family whose weights these are, in any layout; None if of none of them.

    Of the families all of whose marks are there, it is the one with the most.
    """
    layout = layout_of(names)
    below = {_below_a_block(layout, name) for name in names}
    best, most = None, 0
    for family, inner in layout.inner.items():
        marks = {_replaced(f".mixer.{mark}", inner) for mark in TABLE[family].mixer.marks}
        if marks <= below and len(marks) > most:
            best, most = family, len(marks)
    return best


def _below_a_block(layout: Layout, name: str) -> str | None:
    """What follows the block's number, with its dot."""
    for blocks in layout.blocks:
        if name.startswith(blocks):
            _, dot, rest = name.removeprefix(blocks).partition(".")
            return dot + rest
    return None


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and orders for anybody's; what is ours, or nobody's, passes unchanged."""
    layout = layout_of(state_dict)
    inner = layout.inner.get(family_of(state_dict), ())
    return dict(
        _entry_to_ours(layout, inner, name, value)
        for name, value in state_dict.items()
        if not name.endswith((_INDEX, ".attn_mask"))
    )


def from_ours(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Weights by our names as another layout has them.

    Args:
        state_dict: a pyramid's or a dense backbone's.
        layout: one of :data:`LAYOUTS`.

    Raises:
        ValueError: the layout has no place for the family.
    """
    family = family_of(state_dict)
    if family not in layout.inner:
        raise ValueError(
            f"the {layout.name} layout ({layout.description}) holds "
            f"{', '.join(layout.inner)}, not {family or 'what this file holds'}"
        )
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.startswith(layout.drops):
            continue
        theirs, value = _entry_from_ours(layout, layout.inner[family], name, value)
        converted[theirs] = value
        if layout.index_buffer and name.endswith("relative_position_bias_table"):
            if not is_of_square_window(value):
                raise ValueError(
                    f"{name} is of a window that is not square: {layout.name} has none"
                )
            side = (round(value.shape[0] ** 0.5) + 1) // 2
            index = layout.index_buffer(relative_position_index((side, side)))
            converted[theirs.rsplit(".", 1)[0] + _INDEX] = index
    return converted


def _entry_to_ours(layout: Layout, inner: tuple, name: str, value: Tensor) -> tuple[str, Tensor]:
    for i, blocks in enumerate(layout.blocks):
        if name.startswith(blocks):
            number, dot, rest = name.removeprefix(blocks).partition(".")
            rest = _replaced(dot + rest, ((theirs, ours) for ours, theirs in inner))
            # The 1x1 convolutions of the convolutional mixers are linear layers here.
            if ".mixer." in rest and value.shape[2:] == (1, 1):
                value = value.flatten(1)
            return f"stages.{i}.blocks.{number}{rest}", value
    ours = _replaced(name, ((theirs, ours) for ours, theirs in layout.pairs()))
    if ".downsample." in ours:
        value = layout.to_ours(value)
    return ours, value


def _entry_from_ours(layout: Layout, inner: tuple, name: str, value: Tensor) -> tuple[str, Tensor]:
    if name.startswith("stages.") and ".blocks." in name:
        _, stage, _, number, rest = name.split(".", 4)
        rest = _replaced(f".{rest}", inner)
        if ".attn2conv." in rest and value.ndim == 2:
            value = value[:, :, None, None]
        return f"{layout.blocks[int(stage)]}{number}{rest}", value
    if ".downsample." in name:
        value = layout.from_ours(value)
    return _replaced(name, layout.pairs()), value


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
