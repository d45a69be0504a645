"""What plugs the backbones into detection and segmentation frameworks.

Nothing here imports a framework: :mod:`dense.detection` needs Detectron2, :mod:`dense.segmentation`
mmengine (and MMSegmentation for its configs), :mod:`dense.mmdetection` MMDetection, each without
the others.
"""

from importlib.util import find_spec

_INSTALL = {
    "detectron2": "the README's section on Detectron2 says how to install it",
}


def require(package: str, extra: str) -> None:
    """Refuse early, and by name, when a framework that a part needs is not installed.

    Args:
        package: what is imported, such as ``"mmengine"``.
        extra: the extra of this distribution that brings what goes with it.

    Raises:
        ImportError: ``package`` is missing; the message has the command that installs it.
    """
    if find_spec(package) is None:
        hint = _INSTALL.get(package)
        raise ImportError(
            f"{package} is not installed: run pip install 'dense-backbones[{extra}]'"
            + (f"; {hint}" if hint else "")
        )
