"""Depth-wise convolution with a given kernel at every position, as in involution and CARAFE."""

import torch
from torch import Tensor

from backbones.ops import native, reference
from backbones.ops.common import (
    autocast_dtype,
    inside,
    pad,
    promoted,
    register_backward,
    sum_of_rows,
    triton_kernels,
    windows,
)
from backbones.ops.dispatch import attempt, choose, exporting, operator

_NAME = "inhomogeneous_aggregation"


def inhomogeneous_aggregation(x: Tensor, kernels: Tensor) -> Tensor:
    """Depth-wise convolution with one kernel for each position and group of channels (equation 6).

    Zero padding, stride 1. ``kernels`` has K*K times the size of a map of G channels; if a linear
    layer predicts them, use :func:`backbones.ops.inhomogeneous_dynamic_depthwise_conv`, which never
    stores them.

    >>> inhomogeneous_aggregation(torch.ones(1, 5, 5, 4), torch.ones(1, 5, 5, 2, 3, 3)).shape
    torch.Size([1, 5, 5, 4])

    Args:
        x: ``(B, H, W, C)``.
        kernels: ``(B, H, W, G, K, K)``; channel ``c`` uses the kernel of group ``c // (C/G)``. On
            GPUs those with adjacent groups in memory, as a permuted ``(B, H, W, K, K, G)`` has
            them, are not copied.

    Returns:
        ``(B, H, W, C)`` in the dtype of ``x``, or of autocast if it is on. Half precisions
        accumulate in float32.

    Raises:
        ValueError: the kernels are for another B, H or W, are not square, or G does not divide C.
    """
    # In a compiled graph the check would specialise on the sizes.
    if not torch.compiler.is_compiling():
        _check(x, kernels)
    groups, size = kernels.shape[3:5]
    dtype = autocast_dtype(x)
    x, kernels = x.to(dtype), kernels.to(dtype)
    backend = choose(_NAME, x, kernels)
    if backend == "reference":
        return reference.aggregate(x, kernels)
    shared, given = x.unflatten(-1, (groups, -1)), kernels.flatten(-2)
    if backend == "triton" and given.stride(-2) != 1:
        # The layout that the Triton kernels read, for forward and backward pass at once.
        given = given.mT.contiguous().mT
    out = _by_rows(shared, given, size) if exporting() else _aggregate(shared, given, size)
    return out.flatten(-2)


def _check(x: Tensor, kernels: Tensor) -> None:
    groups, rows, columns = kernels.shape[3:] if kernels.dim() == 6 else (0, 0, 0)
    if not groups or kernels.shape[:3] != x.shape[:3] or rows != columns or x.shape[3] % groups:
        raise ValueError(
            f"kernels of {tuple(kernels.shape)} for a map of {tuple(x.shape)}: expected "
            "(B, H, W, G, K, K) with the B, H and W of the map and G a divisor of C"
        )


@operator("aggregate", _NAME)
def _aggregate(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    """``x`` is ``(B, H, W, G, S)`` with C = G*S, ``kernels`` ``(B, H, W, G, K*K)``."""
    backend, dtype = choose(_NAME, x), x.dtype
    if backend == "native":
        x, kernels = native.maps(x, kernels)
        out = torch.empty_like(x)
        native.call("aggregate", (x, kernels, out), (), (*_shape(x), size))
        return out.to(dtype)
    # The others' innermost axis is that of the groups, as in the kernels.
    x = x.mT
    if backend == "triton":
        args = x.contiguous(), kernels, size
        out = attempt(_NAME, lambda: triton_kernels("aggregation").aggregate(*args))
        if out is not None:
            return out.mT.contiguous()
    return _by_taps(promoted(x), kernels, size).to(dtype).mT.contiguous()


def _shape(x: Tensor) -> list[int]:
    """B, H, W, S and G of ``(B, H, W, G, S)``."""
    return [*x.shape[:3], x.shape[4], x.shape[3]]


@operator("aggregate_backward", _NAME)
def _backward(grad: Tensor, x: Tensor, kernels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    backend = choose(_NAME, x)
    if backend == "native":
        grads = _native_backward(grad, x, kernels, size)
        return grads[0].to(x.dtype), _laid_out_like(grads[1].to(kernels.dtype), kernels)
    grad, x, grads = grad.mT, x.mT, None
    if backend == "triton":
        args = grad.contiguous(), x.contiguous(), kernels, size
        grads = attempt(_NAME, lambda: triton_kernels("aggregation").aggregate_backward(*args))
    if grads is None:
        grads = _torch_backward(promoted(grad), promoted(x), kernels, size)
    grad_x = grads[0].to(x.dtype).mT.contiguous()
    return grad_x, _laid_out_like(grads[1].to(kernels.dtype), kernels)


def _laid_out_like(grad: Tensor, kernels: Tensor) -> Tensor:
    """``grad`` with the strides of ``empty_like(kernels)``, whichever backend computed it."""
    if grad.stride() == torch.empty_like(kernels, device="meta").stride():
        return grad
    return torch.empty_like(kernels).copy_(grad)


def _native_backward(grad: Tensor, x: Tensor, kernels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    x, grad, kernels = native.maps(x, grad, kernels)
    grad_x, grad_kernels = torch.empty_like(x), torch.empty_like(kernels)
    # Threads take strips of rows; each needs at least K - 1, the rows that it shares with the next.
    strips = max(1, min(64, x.shape[1] // max(1, size - 1)))
    maps = grad, x, kernels, grad_x, grad_kernels
    native.call("aggregate_backward", maps, (), (strips, *_shape(x), size))
    return grad_x, grad_kernels


def _torch_backward(grad: Tensor, x: Tensor, kernels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    padded = pad(x, size)
    grad_padded = torch.zeros_like(padded)
    grad_kernels = torch.empty_like(kernels, dtype=padded.dtype)
    views = zip(windows(padded, x.shape, size), windows(grad_padded, x.shape, size), strict=True)
    for k, (window, grad_window) in enumerate(views):
        grad_window.addcmul_(grad, kernels[..., None, :, k].to(grad.dtype))
        torch.sum(window * grad, 3, out=grad_kernels[..., k])
    return inside(grad_padded, x.shape, size), grad_kernels


def _by_taps(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    out = 0
    for k, window in enumerate(windows(pad(x, size), x.shape, size)):
        out = out + window * kernels[..., None, :, k].to(x.dtype)
    return out


def _by_rows(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    """For export."""
    taps = kernels.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (size, size))
    out = sum_of_rows(promoted(x.mT), size, lambda row: taps[:, :, :, None, :, row])
    return out.to(x.dtype).mT


@_aggregate.register_fake
def _(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, kernels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(kernels)


register_backward(_aggregate, torch.ops.dense.aggregate_backward)
