"""Adapters of the backbones for Detectron2, MMSegmentation, MMDetection, mmengine, transformers.

This module imports no framework. :mod:`dense.detection` needs Detectron2, :mod:`dense.segmentation`
mmengine (its configs also MMSegmentation), :mod:`dense.pretraining` mmengine,
:mod:`dense.mmdetection` MMDetection and :mod:`dense.huggingface` transformers.
"""

from importlib.util import find_spec
from pathlib import Path

_EXTRA = "run pip install 'dense-backbones[{extra}]'"
_INSTALL = {
    "detectron2": f"{_EXTRA}; the README's section on Detectron2 says how to install it",
    "mmcv": "run pip install mmcv-lite==2.1.0; the README's section on mmcv has the other ways",
}
# Packages that import mmcv without declaring it as a dependency.
_UNDECLARED = {"mmseg": ("mmcv",), "mmdet": ("mmcv",)}


def require(package: str, extra: str) -> None:
    """Raise an ImportError with install instructions if a package is missing.

    >>> require("mmengine", "segmentation")

    Args:
        package: the package to import, such as ``"mmengine"``.
        extra: the extra of dense-backbones that installs it, such as ``"segmentation"``.

    Raises:
        ImportError: ``package`` or an undeclared dependency of it is not installed.
    """
    for name in (package, *_UNDECLARED.get(package, ())):
        if find_spec(name) is None:
            way = _INSTALL.get(name, _EXTRA).format(extra=extra)
            raise ImportError(f"{name} is not installed: {way}")


def _check_backbones() -> None:
    """Another package of the name is on PyPI, and pip puts it into the same folder."""
    found = find_spec("backbones")
    origin = found and found.origin
    if origin and Path(origin).with_name("families.py").exists():
        return
    where = f"the one in {origin} is of another project" if origin else "there is none"
    raise ImportError(
        f"dense needs the package backbones of dense-backbones; {where}: "
        "run pip uninstall backbones, then install dense-backbones again",
        name="backbones",
    )


_check_backbones()
