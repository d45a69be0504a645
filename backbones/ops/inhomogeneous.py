"""Depth-wise convolution whose kernels are predicted at every position (I-D-DW-Conv).

The kernels are never stored. Tap after tap, one thin matrix product predicts the weights of that
tap for every position, they multiply the shifted map, and they are dropped; the backward pass
predicts them again. What stays in memory is the map, the C/4 map that the prediction reads, and a
handful of maps of the same size, whatever the kernel size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.ops.depthwise import autocast_dtype, same_padding

# Numbers of the map in a chunk on a CPU: the arrays that a tap touches then stay in its cache.
_CHUNK = 2**17


def inhomogeneous_dynamic_depthwise_conv(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel_size: int
) -> Tensor:
    """Predict a kernel for every position and group of channels, and apply it there.

    ``kernels = hidden @ weight.T + bias`` holds, position by position, ``K*K`` weights for each of
    G groups (group-major, as released checkpoints have them); the ``C/G`` channels ``c`` with
    ``c // (C/G) == g`` share the kernel of group ``g``. Zero padding, stride 1, no output bias.

    Args:
        x: ``(B, H, W, C)``, what is convolved.
        hidden: ``(B, H, W, D)``, what the kernels are predicted from.
        weight: ``(G*K*K, D)``.
        bias: ``(G*K*K,)``.
        kernel_size: K.

    Returns:
        ``(B, H, W, C)`` in the dtype of ``x``, or autocast's where it is on. Half precisions
        accumulate in float32.

    Raises:
        ValueError: ``weight`` does not hold K*K taps for a number of groups that divides C.
    """
    taps = kernel_size**2
    groups, rest = divmod(weight.shape[0], taps)
    if rest or x.shape[-1] % groups:
        raise ValueError(
            f"weight of {weight.shape[0]} rows predicts no {kernel_size}x{kernel_size} kernels for "
            f"groups of {x.shape[-1]} channels: it needs groups*{taps} rows, groups a divisor of "
            f"{x.shape[-1]}"
        )
    dtype = autocast_dtype(x)
    # (taps, G, D): each tap's prediction is one contiguous matrix.
    weight = weight.to(dtype).reshape(groups, taps, -1).transpose(0, 1).contiguous()
    bias = bias.to(dtype).reshape(groups, taps).T.contiguous()
    # (C/G, B, H, W, G): a shifted row of one plane is one contiguous run of W*G numbers.
    planes = x.to(dtype).unflatten(-1, (groups, -1)).movedim(-1, 0).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        out = _PredictAndAggregate.apply(planes, hidden.to(dtype), weight, bias, kernel_size)
    return out.movedim(0, -1).flatten(-2)


class _PredictAndAggregate(torch.autograd.Function):
    """``out[s, p] = sum over taps k of planes[s, p + k] * (hidden[p] @ weight[k].T + bias[k])``."""

    @staticmethod
    def forward(ctx, planes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int):
        ctx.save_for_backward(planes, hidden, weight, bias)
        ctx.size = size
        padded = _pad(planes, size)
        out = torch.zeros_like(planes, dtype=padded.dtype)
        for images, rows in _chunks(planes):
            windows = _windows(padded[:, images], rows, planes.shape[3], size)
            for k, window in enumerate(windows):
                kernel = F.linear(hidden[images, rows], weight[k], bias[k])
                out[:, images, rows].addcmul_(window, kernel.to(out.dtype))
        return out.to(planes.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        planes, hidden, weight, bias = ctx.saved_tensors
        padded = _pad(planes, ctx.size)
        accumulate = padded.dtype
        grad_out = grad_out.to(accumulate).contiguous()
        grad_padded = torch.zeros_like(padded)
        grad_hidden = torch.zeros_like(hidden, dtype=accumulate)
        grad_weight = torch.zeros_like(weight, dtype=accumulate)
        grad_bias = torch.zeros_like(bias, dtype=accumulate)

        for images, rows in _chunks(planes):
            windows = _windows(padded[:, images], rows, planes.shape[3], ctx.size)
            grad_windows = _windows(grad_padded[:, images], rows, planes.shape[3], ctx.size)
            inputs, grad = hidden[images, rows], grad_out[:, images, rows]
            flat_inputs = inputs.to(accumulate).flatten(0, 2)
            grad_inputs = grad_hidden[images, rows].flatten(0, 2)
            for k, (window, grad_window) in enumerate(zip(windows, grad_windows, strict=True)):
                kernel = F.linear(inputs, weight[k], bias[k]).to(accumulate)
                grad_window.addcmul_(grad, kernel)
                grad_kernel = (window * grad).sum(0).flatten(0, 2)
                grad_inputs.addmm_(grad_kernel, weight[k].to(accumulate))
                grad_weight[k].addmm_(grad_kernel.T, flat_inputs)
                grad_bias[k] += grad_kernel.sum(0)

        left = same_padding(ctx.size)[0]
        height, width = planes.shape[2:4]
        grad_planes = grad_padded[:, :, left : left + height, left : left + width]
        return (
            grad_planes.to(planes.dtype),
            grad_hidden.to(hidden.dtype),
            grad_weight.to(weight.dtype),
            grad_bias.to(bias.dtype),
            None,
        )


def _pad(planes: Tensor, size: int) -> Tensor:
    """``(S, B, H, W, G)`` with zeros around it, in the dtype that the taps are summed in."""
    accumulate = torch.promote_types(planes.dtype, torch.float32)
    return F.pad(planes.to(accumulate), (0, 0, *same_padding(size), *same_padding(size)))


def _chunks(planes: Tensor) -> Iterator[tuple[slice, slice]]:
    """What to work on at a time: blocks of one image's rows on a CPU, else everything."""
    number, batch, height, width, groups = planes.shape
    if planes.device.type != "cpu":
        yield slice(0, batch), slice(0, height)
        return
    rows = max(1, _CHUNK // max(1, number * width * groups))
    for b in range(batch):
        for start in range(0, height, rows):
            yield slice(b, b + 1), slice(start, min(start + rows, height))


def _windows(padded: Tensor, rows: slice, width: int, size: int) -> Iterator[Tensor]:
    """The views ``(S, B, rows, W, G)`` of padded images that the taps see at those rows."""
    for row in range(size):
        for column in range(size):
            yield padded[:, :, rows.start + row : rows.stop + row, column : column + width]
