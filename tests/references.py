"""The networks from the paper's equations in plain PyTorch, for the tests to compare ours with.

Nothing here is the package's. Maps are ``(B, C, H, W)``; a window, a tap of a kernel or a pair of
positions at a time is taken with indices of its own. Parameters are read by their names in a state
dict of ours, and :attr:`Weights.read` holds which.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

MIXERS = {}
"""A mixer's function by its name, of weights, a map and the network's options."""


@dataclass(frozen=True)
class Weights:
    """The state dict of a network, or of the part of it under ``prefix``.

    Attributes:
        training: whether batch norms use the batch's statistics, and paths are dropped.
        read: the names that were read.
        statistics: the running statistics after a forward pass in training.
    """

    values: dict[str, Tensor]
    training: bool
    prefix: str = ""
    read: set[str] = field(default_factory=set)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def at(self, place: object) -> "Weights":
        return replace(self, prefix=f"{self.prefix}{place}.")

    def __contains__(self, name: str) -> bool:
        return any(key.startswith(self.prefix + name) for key in self.values)

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(self.prefix + name)
        return self.values[self.prefix + name]

    def linear(self, x: Tensor, place: str, bias: bool = True) -> Tensor:
        """A linear layer of ``(B, C, ...)``."""
        out = torch.einsum("dc,bc...->bd...", self[f"{place}.weight"], x)
        return out + along(self[f"{place}.bias"], out) if bias else out


@dataclass(frozen=True)
class Options:
    """What a network is built from, and its weights do not say.

    Attributes:
        mixer: a key of :data:`MIXERS`.
        norm: of the blocks, ``"layernorm"``, ``"batchnorm"`` or ``"centered_batchnorm"``.
        heads: heads or groups of each stage.
        window: rows and columns of a window or kernel.
        drop_path: of the last block.
    """

    mixer: str
    norm: str
    heads: tuple[int, ...] = ()
    window: tuple[int, int] = (7, 7)
    drop_path: float = 0.0
    stage: int = 0
    block: int = 0

    @property
    def head_count(self) -> int:
        return self.heads[self.stage]


def network(weights: Weights, x: Tensor, options: Options) -> tuple[list[Tensor], Tensor]:
    """The map of each stage, ``(B, C, H, W)``, and the logits of an image ``(B, 3, H, W)``."""
    depths = []
    while f"stages.{len(depths)}." in weights:
        stage, depth = weights.at(f"stages.{len(depths)}"), 0
        while f"blocks.{depth}." in stage:
            depth += 1
        depths.append(depth)
    x, maps, before = patches(weights.at("patch_embed"), x), [], 0
    for number, depth in enumerate(depths):
        stage = weights.at(f"stages.{number}")
        if number:
            x = merged(stage.at("downsample"), x)
        for block in range(depth):
            rate = options.drop_path * before / max(1, sum(depths) - 1)
            here = replace(options, stage=number, block=block, drop_path=rate)
            x, before = transformed(stage.at(f"blocks.{block}"), x, here), before + 1
        maps.append(x)
    x = layer_norm(weights.at("norm"), x)
    return maps, weights.linear(x.mean((2, 3)), "head.fc")


def patches(weights: Weights, x: Tensor) -> Tensor:
    """A linear of 4x4 pixels and their channels, zeros right and below; layer norm."""
    x, kernel = whole(x, (4, 4)), weights["proj.weight"]
    out = 0
    for u, v in product(range(4), range(4)):
        out = out + torch.einsum("dc,bchw->bdhw", kernel[:, :, u, v], x[:, :, u::4, v::4])
    return layer_norm(weights.at("norm"), out + along(weights["proj.bias"], out))


def merged(weights: Weights, x: Tensor) -> Tensor:
    """2x2 positions as channels, down before across as in Swin; layer norm; linear to 2C."""
    x = whole(x, (2, 2))
    four = [x[:, :, down::2, across::2] for across, down in product(range(2), range(2))]
    return weights.linear(layer_norm(weights.at("norm"), torch.cat(four, 1)), "reduction", False)


def transformed(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """A block: the mixer's branch, the local convolution of Table 6, the MLP's branch."""
    before = x
    if options.mixer not in CONVOLUTIONAL:
        x = normed(weights.at("norm1"), x, options)
    x = MIXERS[options.mixer](weights.at("mixer"), x, options)
    if "se." in weights:
        gate = torch.relu(weights.linear(x.mean((2, 3)), "se.fc1"))
        gate = 1 / (1 + torch.exp(-weights.linear(gate, "se.fc2")))
        x = gate[:, :, None, None] * x
    x = before + dropped(weights, x, options)
    if "local." in weights:
        y = normed(weights.at("local.norm"), x, options)
        x = x + depthwise(y, weights["local.conv.weight"][:, 0])
    y = weights.linear(normed(weights.at("norm2"), x, options), "mlp.fc1")
    y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    return x + dropped(weights, weights.linear(y, "mlp.fc2"), options)


def dropped(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """Stochastic depth: a branch of an image is left out, or divided by its probability."""
    keep = 1 - options.drop_path
    if keep == 1 or not weights.training:
        return x
    kept = torch.empty(len(x), dtype=x.dtype).bernoulli_(keep)
    return x * (kept / keep)[:, None, None, None]


# Norms


def normed(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """The blocks' norm (Table 12)."""
    if options.norm == "layernorm":
        return layer_norm(weights, x)
    if options.norm == "centered_batchnorm":
        x = x + along(weights["center"], x) * x.mean((2, 3), keepdim=True)
        weights = weights.at("norm")
    return batch_norm(weights, x)


def layer_norm(weights: Weights, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    x = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-5)
    return x * along(weights["weight"], x) + along(weights["bias"], x)


def batch_norm(weights: Weights, x: Tensor, running: bool = False) -> Tensor:
    """Of ``(B, C, ...)``; with ``running`` by the running statistics, in training too."""
    mean, variance = weights["running_mean"], weights["running_var"]
    count = weights["num_batches_tracked"]
    if weights.training and not running:
        others = [axis for axis in range(x.ndim) if axis != 1]
        own = x.mean(others)
        spread = ((x - along(own, x)) ** 2).mean(others)
        number = x.numel() // x.shape[1]
        new = {
            "running_mean": 0.9 * mean + 0.1 * own.detach(),
            "running_var": 0.9 * variance + 0.1 * spread.detach() * number / (number - 1),
            "num_batches_tracked": count + 1,
        }
        weights.statistics.update({weights.prefix + name: value for name, value in new.items()})
        mean, variance = own, spread
    x = (x - along(mean, x)) / torch.sqrt(along(variance, x) + 1e-5)
    return x * along(weights["weight"], x) + along(weights["bias"], x)


# Windows that tile the map: equations 1 to 3, and local MLP


def mixer(function: Callable) -> Callable:
    MIXERS[function.__name__] = function
    return function


@mixer
def swin(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """Attention of a head to the other positions of its window."""
    heads, (height, width) = options.head_count, x.shape[2:]
    x = whole(x, options.window)
    q, k, v = weights.linear(x, "qkv").chunk(3, 1)
    scale, bias = (x.shape[1] // heads) ** -0.5, pairs_bias(weights, options)
    rows = []
    out = torch.zeros_like(q)
    for _, (ys, xs), seen in windows(x.shape[2:], options):
        for h, channels in enumerate(torch.arange(x.shape[1]).chunk(heads)):
            here = (slice(None), channels[:, None], ys, xs)
            logits = torch.einsum("bci,bcj->bij", q[here] * scale, k[here])
            if bias is not None:
                logits = logits + bias[h]
            rows = softmax(logits.masked_fill(~seen, -math.inf), 2)
            out[here] = torch.einsum("bij,bcj->bci", rows, v[here])
    return weights.linear(out, "proj")[:, :, :height, :width]


@mixer
def local_mlp(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """A matrix of learned weights for a head, of all windows or of each (Table 4)."""
    heads, (height, width) = options.head_count, x.shape[2:]
    x = whole(x, options.window)
    value, bias = weights.linear(x, "value"), pairs_bias(weights, options)
    matrices = weights["weight"]
    if matrices.ndim == 6:
        down, across = (
            side // window for side, window in zip(x.shape[2:], options.window, strict=True)
        )
        matrices = of_grid(matrices, down, across).flatten(-2)
    out = torch.zeros_like(value)
    for place, (ys, xs), seen in windows(x.shape[2:], options):
        own = matrices[place] if matrices.ndim == 5 else matrices
        for h, channels in enumerate(torch.arange(x.shape[1]).chunk(heads)):
            here = (slice(None), channels[:, None], ys, xs)
            out[here] = torch.einsum("ij,bcj->bci", (own[h] + bias[h]) * seen, value[here])
    return weights.linear(out, "proj")[:, :, :height, :width]


def windows(size: tuple[int, int], options: Options) -> Iterator:
    """Each window: its place in the grid, its positions, and which of them see each other.

    In every second block they are moved by half a window along an axis that has several; those at
    the end go on at the beginning, which their other positions do not see.
    """
    shift = [
        window // 2 if options.block % 2 and side > window else 0
        for side, window in zip(size, options.window, strict=True)
    ]
    corners = product(*(range(0, side, n) for side, n in zip(size, options.window, strict=True)))
    for top, left in corners:
        ys, xs, parts = [], [], []
        for u, v in product(*map(range, options.window)):
            y, x = top + u + shift[0], left + v + shift[1]
            parts.append(2 * (y >= size[0]) + (x >= size[1]))
            ys.append(y % size[0])
            xs.append(x % size[1])
        part = torch.tensor(parts)
        place = top // options.window[0], left // options.window[1]
        yield place, (torch.tensor(ys), torch.tensor(xs)), part[:, None] == part


def pairs_bias(weights: Weights, options: Options) -> Tensor | None:
    """``(heads, N, N)``: of the offset of a query from a key."""
    if "relative_position_bias_table" not in weights:
        return None
    index = torch.tensor(offsets(options.window))
    return weights["relative_position_bias_table"][index].permute(2, 0, 1)


@cache
def offsets(window: tuple[int, int]) -> list[list[int]]:
    """The row of Swin's bias table for each query and key of a window."""
    places = list(product(*map(range, window)))
    return [
        [(y - v + window[0] - 1) * (2 * window[1] - 1) + (x - u + window[1] - 1) for v, u in places]
        for y, x in places
    ]


def of_grid(values: Tensor, rows: int, columns: int) -> Tensor:
    """``(H, W, ...)`` at the middles of a grid of other cells, linear along each axis."""
    for axis, count in enumerate((rows, columns)):
        taken = []
        for cell in range(count):
            at = max(0.0, (cell + 0.5) * values.shape[axis] / count - 0.5)
            low = math.floor(at)
            high = min(low + 1, values.shape[axis] - 1)
            one, other = values.select(axis, low), values.select(axis, high)
            taken.append(one + (at - low) * (other - one))
        values = torch.stack(taken, axis)
    return values


# Windows centred at each position: sliding attention, and appendix C's


@mixer
def sliding(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """Attention of a head to the positions of the map around its own, an offset at a time."""
    if "pre." in weights:
        kernel = weights["pre.conv.weight"]
        if len(kernel) == len(weights["pre.conv.weight"][0]) == x.shape[1]:
            taps = around(x, (3, 3))
            x = sum(torch.einsum("dc,bchw->bdhw", kernel[:, :, u, v], y) for (u, v), y in taps)
        else:
            x = depthwise(x, kernel[:, 0].expand(x.shape[1], 3, 3))
        x = torch.relu(batch_norm(weights.at("pre.norm"), x))
    heads, window = options.head_count, options.window
    q, k, v = (by_heads(part, heads) for part in weights.linear(x, "qkv").chunk(3, 1))
    q = q * q.shape[2] ** -0.5
    inside = torch.ones(1, 1, *x.shape[2:])
    products = {tap: (q * key).sum(2) for tap, key in around(k, window)}
    logits = dict(products)
    if "post" in weights:
        post = weights["post"]
        for u, w in products:
            logits[u, w] = sum(
                post[:, i + 1, j + 1, None, None]
                * products[(u + i) % window[0], (w + j) % window[1]]
                for i, j in product((-1, 0, 1), repeat=2)
            )
    for u, w in products:
        if "theta" in weights:
            theta = weights["theta"][:, u * window[1] + w]
            logits[u, w] = logits[u, w] + (q * theta[:, :, None, None]).sum(2)
        if "relative_position_bias_table" in weights:
            # Of a query from its key, the other way round than the tap.
            y, z = window[0] // 2 - u, window[1] // 2 - w
            row = (y + window[0] - 1) * (2 * window[1] - 1) + z + window[1] - 1
            bias = weights["relative_position_bias_table"][row]
            logits[u, w] = logits[u, w] + bias[:, None, None]
    for tap, seen in around(inside, window):
        logits[tap] = logits[tap].masked_fill(seen[:, :1] == 0, -math.inf)
    shares = softmax(torch.stack(list(logits.values())), 0)
    values = (value for _, value in around(v, window))
    out = sum(share[:, :, None] * value for share, value in zip(shares, values, strict=True))
    return weights.linear(out.flatten(1, 2), "proj")


def by_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, heads, C/heads, H, W)``."""
    return torch.stack(x.chunk(heads, 1), 1)


def softmax(x: Tensor, axis: int) -> Tensor:
    x = torch.exp(x - x.amax(axis, keepdim=True))
    return x / x.sum(axis, keepdim=True)


# Convolutions: equations 6 to 8, and Table 4's shared kernels


def around(x: Tensor, window: tuple[int, int]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Each tap ``(u, v)`` of a centred window, and what of a map it sees, zeros outside."""
    height, width = x.shape[-2:]
    for u, v in product(*map(range, window)):
        down, across = u - (window[0] - 1) // 2, v - (window[1] - 1) // 2
        moved = torch.zeros_like(x)
        top, bottom = max(0, -down), min(height, height - down)
        left, right = max(0, -across), min(width, width - across)
        if top < bottom and left < right:
            seen = x[..., top + down : bottom + down, left + across : right + across]
            moved[..., top:bottom, left:right] = seen
        yield (u, v), moved


def depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """``y_i = sum_d w_d x_{i+d}`` with ``(C, K, K)`` kernels, or ``(B, C, K, K)`` of each image."""
    return sum(kernels[..., u, v, None, None] * y for (u, v), y in around(x, kernels.shape[-2:]))


def convolutional(mix: Callable) -> Callable:
    """A bottleneck around an operator: linear, norm, ReLU; norm, ReLU; linear, norm."""

    def whole_mixer(weights: Weights, x: Tensor, options: Options) -> Tensor:
        x = weights.linear(x, "in_proj", bias=False)
        x = torch.relu(normed(weights.at("in_norm"), x, options))
        x = torch.relu(normed(weights.at("mid_norm"), mix(weights, x, options), options))
        x = weights.linear(x, "out_proj", bias=False)
        return normed(weights.at("out_norm"), x, options)

    MIXERS[mix.__name__] = whole_mixer
    return whole_mixer


@convolutional
def dw_conv(weights: Weights, x: Tensor, options: Options) -> Tensor:
    return depthwise(x, weights["conv.weight"][:, 0]) + along(weights["conv.bias"], x)


@convolutional
def shared_dw_conv(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """A kernel for a head, of all positions or of each."""
    kernels, share = weights["kernels"], x.shape[1] // options.head_count
    if kernels.ndim == 3:
        out = depthwise(x, torch.stack([kernels[c // share] for c in range(x.shape[1])]))
    else:
        kernels = of_grid(kernels, *x.shape[2:])[:, :, :, 0]
        taps = {(u, v): kernels[..., u, v].permute(2, 0, 1) for u, v in pairs(kernels)}
        out = aggregated(x, taps, share)
    return out + along(weights["bias"], x)


@convolutional
def d_dw_conv(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """Kernels of an image from its mean (equation 7)."""
    pooled = weights.linear(x.mean((2, 3)), "reduce", bias=False)
    # A variance needs two images.
    pooled = batch_norm(weights.at("reduce_norm"), pooled, running=len(x) == 1)
    kernels = weights.linear(torch.relu(pooled), "expand")
    out = depthwise(x, kernels.reshape(len(x), x.shape[1], *options.window))
    return out + along(weights["bias"], x)


@convolutional
def i_d_dw_conv(weights: Weights, x: Tensor, options: Options) -> Tensor:
    """Kernels of a position from its own features, one for a group of channels (equation 8)."""
    hidden = weights.linear(x, "reduce")
    hidden = torch.relu(batch_norm(weights.at("reduce_norm"), hidden))
    flat = weights.linear(hidden, "expand")
    taps = options.window[0] * options.window[1]
    kernels = {
        (u, v): flat[:, u * options.window[1] + v :: taps]
        for u, v in product(*map(range, options.window))
    }
    return aggregated(x, kernels, x.shape[1] * taps // flat.shape[1])


def pairs(kernels: Tensor) -> Iterator[tuple[int, int]]:
    return product(*map(range, kernels.shape[-2:]))


def aggregated(x: Tensor, kernels: dict[tuple[int, int], Tensor], share: int) -> Tensor:
    """``y_i = sum_d w_id x_{i+d}`` with ``(..., groups, H, W)`` a tap for ``share`` channels."""
    window = tuple(max(axis) + 1 for axis in zip(*kernels, strict=True))
    channels = torch.arange(x.shape[1]) // share
    return sum(kernels[tap].index_select(-3, channels) * y for tap, y in around(x, window))


CONVOLUTIONAL = ("dw_conv", "shared_dw_conv", "d_dw_conv", "i_d_dw_conv")

# What several use


def along(values: Tensor, x: Tensor) -> Tensor:
    """``(C,)`` for each position of ``(B, C, ...)``."""
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def whole(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """A map with zeros right and below, to whole cells."""
    height, width = (-(-side // n) * n for side, n in zip(x.shape[2:], cell, strict=True))
    out = x.new_zeros(*x.shape[:2], height, width)
    out[:, :, : x.shape[2], : x.shape[3]] = x
    return out
