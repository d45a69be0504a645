"""What torch.compile sees of the Triton kernels: their launches, where sizes are known.

Compilers' graphs are captured without a GPU, from fake tensors of one and a stand-in of Triton's
driver. Kernels that the interpreter runs cannot be captured, hence the process of its own.
"""

import json
import subprocess
import sys

import pytest
import torch

from backbones.ops.dispatch import ON_GPUS
from tests.support import environment

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.__version__ < (2, 10), reason="torch 2.9's Dynamo takes no fake tensors as inputs"
    ),
]

# What kernels write, beside the gradients: sliding attention's keep each softmax for each other.
WRITTEN = ("out", "out_bias", "top", "share", "mean")
CAPTURE = """
import json, sys
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from backbones import ops
from backbones.ops import cases, dispatch

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
dispatch._on_gpu = lambda operator, device, dtype: (sys.argv[1], "a verdict")

def calls(function, given, dynamic):
    found = []
    def note(graph, _):
        for node in graph.graph.nodes:
            if getattr(node.target, "namespace", "") in ("dense", "higher_order"):
                found.append([str(node.target), *node.kwargs.get("tensors_to_clone", [])])
        return graph.forward
    torch._dynamo.reset()
    out = torch.compile(
        function, backend=aot_autograd(fw_compiler=note), fullgraph=True, dynamic=dynamic
    )(*given)
    out = out if isinstance(out, tuple) else (out,)
    return found, [[str(t.dtype), list(t.shape), list(t.stride())] for t in out]

result = {}
with torch.no_grad():
    for operator in dispatch.ON_GPUS:
        case = cases.first_case(operator)
        plain = [t.float() for t in case.tensors]
        expected = case.run(*plain)
        with FakeTensorMode():
            given = [torch.empty(t.shape, device="cuda") for t in plain]
            grad = torch.empty(expected[0].shape, device="cuda")
            for dynamic in (False, True):
                forward = calls(case.forward, given, dynamic)
                backward = calls(case.backward, [grad, *given], dynamic)
                result[f"{operator} {dynamic}"] = {
                    "forward": forward[0], "backward": backward[0],
                    "got": forward[1] + backward[1],
                    "expected": [
                        [str(t.dtype), list(t.shape), list(t.stride())] for t in expected
                    ],
                }
print(json.dumps(result))
"""


def capture(backend: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CAPTURE, backend],
        capture_output=True,
        text=True,
        env=environment(TRITON_INTERPRET="0"),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def captured():
    return capture("triton")


@pytest.fixture(scope="module")
def captured_of_torch():
    return capture("torch")


@pytest.mark.parametrize("operator", ON_GPUS)
def test_launches_stand_in_the_graph(captured, operator):
    """A compiler that cannot tell what a kernel writes would copy each of its arguments."""
    found = captured[f"{operator} False"]
    for part in ("forward", "backward"):
        names = [name for name, *_ in found[part]]
        assert names and all("triton_kernel_wrapper" in name for name in names), names
        copied = {argument for _, *arguments in found[part] for argument in arguments}
        assert copied and all(a in WRITTEN or a.startswith("grad_") for a in copied), copied
    assert found["got"] == found["expected"]


@pytest.mark.parametrize("operator", ON_GPUS)
def test_open_sizes_keep_the_operator(captured, operator):
    """A launch's grid and tiles depend on sizes: there would be a graph for each."""
    found = captured[f"{operator} True"]
    assert found["forward"] and found["backward"]
    assert not any("triton" in name for name, *_ in found["forward"] + found["backward"])


@pytest.mark.parametrize("operator", ON_GPUS)
def test_operators_that_torch_computes_stay_whole(captured_of_torch, operator):
    found = captured_of_torch[f"{operator} False"]
    assert found["forward"] and found["backward"]
    assert not any("triton" in name for name, *_ in found["forward"] + found["backward"])
