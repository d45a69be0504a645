"""Every operator against plain loops in float64, written from the paper's equations."""

import itertools

import pytest
import torch

from backbones import ops
from backbones.ops import halos, native, reference
from backbones.ops.windows import (
    relative_position_bias,
    relative_position_index,
    sliding_position_index,
)
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


def sliding_by_loops(qkv, bias, heads, window, static=None, convolved=None):
    """Equations 1 and 2 over the window centred at each position, position by position.

    ``static`` and ``convolved`` are those of equations 24 and 25.
    """
    batch, height, width, channels = qkv.shape
    dim, up, left = channels // (3 * heads), window[0] // 2, window[1] // 2
    q, k, v = qkv.reshape(batch, height, width, 3, heads, dim).unbind(3)
    out = torch.zeros(batch, height, width, heads, dim, dtype=qkv.dtype)
    for b, y, x, h in itertools.product(range(batch), range(height), range(width), range(heads)):
        query, seen, products = q[b, y, x, h] / dim**0.5, {}, torch.zeros(window, dtype=qkv.dtype)
        for u, w in itertools.product(range(window[0]), range(window[1])):
            r, c = y + u - up, x + w - left
            if 0 <= r < height and 0 <= c < width:
                seen[u, w] = v[b, r, c, h]
                products[u, w] = query @ k[b, r, c, h]
        logits = []
        for u, w in seen:
            value = products[u, w]
            if convolved is not None:
                near = itertools.product((-1, 0, 1), repeat=2)
                value = sum(
                    convolved[h, i + 1, j + 1] * products[(u + i) % window[0], (w + j) % window[1]]
                    for i, j in near
                )
            if static is not None:
                value = value + query @ static[h, u * window[1] + w]
            logits.append(value + bias[h, u * window[1] + w])
        weights = torch.stack(logits).softmax(0)
        out[b, y, x, h] = sum(a * value for a, value in zip(weights, seen.values(), strict=True))
    return out.flatten(3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [(3, 3), (5, 3), (7, 7)])
def test_sliding_attention(size, window):
    """Also on maps smaller than the window, and of one position."""
    heads, dim = 2, 3
    qkv, bias = randn(2, *size, 3 * heads * dim), randn(heads, window[0] * window[1])
    expected = sliding_by_loops(qkv, bias, heads, window)
    torch.testing.assert_close(ops.sliding_attention(qkv, bias, heads, window), expected)
    torch.testing.assert_close(reference.sliding_attention(qkv, bias, heads, window), expected)


def test_the_offsets_of_a_window_from_its_centre():
    """In Swin's table of 13x13, the middle 7x7 from the last to the first."""
    table = torch.arange(169).reshape(13, 13)
    expected = table[3:10, 3:10].flip(0, 1).flatten()
    assert sliding_position_index((7, 7)).equal(expected)
    assert sliding_position_index((3, 5)).equal(relative_position_index((3, 5))[7])


def test_sliding_attention_moves_with_its_input():
    """Inside of the map; a patch in zeros, moved by a row and two columns."""
    qkv, bias = torch.zeros(1, 20, 20, 12, dtype=torch.float64), randn(2, 9)
    moved, patch = qkv.clone(), randn(1, 6, 6, 12)
    qkv[:, 5:11, 5:11] = patch
    moved[:, 6:12, 7:13] = patch
    first, second = (ops.sliding_attention(x, bias, 2, (3, 3)) for x in (qkv, moved))
    torch.testing.assert_close(second[:, 3:-3, 4:-3], first[:, 2:-4, 2:-5])


@pytest.mark.parametrize("window, what", [((4, 3), r"\(4, 3\)"), ((3, 12), r"\(3, 12\)")])
def test_a_sliding_window_without_a_centre_is_refused(window, what):
    with pytest.raises(ValueError, match=f"window_size={what}: .* odd"):
        ops.sliding_attention(randn(1, 4, 4, 12), randn(2, window[0] * window[1]), 2, window)


def test_a_bias_of_another_window_is_refused():
    with pytest.raises(ValueError, match=r"bias of \(2, 49\) for 2 heads and windows of 5x5"):
        ops.sliding_attention(randn(1, 4, 4, 12), randn(2, 49), 2, (5, 5))


def convolutional_inputs(size, window, heads=2, dim=3):
    taps = window[0] * window[1]
    qkv, bias = randn(2, *size, 3 * heads * dim), randn(heads, taps)
    return qkv, bias, randn(heads, taps, dim), randn(heads, 3, 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [(3, 3), (5, 3), (7, 7)])
def test_convolutional_attention(size, window):
    """Equations 24 and 25, each alone and both."""
    qkv, bias, theta, kernel = convolutional_inputs(size, window)
    for given in ({}, {"theta": theta}, {"kernel": kernel}, {"theta": theta, "kernel": kernel}):
        static, convolved = given.get("theta"), given.get("kernel")
        expected = sliding_by_loops(qkv, bias, 2, window, static, convolved)
        for module in (ops, reference):
            got = module.convolutional_attention(qkv, bias, 2, window, **given)
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scores", [2**19, 100])
@pytest.mark.parametrize("size", [(1, 1), (9, 7), (13, 5)])
@pytest.mark.parametrize("which", ["theta", "kernel"])
def test_convolutional_gradients(size, which, scores, monkeypatch):
    """At once, and a row of blocks at a time."""
    monkeypatch.setitem(halos._SCORES, "cpu", scores)
    qkv, bias, theta, kernel = convolutional_inputs(size, (5, 3))
    learned = {"theta": theta, "kernel": kernel}[which]
    leaves = [t.requires_grad_() for t in (qkv, bias, learned)]
    grad = randn(2, *size, 6)
    found = []
    for module in (ops, reference):
        out = module.convolutional_attention(qkv, bias, 2, (5, 3), **{which: learned})
        found.append(torch.autograd.grad(out, leaves, grad))
    torch.testing.assert_close(*found)


def test_logits_convolved_by_a_delta_or_without_static_part_are_sliding_attention():
    qkv, bias, theta, kernel = convolutional_inputs((9, 8), (7, 7))
    delta = torch.zeros_like(kernel)
    delta[:, 1, 1] = 1
    expected = ops.sliding_attention(qkv, bias, 2, (7, 7))
    for given in ({"theta": torch.zeros_like(theta)}, {"kernel": delta}):
        got = ops.convolutional_attention(qkv, bias, 2, (7, 7), **given)
        torch.testing.assert_close(got, expected)


def test_convolving_logits_is_convolving_the_keys_of_a_window():
    """Equation 25 where the window is the whole map: circular in it."""
    qkv, bias, _, kernel = convolutional_inputs((5, 5), (5, 5), heads=1, dim=4)
    q, k, v = qkv.unflatten(-1, (3, 4)).unbind(3)
    taps = itertools.product(range(3), repeat=2)
    keys = sum(kernel[0, y, x] * k.roll((1 - y, 1 - x), (1, 2)) for y, x in taps)
    logits = torch.einsum("bd,byxd->byx", q[:, 2, 2] / 2, keys).flatten(1) + bias[:1]
    expected = torch.einsum("bn,bnd->bd", logits.softmax(-1), v.flatten(1, 2))
    got = ops.convolutional_attention(qkv, bias[:1], 1, (5, 5), kernel=kernel[:1])
    torch.testing.assert_close(got[:, 2, 2], expected)
