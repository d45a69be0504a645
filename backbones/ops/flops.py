"""FLOP formulas of the operators.

They are registered with ``torch.utils.flop_counter`` for the custom operators in the ``dense``
namespace. Counters that trace Python calls, such as fvcore's, find the cost of each public operator
in :data:`MULTIPLY_ADDS`.
"""

from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

# These modules define the custom operators.
from backbones.ops import aggregation, depthwise, inhomogeneous, sliding, window  # noqa: F401

Shape = tuple[int, ...]


def _attention(qkv: Shape, bias: Shape, *_, products: int = 2, **__) -> int:
    """``q k^T`` and ``weights v``: two products of N*C multiply-adds at each position.

    The bias is ``(heads, N, N)`` of windows, ``(heads, N)`` of sliding ones.
    """
    return prod(qkv[:-1]) * products * bias[-1] * (qkv[-1] // 3)


def _convolutional_attention(
    qkv: Shape,
    bias: Shape,
    num_heads: int,
    window_size: Shape,
    theta: Shape | None = None,
    kernel: Shape | None = None,
) -> int:
    """Sliding attention, a key of its own for each offset, and 3x3 taps on each logit."""
    positions, logits = prod(qkv[:-1]), prod(bias)
    more = positions * prod(theta) if theta else 0
    return _attention(qkv, bias) + more + (positions * logits * 9 if kernel else 0)


def _local_mlp(value: Shape, weight: Shape, *_, **__) -> int:
    return prod(value[:-1]) * weight[-1] * value[-1]


def _convolution(x: Shape, kernels: Shape, *_, **__) -> int:
    """Kernels ``(..., K, K)``."""
    return prod(x) * kernels[-2] * kernels[-1]


def _inhomogeneous(x: Shape, hidden: Shape, weight: Shape, bias: Shape, size: int, **_) -> int:
    return prod(x[:-1]) * prod(weight) + prod(x) * size**2


MULTIPLY_ADDS: dict[str, Callable[..., int]] = {
    "window_attention": _attention,
    "sliding_attention": _attention,
    "convolutional_attention": _convolutional_attention,
    "local_mlp": _local_mlp,
    "depthwise_conv": _convolution,
    "dynamic_depthwise_conv": _convolution,
    "inhomogeneous_aggregation": _convolution,
    "inhomogeneous_dynamic_depthwise_conv": _inhomogeneous,
}
"""Multiply-adds of each operator in :mod:`backbones.ops`, from the shapes of its arguments."""


def _taps(x: Shape, *rest) -> int:
    """``x`` is ``(B, H, W, C)`` or ``(B, H, W, S, G)``, the last argument K."""
    return prod(x) * rest[-1] ** 2


def _predict_and_aggregate(x: Shape, hidden: Shape, weight: Shape, *rest) -> int:
    return prod(x[:3]) * prod(weight) + _taps(x, *rest)


def _predict_and_aggregate_backward(_, x: Shape, hidden: Shape, weight: Shape, *rest) -> int:
    """Three products (kernels, gradients of hidden and weight) and two aggregations."""
    return 3 * prod(x[:3]) * prod(weight) + 2 * _taps(x, *rest)


# Multiply-adds of the custom operators; backward passes include what they recompute.
_OF_OPERATORS: dict[str, Callable[..., int]] = {
    "window_attention": _attention,
    "window_attention_backward": lambda _, *args: _attention(*args, products=5),
    "sliding_attention": _attention,
    "sliding_attention_backward": lambda _, *args: _attention(*args, products=5),
    "local_mlp": _local_mlp,
    "local_mlp_backward": lambda _, *args: 2 * _local_mlp(*args),
    "depthwise": _taps,
    "depthwise_backward": lambda _, *args: 2 * _taps(*args),
    "aggregate": _taps,
    "aggregate_backward": lambda _, *args: 2 * _taps(*args),
    "predict_and_aggregate": _predict_and_aggregate,
    "predict_and_aggregate_backward": _predict_and_aggregate_backward,
}


def _register(name: str, multiply_adds: Callable[..., int]) -> None:
    @register_flop_formula(getattr(torch.ops.dense, name))
    def flops(*args, out_shape=None, **kwargs) -> int:
        return 2 * multiply_adds(*args)


for _name, _formula in _OF_OPERATORS.items():
    _register(_name, _formula)
