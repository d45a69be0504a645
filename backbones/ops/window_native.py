"""Attention and static mixing inside shifted windows by kernels: in C for a CPU, Triton for GPUs.

A window at a time is gathered, mixed and scattered: neither the shifted map nor its windows nor
their weights are ever in memory as a whole, and the backward pass computes the weights again.
"""

import torch
from torch import Tensor

from backbones.ops import native, reference
from backbones.ops.dispatch import attempt, choose
from backbones.ops.layout import autocast_dtype

# Parts of a sum over windows, times heads: enough for the threads of a large machine.
_PARTS = 128
# Positions of the largest window whose weights the Triton kernels hold in registers.
_POSITIONS = 64


def fits(window_size: tuple[int, int]) -> bool:
    """Whether the Triton kernels take windows of so many rows and columns."""
    return window_size[0] * window_size[1] <= _POSITIONS


def window_attention(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """:func:`backbones.ops.window_attention`."""
    qkv = qkv.to(autocast_dtype(qkv))
    return torch.ops.dense.window_attention(qkv, bias, num_heads, [*window_size], [*shift])


def local_mlp(
    value: Tensor, mixing: Tensor, window_size: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """:func:`backbones.ops.local_mlp` with weight and bias added up in ``mixing``."""
    value = value.to(autocast_dtype(value))
    return torch.ops.dense.local_mlp(value, mixing, [*window_size], [*shift])


@torch.library.custom_op("dense::window_attention", mutates_args=())
def _attend(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int], shift: list[int]
) -> Tensor:
    sizes = num_heads, window_size, shift
    if choose("window_attention", qkv) == "triton":
        args = qkv.contiguous(), bias.contiguous(), *sizes
        out = attempt("window_attention", lambda: _triton().forward(*args))
        if out is not None:
            return out
    if qkv.device.type != "cpu":
        return reference.window_attention(qkv, bias, *sizes).contiguous()
    qkv_, bias_ = _summed(qkv, bias)
    out = qkv_.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    sizes = _sizes(out, num_heads, window_size, shift)
    native.call("window_attention", qkv_, bias_, out, *sizes)
    return out.to(qkv.dtype)


@torch.library.custom_op("dense::window_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    num_heads: int,
    window_size: list[int],
    shift: list[int],
) -> tuple[Tensor, Tensor]:
    given = num_heads, window_size, shift
    if choose("window_attention", qkv) == "triton":
        args = grad.contiguous(), qkv.contiguous(), bias.contiguous(), *given
        own = attempt("window_attention", lambda: _triton().backward(*args))
        if own is not None:
            return own[0], own[1].to(bias.dtype)
    if qkv.device.type != "cpu":
        with torch.enable_grad():
            leaves = [qkv.detach().requires_grad_(), bias.detach().requires_grad_()]
            out = reference.window_attention(*leaves, *given)
            return torch.autograd.grad(out, leaves, grad)
    grad_, qkv_, bias_ = _summed(grad, qkv, bias)
    windows = grad.shape[0] * _windows(grad, window_size)
    parts = grad_.new_empty(min(windows, max(1, _PARTS // num_heads)), *bias.shape)
    grad_qkv = torch.empty_like(qkv_)
    sizes = _sizes(grad, num_heads, window_size, shift)
    native.call(
        "window_attention_backward", grad_, qkv_, bias_, grad_qkv, parts, parts.shape[0], *sizes
    )
    return grad_qkv.to(qkv.dtype), parts.sum(0).to(bias.dtype)


@torch.library.custom_op("dense::local_mlp", mutates_args=())
def _mix(value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]) -> Tensor:
    if choose("local_mlp", value) == "triton":
        args = value.contiguous(), mixing.contiguous(), window_size, shift
        out = attempt("local_mlp", lambda: _triton_local_mlp().forward(*args))
        if out is not None:
            return out
    if value.device.type != "cpu":
        return _plain_mix(value, mixing, window_size, shift).contiguous()
    value_, mixing_ = _summed(value, mixing)
    out = torch.empty_like(value_)
    sizes = _sizes(value, mixing.shape[-3], window_size, shift)
    native.call("local_mlp", value_, mixing_, out, _step(mixing), *sizes)
    return out.to(value.dtype)


@torch.library.custom_op("dense::local_mlp_backward", mutates_args=())
def _mix_backward(
    grad: Tensor, value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]
) -> tuple[Tensor, Tensor]:
    if choose("local_mlp", value) == "triton":
        args = grad.contiguous(), value.contiguous(), mixing.contiguous(), window_size, shift
        own = attempt("local_mlp", lambda: _triton_local_mlp().backward(*args))
        if own is not None:
            return own[0], own[1].to(mixing.dtype)
    if value.device.type != "cpu":
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_(), mixing.detach().requires_grad_()]
            out = _plain_mix(*leaves, window_size, shift)
            return torch.autograd.grad(out, leaves, grad)
    grad_, value_, mixing_ = _summed(grad, value, mixing)
    windows, heads = _windows(grad, window_size), mixing.shape[-3]
    chunks = windows if mixing.dim() == 5 else min(windows, max(1, _PARTS // heads))
    parts, grad_value = grad_.new_empty(chunks, *mixing.shape[-3:]), torch.empty_like(value_)
    sizes = _sizes(grad, heads, window_size, shift)
    native.call(
        "local_mlp_backward",
        *(grad_, value_, mixing_, grad_value, parts, chunks, _step(mixing)),
        *sizes,
    )
    grad_mixing = parts.view_as(mixing) if mixing.dim() == 5 else parts.sum(0)
    return grad_value.to(value.dtype), grad_mixing.to(mixing.dtype)


def _triton():
    from backbones.ops.triton_kernels import window

    return window


def _triton_local_mlp():
    from backbones.ops.triton_kernels import local_mlp

    return local_mlp


def _plain_mix(value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]) -> Tensor:
    mixing = mixing.to(value.dtype)
    return reference.local_mlp(value, mixing, mixing.new_zeros(()), window_size, shift)


def _summed(first: Tensor, *others: Tensor) -> list[Tensor]:
    """Contiguous, in the dtype that the first one's sums are kept in."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    return [x.to(dtype).contiguous() for x in (first, *others)]


def _sizes(like: Tensor, num_heads: int, window_size: list[int], shift: list[int]) -> list[int]:
    """B, H, W, heads, D, the window and the shift."""
    batch, height, width, channels = like.shape
    return [batch, height, width, num_heads, channels // num_heads, *window_size, *shift]


def _windows(x: Tensor, window_size: list[int]) -> int:
    return x.shape[1] // window_size[0] * (x.shape[2] // window_size[1])


def _step(mixing: Tensor) -> int:
    """Numbers from one window's weights to the next one's, 0 where all share them."""
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


def _save(ctx, inputs, output) -> None:
    first, second, *ctx.sizes = inputs
    ctx.save_for_backward(first, second)


def _differentiate_attention(ctx, grad: Tensor):
    backward = torch.ops.dense.window_attention_backward
    return *backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None


def _differentiate_mixing(ctx, grad: Tensor):
    backward = torch.ops.dense.local_mlp_backward
    return *backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None


_attend.register_autograd(_differentiate_attention, setup_context=_save)
_mix.register_autograd(_differentiate_mixing, setup_context=_save)
