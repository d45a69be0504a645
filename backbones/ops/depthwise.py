"""Depth-wise convolution: static (learned kernels) and dynamic (kernels predicted per image)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from backbones.ops import native, reference
from backbones.ops.common import (
    autocast_dtype,
    same_padding,
    sum_of_rows,
    triton_kernels,
)
from backbones.ops.dispatch import (
    attempt,
    choose,
    exporting,
    fixes_groups,
    keeps_operators,
    operator,
)

# Static and dynamic share one implementation; static has a kernel batch of 1.
_NAME = "dynamic_depthwise_conv"


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depth-wise convolution with zero padding and stride 1, same output size for any K.

    >>> depthwise_conv(torch.ones(1, 5, 5, 4), torch.ones(4, 1, 3, 3)).shape
    torch.Size([1, 5, 5, 4])

    Args:
        x: ``(B, H, W, C)``, as the result.
        weight: ``(C, 1, K, K)``, the layout of ``nn.Conv2d(C, C, K, groups=C)``.
        bias: ``(C,)`` or None.
    """
    backend = choose("depthwise_conv", x, weight, bias)
    if backend in ("native", "triton") and _suits(x, weight):
        return _own(x, weight[None, :, 0], bias)
    if backend == "reference":
        return reference.depthwise_conv(x, weight, bias)
    return _static(x, weight, bias)


def _static(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels, _, height, width = weight.shape
    x = x.permute(0, 3, 1, 2)
    # Padded beforehand, a map is never a single position, for which a graph would get a guard.
    if height % 2 and width % 2 and not exporting():
        out = F.conv2d(x, weight, bias, padding=(height // 2, width // 2), groups=channels)
    else:
        x = F.pad(x, (*same_padding(width), *same_padding(height)))
        out = F.conv2d(x, weight, bias, groups=channels)
    return out.permute(0, 2, 3, 1)


def dynamic_depthwise_conv(x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depth-wise convolution with its own kernels for each image (D-DW-Conv).

    Zero padding, stride 1.

    >>> dynamic_depthwise_conv(torch.ones(2, 5, 5, 4), torch.ones(2, 4, 3, 3)).shape
    torch.Size([2, 5, 5, 4])

    Args:
        x: ``(B, H, W, C)``, as the result.
        kernels: ``(B, C, K, K)``, one kernel for each image and channel.
        bias: ``(C,)`` or None.
    """
    backend = choose("dynamic_depthwise_conv", x, kernels, bias)
    if backend in ("native", "triton") and _suits(x, kernels):
        return _own(x, kernels, bias)
    if backend == "reference":
        return reference.dynamic_depthwise_conv(x, kernels, bias)
    if exporting():
        if keeps_operators() and _suits(x, kernels):
            return _own(x, kernels, bias)
        return (_by_rows if fixes_groups() else _grouped)(x, kernels, bias)
    return (_grouped if x.shape[0] else _by_rows)(x, kernels, bias)


def _grouped(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    batch, height, width, channels = x.shape
    size = kernels.shape[-1]
    # The batch becomes channels: one convolution with B*C groups.
    x = F.pad(x.permute(0, 3, 1, 2), (*same_padding(size), *same_padding(size)))
    x = x.reshape(1, batch * channels, *x.shape[-2:])
    weight = kernels.reshape(batch * channels, 1, size, size).to(x.dtype)
    out = F.conv2d(x, weight, groups=batch * channels)
    out = out.reshape(batch, channels, height, width).permute(0, 2, 3, 1)
    return out if bias is None else out + bias.to(out.dtype)


def _by_rows(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """Where a number of groups would be fixed, and for 0 images, which a convolution refuses."""
    taps = kernels.to(x.dtype)[:, None, None, None]
    out = sum_of_rows(x[:, :, :, None], kernels.shape[-1], lambda row: taps[..., row, :]).squeeze(3)
    return out if bias is None else out + bias.to(x.dtype)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the C and Triton kernels support it: square kernels, not complex."""
    return weight.shape[-1] == weight.shape[-2] and x.dtype != torch.complex64


def _own(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """By the C or Triton kernels; ``kernels`` is ``(B or 1, C, K, K)``."""
    taps = kernels.flatten(2).transpose(1, 2)
    return torch.ops.dense.depthwise(x.to(autocast_dtype(x)), taps, bias, kernels.shape[-1])


@operator("depthwise", _NAME)
def _depthwise(x: Tensor, taps: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """``x`` is ``(B, H, W, C)``, ``taps`` ``(B or 1, K*K, C)``, which may be of a wider dtype."""
    backend = choose(_NAME, x)
    if backend == "native":
        return _run(native.maps(x), taps, bias, size, flip=False).to(x.dtype)
    taps, bias = taps.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if backend == "triton":
        args = x.contiguous(), taps.contiguous(), bias, size, same_padding(size)[0], False
        out = attempt(_NAME, lambda: triton_kernels("depthwise").convolve(*args))
        if out is not None:
            return out
    return _plain(x, taps, bias, size).contiguous()


@operator("depthwise_backward", _NAME)
def _depthwise_backward(
    grad: Tensor, x: Tensor, taps: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    grad_bias = grad.sum((0, 1, 2), dtype=torch.promote_types(grad.dtype, torch.float32))
    backend, own = choose(_NAME, x), None
    if backend == "native":
        own = _native_backward(grad, x, taps, size)
    elif backend == "triton":
        own = attempt(_NAME, lambda: _triton_backward(grad, x, taps.to(x.dtype), size))
    if own is None:
        own = _plain_backward(grad, x, taps.to(x.dtype), size)
    return own[0].to(x.dtype), own[1].to(taps.dtype), grad_bias.to(taps.dtype)


def _native_backward(grad: Tensor, x: Tensor, taps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    grad, x = native.maps(grad, x)
    grad_x = _run(grad, taps, None, size, flip=True)
    grad_taps = torch.zeros(taps.shape, dtype=native.sums(x.dtype))
    sizes = *x.shape, size, same_padding(size)[0], _step(taps)
    native.call("depthwise_weight", (x, grad), (grad_taps,), sizes)
    return grad_x, grad_taps


def _triton_backward(grad: Tensor, x: Tensor, taps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    kernels, (before, after) = triton_kernels("depthwise"), same_padding(size)
    grad_x = kernels.convolve(grad, taps.contiguous(), None, size, after, True)
    return grad_x, kernels.weight_gradient(x.contiguous(), grad, taps.shape[0], size, before)


def _plain(x: Tensor, taps: Tensor, bias: Tensor | None, size: int) -> Tensor:
    kernels = taps.transpose(1, 2).unflatten(2, (size, size))
    if taps.shape[0] == 1:
        return _static(x, kernels.transpose(0, 1), bias)
    return (_grouped if x.shape[0] else _by_rows)(x, kernels, bias)


def _plain_backward(grad: Tensor, x: Tensor, taps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`_plain` by formula: nothing is recorded inside of an operator."""
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(taps)
    batch, height, width, channels = x.shape
    kernels = taps.shape[0]
    # As in _grouped: the images that have kernels of their own become channels.
    shape = batch // kernels, kernels * channels
    padded = F.pad(x.permute(0, 3, 1, 2), (*same_padding(size), *same_padding(size)))
    padded = padded.reshape(*shape, *padded.shape[-2:])
    grad = grad.permute(0, 3, 1, 2).reshape(*shape, height, width)
    weight = taps.transpose(1, 2).reshape(shape[1], 1, size, size)
    grad_x = conv2d_input(padded.shape, weight, grad, groups=shape[1])
    grad_taps = conv2d_weight(padded, weight.shape, grad, groups=shape[1])
    first = same_padding(size)[0]
    grad_x = grad_x[..., first : first + height, first : first + width]
    grad_x = grad_x.reshape(batch, channels, height, width).permute(0, 2, 3, 1).contiguous()
    return grad_x, grad_taps.reshape(kernels, channels, size**2).transpose(1, 2).contiguous()


def _run(x: Tensor, taps: Tensor, bias: Tensor | None, size: int, flip: bool) -> Tensor:
    """By C; ``flip`` reverses the taps, for the gradient of the map."""
    out = torch.empty_like(x)
    given = native.weights(x.dtype, taps, *(() if bias is None else (bias,)))
    sizes = *x.shape, size, same_padding(size)[flip], _step(taps), int(flip)
    native.call("depthwise", (x, out), (*given, None)[:2], sizes)
    return out


def _step(taps: Tensor) -> int:
    """Elements from one image's kernels to the next image's, 0 if all share them."""
    return taps[0].numel() if taps.shape[0] > 1 else 0


@_depthwise.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor | None, size: int) -> Tensor:
    return x.new_empty(x.shape)


@_depthwise_backward.register_fake
def _(grad: Tensor, x: Tensor, taps: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), taps.new_empty(taps.shape), taps.new_empty(x.shape[-1:])


def _save(ctx, inputs, output) -> None:
    x, taps, bias, ctx.size = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, taps)


def _differentiate(ctx, grad: Tensor):
    grad_x, grad_taps, grad_bias = torch.ops.dense.depthwise_backward(
        grad, *ctx.saved_tensors, ctx.size
    )
    return grad_x, grad_taps, grad_bias if ctx.biased else None, None


_depthwise.register_autograd(_differentiate, setup_context=_save)
