"""Every operator against plain loops in float64, written from the paper's equations."""

import itertools

import pytest
import torch

from backbones import ops
from backbones.ops import native, reference
from backbones.ops.windows import relative_position_bias, relative_position_index
from tests.support import randn

SIZES = [(1, 1), (3, 8), (9, 7), (13, 5)]


def aggregate_by_loops(x, kernel_at):
    """y_i = sum_j w_ij x_j over a centred KxK window, zeros outside (equation 6)."""
    batch, height, width, channels = x.shape
    out = torch.zeros_like(x)
    for b, i, j, c in itertools.product(*map(range, x.shape)):
        kernel = kernel_at(b, i, j, c)
        size = kernel.shape[-1]
        for u, v in itertools.product(range(size), range(size)):
            y, z = i + u - (size - 1) // 2, j + v - (size - 1) // 2
            if 0 <= y < height and 0 <= z < width:
                out[b, i, j, c] += kernel[u, v] * x[b, y, z, c]
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [3, 4, 7])
def test_depthwise(size, kernel):
    x, weight, bias = randn(2, *size, 3), randn(3, 1, kernel, kernel), randn(3)
    expected = aggregate_by_loops(x, lambda b, i, j, c: weight[c, 0]) + bias
    torch.testing.assert_close(ops.depthwise_conv(x, weight, bias), expected)
    torch.testing.assert_close(reference.depthwise_conv(x, weight, bias), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [3, 4, 7])
def test_dynamic_depthwise(size, kernel):
    x, kernels, bias = randn(2, *size, 3), randn(2, 3, kernel, kernel), randn(3)
    expected = aggregate_by_loops(x, lambda b, i, j, c: kernels[b, c]) + bias
    torch.testing.assert_close(ops.dynamic_depthwise_conv(x, kernels, bias), expected)
    torch.testing.assert_close(reference.dynamic_depthwise_conv(x, kernels, bias), expected)


def inhomogeneous_inputs(size, groups, shared, kernel, hidden=5, batch=2):
    rows = groups * kernel**2
    return (
        randn(batch, *size, groups * shared),
        randn(batch, *size, hidden),
        randn(rows, hidden),
        randn(rows),
        kernel,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [3, 4, 7])
def test_inhomogeneous(size, kernel):
    groups, shared = 2, 3
    x, hidden, weight, bias, _ = args = inhomogeneous_inputs(size, groups, shared, kernel)

    def kernel_at(b, i, j, c):
        flat = weight @ hidden[b, i, j] + bias
        return flat.reshape(groups, kernel, kernel)[c // shared]

    expected = aggregate_by_loops(x, kernel_at)
    torch.testing.assert_close(ops.inhomogeneous_dynamic_depthwise_conv(*args), expected)
    torch.testing.assert_close(reference.inhomogeneous_dynamic_depthwise_conv(*args), expected)


@pytest.mark.parametrize("groups, shared", [(1, 1), (1, 4), (4, 1), (2, 3)])
@pytest.mark.parametrize("size", [(1, 1), (5, 9)])
@pytest.mark.parametrize("chunk", [2**17, 100])
def test_inhomogeneous_gradients(groups, shared, size, chunk, monkeypatch):
    """At once, and in blocks of rows that do not divide the height."""
    monkeypatch.setattr("backbones.ops.inhomogeneous._CHUNK", chunk)
    args = inhomogeneous_inputs(size, groups, shared, 7)
    leaves = [a.requires_grad_() for a in args[:4]]
    grad = randn(*args[0].shape)
    ours = torch.autograd.grad(ops.inhomogeneous_dynamic_depthwise_conv(*args), leaves, grad)
    plain = reference.inhomogeneous_dynamic_depthwise_conv(*args)
    for got, expected in zip(ours, torch.autograd.grad(plain, leaves, grad), strict=True):
        torch.testing.assert_close(got, expected)


def test_inhomogeneous_gradcheck():
    args = inhomogeneous_inputs((3, 4), 2, 2, 3, hidden=2, batch=1)
    leaves = [a.requires_grad_() for a in args[:4]]

    def function(*tensors):
        return ops.inhomogeneous_dynamic_depthwise_conv(*tensors, 3)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_inhomogeneous_in_lower_precision(dtype, tolerance):
    args = inhomogeneous_inputs((9, 6), 2, 3, 7)
    grad = randn(*args[0].shape)

    def run(dtype):
        leaves = [a.detach().to(dtype).requires_grad_() for a in args[:4]]
        out = ops.inhomogeneous_dynamic_depthwise_conv(*leaves, 7)
        assert out.dtype == dtype
        return out, *torch.autograd.grad(out, leaves, grad.to(dtype))

    for got, expected in zip(run(dtype), run(torch.float64), strict=True):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance


def test_inhomogeneous_takes_autocast_and_any_layout():
    args = [a.float() for a in inhomogeneous_inputs((9, 6), 2, 3, 7)[:4]]
    expected = ops.inhomogeneous_dynamic_depthwise_conv(*args, 7)
    strided = [args[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), *args[1:]]
    assert not strided[0].is_contiguous()
    assert ops.inhomogeneous_dynamic_depthwise_conv(*strided, 7).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.inhomogeneous_dynamic_depthwise_conv(*args, 7)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 3e-2 * expected.abs().max()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_inhomogeneous_never_holds_the_kernels(backend):
    """No tensor of the forward or backward pass is as large as a third of the kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if torch.is_tensor(t)]
            largest = max(largest, *sizes, 0)
            return out

    groups, shared, size = 32, 3, (16, 16)
    args = [a.requires_grad_() for a in inhomogeneous_inputs(size, groups, shared, 7, 24)[:4]]
    if backend == "native" and native.missing() is not None:
        pytest.skip(native.missing())
    with ops.force(backend), Largest():
        ops.inhomogeneous_dynamic_depthwise_conv(*args, 7).sum().backward()
    kernels = 2 * size[0] * size[1] * groups * 49 * 8
    assert 0 < largest < kernels / 3


def test_inhomogeneous_names_a_weight_that_does_not_fit():
    x, hidden, weight, bias, _ = inhomogeneous_inputs((4, 4), 2, 3, 3)
    with pytest.raises(ValueError, match="18 rows predicts no 7x7 kernels for groups of 6"):
        ops.inhomogeneous_dynamic_depthwise_conv(x, hidden, weight, bias, 7)


def windows_by_loops(height, width, window, shift):
    """For each window its original positions, in order, and the side of the seam they are on."""
    for top, left in itertools.product(range(0, height, window[0]), range(0, width, window[1])):
        positions = []
        for u, v in itertools.product(range(window[0]), range(window[1])):
            y, x = top + u + shift[0], left + v + shift[1]
            positions.append(((y % height, x % width), (y >= height, x >= width)))
        yield (top // window[0], left // window[1]), positions


def offset_bias(table, window, heads):
    """bias[h, i, j] by the relative offset of the two positions, looked up one by one."""
    positions = list(itertools.product(range(window[0]), range(window[1])))
    bias = torch.zeros(heads, len(positions), len(positions), dtype=table.dtype)
    for (i, (yi, xi)), (j, (yj, xj)) in itertools.product(enumerate(positions), repeat=2):
        row = (yi - yj + window[0] - 1) * (2 * window[1] - 1) + xi - xj + window[1] - 1
        bias[:, i, j] = table[row]
    return bias


@pytest.mark.parametrize("window", [(2, 2), (3, 2)])
@pytest.mark.parametrize("shift", [(0, 0), (1, 1), (1, 0)])
def test_window_attention(window, shift):
    """Equations 1 to 3, window by window, position by position."""
    heads, dim = 2, 3
    height, width = 3 * window[0], 2 * window[1]
    qkv = randn(2, height, width, 3 * heads * dim)
    table = randn((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    bias = offset_bias(table, window, heads)
    torch.testing.assert_close(relative_position_bias(table, relative_position_index(window)), bias)

    expected = torch.zeros(2, height, width, heads * dim, dtype=torch.float64)
    for b in range(2):
        q, k, v = qkv[b].reshape(height, width, 3, heads, dim).unbind(2)
        for _, positions in windows_by_loops(height, width, window, shift):
            for h, (i, (p, side)) in itertools.product(range(heads), enumerate(positions)):
                seen = [(j, r) for j, (r, s) in enumerate(positions) if s == side]
                scores = [q[p][h] @ k[r][h] / dim**0.5 + bias[h, i, j] for j, r in seen]
                weights = torch.stack(scores).softmax(0)
                mixed = sum(w * v[r][h] for w, (_, r) in zip(weights, seen, strict=True))
                expected[b, *p, h * dim : (h + 1) * dim] = mixed
    got = ops.window_attention(qkv, bias, heads, window, shift)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("per_window", [True, False])
@pytest.mark.parametrize("shift", [(0, 0), (1, 1), (0, 1)])
def test_local_mlp(per_window, shift):
    heads, dim, window = 2, 3, (2, 3)
    height, width = 3 * window[0], 2 * window[1]
    value, bias = randn(2, height, width, heads * dim), randn(heads, 6, 6)
    weight = randn(3, 2, heads, 6, 6) if per_window else randn(heads, 6, 6)

    expected = torch.zeros_like(value)
    for b in range(2):
        v = value[b].reshape(height, width, heads, dim)
        for (down, across), positions in windows_by_loops(height, width, window, shift):
            own = weight[down, across] if per_window else weight
            for h, (i, (p, side)) in itertools.product(range(heads), enumerate(positions)):
                for j, (r, other) in enumerate(positions):
                    if other == side:
                        scale = own[h, i, j] + bias[h, i, j]
                        expected[b, *p, h * dim : (h + 1) * dim] += scale * v[r][h]
    torch.testing.assert_close(ops.local_mlp(value, weight, bias, window, shift), expected)
