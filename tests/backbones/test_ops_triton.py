"""The Triton kernels against float64, by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from backbones import ops  # noqa: E402
from backbones.ops import dispatch, reference  # noqa: E402
from backbones.ops.__main__ import main  # noqa: E402
from backbones.ops.dispatch import explain  # noqa: E402
from tests import support  # noqa: E402
from tests.support import OperatorCases, at_length, outputs_and_gradients  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="neither a GPU nor TRITON_INTERPRET=1",
)
cases = OperatorCases(kernel=3)


def agrees(case, dtype=torch.float32, tolerance=1e-5):
    support.agrees(case, "triton", dtype, tolerance, DEVICE)


@pytest.mark.parametrize("make", cases.all)
@pytest.mark.parametrize("size, batch", [((1, 1), 2), ((2, 17), 1), *at_length(((5, 3), 2))])
def test_sizes(make, size, batch):
    torch.manual_seed(0)
    agrees(make(size, batch=batch))


@pytest.mark.parametrize("make", cases.convolutions)
@pytest.mark.parametrize("kernel", [4, 7, *at_length(1)])
def test_kernel_sizes(make, kernel):
    torch.manual_seed(0)
    agrees(make((2, 3), kernel=kernel, batch=1))


@pytest.mark.parametrize("make", cases.convolutions)
@pytest.mark.parametrize("groups, shared", [(70, 1), (9, 6), *at_length((1, 1), (1, 32))])
def test_groups(make, groups, shared):
    """More than a tile holds of either, and no power of two."""
    torch.manual_seed(0)
    agrees(make((1, 3), groups=groups, shared=shared, batch=1))


@pytest.mark.parametrize("depth", [1, 16, 70])
def test_what_kernels_are_predicted_from(depth):
    """More than a tile holds, and less."""
    torch.manual_seed(0)
    agrees(cases.inhomogeneous((2, 3), depth=depth, batch=1))


@pytest.mark.parametrize("window, dim", [((7, 7), 32), ((2, 5), 3), ((1, 2), 1)])
def test_windows(window, dim):
    torch.manual_seed(0)
    size = (2 * window[0], 2 * window[1])
    for shift in ((0, 0), (0, window[1] // 2), (window[0] // 2, window[1] // 2)):
        agrees(cases.attention(size, shared=dim, shift=shift, window=window, batch=1))
    for grid in ((), (2, 2)):
        agrees(cases.local_mlp(size, shared=dim, shift=shift, window=window, grid=grid))


@pytest.mark.parametrize(
    "window, dim", [((1, 1), 3), ((5, 3), 1), *at_length(((7, 7), 5), ((1, 9), 40))]
)
def test_sliding_windows(window, dim):
    """Windows larger than the map, channels and positions that fill no tile."""
    torch.manual_seed(0)
    agrees(cases.sliding((3, 4), groups=3, shared=dim, window=window))


@pytest.mark.parametrize("make", cases.all)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 1e-2), *at_length((torch.float16, 2e-3))]
)
def test_half_precisions(make, dtype, tolerance):
    torch.manual_seed(0)
    agrees(make((2, 4)), dtype, tolerance)


@pytest.mark.parametrize("make", cases.all)
def test_an_empty_batch(make):
    agrees(make((4, 4), batch=0))


@pytest.mark.parametrize("make", cases.all)
def test_any_layout_gives_the_same_and_repeats_bit_for_bit(make):
    name, inputs, options = make((1, 4))
    inputs = [x.float().to(DEVICE) for x in inputs]
    grad = torch.randn_like(getattr(reference, name)(*inputs, *options))
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    with ops.force("triton"):
        function = getattr(ops, name)
        first, again = (outputs_and_gradients(function, inputs, options, grad) for _ in range(2))
        other = outputs_and_gradients(function, strided, options, grad.mT.contiguous().mT)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.equal(b) and a.equal(c)


@pytest.mark.parametrize("make", cases.all)
def test_compiled(make):
    """Without a break in the graph."""
    name, inputs, options = make((1, 3), batch=1)
    inputs = [x.float().to(DEVICE).requires_grad_() for x in inputs]
    torch._dynamo.reset()
    with ops.force("triton"):
        compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="eager")
        out = compiled(*inputs, *options)
        assert out.equal(getattr(ops, name)(*inputs, *options))


def registered():
    def leaf(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    dense = torch.ops.dense
    x, window = leaf(1, 2, 3, 4, 2), [[2, 1], [1, 0]]
    yield dense.predict_and_aggregate, x, leaf(1, 2, 3, 5), leaf(36, 5), leaf(36), 3
    yield dense.aggregate, x, leaf(1, 2, 3, 4, 9), 3
    yield dense.depthwise, leaf(2, 2, 3, 4), leaf(2, 9, 4), leaf(4), 3
    yield dense.window_attention, leaf(1, 4, 1, 12), leaf(2, 2, 2), 2, *window
    yield dense.local_mlp, leaf(1, 4, 1, 4), leaf(2, 2, 2), *window
    yield dense.sliding_attention, leaf(1, 2, 3, 12), leaf(2, 3), 2, [1, 3]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(6))
def test_registration_is_sound(case):
    """Schemas, fakes and autograd are what they say, with gradients and with changing sizes."""
    operator, *inputs = list(registered())[case]
    with ops.force("triton"):
        torch.library.opcheck(operator.default, tuple(inputs))


@pytest.mark.parametrize("make", cases.all)
def test_autocast(make):
    name, inputs, options = make((2, 3))
    inputs = [x.float().to(DEVICE).requires_grad_() for x in inputs]
    with ops.force("triton"), torch.autocast(DEVICE, torch.bfloat16):
        out = getattr(ops, name)(*inputs, *options)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), inputs))
    expected = getattr(reference, name)(*inputs, *options)
    assert (out - expected).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.parametrize("make", [cases.attention, cases.local_mlp])
def test_windows_too_large_for_registers_take_another_backend(make):
    torch.manual_seed(0)
    name, inputs, options = make((12, 12), window=(12, 12), batch=1, shift=(0, 0))
    expected = getattr(reference, name)(*inputs, *options)
    with ops.force("triton"):
        out = getattr(ops, name)(*(x.float().to(DEVICE) for x in inputs), *options)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_double_precision_is_left_to_who_has_it():
    with ops.force("triton"):
        for name in dispatch.OPERATORS:
            assert explain(name, DEVICE, torch.float64)[0] == "torch"
        case = cases.depthwise((2, 3))
        assert getattr(ops, case[0])(*case[1]).dtype == torch.float64


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU times by itself")
def test_tiles_agree_and_are_timed_once_for_maps_alike(monkeypatch):
    """Triton's own choice among them, on invented times: the last is the fastest."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip("the autotuner's disk cache knows no interpreted kernels before Triton 3.6")
    from backbones.ops.triton_kernels import inhomogeneous, tuning

    torch.manual_seed(0)
    tiles, timed, outs = inhomogeneous.boxes(3, 16), [], []
    tuner = tuning._tuned(inhomogeneous._mix, tiles)

    def timing(call, quantiles):
        call()
        outs.append(out.clone())
        timed.append(-len(timed))
        return [timed[-1]] * 3

    monkeypatch.setattr(tuner, "_do_bench", timing)
    monkeypatch.setattr(tuning, "_times", lambda: True)
    weight, bias = torch.randn(9, 2, 5), torch.randn(9, 2)
    for width, times in ((9, 3), (11, 3), (30, 6)):
        x, hidden = torch.randn(1, 1, width, 3, 2), torch.randn(1, 1, width, 5)
        out = torch.empty_like(x)
        sizes = 1, width, 3, 2, 5, tuning.bucket(x), 3, 1, False, 1
        fixed = {"BLOCK_G": 16, "BLOCK_D": 16, "DOT": triton.language.float32}
        args = x, hidden, weight, bias, out, *sizes

        def grid(tile, width=width):
            return (triton.cdiv(width, tile["BLOCK_P"]),)

        tuning.run(inhomogeneous._mix, grid, tiles, *args, **fixed)
        assert len(timed) == times and tuner.best_config == tiles[-1]
        kernels = torch.einsum("bhwd,kgd->bhwgk", hidden, weight) + bias.T
        expected = reference.aggregate(
            x.transpose(-1, -2).flatten(-2), kernels.unflatten(-1, (3, 3))
        )
        for got in (out, *outs):
            torch.testing.assert_close(got.transpose(-1, -2).flatten(-2), expected)
        outs.clear()


@pytest.mark.usefixtures("unforced")
def test_which_operators_a_gpu_takes_them_for(monkeypatch):
    monkeypatch.setattr(dispatch, "_verdict", lambda *key: (True, "they agree"))
    backends = {name: explain(name, "cuda", torch.bfloat16)[0] for name in dispatch.OPERATORS}
    taken = {name for name, backend in backends.items() if backend == "triton"}
    assert taken == set(dispatch.ON_GPUS)
    assert explain("dynamic_depthwise_conv", "cuda", torch.float64)[0] == "torch"
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    backend, reason = explain("dynamic_depthwise_conv", "cuda", torch.float32)
    assert backend == "torch" and "no Triton" in reason


@pytest.mark.usefixtures("unforced")
def test_kernels_that_do_not_compile_are_said_once(monkeypatch, recwarn):
    from triton.errors import TritonError

    def compute():
        raise TritonError("no such processor\nmore")

    monkeypatch.setattr(dispatch, "_broken", {})
    assert dispatch.attempt("window_attention", compute) is None
    assert [str(w.message) for w in recwarn] == [
        "window_attention: Triton did not compile it: no such processor"
    ]
    backend, reason = explain("window_attention", "cuda", torch.float32)
    assert backend == "torch" and "no such processor" in reason
    with ops.force("triton"), pytest.raises(TritonError):
        dispatch.attempt("window_attention", compute)


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(114688, 101376, "shared memory"),
        PTXASError("`ptxas` failed"),
        RuntimeError("PassManager::run failed"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc"]),
        PermissionError(13, "Permission denied", "/cache/.triton"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_what_compilers_raise_is_caught(monkeypatch, error):
    monkeypatch.setattr(dispatch, "_broken", {})
    with pytest.warns(RuntimeWarning, match="did not compile"):
        assert dispatch.attempt("local_mlp", raising(error)) is None
    assert explain("local_mlp", "cuda", torch.float32)[0] == "torch"


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        AttributeError("no such name"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_other_errors_come_through_and_keep_the_kernels(monkeypatch, error):
    broken = {}
    monkeypatch.setattr(dispatch, "_broken", broken)
    with pytest.raises(type(error)) as raised:
        dispatch.attempt("local_mlp", raising(error))
    assert raised.value is error and not broken


def raising(error):
    def compute():
        raise error

    return compute


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_the_interpreter_a_cpu_is_told(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    told = "DENSE_OPS=triton: Triton runs on a CPU with TRITON_INTERPRET=1 only"
    with pytest.raises(ValueError, match=told), ops.force("triton"):
        pass
    monkeypatch.setenv("DENSE_OPS", "triton")
    assert main([]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.kernels
def test_kernels_compile_for_gpus_and_do_not_spill():
    tool = support.ROOT / "tools/inspect_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(tool), "--dtypes", "bf16", "--arch", "90"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if "| bf16 |" in line]
    assert len(rows) == 28
    products = [row for row in rows if any(n in row for n in ("I-D-DW", "window", "MLP"))]
    assert len(products) == 13 and all(row.endswith("| yes |") for row in products)
