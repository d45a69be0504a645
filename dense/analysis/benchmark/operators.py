"""The operators of :mod:`backbones.ops` at the first stage of a tiny network, beside alternatives.

Inputs are in the preferred memory layout of each implementation; conversion is not timed.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import ops
from backbones.ops.windows import partition, region_mask, reverse
from dense.analysis.benchmark.measure import Contender, Contest, Step

# Batch, height, width of the feature map: 8 images of 224x224, and one of 800x1344.
SHAPES = ((8, 56, 56), (1, 200, 336))
# The third stage at 224x224, where sliding attention has windows of half the map.
DEEP = (8, 14, 14)
CHANNELS, HEADS, GROUPS, KERNEL, WINDOW = 96, 3, 32, 7, (7, 7)
TAPS = KERNEL**2
POSITIONS = WINDOW[0] * WINDOW[1]
Function = Callable[..., Tensor]


def contests(device: torch.device, modes: Sequence[str]) -> list[Contest]:
    """Every operator at both shapes, in inference (forward) and training (forward and backward)."""
    found = []
    for shape in SHAPES:
        for make in OPERATORS:
            found += _contests(make(*shape, device), shape, CHANNELS, modes)
    deep = _sliding(*DEEP, device, channels=4 * CHANNELS)
    return found + _contests(deep, DEEP, 4 * CHANNELS, modes)


def _contests(
    made: tuple[str, dict], shape: tuple[int, int, int], channels: int, modes: Sequence[str]
) -> list[Contest]:
    (name, functions), (images, height, width) = made, shape
    found = []
    for mode in modes:
        what = "forward" if mode == "inference" else "forward + backward"
        contenders = tuple(
            Contender(label, _builder(prepare, mode), ours=label.startswith("ours"))
            for label, prepare in functions.items()
        )
        title = f"{name}, {what}, {images}x{channels}x{height}x{width}"
        found.append(Contest("operators", title, contenders, images, images * height * width))
    return found


def _builder(prepare: Callable[[], tuple[Function, list[Tensor]]], mode: str):
    def build() -> Step:
        torch.manual_seed(0)
        function, inputs = prepare()

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        if mode == "inference":
            return forward
        leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
        grad = torch.randn_like(forward())

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*inputs), leaves, grad)

        return both

    return build


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, device=device, dtype=_dtype(device))


def _inhomogeneous(images: int, height: int, width: int, device: torch.device):
    hidden = CHANNELS // 4
    shape = (images, height, width)

    def inputs() -> list[Tensor]:
        return [
            _random(device, *shape, CHANNELS),
            _random(device, *shape, hidden),
            _random(device, GROUPS * TAPS, hidden, scale=hidden**-0.5),
            _random(device, GROUPS * TAPS),
        ]

    def channels_first() -> list[Tensor]:
        x, t, weight, bias = inputs()
        x, t = (v.permute(0, 3, 1, 2).contiguous() for v in (x, t))
        return [x, t, weight[:, :, None, None], bias]

    def materialised(x: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _summed(x, F.conv2d(t, weight, bias).unflatten(1, (GROUPS, 1, TAPS)))

    def unfolded(x: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _unfolded(x, F.conv2d(t, weight, bias).unflatten(1, (GROUPS, 1, TAPS)))

    ours = partial(ops.inhomogeneous_dynamic_depthwise_conv, kernel_size=KERNEL)

    def carafe(x: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from mmcv.ops import carafe_naive

        kernels = F.conv2d(t, weight, bias)
        return carafe_naive(x.float(), kernels.float(), KERNEL, GROUPS, 1)

    functions = {
        "conv2d 1x1, then its 49 taps summed": lambda: (materialised, channels_first()),
        "conv2d 1x1, then unfold": lambda: (unfolded, channels_first()),
        "ours": lambda: (ours, inputs()),
    }
    if device.type == "cuda":  # it needs mmcv compiled for CUDA
        functions["conv2d 1x1, then mmcv carafe_naive"] = lambda: (carafe, channels_first())
    return "I-D-DW-Conv with its kernels' prediction", functions


def _aggregation(images: int, height: int, width: int, device: torch.device):
    shape = (images, height, width)

    def inputs() -> list[Tensor]:
        kernels = _random(device, *shape, GROUPS, KERNEL, KERNEL, scale=1 / KERNEL)
        return [_random(device, *shape, CHANNELS), kernels]

    def channels_first() -> list[Tensor]:
        x, kernels = inputs()
        kernels = kernels.flatten(4).permute(0, 3, 4, 1, 2)[:, :, None].contiguous()
        return [x.permute(0, 3, 1, 2).contiguous(), kernels]

    functions = {
        "its 49 taps summed": lambda: (_summed, channels_first()),
        "unfold": lambda: (_unfolded, channels_first()),
        "ours": lambda: (ops.inhomogeneous_aggregation, inputs()),
    }
    return "aggregation by kernels that are given", functions


def _summed(x: Tensor, kernels: Tensor) -> Tensor:
    return _SumOfTaps.apply(x.unflatten(1, (GROUPS, -1)), kernels).flatten(1, 2)


def _unfolded(x: Tensor, kernels: Tensor) -> Tensor:
    windows = F.unfold(x, KERNEL, padding=KERNEL // 2).unflatten(1, (GROUPS, -1, TAPS))
    return (windows * kernels.flatten(-2)).sum(3).unflatten(-1, x.shape[2:]).flatten(1, 2)


class _SumOfTaps(torch.autograd.Function):
    """Aggregate ``(B, G, S, H, W)`` with kernels ``(B, G, 1, K*K, H, W)``, one tap at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        padded = F.pad(x, [KERNEL // 2] * 4)
        out = torch.zeros_like(x)
        for k, window in enumerate(_windows(padded, x)):
            out.addcmul_(window, kernels[:, :, :, k])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, kernels = ctx.saved_tensors
        padded = F.pad(x, [KERNEL // 2] * 4)
        grad_padded, grad_kernels = torch.zeros_like(padded), torch.empty_like(kernels)
        pairs = zip(_windows(padded, x), _windows(grad_padded, x), strict=True)
        for k, (window, grad_window) in enumerate(pairs):
            grad_window.addcmul_(grad, kernels[:, :, :, k])
            grad_kernels[:, :, 0, k] = (window * grad).sum(2)
        margin = KERNEL // 2
        return grad_padded[..., margin:-margin, margin:-margin], grad_kernels


def _windows(padded: Tensor, x: Tensor):
    height, width = x.shape[-2:]
    for row in range(KERNEL):
        for column in range(KERNEL):
            yield padded[..., row : row + height, column : column + width]


def _dynamic(images: int, height: int, width: int, device: torch.device):
    def inputs() -> list[Tensor]:
        return [
            _random(device, images, height, width, CHANNELS),
            _random(device, images, CHANNELS, KERNEL, KERNEL, scale=1 / KERNEL),
            _random(device, CHANNELS),
        ]

    def channels_first() -> list[Tensor]:
        x, kernels, bias = inputs()
        return [x.permute(0, 3, 1, 2).contiguous(), kernels, bias]

    def grouped(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
        groups = images * CHANNELS
        out = F.conv2d(
            x.reshape(1, groups, height, width),
            kernels.reshape(groups, 1, KERNEL, KERNEL),
            padding=KERNEL // 2,
            groups=groups,
        )
        return out.reshape(x.shape) + bias[:, None, None]

    functions = {
        "conv2d of B*C groups": lambda: (grouped, channels_first()),
        "ours": lambda: (ops.dynamic_depthwise_conv, inputs()),
    }
    return "D-DW-Conv given its kernels", functions


def _depthwise(images: int, height: int, width: int, device: torch.device):
    def inputs() -> list[Tensor]:
        return [
            _random(device, images, height, width, CHANNELS),
            _random(device, CHANNELS, 1, KERNEL, KERNEL, scale=1 / KERNEL),
            _random(device, CHANNELS),
        ]

    def with_layout(layout: torch.memory_format):
        x, weight, bias = inputs()
        return [x.permute(0, 3, 1, 2).contiguous(memory_format=layout), weight, bias]

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=KERNEL // 2, groups=CHANNELS)

    functions = {
        "conv2d, NCHW": lambda: (conv, with_layout(torch.contiguous_format)),
        "conv2d, channels last": lambda: (conv, with_layout(torch.channels_last)),
        "ours": lambda: (ops.depthwise_conv, inputs()),
    }
    return "depth-wise 7x7", functions


def _attention(images: int, height: int, width: int, device: torch.device, shift: int = 0):
    height, width = _whole_windows(height, width)
    same = torch.ones(1, POSITIONS, POSITIONS, dtype=torch.bool, device=device)
    if shift:
        same = region_mask(height, width, WINDOW, (shift, shift), device).flatten(0, 1)
    zeros = torch.zeros_like(same, dtype=_dtype(device))
    hundreds, infinities = (zeros.masked_fill(~same, value) for value in (-100.0, -math.inf))

    def inputs() -> list[Tensor]:
        return [
            _random(device, images, height, width, 3 * CHANNELS),
            _random(device, HEADS, POSITIONS, POSITIONS),
        ]

    def windows(qkv: Tensor) -> Tensor:
        """To ``(3, B * windows, heads, N, C / heads)``."""
        qkv = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
        rows, columns = WINDOW
        qkv = qkv.unflatten(1, (-1, rows)).unflatten(3, (-1, columns)).unflatten(5, (3, HEADS, -1))
        return qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(1, 3).flatten(3, 4)

    def whole(out: Tensor) -> Tensor:
        out = reverse(out.unflatten(0, (images, height // WINDOW[0], -1)), WINDOW)
        return out.roll((shift, shift), (1, 2)) if shift else out

    def explicit(qkv: Tensor, bias: Tensor) -> Tensor:
        query, key, v = windows(qkv)
        scores = query * (CHANNELS // HEADS) ** -0.5 @ key.mT + bias
        if shift:
            scores = (scores.unflatten(0, (images, -1)) + hundreds[:, None]).flatten(0, 1)
        return whole(scores.softmax(-1) @ v)

    def sdpa(qkv: Tensor, bias: Tensor) -> Tensor:
        query, key, v = windows(qkv)
        both = (bias + infinities[:, None]).repeat(images, 1, 1, 1) if shift else bias
        return whole(F.scaled_dot_product_attention(query, key, v, both))

    def flex() -> Function:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)

        def attend(qkv: Tensor, bias: Tensor) -> Tensor:
            query, key, v = windows(qkv)

            def score(value, b, h, i, j):
                seen = same[b % same.shape[0], i, j]
                return torch.where(seen, value + bias[h, i, j], -math.inf)

            return whole(compiled(query, key, v, score_mod=score))

        return attend

    sizes = dict(num_heads=HEADS, window_size=WINDOW, shift=(shift, shift))
    ours = partial(ops.window_attention, **sizes)
    functions = {
        "explicit, mask of -100" if shift else "explicit softmax": lambda: (explicit, inputs()),
        "SDPA, bias and mask given": lambda: (sdpa, inputs()),
        "FlexAttention, compiled": lambda: (flex(), inputs()),
        "ours": lambda: (ours, inputs()),
    }
    return f"window attention{', shifted' if shift else ''}", functions


_shifted_attention = partial(_attention, shift=WINDOW[0] // 2)


def _sliding(images: int, height: int, width: int, device: torch.device, channels: int = CHANNELS):
    heads = channels * HEADS // CHANNELS
    inside = F.pad(torch.ones(height, width, device=device), [KERNEL // 2] * 4)
    inside = inside.unfold(0, KERNEL, 1).unfold(1, KERNEL, 1).flatten(2) > 0

    def inputs() -> list[Tensor]:
        return [
            _random(device, images, height, width, 3 * channels),
            _random(device, heads, TAPS),
        ]

    def shifted() -> list[Tensor]:
        sides = _whole_windows(height, width)
        return [
            _random(device, images, *sides, 3 * channels),
            _random(device, heads, POSITIONS, POSITIONS),
        ]

    def windows(x: Tensor) -> Tensor:
        """``(B, H, W, heads, D)`` to ``(B, H, W, heads, D, K*K)``."""
        x = F.pad(x, (0, 0, 0, 0, *[KERNEL // 2] * 4))
        return x.unfold(1, KERNEL, 1).unfold(2, KERNEL, 1).flatten(-2)

    def unfolded(qkv: Tensor, bias: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).unbind(3)
        query = query * (channels // heads) ** -0.5
        scores = (query[..., None, :] @ windows(key))[..., 0, :] + bias
        scores = scores.masked_fill(~inside[:, :, None], -math.inf)
        return (scores.softmax(-1)[..., None, :] @ windows(value).mT).flatten(3)

    functions = {
        "unfold": lambda: (unfolded, inputs()),
        "ours": lambda: (
            partial(ops.sliding_attention, num_heads=heads, window_size=WINDOW),
            inputs(),
        ),
        "ours, shifted windows": lambda: (
            partial(ops.window_attention, num_heads=heads, window_size=WINDOW, shift=(3, 3)),
            shifted(),
        ),
    }
    return "sliding attention", functions


def _whole_windows(height: int, width: int) -> tuple[int, int]:
    return -(-height // WINDOW[0]) * WINDOW[0], -(-width // WINDOW[1]) * WINDOW[1]


def _mlp(images: int, height: int, width: int, device: torch.device):
    height, width = _whole_windows(height, width)

    def inputs() -> list[Tensor]:
        return [
            _random(device, images, height, width, CHANNELS),
            _random(device, HEADS, POSITIONS, POSITIONS, scale=1 / WINDOW[0]),
            _random(device, HEADS, POSITIONS, POSITIONS, scale=1 / WINDOW[0]),
        ]

    def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        windows = partition(x, WINDOW, HEADS)
        mixing = (weight + bias).reshape(-1, POSITIONS, 1)
        mixed = F.conv1d(windows.flatten(0, 2).flatten(1, 2), mixing, groups=HEADS)
        return reverse(mixed.reshape(windows.shape), WINDOW)

    ours = partial(ops.local_mlp, window_size=WINDOW, shift=(0, 0))
    functions = {
        "conv1d of one group a head": lambda: (conv1d, inputs()),
        "ours": lambda: (ours, inputs()),
    }
    return "local MLP", functions


OPERATORS = (
    _inhomogeneous,
    _aggregation,
    _dynamic,
    _depthwise,
    _attention,
    _shifted_attention,
    _sliding,
    _mlp,
)
