"""Blocks of queries with the keys and values that they see: half a window more on every side.

A block has the size of the window, so queries of 7x7 see the 13x13 positions around them, the
block's halo. N are the positions of a block or window, M those of a halo.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.common import constant
from backbones.ops.dispatch import exporting
from backbones.ops.windows import Size, partition

# Scores that are held at once: on a CPU they fit the cache.
_SCORES = {"cpu": 2**19}
_SCORES_ELSEWHERE = 2**26


def pad_to_blocks(qkv: Tensor, window_size: Size) -> Tensor:
    """Zeros to whole blocks and half a window around: ``(B, nH*rows + rows - 1, ..., 3*C)``."""
    (height, width), (rows, columns) = qkv.shape[1:3], window_size
    # Not by a remainder: torch.export knows of quotients which slices fit.
    right = ((width - 1) // columns + 1) * columns - width + columns // 2
    bottom = ((height - 1) // rows + 1) * rows - height + rows // 2
    return F.pad(qkv, (0, 0, columns // 2, right, rows // 2, bottom))


def parts_of(padded: Tensor, num_heads: int, window_size: Size) -> Iterator[tuple[Tensor, int]]:
    """Parts of a padded map with few enough scores, and the number of their first row of blocks."""
    rows, columns = window_size
    blocks = padded.shape[1] // rows
    halo = (2 * rows - 1) * (2 * columns - 1)
    scores = padded.shape[0] * num_heads * padded.shape[2] * rows * halo
    most = _SCORES.get(padded.device.type, _SCORES_ELSEWHERE)
    step = max(1, most // max(1, scores))
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        yield padded[:, first * rows : last * rows + rows - 1], first


def take_blocks(part: Tensor, num_heads: int, window_size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``(B, nH, nW, heads, N, D)``, keys and values of their halos, ``(..., D, M)``."""
    rows, columns = window_size
    query, key, value = part.chunk(3, -1)
    inner = query[:, rows // 2 :, columns // 2 :]
    down, across = part.shape[1] // rows, part.shape[2] // columns
    query = partition(inner[:, : down * rows, : across * columns], window_size, num_heads)
    halos = (_halos(t.unflatten(-1, (num_heads, -1)), window_size) for t in (key, value))
    return query, *halos


def _halos(x: Tensor, window_size: Size) -> Tensor:
    """``(B, H, W, heads, D)`` to ``(B, nH, nW, heads, D, M)``."""
    rows, columns = window_size
    if not exporting():
        return x.unfold(1, 2 * rows - 1, rows).unfold(2, 2 * columns - 1, columns).flatten(5)
    # ONNX has no unfold of an axis whose length is open.
    for axis, side in ((1, rows), (3, columns)):
        count = x.shape[axis] // side
        blocks = torch.arange(count, device=x.device)[:, None] * side
        places = blocks + torch.arange(2 * side - 1, device=x.device)
        x = x.index_select(axis, places.flatten()).unflatten(axis, (count, 2 * side - 1))
    return x.permute(0, 1, 3, 5, 6, 2, 4).flatten(5)


def hidden_keys(query: Tensor, window_size: Size, size: Size, first: int) -> Tensor:
    """``(nH, nW, 1, 1, M)``: which keys of a block's halo are outside of the map."""
    down, across = query.shape[1:3]
    outside = []
    for axis, (count, start) in enumerate(((down, first), (across, 0))):
        side = window_size[axis]
        blocks = torch.arange(count, device=query.device) + start
        places = blocks[:, None] * side + torch.arange(2 * side - 1, device=query.device)
        outside.append((places < side // 2) | (places >= size[axis] + side // 2))
    y, x = outside
    return (y[:, None, :, None] | x[None, :, None, :]).flatten(2)[:, :, None, None]


@constant
def window_offsets(rows: int, columns: int, device: torch.device) -> Tensor:
    """``(N, M)``: the place in a query's window of a key of its halo, rows*columns for none."""

    def along(side: int) -> Tensor:
        halo, block = torch.arange(2 * side - 1, device=device), torch.arange(side, device=device)
        return halo[None] - block[:, None]

    y, x = along(rows)[:, None, :, None], along(columns)[None, :, None, :]
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    return torch.where(inside, y * columns + x, rows * columns).flatten(2).flatten(0, 1)


@constant
def window_keys(rows: int, columns: int, device: torch.device) -> Tensor:
    """``(N, N)``: the key of the halo at each place of a query's window."""

    def along(side: int) -> Tensor:
        block = torch.arange(side, device=device)
        return block[:, None] + block[None]

    y, x = along(rows)[:, None, :, None], along(columns)[None, :, None, :]
    return (y * (2 * columns - 1) + x).flatten(2).flatten(0, 1)


def add_halos(to: Tensor, grads: Tensor, window_size: Size) -> None:
    """Add ``(B, nH, nW, heads, D, M)`` where the halos come from.

    ``to`` has a row and a column of blocks more than there are: a halo lies in two of each.
    """
    rows, columns = window_size
    halos = grads.unflatten(-1, (2 * rows - 1, 2 * columns - 1)).permute(0, 1, 5, 2, 6, 3, 4)
    halos = halos.flatten(5)
    blocks = to.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    for y, high in ((0, slice(0, rows)), (1, slice(rows, None))):
        for x, wide in ((0, slice(0, columns)), (1, slice(columns, None))):
            part = halos[:, :, high, :, wide]
            down, across = part.shape[1], part.shape[3]
            blocks[:, y : y + down, : part.shape[2], x : x + across, : part.shape[4]] += part
