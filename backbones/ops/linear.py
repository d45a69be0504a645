"""Linear layers and MLPs of the models that ``backbones.fuse`` returns, by oneDNN on CPUs.

With gradients enabled both are PyTorch's own functions.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.common import autocast_dtype
from backbones.ops.dispatch import choose, no_packing

# Bytes of an MLP's hidden map at a time: they fit the CPU's cache, and the allocator reuses the
# memory; it would ask the system for larger blocks each time.
_HIDDEN = 2**22
T = TypeVar("T")
ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "relu": F.relu}


class Kept:
    """A value that is made of tensors, until they are replaced, moved or changed in place.

    Changes through ``.data`` alone are not seen. Copies and pickles are empty. Threads may share
    one.

    >>> kept, weight = Kept(), torch.ones(2)
    >>> kept.of((weight,), None, lambda: 2 * weight)
    tensor([2., 2.])
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple, tuple, Any] | None = None

    def of(self, sources: tuple[Tensor | None, ...], key: Hashable, make: Callable[[], T]) -> T:
        """What ``make()`` returns, or returned for the same sources and key."""
        sources = tuple(t for t in sources if t is not None)
        if any(t.is_inference() for t in sources):
            # They have no version, by which a change would be seen.
            return make()
        versions = key, *((t.data_ptr(), t._version, t.dtype, t.shape) for t in sources)
        kept = self._kept
        if kept is None or kept[0] != versions:
            # The sources are held so that no other tensor gets their addresses.
            kept = self._kept = versions, tuple(t.detach() for t in sources), make()
        return kept[2]

    def clear(self) -> None:
        """Free the value."""
        self._kept = None

    def __reduce__(self) -> tuple:
        return Kept, ()


def _converted(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _packed(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    weight, bias = _converted(weight, bias, dtype)
    if no_packing(dtype) is None:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return weight, bias


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    packed: Kept | None = None,
) -> Tensor:
    """``x @ weight.T + bias``, then an activation.

    >>> linear(torch.ones(2, 5, 5, 4), torch.ones(8, 4), activation="gelu").shape
    torch.Size([2, 5, 5, 8])

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)`` or None.
        activation: ``"none"``, ``"relu"`` or ``"gelu"``, the exact one.
        packed: keeps oneDNN's copies of this weight and bias from call to call.

    Returns:
        ``(..., D)`` in the dtype of x, or in autocast's.

    Raises:
        RuntimeError: C or the dtype differs between x and the weight; the error is PyTorch's.
    """
    if by_onednn(x, weight) and _fit(x, weight, bias):
        dtype = autocast_dtype(x)
        if packed is None:
            return _onednn(x.to(dtype), *_converted(weight, bias, dtype), activation)
        given = _in_order(weight, bias, dtype, packed)
        return _onednn(x.to(dtype), *given, activation)
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    packed: tuple[Kept, Kept] | None = None,
) -> Tensor:
    """Linear, GELU, linear; oneDNN computes it in pieces if the hidden map is large.

    >>> mlp(torch.ones(2, 4), torch.ones(16, 4), None, torch.ones(4, 16), None).shape
    torch.Size([2, 4])

    Args:
        x: ``(..., C)``.
        weight1: ``(D, C)``.
        bias1: ``(D,)`` or None.
        weight2: ``(E, D)``.
        bias2: ``(E,)`` or None.
        packed: as of :func:`linear`, for each of the two.

    Returns:
        ``(..., E)``.

    Raises:
        RuntimeError: sizes or dtypes do not match; the error is PyTorch's.
    """
    parameters = weight1, bias1, weight2, bias2, packed or (None, None)
    # The size is compared last: a compiled graph, which never uses oneDNN, gets no guard on it.
    if by_onednn(x, weight1) and _fit(x, weight1, bias1):
        if pieces(x, len(weight1)) > 1:
            return _mlp_by_pieces(x, *parameters)
    return _mlp(x, *parameters)


def by_onednn(x: Tensor, *others: Tensor) -> bool:
    """Whether oneDNN computes the linears of x: on a CPU, without gradients, outside of graphs."""
    chosen = choose("linear", x, *others) == "onednn"
    return chosen and x.numel() > 0 and not torch.is_grad_enabled()


def prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, packed: Kept
) -> Callable[[Tensor], Tensor]:
    """:func:`linear` of rows of a dtype like x's, ``(N, C)`` to ``(N, D)``.

    For many pieces of a map, where :func:`by_onednn` is true of x: all else is done once.

    Raises:
        RuntimeError: the dtypes of x, weight and bias differ, without autocast.
    """
    if not _fit_dtypes(x, weight, bias):
        raise RuntimeError(f"expected x to have the weight's dtype, {weight.dtype}, not {x.dtype}")
    dtype = autocast_dtype(x)
    weight, bias = _in_order(weight, bias, dtype, packed)
    algorithm = "none" if activation == "gelu" else ""
    product = torch.ops.mkldnn._linear_pointwise

    def run(rows: Tensor) -> Tensor:
        rows = rows if rows.dtype == dtype else rows.to(dtype)
        return product(rows, weight, bias, activation, [], algorithm)

    return run


def pieces(x: Tensor, hidden: int) -> int:
    """In how many pieces ``(..., C)`` fits the cache when it has ``hidden`` channels."""
    elements = x.numel() // x.shape[-1] * hidden
    return max(1, round(elements * autocast_dtype(x).itemsize / _HIDDEN))


def _in_order(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, packed: Kept
) -> tuple[Tensor, Tensor | None]:
    return packed.of((weight, bias), dtype, lambda: _packed(weight, bias, dtype))


def _mlp(x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2, packed) -> Tensor:
    x = linear(x, weight1, bias1, "gelu", packed[0])
    return linear(x, weight2, bias2, packed=packed[1])


def _mlp_by_pieces(x: Tensor, weight1: Tensor, *others) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    size = math.ceil(len(rows) / pieces(rows, len(weight1)))
    out = torch.cat([_mlp(part, weight1, *others) for part in rows.split(size)])
    return out.view(*x.shape[:-1], -1)


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether shapes and dtypes match; if not, F.linear raises, with a better message."""
    if not _fit_dtypes(x, weight, bias):
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return x.dim() > 0 and x.shape[-1:] == weight.shape[1:]


def _fit_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    dtypes = {weight.dtype} if bias is None else {weight.dtype, bias.dtype}
    if not torch.is_autocast_enabled("cpu"):
        return dtypes == {x.dtype}
    # It casts all of them but float64.
    return all(dtype.is_floating_point and dtype != torch.float64 for dtype in dtypes)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    shape, x = (*x.shape[:-1], weight.shape[0]), x.reshape(-1, x.shape[-1])
    algorithm = "none" if activation == "gelu" else ""
    out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    # Not a view for autograd: outputs may be modified in place.
    return torch.ops.aten._unsafe_view(out, shape)
