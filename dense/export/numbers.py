"""Smaller numbers: int8 by ONNX Runtime's static quantisation, bfloat16, float16 weights."""

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dense.export.files import FORMATS

PRECISIONS = {"float32": tuple(FORMATS), "int8": ("onnx", "openvino")}
PRECISIONS |= {"bf16": ("openvino",), "fp16": ("openvino",)}
"""The formats that each precision is written in."""

_QUANTISED = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Quantised:
    """What :func:`quantise_within` wrote.

    Attributes:
        cosine: the smallest of any output.
        kept: the kinds of layers that stay in float32, each with the number of its layers.
        tried: the smallest cosine with each set of kinds in float32, in order of trial.
    """

    cosine: float
    kept: dict[str, int]
    tried: tuple[tuple[tuple[str, ...], float], ...]

    def lines(self) -> list[str]:
        """What stays in float32, for a terminal."""
        if not self.kept:
            return ["int8: all convolutions and linears"]
        kinds = ", ".join(f"{kind} ({count})" for kind, count in self.kept.items())
        return [
            f"int8: float32 stay {kinds}; with all in int8 the cosine is {self.tried[0][1]:.4f}"
        ]


def quantise_within(
    graph: Path,
    out: Path,
    batches: Sequence[np.ndarray],
    cosine_of: Callable[[Path], float],
    bar: float,
) -> Quantised:
    """Quantise a file, leaving in float32 the kinds of layers that a bar asks for.

    First all convolutions and linears are quantised. While the bar is missed, the kind of layer
    whose return to float32 helps most returns.

    Args:
        graph: a float32 file of ``tools/export.py``.
        out: the int8 file.
        batches: what it is calibrated on, ``(B, 3, H, W)`` each.
        cosine_of: the smallest cosine of the outputs of a file with eager's.
        bar: the smallest cosine that is allowed.

    Returns:
        The result, which misses the bar if no choice meets it.
    """
    kinds = layers(graph)
    kept: tuple[str, ...] = ()
    quantise(graph, out, batches, ())
    tried = [(kept, cosine_of(out))]
    while tried[-1][1] < bar and len(kept) + 1 < len(kinds):
        found = {}
        for kind in (kind for kind in kinds if kind not in kept):
            quantise(graph, out, batches, _nodes(kinds, (*kept, kind)))
            found[(*kept, kind)] = cosine_of(out)
        kept = max(found, key=found.get)
        tried.append((kept, found[kept]))
        quantise(graph, out, batches, _nodes(kinds, kept))
    return Quantised(tried[-1][1], {kind: len(kinds[kind]) for kind in kept}, tuple(tried))


def layers(graph: Path) -> dict[str, list[str]]:
    """Convolutions and linears of a file: names of nodes by kind, such as ``mixer.qkv``."""
    import onnx

    model = onnx.load_model(graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    kinds = defaultdict(list)
    for node in model.graph.node:
        if node.op_type in _QUANTISED and node.input[1] in constants:
            kinds[_kind(node)].append(node.name)
    return dict(kinds)


def quantise(
    graph: Path, out: Path, batches: Iterable[np.ndarray], in_float: Sequence[str]
) -> None:
    """Write int8 weights per channel and maps per tensor, as QDQ, which OpenVINO reads too."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"image": batch}

    quantize_static(
        graph,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(_QUANTISED),
        per_channel=True,
        # The products of x86's VNNI are of unsigned maps and signed weights.
        activation_type=QuantType.QUInt8,
        nodes_to_exclude=list(in_float),
        extra_options={
            # Products of two maps, as in attention, stay in float.
            "MatMulConstBOnly": True,
            # A sum in int32 becomes float, which biases and norms take; int8 would cost both
            # precision and time.
            "OpTypesToExcludeOutputQuantization": list(_QUANTISED),
        },
    )


def _nodes(kinds: dict[str, list[str]], kept: Iterable[str]) -> list[str]:
    return [node for kind in kept for node in kinds[kind]]


def _kind(node) -> str:
    """The module's place without the numbers of stages and blocks."""
    found = {entry.key: entry.value for entry in node.metadata_props}
    scopes = ast.literal_eval(found.get("pkg.torch.onnx.name_scopes", "['', '']"))
    parts = [part for part in scopes[-2].split(".") if not part.isdigit()]
    parts = [part for part in parts if part not in ("network", "stages", "blocks", "backbone")]
    return ".".join(parts) or node.op_type
