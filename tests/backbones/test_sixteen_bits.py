"""The C kernels on maps of 16 bits: errors, threads, processors, weights that stay in float32."""

import shutil
import subprocess
from functools import partial

import pytest
import torch

from backbones import ops
from backbones.ops import library, native
from tests.support import OperatorCases, agrees, outputs_and_gradients, randn, run_bare, run_code

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="there are no C kernels")
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
HALVES = [pytest.param(*pair, id=str(pair[0])[6:]) for pair in TOLERANCES.items()]
cases = OperatorCases(kernel=7)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype, tolerance", HALVES)
@pytest.mark.parametrize("make", cases.all)
def test_outputs_and_gradients(make, dtype, tolerance):
    for size in (1, 1), (5, 9), (17, 13):
        for groups, shared in (1, 1), (3, 3), (5, 8), (9, 5):
            agrees(make(size, groups=groups, shared=shared), "native", dtype, tolerance)


@pytest.mark.parametrize("dtype, tolerance", HALVES)
@pytest.mark.parametrize("kernel, depth", [(1, 1), (2, 3), (3, 16), (5, 27)])
def test_sums_over_odd_numbers(kernel, depth, dtype, tolerance):
    """Channels, kernels' elements and positions: pairs of them are multiplied at a time."""
    for groups, size in (1, (5, 5)), (5, (3, 17)):
        case = cases.inhomogeneous(size, groups, 2, kernel, batch=1, depth=depth)
        agrees(case, "native", dtype, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("make", cases.all)
def test_any_number_of_threads_gives_the_same_bits(make, dtype):
    name, inputs, options = make((21, 19), groups=5, shared=3)
    inputs, found, before = [x.to(dtype) for x in inputs], [], torch.get_num_threads()
    grad = torch.ones(())
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with ops.force("native"):
                out = getattr(ops, name)(*inputs, *options)
                grad = randn(*out.shape) if grad.dim() == 0 else grad
                found.append(outputs_and_gradients(getattr(ops, name), inputs, options, grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("make", cases.all)
def test_weights_of_autocast_keep_their_precision(make):
    """Their gradients are sums in float32: closer to the truth than bfloat16 can be."""
    name, inputs, options = make((12, 14), groups=8, shared=4)
    if make == cases.aggregation:
        return  # its kernels are a map
    maps = 2 if make == cases.inhomogeneous else 1
    inputs = [*(x.bfloat16().double() for x in inputs[:maps]), *inputs[maps:]]
    # Of the predictor, where pairs are multiplied, the weight is rounded too.
    inputs[maps] = inputs[maps].bfloat16().double()
    grad = randn(*getattr(ops, name)(*inputs, *options).shape).bfloat16()
    expected = outputs_and_gradients(getattr(ops, name), inputs, options, grad)
    given = [*(x.bfloat16() for x in inputs[:maps]), *(x.float() for x in inputs[maps:])]
    with ops.force("native"), torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(getattr(ops, name), given, options, grad)
    for ours, true in zip(got[1 + maps :], expected[1 + maps :], strict=True):
        assert ours.dtype == torch.float32
        limit = 2e-3 if make == cases.inhomogeneous else 1e-5
        assert (ours - true).abs().max() < limit * true.abs().max()


def test_maps_that_are_not_finite():
    x, weight = torch.ones(1, 6, 6, 9, dtype=torch.bfloat16), torch.ones(9, 1, 3, 3)
    for value in float("nan"), float("inf"), -float("inf"):
        x[0, 2, 2] = value
        with ops.force("native"):
            out = ops.depthwise_conv(x, weight)
        near = out[0, 1:4, 1:4]
        assert (near.isnan() if value != value else near == value).all()
        assert out.isfinite().sum() == 9 * (36 - 9)


# Each result within tolerance, from kernels that are compiled for another processor.
OTHER = """
import torch
from backbones.ops import native
from tests.backbones.test_sixteen_bits import TOLERANCES, agrees, cases
for dtype, tolerance in TOLERANCES.items():
    for make in cases.all:
        agrees(make((9, 13), groups=3, shared=5), "native", dtype, tolerance)
    assert native.maps(torch.ones(1, dtype=dtype)).dtype == getattr(torch, "{stored}", dtype)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("flags", ["-mno-avx512bf16", "-mno-avx512f"])
def test_kernels_of_lesser_processors(flags, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", f"cc {flags}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ran = run_bare(partial(run_code, OTHER.format(stored="")))
    assert ran.returncode == 0, ran.stderr
    (built,) = tmp_path.glob("*/*/bfloat16-*.so")
    code = subprocess.run(["objdump", "-d", built], capture_output=True, text=True, check=True)
    assert "vdpbf16ps" not in code.stdout and (flags != "-mno-avx512f" or "%zmm" not in code.stdout)


def test_a_processor_without_float16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(library, "_processor", lambda: "flags : avx2 fma")
    assert native.maps(torch.ones(1, dtype=torch.float16)).dtype == torch.float32
    agrees(cases.attention((7, 7)), "native", torch.float16, 2e-3)
