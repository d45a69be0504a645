"""What decides the speed and memory of an operator, and changes no value: parts, paths, layouts."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from backbones import ops
from backbones.ops import cases, dispatch, native, verdicts, window
from backbones.ops import inhomogeneous as predicted
from backbones.ops.common import forced_here
from tests.support import OperatorCases, randn

maps = OperatorCases(kernel=7)

# What the C kernels of a backward pass are given: partial sums of strips of rows or of windows, as
# many as give 64 or 128 tasks, or fewer where a strip would have less rows than it shares.
PARTS = {
    "sliding, one image": (cases.sliding((56, 20), 3, 8, batch=1), (9, 1, 56, 20, 3, 8, 7, 7)),
    "sliding, enough heads": (cases.sliding((14, 15), 12, 8, batch=8), (1, 8, 14, 15, 12, 8, 7, 7)),
    "sliding, one row": (cases.sliding((5, 4), 1, 3, (1, 3), 2), (5, 2, 5, 4, 1, 3, 1, 3)),
    "sliding, 64 tasks": (cases.sliding((99, 4), 3, 3, (1, 3), 2), (10, 2, 99, 4, 3, 3, 1, 3)),
    "attention": (cases.attention((8, 9), 3, 8, batch=1), (42, 1, 56, 63, 3, 8, 7, 7, 3, 3)),
    "attention, few windows": (
        cases.attention((1, 2), 2, 8, batch=3),
        (6, 3, 7, 14, 2, 8, 7, 7, 3, 3),
    ),
    "mixing": (cases.mixing((8, 9), 3, 8, batch=1), (42, 0, 1, 56, 63, 3, 8, 7, 7, 3, 3)),
    "mixing, a weight a window": (
        cases.mixing((2, 3), 2, 8, batch=3, grid=True),
        (6, 2 * 49 * 49, 3, 14, 21, 2, 8, 7, 7, 3, 3),
    ),
    "mixing, many heads": (
        cases.mixing((1, 2), 200, 1, (2, 3), (1, 1), 3),
        (1, 0, 3, 2, 6, 200, 1, 2, 3, 1, 1),
    ),
    "predicted, one image": (
        cases.inhomogeneous((56, 9), 32, 3, 7, 1, 24),
        (1, 9, 1, 56, 9, 3, 32, 7, 24),
    ),
    "predicted, large weights": (
        cases.inhomogeneous((99, 2), 32, 1, 7, 2, 768),
        (2, 3, 2, 99, 2, 1, 32, 7, 768),
    ),
    "predicted, the largest weights": (
        cases.inhomogeneous((30, 1), 64, 1, 7, 5, 1600),
        (4, 1, 5, 30, 1, 1, 64, 7, 1600),
    ),
    "predicted, one row": (
        cases.inhomogeneous((12, 9), 5, 2, 1, 3, 7),
        (3, 12, 3, 12, 9, 2, 5, 1, 7),
    ),
    "predicted, many images": (
        cases.inhomogeneous((9, 2), 2, 2, 3, 100, 7),
        (64, 1, 100, 9, 2, 2, 2, 3, 7),
    ),
    "aggregation": (cases.aggregation((56, 9), 4, 3, 7, 2), (9, 2, 56, 9, 3, 4, 7)),
    "aggregation, one row": (cases.aggregation((100, 3), 4, 3, 1, 2), (64, 2, 100, 3, 3, 4, 1)),
    "depthwise": (cases.depthwise((5, 6), 8, 4, 2), (2, 5, 6, 8, 4, 1, 0)),
    "dynamic": (cases.depthwise((5, 6), 8, 4, 2, True), (2, 5, 6, 8, 4, 1, 8 * 16)),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_backward_pass(name, monkeypatch):
    case, expected = PARTS[name]
    called = []

    def call(function, maps, weights=(), sizes=()):
        assert all(x.is_contiguous() for x in maps)
        called.append((function, [None if x is None else x.shape for x in weights], sizes))

    monkeypatch.setattr(native, "call", call)
    with forced_here("native"):
        case.run(*(x.float() for x in case.tensors))
    function, weights, sizes = called[-1]
    assert tuple(sizes) == expected and function.endswith(("_backward", "_weight"))
    if name.startswith(("attention", "mixing")):
        assert weights[-1] == (expected[0], *case.tensors[1].shape[-3:])
    if name.startswith("sliding"):
        assert weights[-1] == (expected[0] * expected[1], *case.tensors[1].shape)
    if name.startswith("predicted"):
        # By tap, padded to vectors of eight.
        rows, depth = case.tensors[2].shape
        width = -(-rows // 8) * 8
        assert weights[-2:] == [(*expected[:2], depth, width), (*expected[:2], width)]


@pytest.mark.parametrize(
    "shape, number",
    [((3, 2, 56, 56, 32), 6), ((1, 1, 9, 100, 32), 1), ((4, 1, 9, 2**10, 40), 9)],
)
def test_rows_of_a_chunk(shape, number):
    """As many as 2^17 numbers have, and at least one."""
    planes = torch.empty(shape)
    found = list(predicted._chunks(planes))
    batch, height = shape[1:3]
    rows = max(1, 2**17 // (shape[0] * shape[3] * shape[4]))
    expected = [
        (slice(b, b + 1), slice(start, min(start + rows, height)))
        for b in range(batch)
        for start in range(0, height, rows)
    ]
    assert found == expected and len(found) == number
    assert list(predicted._chunks(planes.to("meta"))) == [(slice(0, batch), slice(0, height))]


# Paths of the torch backend


@pytest.mark.parametrize("shift, grad, fused", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0)])
def test_fused_attention_where_it_is_faster(shift, grad, fused, monkeypatch):
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k)
    )
    name, inputs, options = maps.attention((6, 4), shift=(shift, shift))
    with ops.force("torch"), torch.set_grad_enabled(bool(grad)):
        getattr(ops, name)(*inputs, *options)
    assert len(calls) == fused


@pytest.mark.parametrize("size, padded", [((7, 7), 0), ((3, 5), 0), ((4, 7), 1), ((7, 4), 1)])
def test_a_convolution_pads_by_itself_where_it_can(size, padded, monkeypatch):
    calls, pad = [], F.pad
    monkeypatch.setattr(F, "pad", lambda *given: calls.append(given[1]) or pad(*given))
    x, weight = randn(1, 9, 8, 3), randn(3, 1, *size)
    with ops.force("torch"):
        out = ops.depthwise_conv(x, weight)
    assert out.shape == x.shape and len(calls) == padded


@pytest.mark.parametrize(
    "engine, batch, path",
    [
        *(("", 2, "_grouped"), ("", 0, "_by_rows"), (None, 2, "_grouped")),
        *(("onnx", 2, "_own"), ("aotinductor", 2, "_by_rows")),
    ],
)
def test_paths_of_a_dynamic_convolution(engine, batch, path, monkeypatch):
    """Without a graph (""), in an exported one, and in those for an engine."""
    from backbones.ops import depthwise

    called = []
    for name in ("_own", "_grouped", "_by_rows"):
        real = getattr(depthwise, name)
        noted = lambda *given, name=name, real=real: called.append(name) or real(*given)  # noqa: E731
        monkeypatch.setattr(depthwise, name, noted)
    monkeypatch.setattr(depthwise, "choose", lambda *given: "torch")
    monkeypatch.setattr(depthwise, "exporting", lambda: engine != "")
    name, inputs, options = maps.dynamic((3, 4), batch=batch)
    with dispatch.graphs_for(engine or None):
        out = ops.dynamic_depthwise_conv(*inputs)
        plain = ops.dynamic_depthwise_conv(*inputs[:2])
    assert called[0] == path
    with ops.force("reference"):
        monkeypatch.undo()
        torch.testing.assert_close(out, ops.dynamic_depthwise_conv(*inputs))
        torch.testing.assert_close(plain, ops.dynamic_depthwise_conv(*inputs[:2]))


def test_an_exported_convolution_pads_before(monkeypatch):
    from backbones.ops import depthwise

    calls, pad = [], F.pad
    monkeypatch.setattr(F, "pad", lambda *given: calls.append(given[1]) or pad(*given))
    monkeypatch.setattr(depthwise, "exporting", lambda: True)
    x, weight, bias = randn(1, 9, 8, 3), randn(3, 1, 3, 5), randn(3)
    out = depthwise._static(x, weight, bias)
    assert calls == [(2, 2, 1, 1)]
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=(1, 2), groups=3)
    torch.testing.assert_close(out, expected.permute(0, 2, 3, 1))


def test_windows_that_triton_has_registers_for():
    sizes = ((8, 8), (7, 7), (4, 16), (5, 13), (9, 8), (1, 64))
    assert [window._fits(size) for size in sizes] == [True, True, True, False, False, True]


# Layouts


def schema_cases():
    yield cases.depthwise((3, 4), 5, 3, 2)
    yield cases.depthwise((3, 4), 5, 3, 2, True)
    yield cases.inhomogeneous((3, 4), 2, 3, 3, 2, 5)
    yield cases.aggregation((3, 4), 2, 3, 3, 2)
    yield cases.attention((2, 1), 2, 3, (3, 2), (1, 1))
    yield cases.mixing((2, 1), 2, 3, (3, 2), (1, 1))
    yield cases.mixing((2, 1), 2, 3, (3, 2), (1, 1), grid=True)
    yield cases.sliding((3, 4), 2, 3, (3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("number", range(8))
def test_what_compilers_are_told_of_results(number, backend, dtype, monkeypatch):
    """Shapes, dtypes and strides of both passes, of inputs in any layout; nothing is shared."""
    if backend == "native" and native.missing() is not None:
        pytest.skip(native.missing())
    case = list(schema_cases())[number]
    dense, checked = torch.ops.dense, []
    names = "depthwise predict_and_aggregate aggregate window_attention local_mlp sliding_attention"

    def noted(operator):
        def run(*given):
            checked.append((operator.default, given))
            return operator(*given)

        return run

    both = [f"{name}{end}" for name in names.split() for end in ("", "_backward")]
    proxy = SimpleNamespace(**{name: noted(getattr(dense, name)) for name in both})
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "dense", proxy)
        given = [x.to(dtype).transpose(0, -1).contiguous().transpose(0, -1) for x in case.tensors]
        with forced_here(backend):
            out = case.forward(*given)
            grad = torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2)
            case.backward(grad, *given)
    assert len(checked) == 2
    utils = "test_schema", "test_faketensor"
    for operator, arguments in checked:
        with ops.force(backend):
            torch.library.opcheck(operator, arguments, test_utils=utils)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("make", maps.all)
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_sums_of_half_precisions_are_wider(make, backend, dtype, limit):
    """An output is the true one rounded, by C once, by PyTorch's operators in between too."""
    if backend == "native" and native.missing() is not None:
        pytest.skip(native.missing())
    torch.manual_seed(0)
    name, inputs, options = make((9, 12), groups=2, shared=8)
    inputs = [x.to(dtype) for x in inputs]
    with ops.force("reference"):
        expected = getattr(ops, name)(*(x.double() for x in inputs), *options)
    with ops.force(backend), torch.no_grad():
        out = getattr(ops, name)(*inputs, *options)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < (1 if backend == "native" else 2) * limit


# Triton's launchers


def test_blocks_and_parts():
    triton_kernels = pytest.importorskip("backbones.ops.triton_kernels")
    power, divisor, parts = (getattr(triton_kernels, n) for n in ("power", "divisor", "parts"))
    assert [power(n) for n in (1, 16, 17, 33)] == [16, 16, 32, 64]
    assert [power(n, 1) for n in (1, 2, 3, 5)] == [1, 2, 4, 8]
    found = [divisor(n, 32, 64) for n in (32, 64, 96, 128, 48, 33, 7)]
    assert found == [32, 64, 32, 64, 64, 64, 16]
    assert [parts(n, 4) for n in (0, 1, 255, 256, 257)] == [1, 1, 255, 256, 256]
    assert [parts(10**4, n) for n in (0, 2**16, 2**17, 2**25)] == [256, 256, 128, 1]
    assert parts(10**4, 100, 64 * 100 * 7) == 7 and parts(10**4, 100, 64 * 100 * 7 - 1) == 6
    one, two = torch.randn(1, 3), torch.randn(3, 2)
    added = triton_kernels.added(one, 0)
    assert added.data_ptr() == one.data_ptr() and added.shape == (3,)
    assert triton_kernels.added(two, 1).equal(two.sum(1))


def test_dtypes_of_products(monkeypatch):
    triton = pytest.importorskip("triton")
    from backbones.ops.triton_kernels import operands, tuning

    language = triton.language
    for interpret in (True, False):
        knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=interpret))
        monkeypatch.setattr(triton, "knobs", knobs, raising=False)
        found = [operands(kind) for kind in (torch.bfloat16, torch.float16, torch.float32)]
        plain = [language.float32] * 3
        halves = [language.bfloat16, language.float16, language.float32]
        assert found == (plain if interpret else halves) and tuning._times() == (not interpret)
    assert tuning.bucket(torch.empty(9, 3, 5, 7)) == 4 and tuning.bucket(torch.empty(1, 4, 4)) == 5
    config = tuning.tile(8, BLOCK=3)
    assert config.num_warps == 8 and config.kwargs == {"BLOCK": 3} and tuning.tile().num_warps == 4


def test_launches_are_on_the_device_of_the_first_tensor(monkeypatch):
    pytest.importorskip("triton")
    from contextlib import nullcontext

    from backbones.ops.common import traced_here
    from backbones.ops.triton_kernels import launches, visible

    devices = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: devices.append(x) or nullcontext())
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: ("wrapped", kernel))

    @launches
    def launcher(first, *others):
        """About it."""
        return first, others

    assert launcher(1, 2, 3) == (1, (2, 3)) and devices == [1] and visible("kernel") == "kernel"
    with traced_here():
        assert launcher(4, 5) == (4, (5,)) and devices == [1]
        assert visible("kernel") == ("wrapped", "kernel")
    assert launcher.__doc__ == "About it."


# Verdicts


@pytest.mark.parametrize(
    "dtype, error, use, limit",
    [
        (torch.float64, 1e-10, True, "1e-10"),
        (torch.float64, 1.1e-10, False, "1e-10"),
        (torch.float32, 1e-4, True, "1e-04"),
        (torch.float32, float("nan"), False, "1e-04"),
        (torch.float16, 5e-3, True, "5e-03"),
        (torch.float16, 6e-3, False, "5e-03"),
        (torch.bfloat16, 3e-2, True, "3e-02"),
        (torch.bfloat16, 3.1e-2, False, "3e-02"),
    ],
)
def test_how_an_error_is_judged(dtype, error, use, limit, monkeypatch):
    monkeypatch.setattr(verdicts, "processor", lambda device: f"{device} Fast")
    name = str(dtype)[6:]
    word = "agrees" if use else "disagrees"
    reason = f"native {word} with torch in {name}, error {error:.1e} (at most {limit})"
    expected = verdicts.Verdict("local_mlp", "native", name, use, reason, "cpu Fast")
    assert verdicts.judge("local_mlp", "native", "cpu", dtype, error) == expected


@pytest.mark.parametrize(
    "text, name",
    [
        ("model name\t: Fast One: 2\n\nmodel name\t: Other", "Fast One: 2 AVX9"),
        ("other : x", "unknown AVX9"),
        (None, "AVX9"),
    ],
)
def test_the_processor_of_a_verdict(text, name, monkeypatch):
    def path(where):
        assert where == "/proc/cpuinfo"
        if text is None:
            raise OSError
        return SimpleNamespace(read_text=lambda: text)

    monkeypatch.setattr(verdicts, "Path", path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    assert verdicts._cpu() == name


def test_versions_and_sources_of_a_verdict():
    triton = pytest.importorskip("triton")
    native_, own = (verdicts._versions.__wrapped__(name) for name in ("native", "triton"))
    versions = [torch.__version__, str(torch.version.cuda), str(torch.version.hip)]
    assert native_.split()[:-1] == versions
    assert own.split()[:-1] == [*versions, triton.__version__]
    assert native_.split()[-1] != own.split()[-1] and len(own.split()[-1]) == 64


def test_verdicts_lie_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / "dense-backbones/verdicts"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert verdicts.folder() == tmp_path / "home/.cache/dense-backbones/verdicts"
    path = verdicts._path("local_mlp", "native", "cpu", "float32")
    assert path.name == "local_mlp-native-float32.json" and len(path.parent.name) == 16
    assert path.parent.parent == verdicts.folder() and verdicts.every() == []
    monkeypatch.setattr(verdicts, "_known", {})
    verdict = verdicts.judge("local_mlp", "native", "cpu", torch.float32, 0.0)
    verdicts.remember(verdict, "cpu")
    assert path.exists() and path.parent.parent.stat().st_mode & 0o777 in (0o700, 0o755)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert verdicts.every() == [verdict] and dispatch.verdicts is verdicts
    (path.parent / "other.json").write_text("damaged")
    assert verdicts.every() == [verdict] and verdicts.forget() == 2 and not verdicts._known
