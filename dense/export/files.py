"""Exported files: written with their metadata, and run by the engine of their format.

The metadata is JSON under the key ``dense_backbones``:

* ``task``: ``classification``, ``segmentation``, ``detection`` or ``features``; ``outputs``: their
  names;
* ``channels`` (``RGB`` or ``BGR``), ``mean``, ``std``: of the input ``image``, ``(B, 3, H, W)``,
  float32, which is ``(pixels - mean) / std`` of pixels from 0 to 255; ``batch``: B, if fixed;
* ``sides``: the fewest and most rows and columns in pixels that the file is made for;
* ``classes`` and, of segmentors, ``palette``: names and RGB colours, by index;
* ``transform``: of classifiers, what timm's ``create_transform`` makes of a photo;
* ``resize``: of segmentors and detectors, the long and the short side to fit a photo into, or
  null; ``align_corners``: of the resizing of a segmentor's scores to the photo;
* ``model``: the recipe, of detectors the backbone; ``format``; ``precision``, ``bf16`` where the
  engine shall compute in it.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dense import require

KEY = "dense_backbones"
_EXTRA_FILE = f"{KEY}.json"
FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "aotinductor": ".aoti.pt2"}
"""The suffix of each format; OpenVINO's weights are beside the file, as ``.bin``."""


class ExportError(ValueError):
    """A network, file or request that cannot be exported or run; the message is one line."""


def is_exported(path: str | os.PathLike) -> bool:
    """Whether a file has the suffix of an exported one."""
    return kind_of(path) is not None


def kind_of(path: str | os.PathLike) -> str | None:
    """The format of a file's suffix, a key of :data:`FORMATS`, None if it is of none."""
    fits = [kind for kind, suffix in FORMATS.items() if Path(path).name.endswith(suffix)]
    return max(fits, key=lambda kind: len(FORMATS[kind]), default=None)


_ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}


def require_engine(kind: str) -> None:
    """Raise an ImportError with install instructions if what writes a format is missing.

    Raises:
        ExportError: there is no such format, or no compiler for it.
    """
    if kind not in FORMATS:
        raise ExportError(f"--to {kind}: {', '.join(FORMATS)} are valid")
    if kind == "aotinductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ExportError(f"--to {kind} needs a C++ compiler: g++, or the one that CXX names")
    needs = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
    needs["openvino"] = (*needs["onnx"], "openvino")
    for package in needs.get(kind, ()):
        require(package, "export")


def write(network, about: dict[str, Any], path: Path) -> list[Path]:
    """Write a network (:class:`.sources.Source`) in the format of the path's suffix.

    Args:
        network: ``(B, 3, H, W)`` to a tuple of tensors.
        about: the metadata.
        path: with a suffix of :data:`FORMATS`.

    Returns:
        The files.
    """
    import torch

    from backbones.ops.dispatch import graphs_for
    from dense.export.graphs import captured, open_sizes

    if kind_of(path) == "torch-export":
        program = captured(network)
        torch.export.save(program, path, extra_files={_EXTRA_FILE: json.dumps(about)})
        return [path]
    if kind_of(path) == "aotinductor":
        options = {"aot_inductor.metadata": {KEY: json.dumps(about)}}
        given = dict(package_path=str(path), inductor_configs=options)
        with graphs_for("aotinductor"), open_sizes():
            torch._inductor.aoti_compile_and_package(captured(network), **given)
        return [path]
    import onnx

    from dense.export.operators import to_onnx

    graph, made = path.with_suffix(".onnx"), to_onnx(network, about["outputs"])
    made.metadata_props.add(key=KEY, value=json.dumps(about))
    onnx.save(made, graph)
    return [graph] if path.suffix == ".onnx" else to_openvino(graph, path)


def to_openvino(graph: Path, path: Path, precision: str | None = None) -> list[Path]:
    """Convert an ONNX file with metadata to OpenVINO's ``.xml`` and ``.bin``.

    ``bf16`` and ``fp16`` store weights in float16; the engine computes with them in bfloat16, on
    processors that have it, or in float32.
    """
    import openvino
    from onnx import load_model

    props = load_model(graph, load_external_data=False).metadata_props
    about = json.loads(next(entry.value for entry in props if entry.key == KEY))
    # Not convert_model, which tells OpenVINO's makers over the network that it was called.
    model = openvino_core().read_model(graph)
    model.set_rt_info(json.dumps(about | ({"precision": precision} if precision else {})), KEY)
    openvino.save_model(model, path, compress_to_fp16=precision is not None)
    return [path, path.with_suffix(".bin")]


class Runner:
    """An exported file as a function of arrays.

    >>> run = Runner("swin_tiny.onnx")
    >>> (logits,) = run(image)  # (1, 3, 224, 224) float32
    >>> run.about["classes"][logits.argmax()]

    Args:
        path: a file that ``tools/export.py`` wrote.
        threads: of ONNX Runtime or OpenVINO; None leaves their number to them.
        shape: ``(B, C, H, W)`` of every image, for OpenVINO, which then computes beforehand what
            follows from the sizes; None is for images of any size. ONNX Runtime gains nothing from
            it, and runs int8 as float32.

    Attributes:
        about: the metadata.

    Raises:
        ExportError: the file cannot be read, has no metadata of ours, or cannot have a shape.
        ImportError: the engine is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        threads: int | None = None,
        shape: tuple[int, int, int, int] | None = None,
    ):
        self.path, self.shape = Path(path), shape
        if not self.path.is_file():
            raise ExportError(f"{path} does not exist")
        if (kind := kind_of(path)) is None:
            raise ExportError(f"{path}: {', '.join(FORMATS.values())} are the exported files")
        if package := _ENGINES.get(kind):
            require(package, "export")
        if shape and kind != "openvino":
            raise ExportError(f"{path}: a shape is for openvino, not for {kind}")
        try:
            about, self._run = _READERS[kind](self.path, threads, shape)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{path} cannot be read as {kind}: {reason}") from error
        if not about:
            raise ExportError(f"{path} has no metadata of ours: tools/export.py did not write it")
        self.about: dict[str, Any] = json.loads(about)

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """``(B, 3, H, W)`` float32, normalised, to the arrays that ``about["outputs"]`` names.

        Raises:
            ExportError: the image is of a size that the file was not made for.
        """
        least, most = self.about["sides"]
        if not all(least <= side <= most for side in image.shape[2:]):
            height, width = image.shape[2:]
            raise ExportError(
                f"{self.path} is for images of {least} to {most} pixels a side, "
                f"not {width}x{height}"
            )
        if image.shape[0] != self.about.get("batch", image.shape[0]):
            raise ExportError(f"{self.path} is for one image at a time, not {image.shape[0]}")
        if self.shape and image.shape != tuple(self.shape):
            raise ExportError(f"{self.path} was read for {self.shape}, not for {image.shape}")
        return self._run(image)


_Shape = tuple[int, int, int, int] | None


def _read_onnx(path: Path, threads: int | None, _: _Shape) -> tuple[str | None, Callable]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    about = session.get_modelmeta().custom_metadata_map.get(KEY)
    return about, lambda image: session.run(None, {name: image})


def _read_openvino(path: Path, threads: int | None, shape: _Shape) -> tuple[str | None, Callable]:
    model = openvino_core().read_model(path)
    about = model.get_rt_info(KEY).value if model.has_rt_info(KEY) else None
    precision = about and json.loads(about).get("precision")
    compiled = compiled_openvino(model, threads, precision, shape)
    return about, lambda image: list(compiled(image).values())


def compiled_openvino(
    model, threads: int | None, precision: str | None = None, shape: _Shape = None
):
    """OpenVINO's CompiledModel of a Model, for the CPU.

    Args:
        model: an ``openvino.Model`` with one input.
        threads: their number; None leaves it to OpenVINO.
        precision: ``bf16`` to compute in it, where the processor does; otherwise float32.
        shape: ``(B, C, H, W)`` of every image; None is for images of any size.
    """
    if shape:
        model.reshape(list(shape))
    # A CPU that computes bfloat16 would round float32 files otherwise.
    hint = "bf16" if precision == "bf16" else "f32"
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads or 0}
    return openvino_core().compile_model(model, "CPU", options)


@cache
def openvino_core():
    """OpenVINO's Core, one for the process, never dropped.

    The CPU plugin gives the thread that loads it a stack for signal handlers, and frees that stack
    in the thread that drops the plugin. If another thread does, as garbage collection may, the next
    signal with a handler ends the process: PyTorch has one for the end of a loader's worker.
    """
    import openvino

    return openvino.Core()


def _read_torch_export(path: Path, *_: object) -> tuple[str | None, Callable]:
    import torch

    extra = {_EXTRA_FILE: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return extra[_EXTRA_FILE], _of_arrays(module)


def _read_aotinductor(path: Path, *_: object) -> tuple[str | None, Callable]:
    import torch._inductor

    module = torch._inductor.aoti_load_package(path)
    return module.get_metadata().get(KEY), _of_arrays(module)


def _of_arrays(module: Callable) -> Callable:
    """A function of tensors as one of arrays."""
    import torch

    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [out.numpy() for out in module(torch.from_numpy(image))]

    return run


_READERS = {
    "onnx": _read_onnx,
    "openvino": _read_openvino,
    "torch-export": _read_torch_export,
    "aotinductor": _read_aotinductor,
}
