"""What a mixer connects, shares and predicts: the paper's Tables 1 and 7, measured.

A mixer is a projection, an operator and a projection; the tables are about the operator with its
weights given. The operator is caught while the mixer runs, and differentiated by autograd: ``W`` in
``(H, W, C, H, W, C)`` has the weight of every input position and channel for every output position
and channel (appendix B's connection weight matrix). All properties follow from ``W``, from ``W`` of
another input, and from the mixer's output for moved and exchanged inputs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from backbones import mixers, ops
from dense.analysis import paper
from dense.analysis.complexity_tables import Column, Table

SIZE, CHANNELS, HEADS, KERNEL = 12, 4, 2, 3
TOLERANCE = 1e-9
_MIDDLE = (SIZE // 2, SIZE // 2)
# Operators whose first argument holds query, key and value, of which the value is mixed.
_ATTENTION = ("window_attention", "sliding_attention", "convolutional_attention")
# Those that mix positions.
_CAUGHT = tuple(name for name in ops.__all__ if name not in ("linear", "mlp"))


class Operator(NamedTuple):
    """A linear map of values ``(H, W, C)`` with all weights given, and the values it was given."""

    apply: Callable[[Tensor], Tensor]
    values: Tensor

    def weights(self, *output: slice | int) -> Tensor:
        """``d output / d values``: ``W``, or its part for ``output``, an index of ``(H, W, C)``."""
        return torch.func.jacrev(lambda values: self.apply(values)[output])(self.values)


@dataclass(frozen=True)
class Properties:
    """The properties of one mixer; None where a property has no meaning.

    Attributes:
        connected: the number of positions that an output position depends on, at most.
        positions: the number of positions of the map.
        centred: whether the connected positions lie alike around each output; None if they are one
            or all.
        separable: whether each channel depends on itself only ("sparse between channels").
        channels: how many neighbouring channels have the same weights; None if not separable.
        period: outputs so many positions apart have the same weights; None if none have.
        dynamic: whether the weights depend on the input.
        source: what they depend on: ``"itself"``, ``"its window"`` or ``"the whole map"``.
        equivariant: outputs move with an input that moves so many positions; None for no move.
        ordered: whether the output changes when two other positions of the window are exchanged (a
            vector); False for a set; None if nothing else is connected.
    """

    connected: int
    positions: int
    centred: bool | None
    separable: bool
    channels: int | None
    period: int | None
    dynamic: bool
    source: str | None
    equivariant: int | None
    ordered: bool | None

    @property
    def non_local(self) -> bool:
        """Table 1's "sparse between positions: non-local": a part of the map is connected."""
        return 1 < self.connected < self.positions

    @property
    def full(self) -> bool:
        """Table 1's "sparse between positions: full": positions are not connected."""
        return self.connected == 1


class Measured:
    """Measures the properties of a mixer on a 12x12 map of 4 channels, in float64.

    Every parameter is drawn from a normal distribution of standard deviation 0.5 and running
    statistics are random, since zeros would hide biases and predictors; biases of batch norms are
    3 higher, since a ReLU that is 0 everywhere would make D-DW-Conv static.

    Args:
        module: a mixer, ``(B, H, W, C)`` to the same; one that calls none of the spatial operators
            of :mod:`backbones.ops` is taken as an operator itself. It is changed in place.
        kernel: side of its window.
        seed: seed of the parameters and inputs.
    """

    def __init__(self, module: nn.Module, kernel: int = KERNEL, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.module = module.double().eval().requires_grad_(False)
        self.kernel = kernel
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                value.copy_(0.5 * self._noise(*value.shape))
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.bias += 3
        self.x = self._noise(SIZE, SIZE, CHANNELS)

    def properties(self) -> Properties:
        """All properties."""
        connected = int(self.linked.flatten(2).sum(-1).max())
        near_and_far = 1 < connected < SIZE * SIZE
        return Properties(
            connected,
            SIZE * SIZE,
            self._centred() if near_and_far else None,
            self.separable,
            self._channels() if self.separable else None,
            next((step for step in (1, self.kernel) if self._shared(step)), None),
            self.dynamic,
            self._source() if self.dynamic else None,
            next((step for step in (1, self.kernel) if self._moves(step)), None),
            self._ordered() if connected > 1 else None,
        )

    @cached_property
    def weights(self) -> Tensor:
        """``W``, ``(H, W, C, H, W, C)``."""
        return operator(self.module, self.x).weights()

    @cached_property
    def linked(self) -> Tensor:
        """Whether output position ``[y, x]`` depends on input position ``[v, u]``."""
        return self.weights.abs().amax((2, 5)) > TOLERANCE

    @cached_property
    def separable(self) -> bool:
        """Whether no output channel depends on another input channel."""
        between = self.weights.abs().amax((0, 1, 3, 4)) > TOLERANCE
        return not between[~torch.eye(CHANNELS, dtype=torch.bool)].any()

    @cached_property
    def dynamic(self) -> bool:
        """Whether ``W`` of another input differs."""
        other = operator(self.module, self._noise(*self.x.shape)).weights(*_MIDDLE)
        return _differ(other, self.weights[_MIDDLE])

    def _centred(self) -> bool:
        inner = range(self.kernel // 2, SIZE - self.kernel // 2)
        offsets = {
            frozenset((v - y, u - x) for v, u in self.linked[y, x].nonzero().tolist())
            for y in inner
            for x in inner
        }
        return len(offsets) == 1

    def _channels(self) -> int:
        own = self.weights.diagonal(dim1=2, dim2=5)
        sizes = [g for g in range(CHANNELS, 0, -1) if CHANNELS % g == 0]
        groups = {g: own.unflatten(-1, (-1, g)) for g in sizes}
        return next(g for g in sizes if not _differ(groups[g], groups[g][..., :1]))

    def _shared(self, step: int) -> bool:
        """Whether ``W[i + step, j + step] = W[i, j]`` down and to the right, for inner ``i``."""
        inner = slice(self.kernel // 2, SIZE - self.kernel // 2 - step)
        moved = slice(inner.start + step, inner.stop + step)
        rows = self.weights[inner, :, :, :-step], self.weights[moved, :, :, step:]
        columns = self.weights[:, inner, :, :, :-step], self.weights[:, moved, :, :, step:]
        return not _differ(*rows) and not _differ(*columns)

    def _source(self) -> str:
        linked = self.linked[_MIDDLE].clone()
        linked[_MIDDLE] = False
        near, far = linked.nonzero().tolist(), (~linked).nonzero().tolist()
        far.remove(list(_MIDDLE))
        if far and self._depends_on(far[0]):
            return "the whole map"
        return "its window" if near and self._depends_on(near[0]) else "itself"

    def _depends_on(self, position: list[int]) -> bool:
        """Whether the weights of the middle output depend on the input at ``position``."""
        changed = self.x.clone()
        changed[tuple(position)] = self._noise(CHANNELS)
        other = operator(self.module, changed).weights(*_MIDDLE)
        return _differ(other, self.weights[_MIDDLE])

    def _moves(self, step: int) -> bool:
        """Whether the output for a patch in zeros moves with the patch."""
        first, side = self.kernel, self.kernel + 1
        patch_ = self._noise(side, side, CHANNELS)
        outputs = []
        for start in (first, first + step):
            x = torch.zeros_like(self.x)
            x[start : start + side, start : start + side] = patch_
            # Inside of the patch, and at least a window from the border of the map after a move.
            seen = slice(start, start + SIZE - 2 * self.kernel - step)
            outputs.append(self.module(x[None])[0, seen, seen])
        return not _differ(*outputs)

    def _ordered(self) -> bool:
        linked = self.linked[_MIDDLE].clone()
        linked[_MIDDLE] = False
        one, other = map(tuple, linked.nonzero()[[0, -1]].tolist())
        exchanged = self.x.clone()
        exchanged[one], exchanged[other] = self.x[other], self.x[one]
        outputs = [self.module(x[None])[0][_MIDDLE] for x in (self.x, exchanged)]
        return _differ(*outputs)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def operator(module: nn.Module, x: Tensor) -> Operator:
    """The operator of a mixer with the weights that it has for the map ``x``, ``(H, W, C)``.

    Raises:
        ValueError: the mixer calls more than one operator.
    """
    with _caught() as calls:
        module(x[None])
    if not calls:
        return Operator(lambda values: module(values[None])[0], x)
    if len(calls) > 1:
        names = ", ".join(name for name, *_ in calls)
        raise ValueError(f"{type(module).__name__} calls {len(calls)} operators: {names}")
    [(name, function, first, rest, named)] = calls
    held, values = first[:, :, :, :0], first
    if name in _ATTENTION:
        held, values = first.tensor_split([first.shape[-1] // 3 * 2], -1)

    def apply(values: Tensor) -> Tensor:
        with ops.force("reference"):
            return function(torch.cat((held, values[None]), -1), *rest, **named)[0]

    return Operator(apply, values[0])


@contextmanager
def _caught() -> Iterator[list[tuple]]:
    """Record the calls of spatial operators: name, function, first argument and the others."""
    calls: list[tuple] = []

    def recorder(name: str, function: Callable) -> Callable:
        def record(first: Tensor, *rest, **named) -> Tensor:
            calls.append((name, function, first, rest, named))
            return function(first, *rest, **named)

        return record

    with ExitStack() as stack:
        stack.enter_context(ops.force("reference"))
        for name in _CAUGHT:
            stack.enter_context(patch.object(ops, name, recorder(name, getattr(ops, name))))
        yield calls


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > TOLERANCE)


class ChannelsLast(nn.Module):
    """A module on ``(B, C, H, W)`` applied to ``(B, H, W, C)``."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        return self.module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Flattened(nn.Module):
    """A linear over all positions, or all positions and channels, of a 12x12 map of 4 channels."""

    def __init__(self, channels_too: bool):
        super().__init__()
        self.channels_too = channels_too
        size = SIZE * SIZE * (CHANNELS if channels_too else 1)
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        flat = x.flatten(1) if self.channels_too else x.flatten(1, 2).transpose(1, 2)
        mixed = self.linear(flat)
        return (mixed if self.channels_too else mixed.transpose(1, 2)).reshape(x.shape)


def modules() -> dict[str, nn.Module]:
    """The modules of Tables 1 and 7 and their variants, on 12x12 maps of 4 channels, window 3."""
    window = (CHANNELS, HEADS, KERNEL)
    local_mlp = {"dim": CHANNELS, "window_size": KERNEL, "feat_size": (SIZE, SIZE)}
    return {
        "Local MLP, a matrix a window": mixers.LocalMLP(num_heads=HEADS, **local_mlp),
        "Local MLP, one matrix": mixers.LocalMLP(num_heads=HEADS, shared=True, **local_mlp),
        "Local MLP, one matrix a channel": mixers.LocalMLP(
            num_heads=CHANNELS, shared=True, **local_mlp
        ),
        "Local MLP, one matrix, shifted": mixers.LocalMLP(
            num_heads=HEADS, shared=True, shifted=True, **local_mlp
        ),
        "Local attention": mixers.WindowAttention(*window),
        "Local attention, shifted": mixers.WindowAttention(*window, shifted=True),
        "Local attention, no position bias": mixers.WindowAttention(*window, position_bias=False),
        "Sliding attention": mixers.SlidingAttention(*window),
        "Sliding attention, no position bias": mixers.SlidingAttention(
            *window, position_bias=False
        ),
        "DW-Conv.": mixers.DepthwiseConv(CHANNELS, KERNEL),
        "DW-Conv., channels shared": mixers.SharedDepthwiseConv(CHANNELS, HEADS, KERNEL),
        "DW-Conv., channels shared, positions own": mixers.SharedDepthwiseConv(
            CHANNELS, HEADS, KERNEL, feat_size=(SIZE, SIZE), shared=False
        ),
        "D-DW-Conv.": mixers.DynamicDepthwiseConv(CHANNELS, KERNEL),
        "I-D-DW-Conv.": mixers.InhomogeneousDynamicDepthwiseConv(CHANNELS, KERNEL, HEADS),
        "Conv.": ChannelsLast(nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding="same")),
        "MLP": Flattened(channels_too=True),
        "Attention": mixers.WindowAttention(CHANNELS, HEADS, SIZE),
        "Spatial-mixing MLP": Flattened(channels_too=False),
        "1x1 Conv.": nn.Linear(CHANNELS, CHANNELS),
    }


def measure() -> dict[str, Properties]:
    """The properties of every module of :func:`modules`; seconds on one core."""
    measuring = tqdm(modules().items(), "measuring", delay=2, leave=False, unit="module")
    return {name: Measured(module).properties() for name, module in measuring}


# The tables of the README


def tables(measured: dict[str, Properties]) -> list[Table]:
    """What :func:`measure` returns, and the marks of Tables 1 and 7 beside the measured ones."""
    rows = [dict(name=name, **_words(found)) for name, found in measured.items()]
    printed = [
        dict(name=name, **_beside(_marks(measured[_OF_PAPER.get(name, name)]), marks))
        for name, marks in paper.TABLE_7.items()
    ]
    return [
        Table(
            f"Measured on maps of {SIZE}x{SIZE} positions and {CHANNELS} channels, with "
            f"{KERNEL}x{KERNEL} windows and {HEADS} heads or groups:",
            (Column("module", "name"), *(Column(key, key) for key in rows[0] if key != "name")),
            rows,
        ),
        Table(
            "The marks of Tables 1 and 7, measured / as printed:",
            (Column("module", "name"), *(Column(key, key) for key in paper.MARKS)),
            printed,
        ),
    ]


# Table 1's Local MLP has weights of its own in each window.
_OF_PAPER = {"Local MLP": "Local MLP, a matrix a window"}


def _words(found: Properties) -> dict[str, str]:
    n = found.connected
    moves = {None: "no", 1: "any"}
    return {
        "connected positions": {1: "one", found.positions: "all"}.get(
            n, f"{n} of {found.positions}"
        ),
        "window": {None: "-", True: "centred", False: "block"}[found.centred],
        "sparse between channels": _yes(found.separable),
        "channels that share": str(found.channels or "-"),
        "shared across positions": {None: "no", 1: "all"}.get(
            found.period, f"every {found.period}"
        ),
        "dynamic": _yes(found.dynamic),
        "weights from": found.source or "-",
        "translation": moves.get(found.equivariant, f"by {found.equivariant}"),
        "window as a": {None: "-", True: "vector", False: "set"}[found.ordered],
    }


def _marks(found: Properties) -> set[str]:
    """The marks that Tables 1 and 7 would have."""
    has = (
        found.non_local,
        found.full,
        found.separable,
        found.period == 1,
        (found.channels or 1) > 1,
        found.dynamic,
    )
    return {mark for mark, true in zip(paper.MARKS, has, strict=True) if true}


def _beside(measured: set[str], printed: set[str]) -> dict[str, str]:
    def shown(marks: set[str], mark: str) -> str:
        return "✓" if mark in marks else "-"

    return {mark: f"{shown(measured, mark)} / {shown(printed, mark)}" for mark in paper.MARKS}


def _yes(value: bool) -> str:
    return "yes" if value else "no"
