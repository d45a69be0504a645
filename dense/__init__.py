"""What plugs the backbones into detection and segmentation frameworks.

Nothing here imports a framework: :mod:`dense.detection` needs Detectron2, :mod:`dense.segmentation`
mmengine (and MMSegmentation for its configs), :mod:`dense.mmdetection` MMDetection, each without
the others.
"""

from importlib.util import find_spec

_EXTRA = "run pip install 'dense-backbones[{extra}]'"
_INSTALL = {
    "detectron2": f"{_EXTRA}; the README's section on Detectron2 says how to install it",
    "mmcv": "run pip install mmcv-lite==2.1.0; the README's section on mmcv has the other ways",
}
# What a package imports without declaring it.
_UNDECLARED = {"mmseg": ("mmcv",), "mmdet": ("mmcv",)}


def require(package: str, extra: str) -> None:
    """Refuse early, and by name, when a framework that a part needs is not installed.

    Args:
        package: what is imported, such as ``"mmengine"``.
        extra: the extra of this distribution that brings what goes with it.

    Raises:
        ImportError: ``package``, or what it needs, is missing; the message says what installs it.
    """
    for name in (package, *_UNDECLARED.get(package, ())):
        if find_spec(name) is None:
            way = _INSTALL.get(name, _EXTRA).format(extra=extra)
            raise ImportError(f"{name} is not installed: {way}")
