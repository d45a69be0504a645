"""Depth-wise convolution with kernels predicted at every position (I-D-DW-Conv).

The kernels are never stored as a whole: a matrix product predicts those of a few positions
(``native``) or of one tap (``torch``), which are applied and dropped; the backward pass predicts
them again. Memory is a few maps, whatever the kernel size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops import native, reference
from backbones.ops.common import (
    autocast_dtype,
    inside,
    promoted,
    register_backward,
    same_padding,
    sum_of_rows,
    triton_kernels,
    without_autocast,
)
from backbones.ops.dispatch import attempt, choose, exporting, keeps_operators, operator

_NAME = "inhomogeneous_dynamic_depthwise_conv"
# Elements of the map in a chunk of the torch backend on a CPU: what a tap touches fits the cache.
_CHUNK = 2**17
# Elements in all partial weight gradients of the C kernels together.
_PARTS = 2**23


def inhomogeneous_dynamic_depthwise_conv(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel_size: int
) -> Tensor:
    """Depth-wise convolution with kernels ``hidden @ weight.T + bias`` (equation 8).

    Each position has K*K weights for each of G groups of channels; channel ``c`` uses those of
    group ``c // (C/G)``. Zero padding, stride 1, no output bias. The kernels are never stored.

    >>> x, hidden = torch.ones(1, 5, 5, 4), torch.ones(1, 5, 5, 3)
    >>> weight, bias = torch.ones(2 * 9, 3), torch.zeros(2 * 9)
    >>> inhomogeneous_dynamic_depthwise_conv(x, hidden, weight, bias, kernel_size=3).shape
    torch.Size([1, 5, 5, 4])

    Args:
        x: ``(B, H, W, C)``, the map to convolve.
        hidden: ``(B, H, W, D)``, the features that predict the kernels.
        weight: ``(G*K*K, D)``, group-major as in the released checkpoints.
        bias: ``(G*K*K,)``.
        kernel_size: K.

    Returns:
        ``(B, H, W, C)`` in the dtype of ``x``, or of autocast if it is on. Half precisions
        accumulate in float32.

    Raises:
        ValueError: the rows of ``weight`` are not G*K*K for a G that divides C.
    """
    taps = kernel_size**2
    groups = weight.shape[0] // taps
    if weight.shape[0] % taps or x.shape[-1] % groups:
        raise ValueError(
            f"weight of {weight.shape[0]} rows predicts no {kernel_size}x{kernel_size} kernels for "
            f"groups of {x.shape[-1]} channels: it needs groups*{taps} rows, groups a divisor of "
            f"{x.shape[-1]}"
        )
    backend = choose(_NAME, x, hidden, weight, bias)
    dtype = autocast_dtype(x)
    # A conversion to its own dtype is two nodes of a graph.
    x, hidden = (t if t.dtype == dtype else t.to(dtype) for t in (x, hidden))
    shared = x.unflatten(-1, (groups, -1))
    with without_autocast(x):
        if exporting() and not keeps_operators():
            out = _by_rows(shared, hidden, weight.to(dtype), bias.to(dtype), kernel_size)
        elif backend == "reference":
            return reference.inhomogeneous_dynamic_depthwise_conv(
                x, hidden, weight.to(dtype), bias.to(dtype), kernel_size
            )
        else:
            # The operator chooses its backend when it runs, so a compiled graph fixes none.
            out = torch.ops.dense.predict_and_aggregate(shared, hidden, weight, bias, kernel_size)
    return out.flatten(-2)


@operator("predict_and_aggregate", _NAME)
def _forward(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """``out[p] = sum over taps k of x[p + k] * (hidden[p] @ weight[k].T + bias[k])``.

    ``(B, H, W, G, S)``, ``(B, H, W, D)``, ``(G*K*K, D)`` and ``(G*K*K,)`` to ``(B, H, W, G, S)``;
    weight and bias may be of a wider dtype.
    """
    backend, dtype = choose(_NAME, x), x.dtype
    if backend == "native":
        return _native_forward(x, hidden, weight, bias, size)
    x, weight, bias = _by_tap(x, weight.to(dtype), bias.to(dtype))
    if backend == "triton":
        out = attempt(_NAME, lambda: _triton("forward", x, hidden, weight, bias, size=size))
        if out is not None:
            return out.mT.contiguous()
    return _torch_forward(x, hidden, weight, bias, size).mT.contiguous()


@operator("predict_and_aggregate_backward", _NAME)
def _backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend, like, grads = choose(_NAME, x), (x, hidden, weight, bias), None
    if backend == "native":
        grads = _native_backward(grad, *like, size)
        return tuple(g.to(t.dtype) for g, t in zip(grads, like, strict=True))
    shared, by_tap, bias_by_tap = _by_tap(x, weight.to(x.dtype), bias.to(x.dtype))
    given = grad.mT, shared, hidden, by_tap, bias_by_tap
    if backend == "triton":
        grads = attempt(_NAME, lambda: _triton("backward", *given, size=size))
    if grads is None:
        grads = _torch_backward(*given, size)
    grads = grads[0].mT, grads[1], grads[2].transpose(0, 1).flatten(0, 1), grads[3].T.flatten()
    return tuple(g.to(t.dtype).contiguous() for g, t in zip(grads, like, strict=True))


def _by_tap(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, H, W, S, G)``, ``(K*K, G, D)`` and ``(K*K, G)``.

    Groups are innermost, so that products vectorise; the weight of one tap is one matrix.
    """
    groups = x.shape[3]
    weight, bias = weight.unflatten(0, (groups, -1)), bias.unflatten(0, (groups, -1))
    return x.transpose(-1, -2), weight.transpose(0, 1), bias.T


@_forward.register_fake
def _(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int):
    return tuple(t.new_empty(t.shape) for t in (x, hidden, weight, bias))


register_backward(_forward, torch.ops.dense.predict_and_aggregate_backward)


def _triton(name: str, *tensors: Tensor, size: int):
    function = getattr(triton_kernels("inhomogeneous"), name)
    return function(*(t.contiguous() for t in tensors), size)


def _native_forward(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    x_, hidden_ = native.maps(x, hidden)
    out = torch.empty_like(x_)
    weights = native.weights(x.dtype, weight, bias)
    native.call("predict_and_aggregate", (x_, hidden_, out), weights, _sizes(x, hidden, size))
    return out.to(x.dtype)


def _native_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int
) -> tuple[Tensor, ...]:
    x, hidden, grad = native.maps(x, hidden, grad)
    weight, bias = native.weights(x.dtype, weight, bias)
    # By tap, in rows of whole vectors.
    (rows, depth), groups, lanes = weight.shape, x.shape[3], 32 // weight.element_size()
    width = rows + -rows % lanes
    # Number of partial weight gradients: enough for many threads, in tens of megabytes.
    parts = max(4, min(64, _PARTS // (width * depth)))
    batches = min(x.shape[0], parts)
    strips = max(1, min(parts // max(1, batches), x.shape[1] // max(1, size - 1)))
    grad_x, grad_hidden = torch.empty_like(x), torch.empty_like(hidden)
    grad_weight = weight.new_empty(batches, strips, depth, width)
    grad_bias = bias.new_empty(batches, strips, width)
    maps, weights = (grad, x, hidden, grad_x, grad_hidden), (weight, bias, grad_weight, grad_bias)
    sizes = batches, strips, *_sizes(x, hidden, size)
    native.call("predict_and_aggregate_backward", maps, weights, sizes)
    grad_weight = grad_weight.sum((0, 1))[:, :rows].unflatten(1, (-1, groups))
    grad_bias = grad_bias.sum((0, 1))[:rows].unflatten(0, (-1, groups))
    return grad_x, grad_hidden, grad_weight.permute(2, 1, 0).flatten(0, 1), grad_bias.T.flatten()


def _sizes(x: Tensor, hidden: Tensor, size: int) -> list[int]:
    """B, H, W, S, G, K, D."""
    batch, height, width, groups, shared = x.shape
    return [batch, height, width, shared, groups, size, hidden.shape[-1]]


def _torch_forward(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    planes, weight, bias = x.movedim(3, 0).contiguous(), weight.contiguous(), bias.contiguous()
    padded = _pad_planes(planes, size)
    out = torch.zeros_like(planes, dtype=padded.dtype)
    for images, rows in _chunks(planes):
        views = _windows(padded[:, images], rows, planes.shape[3], size)
        for k, window in enumerate(views):
            kernel = F.linear(hidden[images, rows], weight[k], bias[k])
            out[:, images, rows].addcmul_(window, kernel.to(out.dtype))
    return out.movedim(0, 3).to(x.dtype).contiguous()


def _torch_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int
) -> tuple[Tensor, ...]:
    planes, weight, bias = x.movedim(3, 0).contiguous(), weight.contiguous(), bias.contiguous()
    padded = _pad_planes(planes, size)
    accumulate = padded.dtype
    grad_out = grad.movedim(3, 0).to(accumulate).contiguous()
    grad_padded = torch.zeros_like(padded)
    hidden = hidden.contiguous()
    grad_hidden = torch.zeros_like(hidden, dtype=accumulate)
    grad_weight = torch.zeros_like(weight, dtype=accumulate)
    grad_bias = torch.zeros_like(bias, dtype=accumulate)

    for images, rows in _chunks(planes):
        views = _windows(padded[:, images], rows, planes.shape[3], size)
        grad_views = _windows(grad_padded[:, images], rows, planes.shape[3], size)
        inputs, grad = hidden[images, rows], grad_out[:, images, rows]
        flat_inputs = inputs.to(accumulate).flatten(0, 2)
        grad_inputs = grad_hidden[images, rows].flatten(0, 2)
        for k, (window, grad_window) in enumerate(zip(views, grad_views, strict=True)):
            kernel = F.linear(inputs, weight[k], bias[k]).to(accumulate)
            grad_window.addcmul_(grad, kernel)
            grad_kernel = (window * grad).sum(0).flatten(0, 2)
            grad_inputs.addmm_(grad_kernel, weight[k].to(accumulate))
            grad_weight[k].addmm_(grad_kernel.T, flat_inputs)
            grad_bias[k] += grad_kernel.sum(0)
    return inside(grad_padded.movedim(0, 3), x.shape, size), grad_hidden, grad_weight, grad_bias


def _by_rows(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """For export, :func:`_forward` by PyTorch's own operators."""
    groups = x.shape[3]
    weight, bias = (t.unflatten(0, (groups, size, size)) for t in (weight, bias))

    def kernels(row: int) -> Tensor:
        of_row = F.linear(hidden, weight[:, row].flatten(0, 1), bias[:, row].flatten())
        return of_row.unflatten(-1, (1, groups, size)).to(x.dtype)

    return sum_of_rows(promoted(x.mT), size, kernels).to(x.dtype).mT


def _pad_planes(planes: Tensor, size: int) -> Tensor:
    """Zero-pad H and W of ``(S, B, H, W, G)``, in the accumulation dtype."""
    return F.pad(promoted(planes), (0, 0, *same_padding(size), *same_padding(size)))


def _chunks(planes: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of images and rows to work on: a block of one image's rows on a CPU, else all."""
    number, batch, height, width, groups = planes.shape
    if planes.device.type != "cpu":
        yield slice(0, batch), slice(0, height)
        return
    rows = max(1, _CHUNK // max(1, number * width * groups))
    for b in range(batch):
        for start in range(0, height, rows):
            yield slice(b, b + 1), slice(start, min(start + rows, height))


def _windows(padded: Tensor, rows: slice, width: int, size: int) -> Iterator[Tensor]:
    """The views ``(S, B, rows, W, G)`` of padded planes that the taps multiply at those rows."""
    for row in range(size):
        for column in range(size):
            yield padded[:, :, rows.start + row : rows.stop + row, column : column + width]
