"""The launches of the Triton kernels at the sizes of a network, compiled without a GPU."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import signature as signature_of
from pathlib import Path

DTYPES = ("fp32", "bf16", "fp16")
# B, H, W and C of the stages, and of maps whose offsets need more than 32 bits.
STAGES = {
    "stage 1": (2, 56, 56, 96),
    "stage 2": (2, 28, 28, 192),
    "stage 3": (4, 14, 14, 384),
    "stage 4": (8, 7, 7, 768),
}
LARGE = {
    "stage 1": (1, 7168, 7168, 96),
    "stage 2": (4, 3584, 3584, 192),
    "stage 3": (25, 896, 896, 384),
    "stage 4": (100, 266, 266, 768),
}


@dataclass
class Launch:
    """A kernel with the arguments and the grid that its launcher gives it."""

    label: str
    kernel: object
    arguments: dict[str, object]
    grid: tuple[int, ...]
    num_warps: int = 4
    num_stages: int = 3
    # The launcher's results: other tensors that a kernel writes are partial sums.
    returned: list = field(default_factory=list)


def launches(dtype: str, sizes: dict[str, tuple[int, ...]], every: bool = False) -> list[Launch]:
    """All kernels at each stage, with the first of the tiles that autotuning tries or with all."""
    found = []
    for labels, launcher, given in _calls(dtype, sizes):
        recorded = _record(launcher, given, every)
        keys = [(id(launch.kernel), launch.arguments.get("gather")) for launch in recorded]
        names = dict(zip(dict.fromkeys(keys), labels, strict=True))
        for launch, key in zip(recorded, keys, strict=True):
            launch.label = names[key] + launch.label
        found += recorded
    return found


def _calls(
    dtype: str, sizes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[list[str], Callable, tuple]]:
    """Labels of the kernels in the order of their launches, a launcher and its arguments."""
    import torch

    from backbones.ops.triton_kernels import (
        aggregation,
        depthwise,
        inhomogeneous,
        local_mlp,
        sliding,
        window,
    )

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    for stage, (*size, channels) in sizes.items():
        x, grad, depth = empty(*size, channels), empty(*size, channels), channels // 4
        taps, bias = empty(1, 49, channels), empty(channels)
        name = f"depthwise, {stage}", f"depthwise map gradient, {stage}"
        yield [name[0]], depthwise.convolve, (x, taps, bias, 7, 3, False)
        yield [name[1]], depthwise.convolve, (grad, taps, None, 7, 3, True)
        name = f"depthwise weight gradient, {stage}"
        yield [name], depthwise.weight_gradient, (x, grad, 1, 7, 3)
        x, grad = (t.unflatten(-1, (-1, 32)) for t in (x, grad))
        inputs = x, empty(*size, depth), empty(49, 32, depth), empty(49, 32), 7
        yield [f"I-D-DW, {stage}"], inhomogeneous.forward, inputs
        names = [f"I-D-DW {of} gradient, {stage}" for of in ("map", "hidden", "weight")]
        yield names, inhomogeneous.backward, (grad, *inputs)
        kernels = empty(*size, 49, 32).mT
        yield [f"aggregation, {stage}"], aggregation.aggregate, (x, kernels, 7)
        names = [f"aggregation {of} gradient, {stage}" for of in ("kernel", "map")]
        yield names, aggregation.aggregate_backward, (grad, x, kernels, 7)
    *size, channels = sizes["stage 1"]
    heads, windows = channels // 32, ([7, 7], [3, 3])
    qkv, value, grad = (empty(*size, n * channels) for n in (3, 1, 1))
    table = empty(heads, 49, 49)
    yield ["window attention"], window.forward, (qkv, table, heads, *windows)
    name = "window attention gradient"
    yield [name], window.backward, (grad, qkv, table, heads, *windows)
    table = empty(heads, 49)
    yield ["sliding attention"], sliding.forward, (qkv, table, heads, [7, 7])
    names = [f"sliding attention {of} gradient" for of in ("query", "key")]
    yield names, sliding.backward, (grad, qkv, table, heads, [7, 7])
    table = empty(heads, 49, 49)
    yield ["local MLP"], local_mlp.forward, (value, table, *windows)
    names = ["local MLP weight gradient", "local MLP map gradient"]
    yield names, local_mlp.backward, (grad, value, table, *windows)


def _record(launcher: Callable, given: tuple, every: bool) -> list[Launch]:
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from backbones.ops.triton_kernels import tuning

    found = []

    def run(kernel, *given, grid, warmup, num_warps=4, num_stages=3, label="", **named):
        arguments = dict(zip(kernel.arg_names, given, strict=False)) | named
        arguments = {name: arguments[name] for name in kernel.arg_names}
        grid = grid(arguments) if callable(grid) else grid
        found.append(Launch(label, kernel, arguments, grid, num_warps, num_stages))

    def tuned(tuner, *given, **named):
        for config in tuner.configs:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            sides = "x".join(str(side) for side in config.kwargs.values())
            label = f", {sides or f'{config.num_warps} warps'}"
            run(tuner.fn, *given, **named, **config.kwargs, **options, label=label)

    before = JITFunction.run, Autotuner.run, tuning._times
    JITFunction.run = run
    Autotuner.run = tuned
    tuning._times = lambda: every
    try:
        returned = launcher(*given)
    finally:
        JITFunction.run, Autotuner.run, tuning._times = before
    for launch in found:
        launch.returned = list(returned) if isinstance(returned, tuple) else [returned]
    return found


def build(launch: Launch, arch: int, until: str) -> tuple[dict[str, str], dict]:
    """The code of a kernel by stage, up to ``until`` (ttir, llir or ptx), and Triton's metadata."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", arch, 32)
    source = ASTSource(launch.kernel, *specialised(launch))
    backend = make_backend(target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    stages, metadata, code = {}, {"target": target, **options.__dict__}, {}
    backend.add_stages(stages, options, source.language)
    for name, stage in stages.items():
        module = stage(module, metadata)
        code[name] = str(module)
        if name == until:
            return code, metadata
    raise ValueError(f"no stage {until} among {', '.join(stages)}")


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict]:
    """Types, constants and divisibility of the arguments, as Triton's launch finds them."""
    import torch

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    types, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialised and type(value) is int and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{names[value.dtype]}"
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        # PyTorch's allocations are aligned.
        if types[name][0] == "*" or (types[name][0] == "i" and specialised and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def resources(ptx: str, arch: int) -> dict[str, int | str]:
    """Registers and spilled bytes by ptxas, and what the PTX says."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        # get_ptxas takes no architecture before Triton 3.6.
        which = (arch,) if signature_of(get_ptxas).parameters else ()
        ptxas = get_ptxas(*which).path
        target = re.search(r"\.target (\w+)", ptx)[1]
        done = subprocess.run(
            [ptxas, "-v", f"-arch={target}", str(path), "-o", str(Path(folder, "out"))],
            capture_output=True,
            text=True,
            check=True,
        )
    said = done.stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)),
        "tensor cores": "yes" if re.search(r"\b(mma|wgmma|tcgen05\.mma)\b", ptx) else "no",
    }
