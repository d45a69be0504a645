"""The same input gives the same bytes, outputs and all gradients, on any number of threads."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

from backbones import FAMILIES, ops
from backbones.ops import native
from tests.support import OperatorCases, outputs_and_gradients, randn, run_python

REPEATS = 20
SIZE = (21, 28)  # of several parts for 4 threads
cases = OperatorCases(kernel=7)


def convolutional(size):
    qkv, theta, kernel = randn(2, *size, 3 * 6), randn(2, 9, 3), randn(2, 3, 3)
    return "convolutional_attention", [qkv, randn(2, 9), theta, kernel], ()


def linear(size):
    return "linear", [randn(2, *size, 24), randn(48, 24), randn(48)], ("gelu",)


def mlp(size):
    return "mlp", [randn(2, *size, 24), randn(96, 24), randn(96), randn(24, 96), randn(24)], ()


def call(name, *inputs, options):
    if name == "convolutional_attention":
        qkv, bias, theta, kernel = inputs
        return ops.convolutional_attention(qkv, bias, 2, (3, 3), theta, kernel)
    return getattr(ops, name)(*inputs, *options)


OPERATORS = {
    make(SIZE)[0]: make
    for make in (
        partial(cases.depthwise, groups=4, shared=8),
        partial(cases.dynamic, groups=4, shared=8),
        partial(cases.inhomogeneous, groups=4, shared=8),
        partial(cases.aggregation, groups=4, shared=8),
        partial(cases.attention, groups=4, shared=8, window=(7, 7), shift=(3, 3)),
        partial(cases.local_mlp, groups=4, shared=8, window=(7, 7), shift=(3, 3)),
        partial(cases.sliding, groups=4, shared=8, window=(7, 7)),
        *(convolutional, linear, mlp),
    )
}


def test_no_operator_is_left_out():
    assert OPERATORS.keys() == set(ops.__all__)


def repeat(threads: int, repeats: int = REPEATS) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for make in OPERATORS.values():
        name, inputs, options = make(SIZE)
        function = partial(call, name, options=options)
        inputs = [x.float() for x in inputs]
        grad = torch.randn_like(function(*inputs))
        for backend in (None, "torch", *(() if native.missing() else ("native",))):
            if backend == "native" and name not in ops.dispatch.ON_GPUS:
                continue
            with ops.force(backend):
                first = outputs_and_gradients(function, inputs, (), grad)
                for _ in range(repeats - 1):
                    again = outputs_and_gradients(function, inputs, (), grad)
                    assert all(map(torch.equal, first, again)), (name, backend)
    for family in FAMILIES:
        network = timm.create_model(f"{family}_nano", num_classes=5).eval()
        images = torch.randn(2, 3, 61, 90)
        first = gradients(network, images)
        for _ in range(repeats - 1):
            assert all(map(torch.equal, first, gradients(network, images))), family


def gradients(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad()
    out = network(images)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in network.parameters())]


def test_outputs_and_gradients_repeat_on_a_thread():
    repeat(1, 3)


@pytest.mark.e2e
@pytest.mark.parametrize("threads", [2, 4])
def test_outputs_and_gradients_repeat_on_several(threads, monkeypatch):
    # Threads that wait for each other would take the cores from other tests.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    module = "tests.backbones.test_determinism"
    done = run_python("-W", "ignore", "-c", f"from {module} import repeat; repeat({threads})")
    assert done.returncode == 0, done.stderr[-3000:]
