"""Depth-wise convolution by kernels given for every position, as involution and CARAFE have it."""

import torch
from torch import Tensor

from backbones.ops import native, reference
from backbones.ops.common import autocast_dtype, inside, pad, summed
from backbones.ops.dispatch import attempt, choose, exporting

_NAME = "inhomogeneous_aggregation"


def inhomogeneous_aggregation(x: Tensor, kernels: Tensor) -> Tensor:
    """Apply a kernel of its own at every position (equation 6 with the weights of 8).

    Kernels are K*K times as large as a map of G channels; where a matrix product predicts them,
    :func:`backbones.ops.inhomogeneous_dynamic_depthwise_conv` never stores them. Zero padding,
    stride 1.

    Args:
        x: ``(B, H, W, C)``.
        kernels: ``(B, H, W, G, K, K)``; channel ``c`` uses the kernel of group ``c // (C/G)``.

    Returns:
        ``(B, H, W, C)`` in the dtype of ``x``, or autocast's where it is on. Half precisions
        accumulate in float32.

    Raises:
        ValueError: kernels of another map, not square, or of groups that do not divide C.
    """
    if not torch.compiler.is_compiling():
        _check(x, kernels)
    groups, size = kernels.shape[3:5]
    dtype = autocast_dtype(x)
    x, kernels = x.to(dtype), kernels.to(dtype)
    if choose(_NAME, x, kernels) == "reference":
        return reference.aggregate(x, kernels)
    shared = x.unflatten(-1, (groups, -1)).transpose(-1, -2)
    given = kernels.flatten(-2)
    out = _by_taps(shared, given, size) if exporting() else _aggregate(shared, given, size)
    return out.transpose(-1, -2).flatten(-2)


def _check(x: Tensor, kernels: Tensor) -> None:
    # Not in a graph, which would tie the sizes of both for good.
    groups, rows, columns = kernels.shape[3:] if kernels.dim() == 6 else (0, 0, 0)
    if not groups or kernels.shape[:3] != x.shape[:3] or rows != columns or x.shape[3] % groups:
        raise ValueError(
            f"kernels of {tuple(kernels.shape)} for a map of {tuple(x.shape)}: (B, H, W, G, K, K) "
            "of the same B, H and W is needed, G a divisor of C"
        )


@torch.library.custom_op("dense::aggregate", mutates_args=())
def _aggregate(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    """``(B, H, W, S, G)`` by ``(B, H, W, G, K*K)``."""
    backend = choose(_NAME, x)
    if backend == "triton":
        args = x.contiguous(), kernels.contiguous(), size
        out = attempt(_NAME, lambda: _triton().aggregate(*args))
        if out is not None:
            return out
    if backend != "native":
        return _by_taps(summed(x), kernels, size).to(x.dtype).contiguous()
    padded = pad(summed(x), size)
    out = padded.new_empty(x.shape)
    native.call("aggregate", padded, summed(kernels), out, *x.shape, size)
    return out.to(x.dtype)


@torch.library.custom_op("dense::aggregate_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, kernels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    backend, grads = choose(_NAME, x), None
    if backend == "triton":
        args = grad.contiguous(), x.contiguous(), kernels.contiguous(), size
        grads = attempt(_NAME, lambda: _triton().aggregate_backward(*args))
    if grads is None:
        backward = _native_backward if backend == "native" else _torch_backward
        grads = backward(summed(grad), summed(x), kernels, size)
    return grads[0].to(x.dtype), grads[1].to(kernels.dtype)


def _native_backward(grad: Tensor, x: Tensor, kernels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    padded, kernels = pad(x, size), summed(kernels)
    grad_padded, grad_kernels = torch.zeros_like(padded), torch.empty_like(kernels)
    # At least K - 1 rows each.
    strips = max(1, min(64, x.shape[1] // max(1, size - 1)))
    native.call(
        "aggregate_backward",
        *(grad, padded, kernels, grad_padded, grad_kernels, strips, *x.shape, size),
    )
    return inside(grad_padded, x.shape, size), grad_kernels


def _torch_backward(grad: Tensor, x: Tensor, kernels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    padded = pad(x, size)
    grad_padded = torch.zeros_like(padded)
    grad_kernels = torch.empty_like(kernels, dtype=padded.dtype)
    windows = zip(_windows(padded, x, size), _windows(grad_padded, x, size), strict=True)
    for k, (window, grad_window) in enumerate(windows):
        grad_window.addcmul_(grad, kernels[..., None, :, k].to(grad.dtype))
        torch.sum(window * grad, 3, out=grad_kernels[..., k])
    return inside(grad_padded, x.shape, size), grad_kernels


def _by_taps(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    out = 0
    for k, window in enumerate(_windows(pad(x, size), x, size)):
        out = out + window * kernels[..., None, :, k].to(x.dtype)
    return out


def _windows(padded: Tensor, x: Tensor, size: int) -> list[Tensor]:
    """What each tap sees of a padded map."""
    height, width = x.shape[1:3]
    return [
        padded[:, row : row + height, column : column + width]
        for row in range(size)
        for column in range(size)
    ]


def _triton():
    from backbones.ops.triton_kernels import aggregation

    return aggregation


@_aggregate.register_fake
def _(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, kernels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), kernels.new_empty(kernels.shape)


def _save(ctx, inputs, output) -> None:
    x, kernels, ctx.size = inputs
    ctx.save_for_backward(x, kernels)


def _differentiate(ctx, grad: Tensor):
    backward = torch.ops.dense.aggregate_backward
    return *backward(grad, *ctx.saved_tensors, ctx.size), None


_aggregate.register_autograd(_differentiate, setup_context=_save)
