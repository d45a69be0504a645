"""Cases on which the backends of an operator are compared with PyTorch's operators in float64.

A case calls an operator as it is registered, ``torch.ops.dense``, and its registered backward pass,
so that everything runs in the calling thread. Values are normally distributed and always the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from backbones.ops.common import forced_here, without_autocast

Size = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """An operator with inputs.

    Args:
        operator: a key of :data:`backbones.ops.dispatch.OPERATORS`.
        label: its sizes, for a table.
        forward: computes the output from the tensors; it asks for a backend where it runs.
        backward: computes gradients from that of the output and the tensors; None if there is none.
        tensors: the inputs in float64 on the CPU.
    """

    operator: str
    label: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]] | None
    tensors: tuple[Tensor, ...]

    def run(self, *tensors: Tensor, grad: Tensor | None = None) -> tuple[Tensor, ...]:
        """The output, then the gradients of the tensors, ``grad`` being the output's own."""
        with torch.no_grad(), without_autocast(tensors[0]):
            out = self.forward(*tensors)
            if self.backward is None:
                return (out,)
            return out, *self.backward(out if grad is None else grad, *tensors)

    def error(self, backend: str, device: str, dtype: torch.dtype) -> float:
        """The largest error of a backend, as a part of the largest value of the tensor it is in.

        The expected values are those of ``torch`` on the CPU in float64, from inputs rounded to
        ``dtype``; a value that is not finite gives NaN or infinity.
        """
        rounded = [x.to(dtype) for x in self.tensors]
        with forced_here("torch"):
            out = self.forward(*(x.double() for x in rounded))
            grad = normal(0, *out.shape).to(dtype)
            expected = self.run(*(x.double() for x in rounded), grad=grad.double())
        with forced_here(backend):
            got = self.run(*(x.to(device) for x in rounded), grad=grad.to(device))
        errors = [
            (ours.cpu().double() - true).abs().max() / true.abs().max().clamp_min(1e-30)
            for ours, true in zip(got, expected, strict=True)
            if true.numel()
        ]
        return float(torch.stack(errors).max())


def normal(seed: int, *shape: int) -> Tensor:
    """Values of a standard normal distribution, in float64 on the CPU; the same for a seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _case(operator: str, name: str, label: str, tensors: Sequence[Tensor], *sizes, biased=False):
    """A case of ``dense::name``; ``biased`` if its backward pass is not given the bias, the last
    tensor.
    """

    def forward(*given: Tensor) -> Tensor:
        return getattr(torch.ops.dense, name)(*given, *sizes)

    def backward(grad: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        given = given[:-1] if biased else given
        return getattr(torch.ops.dense, f"{name}_backward")(grad, *given, *sizes)

    return Case(operator, label, forward, backward, tuple(tensors))


def depthwise(
    size: Size, channels: int = 40, kernel: int = 7, batch: int = 2, dynamic: bool = False
) -> Case:
    """One kernel for each channel, with ``dynamic`` for each channel and image."""
    label = f"{batch}x{channels}x{size[0]}x{size[1]}, {kernel}x{kernel}"
    kernels = normal(2, batch if dynamic else 1, kernel**2, channels)
    tensors = normal(1, batch, *size, channels), kernels, normal(3, channels)
    name = "dynamic_depthwise_conv" if dynamic else "depthwise_conv"
    return _case(name, "depthwise", label, tensors, kernel, biased=True)


def inhomogeneous(
    size: Size, groups: int = 32, shared: int = 3, kernel: int = 7, batch: int = 2, depth: int = 24
) -> Case:
    """Kernels predicted from ``depth`` channels; ``shared`` channels of a group have the same."""
    tensors = (
        normal(1, batch, *size, groups, shared),
        normal(2, batch, *size, depth),
        normal(3, groups * kernel**2, depth) * depth**-0.5,
        normal(4, groups * kernel**2),
    )
    label = f"{batch}x{groups * shared}x{size[0]}x{size[1]}, {kernel}x{kernel}, {groups} groups"
    name = "inhomogeneous_dynamic_depthwise_conv"
    return _case(name, "predict_and_aggregate", f"{label}, depth {depth}", tensors, kernel)


def aggregation(
    size: Size, groups: int = 32, shared: int = 3, kernel: int = 7, batch: int = 2
) -> Case:
    """Kernels that are given; ``shared`` channels of a group have the same."""
    tensors = (
        normal(1, batch, *size, groups, shared),
        normal(2, batch, *size, groups, kernel**2),
    )
    label = f"{batch}x{groups * shared}x{size[0]}x{size[1]}, {kernel}x{kernel}, {groups} groups"
    return _case("inhomogeneous_aggregation", "aggregate", label, tensors, kernel)


def attention(
    size: Size, heads: int = 2, dim: int = 32, window: Size = (7, 7), shift: Size = (3, 3), batch=2
) -> Case:
    """Heads of ``dim`` channels; ``size`` counts windows."""
    height, width = (n * side for n, side in zip(size, window, strict=True))
    positions = window[0] * window[1]
    tensors = normal(1, batch, height, width, 3 * heads * dim), normal(2, heads, *2 * [positions])
    label = f"{batch}x{heads * dim}x{height}x{width}, {heads} heads, {_seam(window, shift)}"
    sizes = heads, [*window], [*shift]
    return _case("window_attention", "window_attention", label, tensors, *sizes)


def mixing(
    size: Size,
    heads: int = 2,
    dim: int = 32,
    window: Size = (7, 7),
    shift: Size = (3, 3),
    batch=2,
    grid: bool = False,
) -> Case:
    """As :func:`attention`; with ``grid`` each window of an image has weights of its own."""
    height, width = (n * side for n, side in zip(size, window, strict=True))
    shape = heads, *2 * [window[0] * window[1]]
    weights = normal(2, *size, *shape) if grid else normal(2, *shape)
    tensors = normal(1, batch, height, width, heads * dim), weights
    label = f"{batch}x{heads * dim}x{height}x{width}, {heads} heads, {_seam(window, shift)}"
    label += ", weights by window" if grid else ""
    return _case("local_mlp", "local_mlp", label, tensors, [*window], [*shift])


def sliding(
    size: Size, heads: int = 2, dim: int = 32, window: Size = (7, 7), batch: int = 2
) -> Case:
    """Heads of ``dim`` channels on a map of ``size`` positions."""
    tensors = normal(1, batch, *size, 3 * heads * dim), normal(2, heads, window[0] * window[1])
    label = f"{batch}x{heads * dim}x{size[0]}x{size[1]}, {heads} heads, {_seam(window, (0, 0))}"
    return _case("sliding_attention", "sliding_attention", label, tensors, heads, [*window])


def _seam(window: Size, shift: Size) -> str:
    shifted = f", shift {shift[0]} {shift[1]}" if any(shift) else ""
    return f"windows {window[0]}x{window[1]}{shifted}"


_MAKERS = {
    "depthwise_conv": depthwise,
    "dynamic_depthwise_conv": partial(depthwise, dynamic=True),
    "inhomogeneous_dynamic_depthwise_conv": inhomogeneous,
    "inhomogeneous_aggregation": aggregation,
    "window_attention": attention,
    "local_mlp": mixing,
    "sliding_attention": sliding,
}


def first_case(operator: str) -> Case:
    """The case that the first call of an operator on a GPU runs: odd sizes, more than one tile."""
    size = (2, 3) if operator in ("window_attention", "local_mlp") else (9, 19)
    return _MAKERS[operator](size)


def small_cases(operator: str) -> list[Case]:
    """Cases that reach every border: single rows, small kernels, channels that fill no vector."""
    make, sizes = _MAKERS[operator], ((1, 1), (1, 13), (5, 3))
    if operator in ("depthwise_conv", "dynamic_depthwise_conv"):
        found = [make(size, channels) for size in sizes for channels in (1, 7, 33)]
        return found + [make((4, 9), 5, kernel) for kernel in (1, 2, 3, 5)]
    if operator in ("window_attention", "local_mlp"):
        found = [make((2, 2), 2, dim, (3, 2), (1, 1)) for dim in (1, 7, 24, 48, 96)]
        found += [make((1, 2), 3, 16, window, (0, 0)) for window in ((7, 7), (2, 5), (1, 2))]
        found += [make((2, 2), 1, 16, (4, 5), shift) for shift in ((2, 0), (0, 2))]
        own = [make((2, 2), 2, 16, (3, 2), (1, 1), grid=True)] if make is mixing else []
        return found + own
    if operator == "sliding_attention":
        found = [make(size, 2, dim, (3, 5)) for size in sizes for dim in (1, 7, 24)]
        return found + [make((4, 9), 3, 5, window) for window in ((1, 1), (3, 3), (7, 7), (9, 1))]
    found = [make(size, 2, 3) for size in sizes]
    found += [make((2, 3), groups, 3, 3) for groups in (1, 5, 40)]
    found += [make((2, 3), 2, shared, 3) for shared in (1, 17, 40)]
    return found + [make((2, 3), 2, 3, kernel) for kernel in (1, 2, 5)]


def stage_cases(operator: str, batch: int) -> list[Case]:
    """Maps of the first and third stage of a tiny network, for images of 224x224."""
    make, found = _MAKERS[operator], []
    for side, channels in ((56, 96), (14, 384)):
        if operator in ("window_attention", "local_mlp"):
            found.append(make((side // 7, side // 7), channels // 32, batch=batch))
        elif operator == "sliding_attention":
            found.append(make((side, side), channels // 32, batch=batch))
        elif operator.startswith("inhomogeneous"):
            found.append(make((side, side), 32, channels // 32, batch=batch))
        else:
            found.append(make((side, side), channels, batch=batch))
    return found
