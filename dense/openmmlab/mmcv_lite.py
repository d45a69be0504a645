"""mmcv without a compiler: ``mmcv-lite``, with :mod:`.mmcv_ext` for the module it lacks.

``import dense.segmentation`` suffices, before anything imports ``mmcv.ops``. Programs that import
MMDetection or MMSegmentation first, their own tools among them, find it once it lies in mmcv's
folder, where this puts it::

    python -m dense.openmmlab.mmcv_lite

A compiled mmcv is never replaced: Python prefers a compiled module to a file beside it.
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
    """Finds ``mmcv._ext`` where no other finder does."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """The stand-in's spec for that one name."""
        if name == "mmcv._ext":
            return importlib.util.spec_from_file_location(name, STAND_IN)
        return None


def offer() -> None:
    """From now on, let ``import mmcv._ext`` find the stand-in where there is no such module."""
    if not any(isinstance(finder, _StandIn) for finder in sys.meta_path):
        sys.meta_path.append(_StandIn())  # behind the finders of files


def install() -> str:
    """Copy the stand-in into the folder of the installed mmcv-lite.

    Returns:
        One line that says what was done.

    Raises:
        ImportError: there is no mmcv of either kind.
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
    """Names the file in mmcv-lite's own list, so that uninstalling leaves nothing behind."""
    try:
        record = Path(metadata.distribution("mmcv-lite").locate_file("")) / next(
            path for path in metadata.files("mmcv-lite") or () if path.name == "RECORD"
        )
    except (metadata.PackageNotFoundError, StopIteration):
        return
    lines = record.read_text().splitlines()
    own = f"{target.parent.name}/{target.name},,"
    if own not in lines:
        # A new file in its place: package managers link the installed one to their cache.
        temporary = record.with_suffix(".new")
        temporary.write_text("\n".join([*lines, own, ""]))
        temporary.replace(record)


if __name__ == "__main__":
    try:
        print(install())
    except ImportError as error:
        sys.exit(str(error))
