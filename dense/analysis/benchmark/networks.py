"""Whole networks, beside those of timm and torchvision of the same size."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import timm
import torch
from torch import nn
from torchvision.models import swin_t

import backbones
from backbones.inference import InferenceLinear
from dense.analysis import complexity
from dense.analysis.benchmark import engines as engines_of
from dense.analysis.benchmark.measure import Contender, Contest, Step
from dense.analysis.benchmark.report import PRODUCT

SIZES = ((224, 224), (512, 512), (512, 2048), (800, 1344))
REFERENCE = "timm swin_tiny"
# Swin's window of 7 does not divide the larger feature maps: each library pads in its own way.
_PEERS: dict[str, Callable[[tuple[int, int]], nn.Module]] = {
    REFERENCE: lambda size: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, window_size=7
    ),
    "timm convnext_tiny": lambda size: timm.create_model("convnext_tiny"),
    "torchvision swin_t": lambda size: swin_t(),
}


def contests(
    sizes: Sequence[tuple[int, int]],
    batch: int | None,
    device: torch.device,
    compiled: bool = False,
    scale: str = "tiny",
    modes: Sequence[str] = ("inference", "training"),
    dtype: torch.dtype | None = None,
    engines: bool = False,
    limit: bool = False,
) -> list[Contest]:
    """The five families and three peers at every size.

    Args:
        sizes: height and width of the images in pixels.
        batch: images in a step; None takes :func:`_default_batch`.
        device: where they run.
        compiled: run every network also under ``torch.compile(dynamic=True)``.
        scale: ``"nano"``, ``"tiny"`` or ``"base"`` of our networks.
        modes: ``"inference"`` (:func:`backbones.fuse`, no gradients), ``"training"`` (forward and
            backward).
        dtype: float32 or bfloat16, by autocast; None takes :func:`default_dtype`.
        engines: run timm's networks and ours also in ONNX Runtime and OpenVINO: inference on a CPU.
        limit: one large matrix product too, whose multiply-adds a second limit the networks'.
    """
    ours = [f"{family}_{scale}" for family in backbones.FAMILIES]
    dtype = dtype or default_dtype(device)
    found = []
    for size in sizes:
        images = batch or _default_batch(size, device)
        for mode in modes:
            makers = _PEERS | {name: _our(name, mode) for name in ours}
            contenders = []
            for name, make in makers.items():
                shape = (images, 3, *size)
                plain = _our(name, "training") if name in ours else make
                counted = None
                if limit:
                    # A backward pass has two products for each of the forward pass.
                    passes = 1 if mode == "inference" else 3
                    counted = passes * complexity.flops(plain(size), shape)
                more = dict(ours=name in ours, multiply_adds=counted)
                options = make, size, images, mode, device, dtype
                contenders.append(Contender(name, _builder(*options), **more))
                if compiled:
                    build = _builder(*options, compile_it=True)
                    contenders.append(Contender(f"{name}, compiled", build, **more))
                if engines and mode == "inference" and not name.startswith("torchvision"):
                    contenders += _in_engines(name, plain, size, images, dtype, more)
            if limit:
                contenders.append(_product(device, dtype))
            title = f"{scale}, {mode}, {size[0]}x{size[1]}, batch {images}"
            title += ", eager and compiled" if compiled else ""
            title += ", with engines" if engines else ""
            title += ", beside a product" if limit else ""
            pixels = images * size[0] * size[1]
            found.append(Contest("networks", title, tuple(contenders), images, pixels))
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def scaling_contests(
    device: torch.device,
    modes: Sequence[str] = ("inference",),
    dtype: torch.dtype | None = None,
) -> list[Contest]:
    """Each family at sides of 224 to 1344 pixels, and with 1 to 64 images of 224x224."""
    shapes = [(1, side) for side in (224, 320, 448, 640, 896, 1344)]
    shapes += [(batch, 224) for batch in (2, 4, 8, 16, 32, 64)]
    found, dtype = [], dtype or default_dtype(device)
    for mode, (images, side) in product(modes, shapes):
        contenders = tuple(
            Contender(
                name,
                _builder(_our(name, mode), (side, side), images, mode, device, dtype),
                ours=True,
            )
            for name in (f"{family}_tiny" for family in backbones.FAMILIES)
        )
        title = f"{mode}, {side}x{side}, batch {images}"
        found.append(Contest("scaling", title, contenders, images, images * side**2))
    return found


def _our(name: str, mode: str) -> Callable[[tuple[int, int]], nn.Module]:
    def make(size: tuple[int, int]) -> nn.Module:
        # Swin-Local-MLP's learned weights depend on img_size: build it for the measured size.
        model = timm.create_model(name, img_size=size)
        return backbones.fuse(model, inplace=True) if mode == "inference" else model

    return make


def _builder(
    make: Callable[[tuple[int, int]], nn.Module],
    size: tuple[int, int],
    images: int,
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    compile_it: bool = False,
) -> Callable[[], Step]:
    def build() -> Step:
        torch.manual_seed(0)
        model = make(size).to(device, memory_format=torch.channels_last)
        model.train(mode == "training")
        x = torch.randn(images, 3, *size, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        run = torch.compile(model, dynamic=True) if compile_it else model
        half = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

        def infer() -> torch.Tensor:
            with torch.no_grad(), half:
                return run(x)

        def train() -> None:
            model.zero_grad(set_to_none=True)
            with half:
                loss = run(x).float().square().mean()
            loss.backward()

        return infer if mode == "inference" else train

    return build


def _in_engines(
    name: str,
    make: Callable[[tuple[int, int]], nn.Module],
    size: tuple[int, int],
    images: int,
    dtype: torch.dtype,
    more: dict,
) -> Iterator[Contender]:
    def network() -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        return make(size).eval(), torch.randn(images, 3, *size)

    for engine, build in engines_of.steps(network, dtype).items():
        yield Contender(f"{name}, {engine}", build, in_torch=False, **more)


def _product(device: torch.device, dtype: torch.dtype) -> Contender:
    rows, inner, columns = 4096, 1024, 1024

    def build() -> Step:
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        layer = nn.Linear(inner, columns, bias=False, device=device, dtype=dtype).eval()
        # oneDNN's product of packed weights: twice as fast as torch.mm on some processors.
        return torch.inference_mode()(partial(InferenceLinear(layer).eval(), a))

    return Contender(PRODUCT, build, multiply_adds=rows * inner * columns)


def _default_batch(size: tuple[int, int], device: torch.device) -> int:
    """The batch with as many pixels as 4 (CPU) or 64 (GPU) images of 224x224, at least 1."""
    budget = (64 if device.type == "cuda" else 4) * 224 * 224
    return max(1, budget // (size[0] * size[1]))
