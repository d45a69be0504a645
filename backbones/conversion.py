"""A file of one code base's weights written as a file of another's."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from backbones.checkpoints import backbone_of
from backbones.layouts import LAYOUTS, Layout, family_of, from_ours, layout_of, to_ours
from backbones.reading import CheckpointError, read_with_classes

SUFFIXES = (".pth", ".pt", ".safetensors")
_OURS = ("patch_embed.", "stages.", "norm.", "norms.", "head.fc.")


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_checkpoint` did.

    Attributes:
        family: whose weights they are.
        source: the layout they had.
        written: entries of the new file.
        left_out: entries, by our names, that the new layout has no place for or that are no part of
            the pyramid.
    """

    family: str
    source: Layout
    written: tuple[str, ...]
    left_out: tuple[str, ...]


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    layout: str,
    *,
    prefix: str = "",
    from_prefix: str | None = None,
    weights_only: bool = True,
) -> Conversion:
    """Write a checkpoint's backbone as another code base has it, values untouched.

    The patch merging's channels are reordered where the two differ, 1x1 convolutions and linear
    layers take each other's shape; converting back gives the same bits.

    Args:
        source: a file or URL of any of :data:`backbones.layouts.LAYOUTS`, a backbone, a classifier
            or a whole detector or segmentor with it inside.
        target: a ``.pth`` or ``.safetensors`` file, written whole or not at all.
        layout: one of :data:`backbones.layouts.LAYOUTS`.
        prefix: what to put before every name, ``"backbone."`` say.
        from_prefix: what stands before the backbone's names in a source that holds several.
        weights_only: False reads files that cannot be read safely too; only for those you trust.

    Raises:
        CheckpointError: the source cannot be read or holds none of our families.
        ValueError: an unknown layout, one that cannot hold the family, or another suffix.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}: {', '.join(LAYOUTS)} are valid")
    if Path(target).suffix not in SUFFIXES:
        raise ValueError(f"{target}: {' or '.join(SUFFIXES)} is needed")
    given, classes = read_with_classes(source, weights_only=weights_only)
    own = backbone_of(given, from_prefix)
    ours = to_ours(own)
    family = family_of(ours)
    if family is None or "patch_embed.proj.weight" not in ours:
        raise CheckpointError(f"{source} holds no backbone of a family of this package")
    kept = {name: value for name, value in ours.items() if name.startswith(_OURS)}
    to = LAYOUTS[layout]
    written = {prefix + name: value for name, value in from_ours(kept, to).items()}
    dropped = [name for name in ours if name not in kept or name.startswith(to.drops)]
    has_classifier = not any(name.startswith("head.") for name in dropped)
    write_weights(target, written, to.wrapper, classes if has_classifier else None)
    return Conversion(family, layout_of(own), tuple(written), tuple(dropped))


def write_weights(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    wrapper: str | None = None,
    classes: Sequence[str] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write weights whole or not at all.

    Args:
        path: ``.safetensors``, or anything else for PyTorch's format.
        state_dict: what to write.
        wrapper: the key to put them under in PyTorch's format; None writes them bare, unless there
            are classes to be kept beside.
        classes: names of the classifier's outputs.
        meta: plain values to be kept beside, under ``meta``; JSON in a safetensors header.
    """
    meta = dict(meta or {}) | ({"classes": list(classes)} if classes else {})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Clones, for safetensors refuses tensors that share memory.
    weights = {
        name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()
    }
    if path.suffix == ".safetensors":
        header = {key: json.dumps(value) for key, value in meta.items()}
        save_file(weights, partial, {"format": "pt"} | header)
    else:
        content = {wrapper or "state_dict": weights} if wrapper or meta else weights
        if meta:
            content["meta"] = meta
        torch.save(content, partial)
    os.replace(partial, path)
