"""Which backend computes an operator, and why: every device, dtype and request."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones import ops
from backbones.ops import cases, common, dispatch, library, native, verdicts
from backbones.ops.dispatch import OPERATORS, explain
from backbones.ops.flops import MULTIPLY_ADDS

FLOAT, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
ON_GPU = [
    *("dynamic_depthwise_conv", "inhomogeneous_dynamic_depthwise_conv"),
    *("inhomogeneous_aggregation", "window_attention", "local_mlp", "sliding_attention"),
]
OWN = ["depthwise_conv", *ON_GPU]
PLAIN = ("torch", "PyTorch's operators")
LINEAR = ("torch", "oneDNN is used for float32 and bfloat16 on a CPU only")
UNCOMPARED = "its Triton kernels are compared with torch by the first call on this processor"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """C kernels and Triton are there, and nothing is forced or known."""
    monkeypatch.delenv("DENSE_OPS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch, "_broken", {})
    monkeypatch.setattr(verdicts, "known", lambda *given: None)
    monkeypatch.setattr(verdicts, "halved_by_mkl", lambda: False)
    monkeypatch.setattr(dispatch, "_no_linear_pointwise", lambda dtype: None)


def verdict(use: bool, asked: list | None = None):
    def known(*given):
        if asked is not None:
            asked.append(given)
        return SimpleNamespace(use=use, reason=f"said {use}")

    return known


def test_the_operators():
    others = "convolutional_attention", "linear", "linear_layer", "residual_mlp"
    assert list(OPERATORS) == [*OWN, *others]
    assert dispatch.ON_GPUS == tuple(ON_GPU) and dispatch.GPUS == ("cuda",)


def test_on_a_cpu(monkeypatch):
    for name in OWN:
        assert explain(name, "cpu", FLOAT) == ("native", "C, the fastest on a CPU")
    assert explain("convolutional_attention", "cpu", FLOAT) == PLAIN
    onednn = ("onednn", "without gradients faster than PyTorch's linear")
    assert explain("linear", "cpu", FLOAT) == explain("linear", "cpu", BRAIN) == onednn
    assert explain("linear", "cpu", HALF) == explain("linear", "cpu", DOUBLE) == LINEAR
    with torch.no_grad():
        faster = ("torch", "without gradients oneDNN's convolution is faster than C")
        assert explain("depthwise_conv", "cpu", FLOAT) == faster
        assert {explain(name, "cpu", FLOAT)[0] for name in ON_GPU} == {"native"}
    asked = []
    monkeypatch.setattr(verdicts, "known", verdict(True, asked))
    assert explain("local_mlp", "cpu", BRAIN) == ("native", "C, the fastest on a CPU")
    assert explain("linear", "cpu", BRAIN) == onednn
    given = ("cpu", "bfloat16")
    assert asked == [("local_mlp", "native", *given), ("linear", "onednn", *given)]
    monkeypatch.setattr(verdicts, "known", verdict(False))
    for name in ("local_mlp", "linear"):
        assert explain(name, "cpu", FLOAT) == ("torch", "said False")
    monkeypatch.setattr(native, "missing", lambda: "no compiler")
    assert explain("local_mlp", "cpu", FLOAT) == ("torch", "no compiler")


def test_on_a_gpu(monkeypatch):
    for name in OPERATORS:
        expected = ("torch", UNCOMPARED) if name in ON_GPU else PLAIN
        assert explain(name, "cuda:1", FLOAT) == (LINEAR if name.startswith("linear") else expected)
    wide = "the Triton kernels accumulate in float32, not in float64"
    assert explain("local_mlp", "cuda", DOUBLE) == ("torch", wide)
    asked = []
    for use in (True, False):
        monkeypatch.setattr(verdicts, "known", verdict(use, asked))
        for dtype in (FLOAT, BRAIN, HALF):
            expected = ("triton" if use else "torch", f"said {use}")
            assert explain("local_mlp", "cuda:1", dtype) == expected
    assert asked[1] == ("local_mlp", "triton", "cuda:1", "bfloat16")
    dispatch._broken["local_mlp"] = "it broke"
    assert explain("local_mlp", "cuda", FLOAT) == ("torch", "it broke")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert explain("sliding_attention", "cuda", FLOAT) == ("torch", "no Triton is installed")
    assert explain("linear", "mps", FLOAT) == LINEAR
    assert explain("local_mlp", "mps", FLOAT) == PLAIN


def test_what_keeps_onednn_from_linear(monkeypatch):
    monkeypatch.setattr(dispatch, "_no_linear_pointwise", lambda dtype: f"differs in {dtype}")
    assert explain("linear", "cpu", FLOAT) == ("torch", "differs in torch.float32")
    with torch.device("meta"), torch._subclasses.FakeTensorMode():
        reason = "under a mode of fake tensors nothing can be compared"
        assert explain("linear", "cpu", FLOAT) == ("torch", reason)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert explain("linear", "cpu", FLOAT) == ("torch", "this PyTorch was built without oneDNN")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert explain("linear", "cpu", FLOAT) == ("torch", "torch.compile chooses its own kernels")
    # The dtype that autocast would give it.
    with torch.autocast("cpu", HALF):
        assert explain("linear", "cpu", FLOAT) == LINEAR


@pytest.mark.parametrize("by", ["ops.force", "DENSE_OPS"])
@pytest.mark.parametrize("wanted", ["reference", "torch", "native", "onednn", "triton"])
def test_what_is_forced(wanted, by, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if by == "DENSE_OPS":
        monkeypatch.setenv(by, wanted)
    with ops.force(wanted if by == "ops.force" else None):
        for name, backends in OPERATORS.items():
            for device in ("cpu", "cuda"):
                expected = (wanted, f"forced by {by}")
                if wanted not in backends or (wanted, device) == ("native", "cuda"):
                    expected = ("torch", f"it has no backend {wanted} on {device}")
                if device == "cuda" and name.startswith("linear"):
                    expected = LINEAR
                assert explain(name, device, FLOAT) == expected
        if wanted == "triton":
            wide = "the Triton kernels accumulate in float32, not in float64"
            assert explain("local_mlp", "cpu", DOUBLE) == ("torch", wide)
    # The last request counts, and the one before after it.
    with ops.force("torch"):
        with ops.force("reference"):
            assert explain("local_mlp", "cpu", FLOAT)[0] == "reference"
        assert explain("local_mlp", "cpu", FLOAT) == ("torch", "forced by ops.force")


@pytest.mark.parametrize(
    "backend, message",
    [
        ("fast", "DENSE_OPS='fast': reference, torch, native, onednn, triton are valid"),
        ("native", "DENSE_OPS=native: no compiler"),
        ("triton", "DENSE_OPS=triton: Triton runs on a CPU with TRITON_INTERPRET=1 only"),
    ],
)
def test_what_cannot_be_forced(backend, message, monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "no compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for _ in range(2):
        with pytest.raises(ValueError) as found, ops.force(backend):
            pass
        assert str(found.value) == message
    monkeypatch.setenv("DENSE_OPS", backend)
    with pytest.raises(ValueError) as found:
        explain("local_mlp", "cpu", FLOAT)
    assert str(found.value) == message
    if backend == "triton":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert explain("local_mlp", "cuda", FLOAT) == ("triton", "forced by DENSE_OPS")
        monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="DENSE_OPS=triton: no Triton is installed"):
            explain("local_mlp", "cuda", FLOAT)


def test_exported_graphs(monkeypatch):
    assert not dispatch.exporting() and not dispatch.fixes_groups()
    reason = ("torch", "exported graphs use PyTorch's operators only")
    for module, name, fixes in (
        (torch.compiler, "is_exporting", False),
        (torch.onnx, "is_in_onnx_export", True),
        (torch.jit, "is_tracing", True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            assert dispatch.exporting() and dispatch.fixes_groups() == fixes
            with ops.force("reference"):
                assert explain("local_mlp", "cpu", FLOAT) == reason
    for engine in ("onnx", "aotinductor"):
        with dispatch.graphs_for(engine):
            assert dispatch.keeps_operators() == (engine == "onnx") and dispatch.fixes_groups()
            assert not dispatch.exporting()
    assert not dispatch.keeps_operators()


# Kernels that fail


class Torchs(RuntimeError):
    """A subclass, as PyTorch's own errors of a device."""


@pytest.mark.parametrize(
    "error, of_a_compiler",
    [
        (ImportError("a"), True),
        (OSError("a"), True),
        (subprocess.SubprocessError("a"), True),
        (RuntimeError("x PassManager::run failed y"), True),
        (RuntimeError("Failed to find C compiler"), True),
        (RuntimeError("Failed to load newly compiled"), True),
        (RuntimeError("failed to translate module to LLVM IR"), True),
        (RuntimeError("0 active drivers"), True),
        (RuntimeError("CUDA error"), False),
        (Torchs("PassManager::run failed"), False),
        (ValueError("PassManager::run failed"), False),
        (AssertionError(), False),
    ],
)
def test_errors_of_compilers_are_survived(error, of_a_compiler, monkeypatch):
    pytest.importorskip("triton")

    def fails():
        raise error

    if not of_a_compiler:
        with pytest.raises(type(error)):
            dispatch.attempt("local_mlp", fails)
        assert not dispatch._broken
        return
    said = f"Triton did not compile it: {error}"
    with pytest.warns(RuntimeWarning) as found:
        assert dispatch.attempt("local_mlp", fails) is None
    assert [str(one.message) for one in found] == [f"local_mlp: {said}"]
    assert dispatch._broken == {"local_mlp": said}
    # Not where Triton was asked for.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ops.force("triton"), pytest.raises(type(error)):
        dispatch.attempt("local_mlp", fails)
    with common.forced_here("triton"), pytest.raises(type(error)):
        dispatch.attempt("local_mlp", fails)
    monkeypatch.setenv("DENSE_OPS", "triton")
    with pytest.raises(type(error)):
        dispatch.attempt("local_mlp", fails)


@pytest.mark.parametrize(
    "message, said", [("", "OSError"), ("\n one\ntwo", "one"), ("x" * 201, "x" * 200)]
)
def test_the_first_line_of_a_failure(message, said):
    pytest.importorskip("triton")

    def fails():
        raise OSError(message)

    with pytest.warns(RuntimeWarning):
        dispatch.attempt("local_mlp", fails)
    assert dispatch._broken["local_mlp"] == f"Triton did not compile it: {said}"
    assert dispatch.attempt("local_mlp", lambda: 5) == 5


def test_a_request_of_one_thread():
    x = torch.ones(1)
    with common.forced_here("reference"):
        assert dispatch.choose("local_mlp", x) == "reference"
        with common.forced_here("native"):
            assert dispatch.choose("linear", x) == "torch"
            assert dispatch.choose("local_mlp", x, x) == "native"
        assert dispatch.choose("local_mlp", x) == "reference"
    assert dispatch.choose("local_mlp", x) == "native"


def test_transforms_and_tangents_get_the_reference():
    x, chosen = torch.ones(2), []

    def function(x):
        chosen.append(dispatch.choose("local_mlp", x, None))
        return x.sum()

    function(x)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        function(dual)
        chosen.append(dispatch.choose("local_mlp", x, None, dual))
        chosen.append(dispatch.choose("local_mlp", dual))
    assert chosen == ["native", *["reference"] * 4, "native"]


# FLOPs


@pytest.mark.parametrize("operator", ["depthwise_conv", *ON_GPU])
def test_flops_of_both_passes(operator):
    """Two for a multiply-add; what the backward pass computes again is counted."""
    makers = {
        "depthwise_conv": lambda: cases.depthwise((3, 5), 7, 4, 2),
        "dynamic_depthwise_conv": lambda: cases.depthwise((3, 5), 7, 4, 2, True),
        "inhomogeneous_dynamic_depthwise_conv": lambda: cases.inhomogeneous((3, 5), 3, 2, 4, 2, 11),
        "inhomogeneous_aggregation": lambda: cases.aggregation((3, 5), 3, 2, 4, 2),
        "window_attention": lambda: cases.attention((2, 3), 2, 5, (3, 4), (1, 1), 3),
        "local_mlp": lambda: cases.mixing((2, 3), 2, 5, (3, 4), (1, 1), 3),
        "sliding_attention": lambda: cases.sliding((3, 5), 2, 7, (3, 5), 2),
    }
    windows = 3 * (2 * 3) * (3 * 4)  # positions of three images
    expected = {
        "depthwise_conv": 3 * (30 * 7 * 16),
        "dynamic_depthwise_conv": 3 * (30 * 7 * 16),
        "inhomogeneous_dynamic_depthwise_conv": 4 * (30 * 3 * 16 * 11) + 3 * (30 * 6 * 16),
        "inhomogeneous_aggregation": 3 * (30 * 6 * 16),
        "window_attention": 7 * (windows * 12 * 10),
        "local_mlp": 3 * (windows * 12 * 10),
        "sliding_attention": 7 * (30 * 15 * 14),
    }
    case = makers[operator]()
    with common.forced_here("torch"), FlopCounterMode(display=False) as counter:
        case.run(*case.tensors)
    assert counter.get_total_flops() == 2 * expected[operator]


def test_multiply_adds_by_shapes():
    maps, qkv = (2, 3, 5, 6), (2, 3, 5, 18)
    found = {
        "window_attention": MULTIPLY_ADDS["window_attention"](qkv, (2, 15, 15), 2, (3, 5), (1, 1)),
        "sliding_attention": MULTIPLY_ADDS["sliding_attention"](qkv, (2, 15), 2, (3, 5)),
        "local_mlp": MULTIPLY_ADDS["local_mlp"](maps, (2, 15, 15), (2, 15, 15), (3, 5), (1, 1)),
        "depthwise_conv": MULTIPLY_ADDS["depthwise_conv"](maps, (6, 1, 4, 7), (6,)),
        "dynamic_depthwise_conv": MULTIPLY_ADDS["dynamic_depthwise_conv"](maps, (2, 6, 4, 7)),
        "inhomogeneous_aggregation": MULTIPLY_ADDS["inhomogeneous_aggregation"](
            maps, (2, 3, 5, 2, 4, 7)
        ),
        "inhomogeneous_dynamic_depthwise_conv": MULTIPLY_ADDS[
            "inhomogeneous_dynamic_depthwise_conv"
        ](maps, (2, 3, 5, 11), (32, 11), (32,), 4),
    }
    assert found == {
        **dict(window_attention=2 * 30 * 15 * 6, sliding_attention=2 * 30 * 15 * 6),
        **dict(local_mlp=30 * 15 * 6, depthwise_conv=30 * 6 * 28),
        **dict(dynamic_depthwise_conv=30 * 6 * 28, inhomogeneous_aggregation=30 * 6 * 28),
        "inhomogeneous_dynamic_depthwise_conv": 30 * 32 * 11 + 30 * 6 * 16,
    }
    attend, given = MULTIPLY_ADDS["convolutional_attention"], (qkv, (2, 15), 2, (3, 5))
    plain = 2 * 30 * 15 * 6
    assert attend(*given) == plain
    assert attend(*given, theta=(2, 15, 3)) == plain + 30 * 2 * 15 * 3
    assert attend(*given, kernel=(2, 3, 3)) == plain + 30 * 2 * 15 * 9
    assert attend(*given, (2, 15, 3), (2, 3, 3)) == plain + 30 * 2 * 15 * (3 + 9)


# What the operators share


def test_kept_constants():
    made = []

    @common.constant
    def zeros(size: int) -> torch.Tensor:
        """About it."""
        made.append(size)
        return torch.zeros(size)

    with torch.inference_mode():
        first = zeros(3)
    assert not first.is_inference() and zeros(3) is first and made == [3]
    assert zeros.__doc__ == "About it." and zeros.__name__ == "zeros"
    with torch._subclasses.FakeTensorMode():
        assert zeros(3) is not first
    assert zeros(3) is first and made == [3, 3]


def test_autocast_s_dtype():
    x = torch.ones(1)
    assert common.autocast_dtype(x) == FLOAT
    with torch.autocast("cpu", BRAIN):
        assert common.autocast_dtype(x) == common.autocast_dtype(x.half()) == BRAIN
        assert common.autocast_dtype(x.double()) == DOUBLE
        assert common.autocast_dtype(x.to("meta")) == FLOAT
        with common.without_autocast(x):
            assert common.autocast_dtype(x) == FLOAT
        with common.without_autocast(x.to("meta")), common.without_float16(x):
            assert common.autocast_dtype(x) == BRAIN
        assert common.widened(x.half(), x).dtype == HALF
    with torch.autocast("cpu", HALF):
        with common.without_float16(x):
            assert common.autocast_dtype(x) == FLOAT
        with common.without_float16(x.half()):
            assert common.autocast_dtype(x) == HALF
        assert common.widened(x.half(), x).dtype == FLOAT
        assert common.widened(x.half(), x.half()).dtype == HALF
    assert common.promoted(x.half()).dtype == FLOAT
    assert [t.dtype for t in common.promoted(x.double(), x)] == [DOUBLE, DOUBLE]
    assert all(t.is_contiguous() for t in common.promoted(torch.ones(2, 3).T, torch.ones(4, 5).T))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_padding_is_undone(size):
    x = torch.randn(2, 3, 5, 2, 4)
    padded = common.pad(x, size)
    assert padded.shape == (2, 3 + size - 1, 5 + size - 1, 2, 4)
    assert common.inside(padded, x.shape, size).equal(x)
    assert padded.count_nonzero() == x.numel()
    windows = common.windows(padded, x.shape, size)
    before, after = common.same_padding(size)
    assert len(windows) == size**2 and (before + after, after - before) == (
        size - 1,
        (size + 1) % 2,
    )
    assert windows[before * size + before].equal(x)


# The compiler


def test_how_the_c_kernels_are_compiled(monkeypatch):
    assert library.SECONDS == 300 and library._FLAGS[:2] == ("-O3", "-march=native")
    monkeypatch.setattr(library.platform, "system", lambda: "Darwin")
    with pytest.raises(library.MissingCompiler, match="are built on Linux only, not on Darwin"):
        library.compiler()
    monkeypatch.setattr(library.platform, "system", lambda: "Linux")
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr(library.shutil, "which", lambda name: name if name == "cc" else None)
    assert library.compiler() == ["cc"]


@pytest.mark.parametrize(
    "kind, flags, suits",
    [
        ("float16", "flags : avx2 f16c", True),
        ("float16", "flags : avx2 f16c_not", False),
        ("bfloat16", "flags : avx2", True),
        ("float", "", True),
    ],
)
def test_what_a_processor_has(kind, flags, suits, monkeypatch):
    monkeypatch.setattr(library, "_processor", lambda: flags)
    assert library.suits(kind) == suits


@pytest.mark.parametrize(
    "text, line",
    [
        ("processor : 0\nflags : a b\nflags : c", "flags : a b"),
        ("Features : neon", "Features : neon"),
        ("other : x", ""),
    ],
)
def test_the_processor_s_flags(text, line, monkeypatch):
    monkeypatch.setattr(library, "Path", lambda path: SimpleNamespace(read_text=lambda: text))
    assert library._processor() == line


def test_a_group_of_one_user(monkeypatch):
    monkeypatch.setattr(library.os, "geteuid", lambda: 7)
    monkeypatch.setattr(
        library.pwd, "getpwuid", lambda user: SimpleNamespace(pw_name=f"user{user}")
    )
    groups = {
        1: SimpleNamespace(gr_name="user7", gr_mem=[]),
        2: SimpleNamespace(gr_name="user7", gr_mem=["user7"]),
        3: SimpleNamespace(gr_name="user7", gr_mem=["user7", "other"]),
        4: SimpleNamespace(gr_name="others", gr_mem=[]),
    }
    monkeypatch.setattr(library.grp, "getgrgid", groups.__getitem__)
    assert [library._is_of_this_user_alone(group) for group in range(1, 6)] == [
        *(True, True, False, False, False)
    ]


def test_tensors_that_c_does_not_take(monkeypatch):
    x = torch.ones(2, 3)
    for given in (([x.T], []), ([x, x.double()], []), ([x], [x.double()]), ([x.to("meta")], [])):
        with pytest.raises(ValueError, match="native depthwise takes contiguous CPU tensors, here"):
            native.call("depthwise", *given)
    called = []

    def library_of(dtype):
        def function(*given):
            called.append([one.value for one in given])
            return status

        assert dtype == BRAIN
        return SimpleNamespace(function=function)

    monkeypatch.setattr(native, "_library", library_of)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    maps, weight = [x.bfloat16(), x.bfloat16()], torch.ones(2)
    status = 0
    native.call("function", maps, [weight, None], [2, 3])
    assert called == [[maps[0].data_ptr(), maps[1].data_ptr(), weight.data_ptr(), None, 2, 3, 5]]
    status = 1
    with pytest.raises(MemoryError, match="native function: out of memory"):
        native.call("function", maps)
