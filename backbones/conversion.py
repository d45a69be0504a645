"""Convert checkpoint files between the layouts of different code bases."""

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
    """The result of :func:`convert_checkpoint`.

    Attributes:
        family: the family of the weights.
        source: the layout of the input.
        written: entries of the new file.
        left_out: entries, by our names, that the new layout lacks or that are not the backbone's.
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
    """Write the backbone of a checkpoint in another layout; converting back gives the same bits.

    Entries are renamed, patch merging channels reordered, and 1x1 convolutions reshaped to or from
    linear layers.

    >>> convert_checkpoint("swin_tiny.pth", "torchvision.pth", "torchvision")

    Args:
        source: a file or URL in any layout, of a backbone, classifier, detector or segmentor.
        target: a ``.pth``, ``.pt`` or ``.safetensors`` file, written atomically.
        layout: a key of :data:`backbones.layouts.LAYOUTS`.
        prefix: prepended to every name, such as ``"backbone."``.
        from_prefix: prefix of the backbone's names in a source with several; None finds it.
        weights_only: False also unpickles unsafe files, which can run code: only for trusted files.

    Raises:
        CheckpointError: the source cannot be read or holds no backbone of this package.
        ValueError: the layout is unknown or cannot hold the family, or the suffix is wrong.
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
    """Write a state dict to a file atomically.

    Args:
        path: ``.safetensors``, or any other suffix for ``torch.save``.
        state_dict: the weights; they are copied to the CPU.
        wrapper: the key of the weights in a ``torch.save`` file. None writes a bare state dict, or
            uses ``"state_dict"`` if there are classes or other metadata.
        classes: class names of the classifier, written to ``meta``.
        meta: plain values under the key ``meta``; JSON in a safetensors header.
    """
    meta = dict(meta or {}) | ({"classes": list(classes)} if classes else {})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Cloned because safetensors refuses tensors that share memory.
    weights = {
        name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()
    }
    if path.suffix == ".safetensors":
        header = {key: json.dumps(value) for key, value in meta.items()}
        save_file(weights, partial, {"format": "pt"} | header)
        _sort_metadata(partial)
    else:
        content = {wrapper or "state_dict": weights} if wrapper or meta else weights
        if meta:
            content["meta"] = meta
        torch.save(content, partial)
    os.replace(partial, path)


def _sort_metadata(path: Path) -> None:
    """Sort a safetensors file's metadata, whose order is drawn anew for each file.

    One checkpoint then has one file, byte for byte, and one hash.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
