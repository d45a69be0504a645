"""Every backend of every operator: outputs and gradients, precisions, registration, capture."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from backbones import ops
from backbones.ops import __main__ as command
from backbones.ops import halos, native, reference
from backbones.ops.dispatch import OPERATORS, explain
from tests.support import OperatorCases, agrees, outputs_and_gradients, randn

BACKENDS = [
    "torch",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    ),
]
cases = OperatorCases(kernel=7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", cases.all)
@pytest.mark.parametrize("size", [(1, 1), (3, 20), (17, 12)])
def test_backends_agree_with_the_reference(make, backend, size):
    agrees(make(size), backend)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("make", cases.all)
def test_the_c_kernels_compute_what_they_are_forced_to(make):
    """Not PyTorch's operators, whose values are the same; complex numbers are left to these."""
    name, inputs, options = make((5, 8))
    called = []

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with ops.force("native"), torch.no_grad(), Called():
        getattr(ops, name)(*inputs, *options)
    assert any(function.startswith("dense.") for function in called)


# test_sizes.py has all kernels, groups and windows of the C kernels.
@pytest.mark.parametrize("make", cases.convolutions)
@pytest.mark.parametrize("kernel", [1, 3, 4, 5])
def test_kernel_sizes(make, kernel):
    agrees(make((5, 14), kernel=kernel), "torch")


@pytest.mark.parametrize("make", cases.convolutions)
@pytest.mark.parametrize("groups, shared", [(1, 1), (32, 1), (1, 32), (9, 6)])
def test_groups(make, groups, shared):
    agrees(make((4, 9), groups=groups, shared=shared, batch=1), "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", cases.all)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)]
)
def test_precisions(make, backend, dtype, tolerance):
    torch.manual_seed(0)
    agrees(make((9, 12)), backend, dtype, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(7, 7), (1, 2), (2, 5), (12, 12)])
def test_windows(backend, window, dim=3, heads=2):
    rows, columns = window
    size = (2 * rows, 3 * columns)
    for shift in {(0, 0), (rows // 2, columns // 2), (0, columns // 2), (rows - 1, 0)}:
        bias = randn(heads, rows * columns, rows * columns)
        qkv = randn(2, *size, 3 * heads * dim)
        agrees(("window_attention", [qkv, bias], (heads, window, shift)), backend)
        for grid in ((), (2, 3)):
            weight = randn(*grid, *bias.shape)
            value = randn(2, *size, heads * dim)
            agrees(("local_mlp", [value, weight, bias], (window, shift)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(7, 7), (1, 1), (5, 7), (9, 1), (1, 9)])
def test_sliding_windows(backend, window):
    """Maps smaller than the window, those that are no whole blocks, strips of rows in C."""
    for size in ((1, 1), (2, 11), (23, 6)):
        agrees(cases.sliding(size, groups=3, shared=5, window=window), backend)


@pytest.mark.parametrize("scores", [2**19, 100])
def test_blocks_of_queries_at_once_and_by_rows(scores, monkeypatch):
    monkeypatch.setitem(halos._SCORES, "cpu", scores)
    agrees(cases.sliding((17, 12)), "torch")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_sliding_window_does_not_see_does_not_matter(backend, value):
    """A key or value beside the window, in the same vector of it."""
    qkv, bias = torch.randn(1, 9, 14, 3 * 8), torch.randn(2, 9)
    with ops.force(backend):
        expected = ops.sliding_attention(qkv, bias, 2, (3, 3))
        for channel in (9, 17):
            wrong = qkv.clone()
            wrong[0, 4, 6, channel] = value
            out = ops.sliding_attention(wrong, bias, 2, (3, 3))
            near = torch.zeros(9, 14, dtype=torch.bool)
            near[3:6, 5:8] = True
            assert not out[:, near].isfinite().all()
            if backend != "torch":  # whose blocks of queries share products
                torch.testing.assert_close(out[:, ~near], expected[:, ~near])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_attention_of_any_sharpness(backend, scale):
    """From even weights to a single one, whose others are below the smallest float32."""
    torch.manual_seed(0)
    case = "window_attention", [scale * randn(1, 7, 14, 192), randn(2, 49, 49)], (2, (7, 7), (3, 3))
    agrees(case, backend)
    agrees(case, backend, torch.float32, 1e-5 * max(1.0, scale**2))
    case = "sliding_attention", [scale * randn(1, 7, 14, 192), randn(2, 49)], (2, (7, 7))
    agrees(case, backend)
    agrees(case, backend, torch.float32, 1e-5 * max(1.0, scale**2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", cases.all)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(make, backend, value):
    name, inputs, options = make((6, 6))
    inputs = [x.float() for x in inputs]
    inputs[0][0, 2, 3, 0] = value
    with ops.force(backend):
        assert not getattr(ops, name)(*inputs, *options).isfinite().all()


def test_a_key_that_is_not_a_number_is_not_hidden():
    """Its value is one, and would be left out with a weight of zero."""
    qkv = torch.randn(1, 3, 2, 3 * 8)
    qkv[0, 1, 1, 9] = float("nan")
    with ops.force("native"):
        assert ops.window_attention(qkv, torch.zeros(2, 6, 6), 2, (3, 2), (0, 0)).isnan().any()
        assert ops.sliding_attention(qkv, torch.zeros(2, 9), 2, (3, 3)).isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", cases.all)
def test_an_empty_batch(make, backend):
    agrees(make((4, 4), batch=0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", cases.all)
def test_any_layout_gives_the_same_and_repeats_bit_for_bit(make, backend):
    name, inputs, options = make((9, 12))
    grad = randn(*getattr(reference, name)(*inputs, *options).shape)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    with ops.force(backend):
        function = getattr(ops, name)
        first, again = (outputs_and_gradients(function, inputs, options, grad) for _ in range(2))
        other = outputs_and_gradients(function, strided, options, grad.mT.contiguous().mT)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.equal(b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", cases.all)
def test_autocast(make, backend):
    name, inputs, options = make((9, 12))
    inputs = [x.float().requires_grad_() for x in inputs]
    with ops.force(backend), torch.autocast("cpu", torch.bfloat16):
        out = getattr(ops, name)(*inputs, *options)
    if make in cases.convolutions:
        assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), inputs))
    expected = getattr(reference, name)(*inputs, *options)
    assert (out - expected).abs().max() < 4e-2 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_is_sound(backend):
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    x = leaf(2, 4, 5, 8, 3)
    inner = (x, leaf(2, 4, 5, 6), leaf(9 * 8, 6), leaf(9 * 8), 3)
    with ops.force(backend):
        torch.library.opcheck(torch.ops.dense.predict_and_aggregate.default, inner)
        inner = (leaf(2, 4, 5, 18), leaf(2, 9), 2, [3, 3])
        torch.library.opcheck(torch.ops.dense.sliding_attention.default, inner)
        if backend == "native":
            inner = (leaf(2, 4, 5, 9), leaf(2, 49, 9), leaf(9), 7)
            torch.library.opcheck(torch.ops.dense.depthwise.default, inner)


class Operator(nn.Module):
    def __init__(self, name, options):
        super().__init__()
        self.name, self.options = name, options

    def forward(self, *inputs):
        return getattr(ops, self.name)(*inputs, *self.options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [*cases.convolutions, cases.sliding])
def test_one_graph_serves_all_sizes(make, backend):
    """Forward and backward, without a break; the second size compiles nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with ops.force(backend):
        for size in [(9, 12), (14, 10)]:
            name, inputs, options = make(size)
            maps = inputs[: 2 if make in (cases.inhomogeneous, cases.aggregation) else 1]
            for axis in (1, 2):
                for tensor in maps:
                    torch._dynamo.mark_dynamic(tensor, axis)
            compiled = torch.compile(Operator(name, options), backend=counter, fullgraph=True)
            leaves = [x.requires_grad_() for x in inputs]
            out = compiled(*leaves)
            grad = torch.ones_like(out)
            got = out, *torch.autograd.grad(out, leaves, grad)
            expected = outputs_and_gradients(getattr(ops, name), inputs, options, grad)
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("make", [cases.inhomogeneous, cases.aggregation, cases.sliding])
def test_compiled_graphs_hold_the_operator(make):
    """And not the form that exported ones do, which keeps the kernels for the backward pass."""
    name, inputs, options = make((9, 12))
    held = []

    def backend(graph, example_inputs):
        held.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(Operator(name, options), backend=backend, fullgraph=True)(*inputs)
    assert any(target.startswith("dense.") for target in held)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", cases.all)
def test_exports_hold_no_operator_of_ours(make, strict):
    name, inputs, options = make((9, 12))
    exported = torch.export.export(Operator(name, options), tuple(inputs), strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert not [t for t in targets if t.startswith("dense")]
    expected = getattr(reference, name)(*inputs, *options)
    torch.testing.assert_close(exported.module()(*inputs), expected)


@pytest.mark.parametrize("make", cases.all)
def test_fake_tensors_leave_nothing_for_others(make):
    """The torch backend keeps masks and indices."""
    from torch._subclasses import FakeTensorMode

    name, inputs, options = make((9, 12))
    with ops.force("torch"):
        with FakeTensorMode() as mode:
            getattr(ops, name)(*map(mode.from_tensor, inputs), *options)
        agrees((name, inputs, options), "torch")


@pytest.mark.parametrize(
    "shape", [(1, 4, 5, 2, 3, 4), (1, 4, 4, 2, 3, 3), (1, 4, 5, 4, 3, 3), (1, 4, 5, 2, 9), (1, 4)]
)
def test_kernels_of_another_map_are_refused(shape):
    with pytest.raises(ValueError, match=r"kernels of .* for a map of \(1, 4, 5, 6\)"):
        ops.inhomogeneous_aggregation(torch.zeros(1, 4, 5, 6), torch.zeros(shape))


def test_forcing(monkeypatch):
    x = torch.zeros(1, 2, 2, 3)
    operator = next(iter(OPERATORS))
    with ops.force("reference"):
        assert explain(operator, "cpu", x.dtype) == ("reference", "forced by ops.force")
    monkeypatch.setenv("DENSE_OPS", "reference")
    assert explain(operator, "cpu", x.dtype) == ("reference", "forced by DENSE_OPS")
    with ops.force("torch"):
        assert explain(operator, "cpu", x.dtype)[0] == "torch"
    monkeypatch.setenv("DENSE_OPS", "fast")
    with pytest.raises(
        ValueError, match="DENSE_OPS='fast': reference, torch, native, onednn, triton"
    ):
        explain(operator, "cpu", x.dtype)
    with pytest.raises(ValueError, match="valid"), ops.force("slow"):
        pass


@pytest.mark.usefixtures("unforced")
def test_a_compiler_that_fails_is_said_once(monkeypatch, tmp_path, recwarn):
    broken = tmp_path / "broken"
    broken.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'no such processor' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._build.cache_clear()
    try:
        for _ in range(2):
            agrees(cases.depthwise((4, 5)), None)
        assert explain("depthwise_conv", "cpu", torch.float32)[0] == "torch"
        said = [str(w.message) for w in recwarn if "C kernels" in str(w.message)]
        assert len(said) == 1 and "no such processor; slower backends take over" in said[0]
    finally:
        native._build.cache_clear()


def test_command_names_backend_and_reason(capsys):
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Verdicts of an earlier --check follow; their lines begin with the processor's whole name.
    assert [line.split()[1] for line in lines if line.startswith("cpu  ")] == list(OPERATORS)
