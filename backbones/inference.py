"""Layers and blocks of the networks that :func:`backbones.fuse` returns."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import ops
from backbones.folding import parameter
from backbones.layers import Mlp, Size, ceil_div, is_plain
from backbones.mixers.conv import ConvMixer
from backbones.mixers.local_mlp import LocalMLP
from backbones.mixers.window_attention import WindowAttention
from backbones.mixers.windowed import WindowedMixer
from backbones.ops.common import autocast_dtype
from backbones.ops.linear import Kept, by_onednn, pieces, prepared
from backbones.ops.residual_mlp import Panels, by_native, residual_mlp
from backbones.ops.windows import resize_window_grid
from backbones.pyramid import Block, PatchMerging, in_fours

Rows = Callable[[Tensor], Tensor]


class InferenceLinear(nn.Module):
    """``nn.Linear`` for inference, computed by :func:`backbones.ops.linear`.

    Attributes:
        weight_t: ``(C, D)``, the transposed weight, contiguous for the matrix product.
        bias: ``(D,)`` or None.
        activation: what follows; see :func:`backbones.ops.linear`.
        packed: oneDNN's copies of weight and bias; they are no part of the state dict.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight_t = parameter(linear.weight.t().contiguous(), linear.weight)
        self.bias = linear.bias
        self.activation = "none"
        self.packed = Kept()

    @property
    def weight(self) -> Tensor:
        """``(D, C)``, a view of ``weight_t``."""
        return self.weight_t.t()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., D)``."""
        packed = None if isinstance(x, torch.fx.Proxy) else self.packed
        return ops.linear(x, self.weight, self.bias, self.activation, packed)

    def prepared(self, x: Tensor) -> Rows:
        """The layer as a function of rows of x, for its many pieces."""
        return prepared(x, self.weight, self.bias, self.activation, self.packed)

    def extra_repr(self) -> str:
        """The sizes, in the format of :class:`torch.nn.Linear`, and the activation."""
        rows, columns = self.weight_t.shape
        then = "" if self.activation == "none" else f", activation={self.activation}"
        return f"in_features={rows}, out_features={columns}, bias={self.bias is not None}{then}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.packed.clear()
        return super()._apply(fn, recurse)


class InferenceMlp(nn.Module):
    """:class:`~backbones.layers.Mlp` for inference, computed by :func:`backbones.ops.mlp`."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.fc2 = InferenceLinear(mlp.fc1), InferenceLinear(mlp.fc2)
        self.fc1.activation = "gelu"

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        first, second = self.fc1, self.fc2
        packed = None if isinstance(x, torch.fx.Proxy) else (first.packed, second.packed)
        return ops.mlp(x, first.weight, first.bias, second.weight, second.bias, packed)


class InferenceBlock(Block):
    """:class:`~backbones.pyramid.Block` for inference: oneDNN's products on pieces of the map.

    What is computed position by position, or window by window, is computed from start to end for a
    piece that fits the cache; a block needs the memory of one or two maps. Graphs, gradients and
    other devices get the block as it is.
    """

    @classmethod
    def become(cls, block: Block) -> None:
        """Make ``block`` one, in place."""
        block.__class__ = cls
        block.kept, block.panels = Kept(), Kept()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        if isinstance(x, torch.fx.Proxy) or self.training or not (by_native(x) or by_onednn(x)):
            return super().forward(x)
        if not (_pointwise(self.norm2) and is_plain(self.mlp, InferenceMlp)):
            return super().forward(x)
        x = x.contiguous()
        if self.se is None and self.local is None and _pointwise(self.norm1):
            for kind, mix in _IN_WINDOWS.items():
                if is_plain(self.mixer, kind):
                    return self._by_windows(x, mix)
            if self._ends_in_linear():
                return self._by_rows(x)
        x = self.mixed(x)
        self._finished(x)(x, x)
        return x

    def _ends_in_linear(self) -> bool:
        mixer = self.mixer
        if not isinstance(mixer, ConvMixer) or not is_plain(mixer, type(mixer)):
            return False
        known = type(mixer).forward is ConvMixer.forward and is_plain(mixer.mid_act, nn.ReLU)
        return known and is_plain(mixer.out_norm, nn.Identity)

    def _by_rows(self, x: Tensor) -> Tensor:
        """With a convolutional mixer; the result takes the memory of its hidden map."""
        hidden = self.mixer.hidden(self.norm1(x)).contiguous()
        x = x.to(hidden.dtype)
        self._finished(x, self.mixer.out_proj)(x, hidden)
        return hidden

    def _by_windows(self, x: Tensor, mix: "Mix") -> Tensor:
        """With a windowed mixer, for some images or rows of windows at a time."""
        (down, right), width, out = self.mixer.window_size, x.shape[2], torch.empty_like(x)
        grid = ceil_div(x.shape[1], down), ceil_div(width, right)
        mixed, finish, norm = mix(self.mixer, x, grid, self.kept), self._finished(x), self.norm1
        number = pieces(x, self._hidden())
        for images, rows, places, shift in _stripes(len(x), grid, self.mixer, number):
            parts = [x[images, place] for place in places]
            given = [norm(part) for part in parts]
            given = given[0] if len(given) == 1 else torch.cat(given, 1)
            missing = down * (rows.stop - rows.start) - given.shape[1], right * grid[1] - width
            if any(missing):
                given = F.pad(given, (0, 0, 0, missing[1], 0, missing[0]))
            given, begin = mixed(given, shift, rows), 0
            for part, place in zip(parts, places, strict=True):
                end = begin + part.shape[1]
                finish(part + given[:, begin:end, :width], out[images, place])
                begin = end
        return out

    def _hidden(self) -> int:
        return self.mlp.fc1.weight_t.shape[1]

    def _finished(
        self, x: Tensor, project: nn.Module | None = None
    ) -> Callable[[Tensor, Tensor], None]:
        """A function of parts of x and of the result: the MLP's half of the block.

        ``project(relu(out))`` is added to x before, if given.
        """
        layers = [] if project is None else [project]
        layers += self.mlp.fc1, self.mlp.fc2
        if x.dtype == autocast_dtype(x) and by_native(x):
            if all(is_plain(layer, InferenceLinear) for layer in layers):
                return self._finished_in_c(x, layers)
        norm, first, second = self.norm2, _rows(self.mlp.fc1, x), _rows(self.mlp.fc2, x)
        before = None if project is None else _rows(project, x)

        def finish(x: Tensor, out: Tensor) -> None:
            rows, into = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1])
            size = ceil_div(len(rows), pieces(rows, self._hidden()))
            for part, place in zip(rows.split(size), into.split(size), strict=True):
                if before is not None:
                    part = before(place.relu_()).add_(part)
                torch.add(part, second(first(norm(part))), out=place)

        return finish

    def _finished_in_c(
        self, x: Tensor, layers: list[InferenceLinear]
    ) -> Callable[[Tensor, Tensor], None]:
        linears = tuple((layer.weight_t, layer.bias) for layer in layers)
        norm = None
        if isinstance(self.norm2, nn.LayerNorm):
            norm = self.norm2.weight, self.norm2.bias, self.norm2.eps

        def laid_out() -> Panels:
            return Panels.of(x.dtype, tuple((weight.t(), bias) for weight, bias in linears), norm)

        sources = sum(linears, ()) + (norm or ())[:2]
        panels = self.panels.of(sources, (x.dtype, norm and norm[2]), laid_out)

        def finish(x: Tensor, out: Tensor) -> None:
            residual_mlp(x.contiguous(), out if len(layers) == 3 else None, panels, out)

        return finish

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.kept.clear()
        self.panels.clear()
        return super()._apply(fn, recurse)


class InferenceMerging(PatchMerging):
    """:class:`~backbones.pyramid.PatchMerging` for inference, on pieces of the map as a block."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), 2*C)``."""
        if isinstance(x, torch.fx.Proxy) or not by_onednn(x):
            return super().forward(x)
        if not (_pointwise(self.norm) and is_plain(self.reduction, InferenceLinear)):
            return super().forward(x)
        channels, (height, width) = 2 * x.shape[3], (ceil_div(n, 2) for n in x.shape[1:3])
        out = x.new_empty(len(x), height, width, channels, dtype=autocast_dtype(x))
        reduce = self.reduction.prepared(x)
        # Of a part there is a copy in fours and a normalised one.
        for images, rows in _parts(len(x), height, pieces(x, 2 * x.shape[3])):
            part = x[images, 2 * rows.start : 2 * rows.stop]
            out[images, rows] = reduce(self.norm(in_fours(part)))
        return out


# A function of normalised windows, their shift, and which rows of windows they are.
Mixed = Callable[[Tensor, Size, slice], Tensor]
Mix = Callable[[WindowedMixer, Tensor, Size, Kept], Mixed]


def _attention(mixer: WindowAttention, x: Tensor, grid: Size, kept: Kept) -> Mixed:
    table = mixer.relative_position_bias_table
    bias = kept.of((table,), x.dtype, lambda: mixer.bias_of(x).contiguous())
    before, after = _rows(mixer.qkv, x), _rows(mixer.proj, x)

    def mixed(x: Tensor, shift: Size, rows: slice) -> Tensor:
        x = ops.window_attention(before(x), bias, mixer.num_heads, mixer.window_size, shift)
        return after(x)

    return mixed


def _local_mlp(mixer: LocalMLP, x: Tensor, grid: Size, kept: Kept) -> Mixed:
    def sum_of_both() -> Tensor:
        weight = mixer.weight
        if not mixer.shared:
            weight = resize_window_grid(weight, grid).flatten(-2)
        # A resized grid is in another order of memory, which each call of the kernel would copy.
        return (weight + mixer.bias()).contiguous()

    sources = mixer.weight, mixer.relative_position_bias_table
    weight = kept.of(sources, grid, sum_of_both)
    before, after = _rows(mixer.value, x), _rows(mixer.proj, x)

    def mixed(x: Tensor, shift: Size, rows: slice) -> Tensor:
        own = weight if mixer.shared else weight[rows]
        return after(ops.local_mlp(before(x), own, None, mixer.window_size, shift))

    return mixed


_IN_WINDOWS: dict[type[WindowedMixer], Mix] = {WindowAttention: _attention, LocalMLP: _local_mlp}


def _rows(layer: nn.Module, x: Tensor) -> Rows:
    """A layer as a function of parts of maps like x."""
    return layer.prepared(x) if is_plain(layer, InferenceLinear) and by_onednn(x) else layer


def _stripes(
    images: int, grid: Sequence[int], mixer: WindowedMixer, number: int
) -> Iterator[tuple[slice, slice, list[slice], Size]]:
    """About ``number`` pieces of a batch in (shifted) windows.

    Yields:
        The images, the rows of windows, the rows of the map from top to bottom, and the shift of
        the windows in them. Rows may be beyond the map, where it is padded.
    """
    side, height = mixer.window_size[0], mixer.window_size[0] * grid[0]
    down, right = (
        length // 2 if mixer.shifted and count > 1 else 0
        for length, count in zip(mixer.window_size, grid, strict=True)
    )
    for chosen, rows in _parts(images, grid[0], number):
        top, bottom = down + rows.start * side, down + rows.stop * side
        if rows.stop - rows.start == grid[0]:
            yield chosen, rows, [slice(0, height)], (down, right)
        elif bottom > height:
            # The last row of windows wraps around to the first rows of the map.
            yield chosen, rows, [slice(0, down), slice(top, height)], (down, right)
        else:
            yield chosen, rows, [slice(top, bottom)], (0, right)


def _parts(images: int, height: int, number: int) -> Iterator[tuple[slice, slice]]:
    """About ``number`` parts of a batch of maps: some images, or some rows of one."""
    step = ceil_div(images, min(number, images))
    down = ceil_div(height, ceil_div(number, images))
    for image, row in product(range(0, images, step), range(0, height, down)):
        yield slice(image, image + step), slice(row, min(row + down, height))


def _pointwise(norm: nn.Module) -> bool:
    """Whether a norm computes each position by itself, in the memory layout of a map."""
    return is_plain(norm, nn.LayerNorm) or is_plain(norm, nn.Identity)
