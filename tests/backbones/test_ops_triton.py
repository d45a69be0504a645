"""The Triton kernels against float64, by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from backbones import ops  # noqa: E402
from backbones.ops import dispatch, reference  # noqa: E402
from backbones.ops.dispatch import explain  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="neither a GPU nor TRITON_INTERPRET=1",
)
WINDOW = (3, 2)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def depthwise(size, groups=2, shared=3, kernel=3, batch=2):
    channels = groups * shared
    inputs = [randn(batch, *size, channels), randn(channels, 1, kernel, kernel), randn(channels)]
    return "depthwise_conv", inputs, ()


def dynamic(size, groups=2, shared=3, kernel=3, batch=2):
    channels = groups * shared
    kernels = randn(batch, channels, kernel, kernel)
    return "dynamic_depthwise_conv", [randn(batch, *size, channels), kernels, randn(channels)], ()


def inhomogeneous(size, groups=2, shared=3, kernel=3, batch=2, depth=5):
    rows = groups * kernel**2
    inputs = [randn(batch, *size, groups * shared), randn(batch, *size, depth)]
    inputs += [randn(rows, depth) * depth**-0.5, randn(rows)]
    return "inhomogeneous_dynamic_depthwise_conv", inputs, (kernel,)


def aggregation(size, groups=2, shared=3, kernel=3, batch=2):
    kernels = randn(batch, *size, groups, kernel, kernel)
    return "inhomogeneous_aggregation", [randn(batch, *size, groups * shared), kernels], ()


def attention(size, groups=2, shared=3, shift=(1, 1), window=WINDOW, batch=2):
    size = [n * -(-side // n) for n, side in zip(window, size, strict=True)]
    positions = window[0] * window[1]
    inputs = [randn(batch, *size, 3 * groups * shared), randn(groups, positions, positions)]
    return "window_attention", inputs, (groups, window, shift)


def local_mlp(size, groups=2, shared=3, shift=(1, 1), window=WINDOW, batch=2, grid=()):
    size = [n * -(-side // n) for n, side in zip(window, size, strict=True)]
    weights = groups, window[0] * window[1], window[0] * window[1]
    inputs = [randn(batch, *size, groups * shared), randn(*grid, *weights), randn(*weights)]
    return "local_mlp", inputs, (window, shift)


CONVOLUTIONS = [depthwise, dynamic, inhomogeneous, aggregation]
ALL = [*CONVOLUTIONS, attention, local_mlp]


def outputs_and_gradients(function, inputs, options, grad):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, *options)
    return out, *torch.autograd.grad(out, leaves, grad.to(out))


def agrees(case, dtype=torch.float32, tolerance=1e-5):
    name, inputs, options = case
    inputs = [x.to(dtype).double() for x in inputs]
    plain = getattr(reference, name)
    grad = randn(*plain(*inputs, *options).shape).to(dtype).double()
    expected = outputs_and_gradients(plain, inputs, options, grad)
    with ops.force("triton"):
        lower = [x.to(DEVICE, dtype) for x in inputs]
        got = outputs_and_gradients(getattr(ops, name), lower, options, grad)
    for ours, true in zip(got, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        if true.numel():
            error = (ours.cpu().double() - true).abs().max() / true.abs().max().clamp_min(1e-30)
            assert error < tolerance


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("size", [(1, 1), (2, 19), (7, 5)])
def test_sizes(make, size):
    torch.manual_seed(0)
    agrees(make(size))


@pytest.mark.parametrize("make", CONVOLUTIONS)
@pytest.mark.parametrize("kernel", [1, 4, 7])
def test_kernel_sizes(make, kernel):
    torch.manual_seed(0)
    agrees(make((3, 4), kernel=kernel, batch=1))


@pytest.mark.parametrize("make", CONVOLUTIONS)
@pytest.mark.parametrize("groups, shared", [(1, 1), (32, 1), (1, 32), (9, 6)])
def test_groups(make, groups, shared):
    torch.manual_seed(0)
    agrees(make((2, 3), groups=groups, shared=shared, batch=1))


@pytest.mark.parametrize("depth", [1, 16, 70])
def test_what_kernels_are_predicted_from(depth):
    """More than a tile holds, and less."""
    torch.manual_seed(0)
    agrees(inhomogeneous((2, 3), depth=depth, batch=1))


@pytest.mark.parametrize("window, dim", [((7, 7), 32), ((2, 5), 3), ((1, 2), 1)])
def test_windows(window, dim):
    torch.manual_seed(0)
    size = (2 * window[0], 2 * window[1])
    for shift in {(0, 0), (window[0] // 2, window[1] // 2), (0, window[1] // 2)}:
        agrees(attention(size, shared=dim, shift=shift, window=window, batch=1))
        for grid in ((), (2, 2)):
            agrees(local_mlp(size, shared=dim, shift=shift, window=window, batch=2, grid=grid))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_half_precisions(make, dtype, tolerance):
    torch.manual_seed(0)
    agrees(make((5, 4)), dtype, tolerance)


@pytest.mark.parametrize("make", ALL)
def test_an_empty_batch(make):
    agrees(make((4, 4), batch=0))


@pytest.mark.parametrize("make", ALL)
def test_any_layout_gives_the_same_and_repeats_bit_for_bit(make):
    name, inputs, options = make((5, 4))
    inputs = [x.float().to(DEVICE) for x in inputs]
    grad = torch.randn_like(getattr(reference, name)(*inputs, *options))
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    with ops.force("triton"):
        function = getattr(ops, name)
        first, again = (outputs_and_gradients(function, inputs, options, grad) for _ in range(2))
        other = outputs_and_gradients(function, strided, options, grad.mT.contiguous().mT)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.equal(b) and a.equal(c)


@pytest.mark.parametrize("make", ALL)
def test_registration(make):
    """Fakes, autograd and schemas are what they say."""
    name, inputs, options = make((3, 4), batch=1)
    inputs = [x.float().to(DEVICE).requires_grad_() for x in inputs]
    with ops.force("triton"):
        compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
        out = compiled(*inputs, *options)
        torch.testing.assert_close(out, getattr(ops, name)(*inputs, *options))
        out.sum().backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts on memory that costs nothing until touched")
@pytest.mark.parametrize("kind", ["depthwise", "inhomogeneous"])
def test_offsets_beyond_32_bits(kind):
    """The first program of a map whose second row begins at the 2^31st number."""
    from backbones.ops.triton_kernels import depthwise as plain
    from backbones.ops.triton_kernels import inhomogeneous as predicted

    width, groups, shared, near = 2**21, 32, 32, 20
    x = torch.empty(1, 2, width, shared, groups, dtype=torch.float16)
    out = torch.empty_like(x)
    x[:, :, :near] = torch.randn(1, 2, near, shared, groups)
    small = x[:, :, :near].contiguous()
    sizes = (2, width)
    if kind == "depthwise":
        taps = torch.randn(1, 9, shared * groups, dtype=torch.float16)
        options = (shared * groups, 0, 3, 1, False, False, 16, 64)
        plain._forward[(1, 1, 1)](x, taps, x, out, *sizes, *options)
        expected = plain.convolve(small.flatten(3), taps, None, 3, 1, False).view_as(small)
        got, expected = (t.flatten(3)[:, :1, :16, :64] for t in (out[:, :, :near], expected))
    else:
        hidden, weight = torch.randn(1, 2, width, 1).half(), torch.randn(9, groups, 1).half()
        bias = torch.randn(9, groups).half()
        options = (shared, groups, 1, 3, 1, False, *predicted._blocks(x, 1))
        kind = predicted.operands(x.dtype)
        predicted._mix[(1, 1, 1)](x, hidden, weight, bias, out, *sizes, *options, kind)
        few = hidden[:, :, :near].contiguous()
        expected = predicted.forward(small, few, weight, bias, 3)
        got, expected = (t[:, :1, :16, :4] for t in (out, expected))
    torch.testing.assert_close(got, expected)
    assert x.stride(1) == 2**31 and got.abs().max() > 0


def test_which_operators_a_gpu_takes_them_for(monkeypatch):
    paths = {name: explain(name, "cuda", torch.bfloat16)[0] for name in dispatch.OPERATORS}
    taken = {name for name, path in paths.items() if path == "triton"}
    assert taken == set(dispatch.ON_GPUS)
    assert explain("dynamic_depthwise_conv", "cuda", torch.float64)[0] == "torch"
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    path, reason = explain("dynamic_depthwise_conv", "cuda", torch.float32)
    assert path == "torch" and "no Triton" in reason


def test_kernels_that_do_not_compile_are_said_once(monkeypatch, recwarn):
    from triton.errors import TritonError

    def compute():
        raise TritonError("no such processor\nmore")

    monkeypatch.setattr(dispatch, "_broken", {})
    assert dispatch.attempt("window_attention", compute) is None
    assert [str(w.message) for w in recwarn] == [
        "window_attention: Triton did not compile it: no such processor"
    ]
    path, reason = explain("window_attention", "cuda", torch.float32)
    assert path == "torch" and "no such processor" in reason
    with ops.force("triton"), pytest.raises(TritonError):
        dispatch.attempt("window_attention", compute)


def test_without_the_interpreter_a_cpu_is_told():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "backbones.ops"],
        env=environment | {"DENSE_OPS": "triton"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "DENSE_OPS=triton: Triton runs on a CPU with TRITON_INTERPRET=1 only" in done.stderr


def test_kernels_compile_for_gpus_and_do_not_spill():
    tool = Path(__file__).parents[2] / "tools/inspect_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(tool), "--dtypes", "bf16"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if "| bf16 |" in line]
    assert len(rows) == 23
    products = [row for row in rows if "I-D-DW" in row or "attention" in row or "MLP" in row]
    assert all(row.endswith("| yes |") for row in products)
