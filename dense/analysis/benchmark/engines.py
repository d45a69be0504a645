"""Networks exported to ONNX, in ONNX Runtime and in OpenVINO.

Ours are the graph for all sizes that ``tools/export.py`` writes, and OpenVINO is told the size;
others are exported for one size.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from backbones import Pyramid
from dense.analysis.benchmark.measure import Step
from dense.export.files import compiled_openvino, openvino_core


def steps(
    make: Callable[[], tuple[nn.Module, Tensor]], dtype: torch.dtype
) -> dict[str, Callable[[], Step]]:
    """A builder of a step for each engine that is installed; both run the same graph.

    Engines get as many threads as PyTorch has.

    Args:
        make: returns a network in evaluation mode and its input, ``(B, 3, H, W)``.
        dtype: OpenVINO computes in it; ONNX Runtime has few operators in bfloat16 and is left out
            there.

    Example:
        >>> steps(lambda: (model, images), torch.float32)["OpenVINO"]()()
    """

    @cache
    def exported() -> tuple[bytes, Tensor]:
        model, x = make()
        if isinstance(model, Pyramid):
            from dense.export.operators import to_onnx

            return to_onnx(model).SerializeToString(), x
        with torch.no_grad():
            program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        return program.model_proto.SerializeToString(), x

    builders = {}
    if find_spec("onnxruntime") and dtype == torch.float32:
        builders["ONNX Runtime"] = lambda: _onnx_runtime(*exported())
    if find_spec("openvino"):
        builders["OpenVINO"] = lambda: _openvino(*exported(), dtype)
    return builders


def _onnx_runtime(graph: bytes, x: Tensor) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would wait busily when the step is done, in the time of the next contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def _openvino(graph: bytes, x: Tensor, dtype: torch.dtype) -> Step:
    precision = "bf16" if dtype == torch.bfloat16 else None
    model = openvino_core().read_model(graph)
    compiled = compiled_openvino(model, torch.get_num_threads(), precision, tuple(x.shape))
    image = x.numpy()
    return lambda: torch.from_numpy(compiled(image)[0])
