"""Attention (Swin) and learned static mixing (Swin-Local-MLP) inside shifted windows.

The C and Triton kernels gather, mix and scatter one window at a time: they store neither the rolled
map nor the windows nor the attention weights, which the backward pass computes again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.ops import native, reference
from backbones.ops.common import (
    autocast_dtype,
    constant,
    register_backward,
    triton_kernels,
    without_autocast,
)
from backbones.ops.dispatch import attempt, choose, exporting, operator
from backbones.ops.windows import Size, partition, region_mask, reverse, roll, surely

# Partial sums over windows times heads in the C kernels: enough tasks for many threads.
_PARTS = 128
# Positions of the largest window that the Triton kernels hold in registers.
_POSITIONS = 64


def window_attention(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size, shift: Size
) -> Tensor:
    """Multi-head self-attention inside (shifted) windows (equations 1 to 3).

    ``softmax(q k^T / sqrt(C / heads) + bias) v`` in each window. With a shift, positions that the
    roll brought together from opposite borders are masked from each other.

    >>> window_attention(torch.ones(1, 4, 4, 24), torch.zeros(2, 4, 4), 2, (2, 2), (1, 1)).shape
    torch.Size([1, 4, 4, 8])

    Args:
        qkv: ``(B, H, W, 3*C)``, query, key and value concatenated, each head-major; H and W are
            multiples of the window size.
        bias: ``(heads, N, N)`` relative position bias, N the positions of a window.
        num_heads: number of heads.
        window_size: rows and columns of a window.
        shift: rows and columns of the cyclic shift; 0 for an axis that one window covers.

    Returns:
        ``(B, H, W, C)``.
    """
    backend = choose("window_attention", qkv, bias)
    if backend == "native" or (backend == "triton" and _fits(window_size)):
        qkv = qkv.to(autocast_dtype(qkv))
        return torch.ops.dense.window_attention(qkv, bias, num_heads, [*window_size], [*shift])
    if backend == "reference" or exporting():
        return reference.window_attention(qkv, bias, num_heads, window_size, shift)
    return _plain_attention(qkv, bias, num_heads, window_size, shift)


def _plain_attention(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size, shift: Size
) -> Tensor:
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    query, key, value = _windows_of(qkv, num_heads, window_size, shift)
    bias = bias.to(query.dtype)
    if not _shifts(shift) and qkv.device.type == "cpu" and not torch.is_grad_enabled():
        # PyTorch's fused attention is faster than _Attend forward, slower backward.
        windows = (part.flatten(0, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(*windows, attn_mask=bias[None], scale=scale)
        out = out.unflatten(0, query.shape[:3])
    else:
        with without_autocast(qkv):
            masks = _masks(bias, window_size, shift)
            out = _Attend.apply(query * scale, key, value, bias, *masks)
    return _roll(reverse(out, window_size), shift, 1)


def _plain_attention_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size, shift: Size
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`_plain_attention` by formula: nothing is recorded in an operator."""
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    query, key, value = _windows_of(qkv, num_heads, window_size, shift)
    given = query * scale, key, value
    masks = _masks(bias.to(qkv.dtype), window_size, shift)
    weights, out = _attention(*given, bias.to(qkv.dtype), *masks)
    grad = partition(_roll(grad, shift, -1), window_size, num_heads)
    *grads, grad_bias = _attention_gradients(grad, *given, weights, out)
    grads[0] = grads[0] * scale
    # (B, nH, nW, 3 * heads, N, C/heads), as they were taken apart.
    grad_qkv = _roll(reverse(torch.stack(grads, 3).flatten(3, 4), window_size), shift, 1)
    return grad_qkv.contiguous(), grad_bias.to(bias.dtype)


def _windows_of(
    qkv: Tensor, num_heads: int, window_size: Size, shift: Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of each window, ``(B, nH, nW, heads, N, C/heads)``."""
    windows = partition(_roll(qkv, shift, -1), window_size, 3 * num_heads)
    return windows.unflatten(3, (3, num_heads)).unbind(3)


def _masks(bias: Tensor, window_size: Size, shift: Size) -> tuple[Tensor | None, ...]:
    return _seam_masks(tuple(window_size), tuple(shift), bias.device, bias.dtype)


def local_mlp(
    value: Tensor, weight: Tensor, bias: Tensor | None, window_size: Size, shift: Size
) -> Tensor:
    """Learned static mixing inside (shifted) windows: ``out = (weight + bias) v``.

    No query, key or softmax. With a shift, positions that the roll brought together from opposite
    borders have weight zero for each other.

    >>> weight, bias = torch.ones(2, 4, 4), torch.zeros(2, 4, 4)
    >>> local_mlp(torch.ones(1, 4, 4, 8), weight, bias, (2, 2), (1, 1)).shape
    torch.Size([1, 4, 4, 8])

    Args:
        value: ``(B, H, W, C)``, as the result; H and W are multiples of the window size.
        weight: ``(heads, N, N)`` for all windows, or ``(nH, nW, heads, N, N)`` with one for each
            window of the image; N is the positions of a window.
        bias: ``(heads, N, N)`` relative position bias, None if ``weight`` contains it.
        window_size: rows and columns of a window.
        shift: rows and columns of the cyclic shift; 0 for an axis that one window covers.
    """
    backend = choose("local_mlp", value, weight, bias)
    if backend == "reference":
        return reference.local_mlp(value, weight, bias, window_size, shift)
    mixing = weight if bias is None else weight + bias
    if backend == "native" or (backend == "triton" and _fits(window_size)):
        value = value.to(autocast_dtype(value))
        return torch.ops.dense.local_mlp(value, mixing, [*window_size], [*shift])
    return _plain_mix(value, mixing, window_size, shift)


def _plain_mix(value: Tensor, mixing: Tensor, window_size: Size, shift: Size) -> Tensor:
    if _shifts(shift):
        same_region = region_mask(*value.shape[1:3], window_size, shift, value.device)
        mixing = mixing * same_region[:, :, None]
    windows = partition(_roll(value, shift, -1), window_size, mixing.shape[-3])
    return _roll(reverse(mixing @ windows, window_size), shift, 1)


def _plain_mix_backward(
    grad: Tensor, value: Tensor, mixing: Tensor, window_size: Size, shift: Size
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`_plain_mix` by formula."""
    heads = mixing.shape[-3]
    grads, values = (partition(_roll(x, shift, -1), window_size, heads) for x in (grad, value))
    same_region = region_mask(*value.shape[1:3], window_size, shift, value.device)[:, :, None]
    back = (mixing * same_region).transpose(-2, -1) @ grads
    grad_mixing = (grads @ values.transpose(-2, -1) * same_region).sum(0)
    if mixing.dim() == 3:
        grad_mixing = grad_mixing.sum((0, 1))
    return _roll(reverse(back, window_size), shift, 1).contiguous(), grad_mixing


class _Attend(torch.autograd.Function):
    """:func:`_attention`, whose backward pass reuses its buffer of scores."""

    @staticmethod
    def forward(ctx, query, key, value, bias, rows: Tensor | None, columns: Tensor | None):
        weights, out = _attention(query, key, value, bias, rows, columns)
        ctx.save_for_backward(query, key, value, weights, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *_attention_gradients(grad, *ctx.saved_tensors), None, None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weights ``softmax(query key^T + bias + masks)``, one in-place buffer, and the result.

    ``rows`` masks the last row of windows, ``columns`` the last column; None masks nothing.
    """
    weights = query @ key.transpose(-2, -1)
    weights += bias
    # -inf is safe, no row is masked whole; Swin's -100 makes slow denormals.
    if rows is not None:
        weights[:, -1:] += rows
    if columns is not None:
        weights[:, :, -1:] += columns
    weights = weights.softmax(-1)
    return weights, weights @ value


def _attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of query, key, value and bias, given that of ``out``."""
    grad_value = weights.transpose(-2, -1) @ grad
    grad_scores = grad @ value.transpose(-2, -1)
    grad_scores -= (grad * out).sum(-1, keepdim=True)
    grad_scores *= weights
    grad_query, grad_key = grad_scores @ key, grad_scores.transpose(-2, -1) @ query
    return grad_query, grad_key, grad_value, grad_scores.sum((0, 1, 2))


@constant
def _seam_masks(
    window_size: Size, shift: Size, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """``(N, N)`` masks, 0 or -inf, of the last windows of each axis; None without a shift."""
    masks = []
    for along in ((shift[0], 0), (0, shift[1])):
        mask = None
        if _shifts(along):
            same = region_mask(*window_size, window_size, along, device)[0, 0]
            mask = torch.zeros_like(same, dtype=dtype).masked_fill(~same, float("-inf"))
        masks.append(mask)
    return tuple(masks)


def _roll(x: Tensor, shift: Size, sign: int) -> Tensor:
    if not _shifts(shift):
        return x
    return roll(x, (sign * shift[0], sign * shift[1]))


def _shifts(shift: Size) -> bool:
    """Whether ``shift`` is not known to be zero (symbolic sizes may leave it open)."""
    return not (surely(shift[0] == 0) and surely(shift[1] == 0))


def _fits(window_size: Size) -> bool:
    """Whether the Triton kernels support the window size."""
    return window_size[0] * window_size[1] <= _POSITIONS


@operator("window_attention", "window_attention")
def _attend(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int], shift: list[int]
) -> Tensor:
    backend, given = choose("window_attention", qkv), (num_heads, window_size, shift)
    if backend == "triton":
        args = qkv.contiguous(), bias.contiguous(), *given
        out = attempt("window_attention", lambda: triton_kernels("window").forward(*args))
        if out is not None:
            return out
    if backend != "native":
        return _plain_attention(qkv, bias, *given).contiguous()
    qkv_ = native.maps(qkv)
    out = qkv_.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    sizes = _sizes(out, num_heads, window_size, shift)
    native.call("window_attention", (qkv_, out), native.weights(qkv.dtype, bias), sizes)
    return out.to(qkv.dtype)


@operator("window_attention_backward", "window_attention")
def _attend_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    num_heads: int,
    window_size: list[int],
    shift: list[int],
) -> tuple[Tensor, Tensor]:
    backend, given = choose("window_attention", qkv), (num_heads, window_size, shift)
    if backend == "triton":
        args = grad.contiguous(), qkv.contiguous(), bias.contiguous(), *given
        own = attempt("window_attention", lambda: triton_kernels("window").backward(*args))
        if own is not None:
            return own[0], own[1].to(bias.dtype)
    if backend != "native":
        return _plain_attention_backward(grad, qkv, bias, *given)
    qkv_, grad_ = native.maps(qkv, grad)
    (bias_,) = native.weights(qkv.dtype, bias)
    windows = grad.shape[0] * _windows(grad, window_size)
    parts = bias_.new_empty(min(windows, max(1, _PARTS // num_heads)), *bias.shape)
    grad_qkv = torch.empty_like(qkv_)
    sizes = parts.shape[0], *_sizes(grad, num_heads, window_size, shift)
    maps = grad_, qkv_, grad_qkv
    native.call("window_attention_backward", maps, (bias_, parts), sizes)
    return grad_qkv.to(qkv.dtype), parts.sum(0).to(bias.dtype)


@operator("local_mlp", "local_mlp")
def _mix(value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]) -> Tensor:
    backend = choose("local_mlp", value)
    if backend == "triton":
        args = value.contiguous(), mixing.contiguous(), window_size, shift
        out = attempt("local_mlp", lambda: triton_kernels("local_mlp").forward(*args))
        if out is not None:
            return out
    if backend != "native":
        return _plain_mix(value, mixing.to(value.dtype), window_size, shift).contiguous()
    value_ = native.maps(value)
    out = torch.empty_like(value_)
    sizes = _step(mixing), *_sizes(value, mixing.shape[-3], window_size, shift)
    native.call("local_mlp", (value_, out), native.weights(value.dtype, mixing), sizes)
    return out.to(value.dtype)


@operator("local_mlp_backward", "local_mlp")
def _mix_backward(
    grad: Tensor, value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]
) -> tuple[Tensor, Tensor]:
    backend = choose("local_mlp", value)
    if backend == "triton":
        args = grad.contiguous(), value.contiguous(), mixing.contiguous(), window_size, shift
        own = attempt("local_mlp", lambda: triton_kernels("local_mlp").backward(*args))
        if own is not None:
            return own[0], own[1].to(mixing.dtype)
    if backend != "native":
        own = _plain_mix_backward(grad, value, mixing.to(value.dtype), window_size, shift)
        return own[0], own[1].to(mixing.dtype)
    value_, grad_ = native.maps(value, grad)
    (mixing_,) = native.weights(value.dtype, mixing)
    windows, heads = _windows(grad, window_size), mixing.shape[-3]
    chunks = windows if mixing.dim() == 5 else min(windows, max(1, _PARTS // heads))
    parts, grad_value = mixing_.new_empty(chunks, *mixing.shape[-3:]), torch.empty_like(value_)
    sizes = chunks, _step(mixing), *_sizes(grad, heads, window_size, shift)
    native.call("local_mlp_backward", (grad_, value_, grad_value), (mixing_, parts), sizes)
    grad_mixing = parts.view_as(mixing) if mixing.dim() == 5 else parts.sum(0)
    return grad_value.to(value.dtype), grad_mixing.to(mixing.dtype)


def _sizes(like: Tensor, num_heads: int, window_size: list[int], shift: list[int]) -> list[int]:
    """B, H, W, heads, channels of a head, window size, shift."""
    batch, height, width, channels = like.shape
    return [batch, height, width, num_heads, channels // num_heads, *window_size, *shift]


def _windows(x: Tensor, window_size: list[int]) -> int:
    return x.shape[1] // window_size[0] * (x.shape[2] // window_size[1])


def _step(mixing: Tensor) -> int:
    """Elements from one window's weights to the next window's, 0 if all share them."""
    return mixing[0, 0].numel() if mixing.dim() == 5 else 0


@_attend.register_fake
def _(qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int], shift: list[int]):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@_attend_backward.register_fake
def _(grad: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int], shift):
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


@_mix.register_fake
def _(value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]):
    return value.new_empty(value.shape)


@_mix_backward.register_fake
def _(grad: Tensor, value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]):
    return value.new_empty(value.shape), mixing.new_empty(mixing.shape)


register_backward(_attend, torch.ops.dense.window_attention_backward)
register_backward(_mix, torch.ops.dense.local_mlp_backward)
