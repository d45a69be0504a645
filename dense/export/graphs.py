"""One graph of a network for every batch, height and width.

The networks compute shifts, padding and masks from the sizes. What would still bind a graph to its
example are decisions inside of PyTorch that change no value: which memory layout a convolution
prefers for a map of a single position, whether an axis of one window broadcasts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.fx.experimental._config as symbolic
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from backbones.fusion import fold_norms
from backbones.pyramid import Block

SMALLEST, LARGEST = 32, 8192
"""Rows and columns of an image in pixels that a graph is made for."""
IMAGE = "image"
"""The name of the graphs' input."""

_BATCH, _ROWS, _COLUMNS = 2, 260, 296  # of the example: no stage's map is a single window


def captured(model: nn.Module, channels: int = 3) -> ExportedProgram:
    """The graph of a network of images, one for all sizes, with the blocks' batch norms folded.

    >>> program = captured(timm.create_model("swin_nano").eval())
    >>> program.module()(torch.randn(1, 3, 33, 480))

    Args:
        model: in evaluation mode; called with ``image``, ``(B, 3, H, W)``. Its ``images``, if it
            has this attribute, is the only B.
        channels: of the image.

    Returns:
        A program for batches from 1 and sides from :data:`SMALLEST` to :data:`LARGEST`.
    """
    like = next(model.parameters())
    batch = getattr(model, "images", None)
    shape = batch or _BATCH, channels, _ROWS, _COLUMNS
    image = torch.zeros(shape, dtype=like.dtype, device=like.device)
    sides = {
        2: Dim("height", min=SMALLEST, max=LARGEST),
        3: Dim("width", min=SMALLEST, max=LARGEST),
    }
    if batch is None:
        sides[0] = Dim("batch", min=1, max=2**20)
    with open_sizes(), exact_pooling(model), folded(model), torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=(sides,))
    _drop_counts_of_boxes(program)
    return program


def _drop_counts_of_boxes(program: ExportedProgram) -> None:
    """Drop the assertions on the number of boxes that torchvision's NMS keeps: two or more."""
    nodes = list(program.graph.nodes)
    if not any(node.target is torch.ops.torchvision.nms.default for node in nodes):
        return
    for node in nodes:
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


@contextmanager
def open_sizes() -> Iterator[None]:
    """A context in which torch.export adds no guard on a size, and 1 is a size as any other."""
    with symbolic.patch(backed_size_oblivious=True), ShapeEnv().suppress_guards():
        yield


class ExactPool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, whose matrices follow from the size.

    Args:
        output_size: rows and columns of the result.
    """

    def __init__(self, output_size: Sequence[int]):
        super().__init__()
        self.output_size = tuple(output_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, *output_size)``."""
        rows, columns = (
            _averages(length, count, x)
            for length, count in zip(x.shape[2:], self.output_size, strict=True)
        )
        return rows @ x @ columns.mT


@contextmanager
def exact_pooling(model: nn.Module) -> Iterator[None]:
    """A context in which each ``nn.AdaptiveAvgPool2d`` of a model is an :class:`ExactPool`."""
    with _restored(model):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.AdaptiveAvgPool2d):
                    setattr(parent, name, ExactPool(to_2tuple(child.output_size)))
        yield


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """A context in which the batch norms of a model's blocks are folded: half of a graph's nodes.

    Engines cannot, past the transpositions around a norm.
    """
    with _restored(model), torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, Block) and not module.training:
                fold_norms(module)
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """A context after which each module has the parameters and children that it had."""
    kept = [(m, dict(m._parameters), dict(m._modules)) for m in model.modules()]
    try:
        yield
    finally:
        for module, parameters, modules in kept:
            module._parameters, module._modules = parameters, modules


def _averages(length: int, count: int, like: Tensor) -> Tensor:
    """``(count, length)``: each row averages one of PyTorch's bins, which may overlap."""
    bins = torch.arange(count, device=like.device)[:, None]
    first = torch.div(bins * length, count, rounding_mode="floor")
    last = torch.div((bins + 1) * length + count - 1, count, rounding_mode="floor")
    places = torch.arange(length, device=like.device)
    inside = (places >= first) & (places < last)
    return inside.to(like.dtype) / (last - first).to(like.dtype)
