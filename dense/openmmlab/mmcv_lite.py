"""Provides :mod:`.mmcv_ext` as ``mmcv._ext``, the compiled module that ``mmcv-lite`` lacks.

``import dense.segmentation`` is enough if it comes before any import of ``mmcv.ops``. For programs
that import MMDetection or MMSegmentation first, such as their own tools, copy the module into
mmcv's folder once::

    python -m dense.openmmlab.mmcv_lite

A compiled mmcv is never replaced: Python prefers a compiled module to a source file.
"""

import importlib.util
import shutil
import sys
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path

from dense import require

STAND_IN = Path(__file__).with_name("mmcv_ext.py")


class _StandIn(MetaPathFinder):
    """Import finder for ``mmcv._ext``."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """The spec of the stand-in, None for any other name."""
        if name == "mmcv._ext":
            return importlib.util.spec_from_file_location(name, STAND_IN)
        return None


def offer() -> None:
    """Make ``import mmcv._ext`` find the stand-in if mmcv has no such module."""
    if not any(isinstance(finder, _StandIn) for finder in sys.meta_path):
        sys.meta_path.append(_StandIn())  # last, so that a real mmcv._ext is found first


def install() -> str:
    """Copy the stand-in into the folder of the installed mmcv-lite.

    Returns:
        One line that describes the result.

    Raises:
        ImportError: neither mmcv nor mmcv-lite is installed.
    """
    require("mmcv", "segmentation")
    folder = Path(importlib.util.find_spec("mmcv").origin).parent
    if compiled := [path for s in EXTENSION_SUFFIXES for path in folder.glob(f"_ext*{s}")]:
        return f"mmcv is compiled ({compiled[0]}): nothing to do"
    target = folder / "_ext.py"
    shutil.copyfile(STAND_IN, target)
    _let_pip_remove(target)
    return f"{target} stands in for mmcv's compiled operators"


def _let_pip_remove(target: Path) -> None:
    """Add the file to mmcv-lite's RECORD, so that pip uninstalls it too."""
    try:
        record = Path(metadata.distribution("mmcv-lite").locate_file("")) / next(
            path for path in metadata.files("mmcv-lite") or () if path.name == "RECORD"
        )
    except (metadata.PackageNotFoundError, StopIteration):
        return
    lines = record.read_text().splitlines()
    own = f"{target.parent.name}/{target.name},,"
    if own not in lines:
        # Written to a new file: the installed one may be a hard link into a package cache.
        temporary = record.with_suffix(".new")
        temporary.write_text("\n".join([*lines, own, ""]))
        temporary.replace(record)


if __name__ == "__main__":
    try:
        print(install())
    except ImportError as error:
        sys.exit(str(error))
