"""How the Triton kernels are laid out: shapes that no block fits, memory, offsets and resources."""

import os
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")

from backbones import ops  # noqa: E402
from backbones.ops import reference  # noqa: E402
from dense.analysis.kernels import accesses  # noqa: E402
from dense.analysis.kernels.launches import Launch  # noqa: E402
from dense.analysis.kernels.offsets import overflows  # noqa: E402
from tests import support  # noqa: E402
from tests.support import OperatorCases, at_length, outputs_and_gradients, randn  # noqa: E402

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="neither a GPU nor TRITON_INTERPRET=1",
)
# Maps of 4 GB and more, of which a few rows are touched.
lazy = pytest.mark.skipif(DEVICE == "cuda", reason="counts on memory that costs nothing unread")
cases = OperatorCases(kernel=3)


def agrees(case, dtype=torch.float32, tolerance=1e-5):
    support.agrees(case, "triton", dtype, tolerance, DEVICE)


# Sizes that blocks do not fit

OTHER_DIMS = (1, 2, *range(4, 15), 96)


@interpreted
@pytest.mark.parametrize(
    "make, dim",
    [
        *((make, dim) for make in (cases.attention, cases.local_mlp) for dim in (3, 15, 48)),
        (cases.sliding, 15),
        *at_length(
            *((make, dim) for make in (cases.attention, cases.local_mlp) for dim in OTHER_DIMS),
            *((cases.sliding, dim) for dim in (3, 48, *OTHER_DIMS)),
        ),
    ],
)
def test_channels_of_a_head(make, dim):
    torch.manual_seed(dim)
    agrees(make((3, 4), groups=3, shared=dim, batch=1))


@interpreted
@pytest.mark.parametrize("shared", [3, 33, *at_length(4, 5, 7, 12, 24, 40)])
@pytest.mark.parametrize("make", [cases.inhomogeneous, cases.aggregation])
def test_channels_of_a_group(make, shared):
    torch.manual_seed(shared)
    agrees(make((2, 3), groups=3, shared=shared, batch=1))


@interpreted
@pytest.mark.parametrize("groups", [17, *at_length(3, 40)])
@pytest.mark.parametrize("make", cases.convolutions)
def test_groups_and_channels(make, groups):
    torch.manual_seed(groups)
    agrees(make((2, 3), groups=groups, shared=5, batch=1))


@interpreted
@pytest.mark.parametrize("depth", [5, 130, *at_length(48, 96, 192)])
def test_blocks_of_what_kernels_are_predicted_from(depth):
    torch.manual_seed(depth)
    agrees(cases.inhomogeneous((2, 3), depth=depth, batch=1))


@interpreted
@pytest.mark.parametrize(
    "make",
    [
        *(cases.depthwise, cases.dynamic),
        *at_length(cases.inhomogeneous, cases.sliding),
    ],
)
def test_sums_over_positions_in_several_parts(make, monkeypatch):
    """Gradients agree, and repeat bit for bit, whose parts end inside an image or span images."""
    from backbones.ops.triton_kernels import depthwise, inhomogeneous, sliding

    numbers = []

    def parts(blocks, numel, read=None):
        numbers.append(min(blocks, 4))
        return numbers[-1]

    for module in (depthwise, inhomogeneous, sliding):
        monkeypatch.setattr(module, "parts", parts)
    monkeypatch.setattr(sliding, "_ELEMENTS", 16)
    torch.manual_seed(0)
    name, inputs, options = case = make((5, 3))
    agrees(case)
    inputs = [x.float().to(DEVICE) for x in inputs]
    grad = torch.randn_like(getattr(reference, name)(*inputs, *options))
    with ops.force("triton"):
        runs = [outputs_and_gradients(getattr(ops, name), inputs, options, grad) for _ in range(2)]
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
    assert set(numbers) == {4}


@interpreted
def test_parts_of_sums_cost_an_eighth_of_the_maps_at_most():
    from backbones.ops.triton_kernels import parts

    assert parts(10_000, 4704, 2 * 32 * 56**2 * 96 * 2) == 128
    assert parts(10_000, 49 * 768, 2 * 64 * 7**2 * 768 * 2) == 4
    assert parts(10_000, 4704) == 256
    assert parts(3, 4704, 10**9) == 3
    assert parts(3, 4704, 0) == 1


# Kernels of the aggregation in memory


def aggregation(*layout: int):
    """A case whose kernels' axes B, H, W, G, K, K are in memory in the order ``layout``."""
    name, (x, kernels), options = cases.aggregation((3, 5), groups=4, shared=2)
    back = sorted(range(6), key=layout.__getitem__)
    return name, [x, kernels.permute(layout).contiguous().permute(back)], options


@interpreted
@pytest.mark.parametrize(
    "layout, copied",
    [((0, 1, 2, 3, 4, 5), True), ((0, 1, 2, 4, 5, 3), False), ((4, 5, 0, 1, 2, 3), False)],
    ids=["public", "taps before groups", "taps first"],
)
def test_kernels_by_tap_are_not_copied(layout, copied, monkeypatch):
    from backbones.ops.triton_kernels import aggregation as own

    torch.manual_seed(0)
    name, inputs, options = aggregation(*layout)
    x, kernels = (t.float().to(DEVICE) for t in inputs)
    expected = support.outputs_and_gradients(
        reference.inhomogeneous_aggregation, inputs, (), torch.ones_like(inputs[0])
    )
    pointers, run = [], own.run

    def noted(kernel, grid, tiles, *given, **constants):
        if kernel is own._mix:
            pointers.append(given[1].data_ptr())
            assert given[1].stride(3) == 1
        return run(kernel, grid, tiles, *given, **constants)

    monkeypatch.setattr(own, "run", noted)
    with ops.force("triton"):
        kernels.requires_grad_()
        out = ops.inhomogeneous_aggregation(x, kernels)
        forward = pointers.pop()
        grad = torch.autograd.grad(out.sum(), kernels)[0]
    assert (forward != kernels.data_ptr()) == copied
    # The backward pass reads the same memory, copied or not.
    assert pointers[-1] == forward
    assert grad.stride(3) == 1
    torch.testing.assert_close(out.double().cpu(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double().cpu(), expected[2], rtol=1e-5, atol=1e-5)


@interpreted
def test_kernels_in_part_of_a_map_are_not_copied():
    """A predictor's map may hold more than the kernels."""
    from backbones.ops.triton_kernels import aggregation as own

    torch.manual_seed(0)
    x, wide = randn(2, 3, 4, 3, 8).float(), randn(2, 3, 4, 9, 13).float()
    kernels = wide[..., 2:10].mT
    assert own.by_tap(kernels)[0] is kernels
    uneven = wide[:, :, :3, :, :8].mT
    assert own.by_tap(uneven)[0] is not uneven
    x, kernels = x.to(DEVICE), kernels.to(DEVICE)
    assert own.aggregate(x, kernels, 3).equal(own.aggregate(x, kernels.contiguous(), 3))


@pytest.mark.parametrize("backend", ["torch", "native", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("layout", [(0, 1, 2, 3, 4, 5), (0, 1, 2, 4, 5, 3)])
def test_the_gradient_of_kernels_has_the_layout_that_compilers_are_told(backend, layout):
    _, (x, kernels), _ = aggregation(*layout)
    x, kernels = x.float().unflatten(-1, (4, -1)), kernels.float().flatten(-2)
    with ops.force(backend):
        arguments = x.requires_grad_().to(DEVICE), kernels.requires_grad_().to(DEVICE), 3
        torch.library.opcheck(torch.ops.dense.aggregate.default, arguments)
        grads = torch.ops.dense.aggregate_backward(*(t.detach() for t in (x, *arguments[:2])), 3)
    assert grads[1].stride() == kernels.stride()


# Offsets


@interpreted
@lazy
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
        options = (shared * groups, 0, 0, 3, 1, False, False, 16, 64)
        plain._forward[(1, 1, 1)](x, taps, x, out, *sizes, *options)
        expected = plain.convolve(small.flatten(3), taps, None, 3, 1, False).view_as(small)
        got, expected = (t.flatten(3)[:, :1, :16, :64] for t in (out[:, :, :near], expected))
    else:
        hidden, weight = torch.randn(1, 2, width, 1).half(), torch.randn(9, groups, 1).half()
        bias = torch.randn(9, groups).half()
        options = (shared, groups, 1, 0, 3, 1, False, 1, 16, 4, 32, 16)
        kind = predicted.operands(x.dtype)
        predicted._mix[(1, 1, 1)](x, hidden, weight, bias, out, *sizes, *options, kind)
        few = hidden[:, :, :near].contiguous()
        expected = predicted.forward(small, few, weight, bias, 3)
        got, expected = (t[:, :1, :16, :4] for t in (out, expected))
    torch.testing.assert_close(got, expected)
    assert x.stride(1) == 2**31 and got.abs().max() > 0


def far(near, *shape):
    """A map of 16-bit numbers whose second row begins beyond the 2^31st, and what is in it.

    Only the first ``near`` of its last axis exist; the rest is memory that nobody touches.
    """
    whole = torch.empty(shape, dtype=torch.float16)
    assert whole.stride(1) >= 2**31
    whole[..., :near] = torch.randn(*shape[:-1], near)
    return whole, whole[..., :near].contiguous()


@interpreted
@lazy
@pytest.mark.parametrize("kind", ["depthwise", "inhomogeneous", "aggregation"])
def test_offsets_beyond_32_bits_in_gradients(kind):
    """The programs of the first channels of a map of very many, at rows on both sides of 2^31."""
    from backbones.ops.triton_kernels import aggregation, inhomogeneous
    from backbones.ops.triton_kernels import depthwise as plain

    torch.manual_seed(0)
    if kind == "depthwise":
        channels = 2**27
        (x, near_x), (grad, near_grad) = (far(64, 1, 2, 16, channels) for _ in range(2))
        out = torch.empty(1, 9, channels)
        first = First(plain._weight_gradient, 3, channels // 32)
        first(x, grad, out, 2, 16, channels, 2, 1, 1, 3, 1, 4, 32, 32)
        expected = plain.weight_gradient(near_x, near_grad, 1, 3, 1)
        torch.testing.assert_close(out[..., :32], expected[..., :32])
        return
    groups = 2**26
    (x, near_x), (grad, near_grad) = (far(32, 1, 2, 16, 2, groups) for _ in range(2))
    sizes = (2, 16, 2, groups)
    if kind == "aggregation":
        kernels, out = (torch.empty(1, 2, 16, groups, dtype=torch.float16) for _ in range(2))
        kernels[..., :32] = near = torch.randn(1, 2, 16, 32).half()
        mixed, steps = torch.empty_like(x), (groups, groups)
        first = First(aggregation._mix, 2, groups // 32)
        first(x, kernels, mixed, *sizes, *steps, 0, 1, 0, False, 16, 2, 32)
        first = First(aggregation._kernel_gradient, 2, groups // 32)
        first(x, grad, out, *sizes, *steps, 0, 1, 0, 1, 16, 32)
        expected = aggregation.aggregate(near_x, near[..., None], 1)
        torch.testing.assert_close(mixed[..., :32], expected)
        expected = aggregation.aggregate_backward(near_grad, near_x, near[..., None], 1)[1]
        torch.testing.assert_close(out[..., :32], expected[..., 0])
        return
    hidden, near = torch.randn(1, 2, 16, 2).half(), torch.randn(9, 32, 2).half()
    weight = torch.empty(9, groups, 2, dtype=torch.float16)
    weight[:, :32] = near
    options = 3, 1, 4, 16, 32, 16, inhomogeneous.operands(x.dtype)
    grad_hidden = torch.empty_like(hidden)
    grad_weight, grad_bias = torch.empty(9, groups, 2), torch.empty(9, groups)
    inhomogeneous._hidden_gradient[(2, 1, 1)](
        x, grad, weight, grad_hidden, *sizes, 2, 0, 1, *options
    )
    first = First(inhomogeneous._weight_gradient, 3, groups // 32)
    first(x, grad, hidden, grad_weight, grad_bias, *sizes, 2, 2, 1, *options)
    expected = inhomogeneous.backward(near_grad, near_x, hidden, near, torch.zeros(9, 32), 3)
    got = grad_hidden, grad_weight[:, :32], grad_bias[:, :32]
    torch.testing.assert_close(got, expected[1:])


class First:
    """The first ``number`` programs, ``step`` apart, of a grid too large to interpret."""

    def __init__(self, kernel, number: int, step: int):
        self.kernel, self.number, self.step = kernel, number, step

    def __call__(self, *arguments):
        from triton.runtime.interpreter import interpreter_builder

        place = interpreter_builder.set_grid_idx

        def apart(x, y, z):
            interpreter_builder.grid_dim = (self.number * self.step, 1, 1)
            place(x * self.step, y, z)

        interpreter_builder.set_grid_idx = apart
        try:
            self.kernel[(self.number, 1, 1)](*arguments)
        finally:
            interpreter_builder.set_grid_idx = place


@interpreted
@lazy
def test_offsets_beyond_32_bits_in_windows():
    """The first head of very many, in a window of two rows."""
    from backbones.ops.triton_kernels import local_mlp as mlp
    from backbones.ops.triton_kernels import window

    torch.manual_seed(0)
    heads, dim, near = 3 * 2**23, 16, torch.randn(1, 4, 4).half()
    many = torch.empty(heads, 4, 4, dtype=torch.float16)
    many[:1] = near
    qkv = torch.empty(1, 2, 2, 3, heads, dim, dtype=torch.float16)
    assert qkv.stride(1) >= 2**31
    qkv[..., 0, :] = torch.randn(1, 2, 2, 3, dim)
    few = qkv[..., 0, :].flatten(3).contiguous()
    grad = torch.empty(1, 2, 2, heads, dim, dtype=torch.float16)
    grad[..., 0, :] = given = torch.randn(1, 2, 2, dim).half()
    sizes = (2, 2, heads, dim, 2, 2, 0, 0, 4)
    blocks = (1, 16, 16, window.operands(qkv.dtype))

    out = torch.empty_like(grad)
    window._forward[(1, 1)](qkv, many, out, *sizes, 0.25, 0, *blocks)
    torch.testing.assert_close(out[..., 0, :], window.forward(few, near, 1, [2, 2], [0, 0]))
    grad_qkv, grad_bias = torch.empty_like(qkv), torch.empty(heads, 4, 4)
    window._backward[(1, 1)](grad, qkv, many, grad_qkv, grad_bias, 1, 1, *sizes, 0.25, *blocks)
    expected = window.backward(given, few, near, 1, [2, 2], [0, 0])
    torch.testing.assert_close((grad_qkv[..., 0, :].flatten(3), grad_bias[:1]), expected)
    del qkv, grad_qkv, out, grad

    heads = 2**26
    (value, near_value), (grad, near_grad) = (far(dim, 1, 2, 2, heads * dim) for _ in range(2))
    many = torch.empty(heads, 4, 4, dtype=torch.float16)
    many[:1] = near
    sizes = (1, 1, 1, 2, 2, heads, dim, 2, 2, 0, 0, 4)
    out, grad_mixing = torch.empty_like(value), torch.empty(heads, 4, 4)
    mlp._mix[(1, 1)](value, many, out, *sizes, False, *blocks)
    mlp._weight_gradient[(1, 1)](value, grad, grad_mixing, *sizes, *blocks)
    expected = mlp.forward(near_value, near, [2, 2], [0, 0])
    torch.testing.assert_close(out[..., :dim], expected)
    expected = mlp.backward(near_grad, near_value, near, [2, 2], [0, 0])[1]
    torch.testing.assert_close(grad_mixing[:1], expected)


TTIR = """
module {
  tt.func public @_place(%x: !tt.ptr<bf16> loc("x"(#loc)), %W: i32 loc("W"(#loc))) {
    %c16_i32 = arith.constant 16 : i32 loc(#loc1)
    %row = tt.get_program_id x : i32 loc(#loc2)
    %0 = arith.extsi %row : i32 to i64 loc(#loc3)
    %1 = arith.extsi %W : i32 to i64 loc(#loc3)
    %own = arith.muli %0, %1 : i64 loc(#loc3)
    scf.for %left = %c0_i32 to %W step %c16_i32  : i32 {
      %2 = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32> loc(#loc4)
      %3 = tt.splat %left : i32 -> tensor<16xi32> loc(#loc4)
      %4 = arith.addi %3, %2 : tensor<16xi32> loc(#loc4)
    } loc(#loc5)
  }
}
"""


def test_offsets_in_32_bits_are_found():
    text = TTIR.replace("%row =", "%c0_i32 = arith.constant 0 : i32\n    %row =")
    arguments = {"x": torch.empty(0), "W": 2**16}
    assert not overflows(text, Launch("", None, arguments, (2**16,)))
    # The product in 32 bits, widened when it is too late.
    late = text.replace("arith.extsi %row : i32 to i64", "arith.muli %row, %W : i32")
    late = late.replace("arith.muli %0, %1 : i64", "arith.extsi %0 : i32 to i64")
    found = overflows(late, Launch("", None, arguments, (2**16,)))
    assert found == ["%0 = arith.muli %row, %W : i32"]
    assert not overflows(late, Launch("", None, arguments, (2**15,)))
    last = Launch("", None, {"x": torch.empty(0), "W": 2**31 - 1}, (2**16,))
    assert len(overflows(text, last)) == 1


def test_offsets_of_all_kernels_have_64_bits():
    done = run_inspection("--arch", "90", "--dtypes", "bf16", "--only", "offsets")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("| 64 bits |") == 28


# What the generated code uses


PTX = """
.visible .entry _copy(
	.param .u64 .ptr .global .align 1 _copy_param_0,
	.param .u32 _copy_param_1,
	.param .u64 .ptr .global .align 1 _copy_param_2
)
.reqntid 64
{
	ld.param.b64 	%rd1, [_copy_param_0];
	ld.param.b32 	%r1, [_copy_param_1];
	ld.param.b64 	%rd4, [_copy_param_2];
	mov.u32 	%r2, %tid.x;
	mul.lo.s32 	%r3, %r2, %r1;
	mul.wide.s32 	%rd2, %r3, 2;
	add.s64 	%rd3, %rd1, %rd2;
	mov.b32 	%r4, 0;
$L__BB0_1:
	setp.lt.s32 	%p1, %r2, 48;
	// begin inline asm
	mov.u16 %rs1, 0x0;
	@%p1 ld.global.b16 { %rs1 }, [ %rd3 + 0 ];
	// end inline asm
	cvt.f32.bf16 	%r9, %rs1;
	add.s32 	%r4, %r4, 1;
	setp.ne.b32 	%p2, %r4, %r5;
	@%p2 bra 	$L__BB0_1;
	mul.wide.s32 	%rd5, %r2, 4;
	add.s64 	%rd6, %rd4, %rd5;
	st.global.b32 	[%rd6], %r9;
	ret;
}
"""


@pytest.mark.parametrize(
    "step, used, touched, read",
    [(1, 2 * 96, 2 * 96, 3), (49, 2 * 96, 2 * 48 * 32, 48), (0, 2 * 4, 4 * 32, 1)],
    ids=["adjacent", "49 apart", "the same"],
)
def test_sectors_of_accesses(step, used, touched, read):
    """48 of 64 threads read 2 bytes in each of two iterations; all write 4 bytes once."""
    code = PTX.replace("mov.b32 	%r4, 0;", "mov.b32 	%r4, 0;\n	mov.u32 	%r5, 2;")
    seen = accesses.touched(code, [None, step, None], (1,), 2)
    assert (seen.used, seen.touched) == (used + 4 * 64, touched + 4 * 64)
    assert seen.by_programs == len(seen.read[0]) == read
    assert len(seen.written[2]) == 8
    # A second program reads and writes the same, and the threads of both branch apart.
    apart = code.replace(
        "mov.u32 	%r5, 2;", "mov.u32 	%r5, %ctaid.x;\n	add.s32 	%r5, %r5, 2;"
    )
    both = accesses.touched(apart, [None, step, None], (2,), 2)
    assert (both.used, both.touched) == (used // 2 * 5 + 512, touched // 2 * 5 + 512)
    assert both.by_programs == 2 * len(both.read[0]) == 2 * read


def test_addresses_that_depend_on_what_is_loaded_are_refused():
    code = PTX.replace("ld.global.b16 { %rs1 }", "ld.global.b32 { %r2 }")
    with pytest.raises(NotImplementedError, match="depends on what is loaded"):
        accesses.touched(code, [None, 1, None], (1,), 2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_fits_the_shared_memory_of_consumer_gpus(dtype):
    done = run_inspection(
        *("--arch", "89", "--dtypes", dtype, "--only", "resources"),
        *("--kernels", "window attention"),
    )
    assert len(rows(done)) == 2, done.stdout + done.stderr[-2000:]
    assert all(0 < int(row["shared"]) <= 101_376 for row in rows(done))


@pytest.mark.kernels
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_all_tiles_fit_the_shared_memory_of_consumer_gpus(arch):
    done = run_inspection("--arch", str(arch), "--tiles", "--only", "resources")
    assert rows(done), done.stdout + done.stderr[-2000:]
    assert all(int(row["shared"]) <= 101_376 for row in rows(done))


@pytest.mark.kernels
def test_depthwise_and_aggregation_use_what_they_load():
    """At least 85% of the bytes of sectors and of the traffic, in all passes."""
    for kernels, number in (("depthwise", 6), ("aggregation", 6)):
        done = run_inspection("--kernels", kernels)
        found = rows(done)
        assert len(found) == 2 * number, done.stdout + done.stderr[-2000:]
        for row in found:
            for name in ("sectors", "traffic"):
                assert all(int(v.strip(" %")) >= 85 for v in row[name].split("/")), row


def run_inspection(*words: str) -> subprocess.CompletedProcess[str]:
    # A program of its own: in this one Triton interprets its kernels.
    return support.run_python(support.ROOT / "tools/inspect_kernels.py", *words)


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
