"""Compile the Triton kernels, without a GPU, and print what they use and how they access memory.

    python tools/inspect_kernels.py                     # for sm_80, sm_90 and sm_100
    python tools/inspect_kernels.py --arch 80 --dtypes fp16
    python tools/inspect_kernels.py --arch 80 86 89 90 --tiles --only resources

Compiles every kernel as its launcher would call it at the sizes of a tiny network's first and last
stage, with --tiles of all stages. Nothing is timed. Values that differ between architectures are
separated by slashes.

registers, spilled, shared, widest
    Of a thread and in bytes by ptxas; shared memory of a program; the widest access of a thread to
    global memory.
sectors
    The bytes that each warp access uses over the bytes of the 32-byte sectors it touches, summed
    over all loads and stores of a launch. The addresses are those of the generated code: its
    integer instructions are executed for every thread of the grid, with its masks. Bytes that
    several threads of a warp read count once.
traffic
    The ideal traffic to memory over that of the launch. Ideal is each tensor read or written once.
    The launch's is the sectors that all programs together touch, what they share counted once. For
    partial sums, it includes the second pass, which reads them and writes their sum. More than
    100% is possible: kernels are not read at taps that lie in the padding.
reread
    How often the caches serve a sector on average: the sectors that each program reads, over those
    that all programs together read.

Exits with 1 if a kernel spills registers in bfloat16 or float16, needs more shared memory than the
99 KB of a consumer GPU, or computes in 32 bits an offset that passes 2^31 in a map of 5e9 numbers.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import signature as signature_of
from math import ceil
from pathlib import Path

import numpy as np

DTYPES = ("fp32", "bf16", "fp16")
# What a program can have on GPUs of compute capability 8.6, 8.9 and 12.0, in bytes.
SHARED = 101_376
SECTOR = 32
# B, H, W and C of the stages, and of maps whose offsets need more than 32 bits.
# Programs whose threads are executed together.
_PROGRAMS = 256
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


# Launches


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


# Compilation


def build(launch: Launch, arch: int, until: str) -> tuple[dict[str, str], dict]:
    """The code of a kernel by stage, up to ``until`` (ttir, llir or ptx), and Triton's metadata."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", arch, 32)
    source = ASTSource(launch.kernel, *_specialised(launch))
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


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict]:
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


# Accesses to global memory, from the addresses that the PTX computes


class Emulation:
    """Executes the instructions of a PTX kernel that its addresses, masks and branches depend on.

    Registers are arrays over programs and their threads. Where threads branch apart, those at the
    first instruction go on, so that all meet again.
    """

    def __init__(self, ptx: str):
        self.instructions, self.labels, self.parameters = _parse(ptx)
        self.accesses = [one for one in self.instructions if one.is_access]
        self._keep_what_addresses_need()

    def _keep_what_addresses_need(self) -> None:
        needed = set()
        for one in self.instructions:
            if one.is_access or one.operation in ("bra", "cp.async", "ret"):
                needed |= set(_REGISTER.findall(one.guard + one.reads))
        while True:
            more = {
                name
                for one in self.instructions
                if needed & one.written and not one.is_access
                for name in _REGISTER.findall(one.guard + one.reads)
            }
            if more <= needed:
                break
            needed |= more
        self.executed = [
            one.is_access or one.operation in ("bra", "ret") or bool(needed & one.written)
            for one in self.instructions
        ]
        loaded = [
            one for one in self.instructions if one.operation == "ld" and needed & one.written
        ]
        if any("param" not in one.text for one in loaded):
            raise NotImplementedError(f"an address depends on what is loaded: {loaded[0].text}")

    def run(
        self, values: list[int], programs: np.ndarray, threads: int
    ) -> Iterator[tuple[bool, int, np.ndarray, np.ndarray]]:
        """Yield whether each access stores, its bytes, and addresses and mask of all threads.

        Args:
            values: the kernel's parameters.
            programs: program ids ``(3, number)``.
            threads: of a program.
        """
        shape = programs.shape[1], threads
        registers = {f"%ctaid.{axis}": programs[i, :, None] for i, axis in enumerate("xyz")}
        registers["%tid.x"] = np.arange(threads)[None]
        parameters = {
            name: np.array([[value]]) for name, value in zip(self.parameters, values, strict=False)
        }
        end = len(self.instructions)
        at, everywhere = 0, None  # The instruction of all threads, or of each
        while True:
            if everywhere is not None:
                at = int(everywhere.min())
                if (everywhere == at).all():
                    everywhere = None
            if at >= end:
                return
            mask = None if everywhere is None else everywhere == at
            one, after = self.instructions[at], at + 1
            if self.executed[at]:
                guard = _guard(one.guard, registers)
                if one.operation in ("bra", "ret"):
                    goal = end if one.operation == "ret" else self.labels[one.reads.strip()]
                    if everywhere is None and guard is not None and guard.any() != guard.all():
                        everywhere = np.full(shape, at)
                        mask = np.ones(shape, bool)
                    if everywhere is not None:
                        taken = True if guard is None else guard
                        everywhere = np.where(mask, np.where(taken, goal, after), everywhere)
                        continue
                    if guard is None or guard.any():
                        after = goal
                elif one.is_access:
                    seen = np.ones(shape, bool) if mask is None else mask
                    seen = seen if guard is None else seen & guard
                    if one.operation == "cp":
                        size = _value(one.operands[3], registers) if len(one.operands) > 3 else 1
                        seen = seen & (size != 0)
                    address = _value(one.address, registers)
                    if seen.any():
                        yield one.stores, one.width, np.broadcast_to(address, shape), seen
                else:
                    written = mask if guard is None else guard if mask is None else mask & guard
                    _execute(one, registers, parameters, written)
            if everywhere is None:
                at = after
            else:
                everywhere = np.where(mask, after, everywhere)


_REGISTER = re.compile(r"%[a-z]+[\w.]*|\bcomplete\b")
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


@dataclass
class _Instruction:
    text: str
    guard: str
    operation: str
    parts: list[str]
    operands: list[str]
    written: set[str]
    reads: str

    @property
    def is_access(self) -> bool:
        return "global" in self.parts and self.operation in ("ld", "st", "cp", "red", "atom")

    @property
    def stores(self) -> bool:
        return self.operation == "st"

    @property
    def address(self) -> str:
        if self.operation == "cp":
            return self.operands[1]
        return self.operands[0 if self.stores else 1]

    @property
    def width(self) -> int:
        """Bytes of a thread."""
        if self.operation == "cp":
            return int(self.operands[2], 0)
        vector = next((int(p[1:]) for p in self.parts if re.fullmatch(r"v\d", p)), 1)
        return vector * int(re.search(r"\d+$", self.parts[-1])[0]) // 8


def _parse(ptx: str) -> tuple[list[_Instruction], dict[str, int], list[str]]:
    """Instructions, where labels are among them, and names of parameters."""
    head, body = re.sub(r"//[^\n]*", "", ptx).split(".visible .entry", 1)[1].split(")\n", 1)
    parameters = re.findall(r"(\w+_param_\d+)", head)
    body = body[: body.index(".section") if ".section" in body else None]
    instructions, labels = [], {}
    body = re.sub(
        r"^\s*\.(loc|file|reg|reqntid|maxnreg|pragma|minnctapersm)[^\n]*", "", body, flags=re.M
    )
    for statement in re.split(r"[;\n]", body):
        text = statement.strip()
        while label := re.match(r"([$\w]+):", text):
            labels[label[1]] = len(instructions)
            text = text[label.end() :].strip()
        text = text.removeprefix("{").strip() if text.startswith("{") else text
        if not text or text in "{}" or text.startswith("."):
            continue
        guard, text = re.match(r"(?:@(!?\S+)\s+)?(.*)", text, re.S).groups()
        name, _, rest = text.partition(" ")
        name, rest = (
            (name.split("\t") + [""])[0],
            rest if "\t" not in name else text.partition("\t")[2],
        )
        operation, *parts = name.split(".")
        operands = [o.strip() for o in _OPERANDS.findall(rest)]
        writes = operation not in ("st", "bra", "ret", "bar", "red", "cp", "fence", "membar")
        writes = writes and bool(operands)
        written = set(_REGISTER.findall(operands[0])) if writes else set()
        if operation == "ld":
            reads = operands[1]
        elif operation in ("st", "cp"):
            reads = " ".join(operands[1:] if operation == "cp" else operands[:1])
        else:
            reads = " ".join(operands[1:] if writes else operands)
        instructions.append(
            _Instruction(text, guard or "", operation, parts, operands, written, reads)
        )
    return instructions, labels, parameters


def _guard(guard: str, registers: dict[str, np.ndarray]) -> np.ndarray | None:
    if not guard:
        return None
    value = registers[guard.removeprefix("!")]
    return ~value if guard.startswith("!") else value


def _value(operand: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    operand = operand.strip("[] ")
    if "+" in operand:
        return sum(_value(part, registers) for part in operand.split("+"))
    if operand.startswith("%"):
        return registers[operand]
    return np.array([[int(operand, 0)]])


def _execute(
    one: _Instruction,
    registers: dict[str, np.ndarray],
    parameters: dict[str, np.ndarray],
    mask: np.ndarray | None,
) -> None:
    if one.operation == "ld":
        results = [parameters[one.operands[1].strip("[] ")]]
    elif one.operation == "mbarrier":
        results = [np.array([[True]])]
    else:
        results = _compute(one, registers)
    names = _REGISTER.findall(one.operands[0])
    for name, result in zip(names, results, strict=False):
        if mask is not None and name in registers:
            result = np.where(mask, result, registers[name])
        registers[name] = result


def _compute(one: _Instruction, registers: dict[str, np.ndarray]) -> list[np.ndarray]:
    operation, kind = one.operation, one.parts[-1] if one.parts else ""
    if operation == "mov" and one.operands[1].startswith("{"):
        low, high = (_value(o, registers) for o in one.operands[1].strip("{}").split(","))
        half = int(kind[1:]) // 2
        return [_wrap((high << half) | (low & (2**half - 1)), f"s{2 * half}")]
    given = [_value(o, registers) for o in one.operands[1:]]
    if operation in ("mov", "cvta"):
        return given
    if kind == "pred":
        return [_LOGIC[operation](*given)]
    if operation == "cvt":
        return [_wrap(_wrap(given[0], one.parts[-1]), one.parts[-2])]
    if operation == "shfl":
        warps = np.broadcast_to(given[0], given[0].shape[:1] + (max(32, given[0].shape[1]),))
        lane = int(given[1].item())
        return [np.repeat(warps[:, lane::32], 32, axis=1)]
    if set(one.parts[:-1]) & {"hi", "sat", "cc"} and (operation, kind[1:]) != ("mul", "32"):
        raise NotImplementedError(one.text)
    wide = "wide" in one.parts
    signed = [_wrap(g, kind if kind[0] in "su" else f"s{kind[1:]}") for g in given]
    if operation == "setp":
        return [_TESTS[one.parts[0]](*signed)]
    if operation == "selp":
        return [np.where(given[2].astype(bool), given[0], given[1])]
    if operation in ("shl", "shr"):
        count = np.clip(given[1], 0, 63)
        result = signed[0] << count if operation == "shl" else signed[0] >> count
        if operation == "shl":
            result = np.where(given[1] >= int(kind[1:]), 0, result)
    elif operation == "bfe":
        result = (signed[0] >> given[1]) & ((1 << given[2]) - 1)
    elif operation == "mul" and "hi" in one.parts and kind[1:] == "32":
        result = signed[0] * signed[1] >> 32
    elif operation == "mad":
        addend = given[2] if wide else signed[2]
        result = signed[0] * signed[1] + addend
    elif operation in ("div", "rem"):
        result = _divide(signed[0], signed[1], operation)
    else:
        result = _ARITHMETIC[operation](*signed)
    bits = int(kind[1:]) * (2 if wide else 1)
    return [_wrap(result, f"s{bits}")]


_LOGIC = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "mov": lambda a: a,
    "selp": lambda a, b, c: np.where(c, a, b),
}
_TESTS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
}


def _wrap(value: np.ndarray, kind: str) -> np.ndarray:
    """To the range of ``s32``, ``u32`` and the like; 64 bits stay as they are."""
    bits = int(kind[1:])
    if bits >= 64:
        return value
    if kind[0] == "u":
        return value & (2**bits - 1)
    return ((value + 2 ** (bits - 1)) & (2**bits - 1)) - 2 ** (bits - 1)


def _divide(a: np.ndarray, b: np.ndarray, operation: str) -> np.ndarray:
    """Rounded to zero. Where the code would not have divided, the divisor may be zero."""
    quotient = np.abs(a) // np.maximum(np.abs(b), 1) * np.sign(a) * np.sign(b)
    return quotient if operation == "div" else a - quotient * b


def accesses(launch: Launch, ptx: str) -> dict[str, float]:
    """``sectors``, ``traffic`` and ``reread`` of a launch, see above."""
    import torch

    types = _specialised(launch)[0]
    given = [value for name, value in launch.arguments.items() if types[name] != "constexpr"]
    seen = touched(ptx, given, launch.grid, launch.num_warps)
    direct = [tensor.untyped_storage()._cdata for tensor in launch.returned]
    ideal, traffic = 0, SECTOR * sum(len(s) for s in (*seen.read.values(), *seen.written.values()))
    for place in seen.read:
        ideal += given[place].nbytes
    for place in seen.written:
        tensor, partial = given[place], 1
        if tensor.untyped_storage()._cdata not in direct:
            partial = launch.arguments["chunks"]
            traffic += tensor.nbytes + tensor.nbytes // partial
        ideal += tensor.nbytes // partial
    assert all(isinstance(given[place], torch.Tensor) for place in (*seen.read, *seen.written))
    return {
        "sectors": seen.used / seen.touched,
        "traffic": ideal / traffic,
        "reread": seen.by_programs / sum(map(len, seen.read.values())),
    }


@dataclass
class Touched:
    """Accesses of a whole grid; ``read`` and ``written`` are the sectors of each argument."""

    used: int
    touched: int
    by_programs: int
    read: dict[int, np.ndarray]
    written: dict[int, np.ndarray]


def touched(ptx: str, given: list, grid: tuple[int, ...], num_warps: int) -> Touched:
    """Execute a kernel's addresses for all threads of a grid.

    Args:
        ptx: of the kernel.
        given: tensors, of which only the size matters, and numbers in the order of the parameters.
        grid: of programs.
        num_warps: of a program.
    """
    emulation = Emulation(ptx)
    # Each argument has an address space of its own, of 2^40 bytes.
    values = [v if isinstance(v, int) else (place + 1) << 40 for place, v in enumerate(given)]
    values += [0] * (len(emulation.parameters) - len(values))
    x, y, z = (*grid, 1, 1)[:3]
    programs = np.stack(np.unravel_index(np.arange(x * y * z), (z, y, x))[::-1])
    used = total = by_programs = 0
    # Sectors, and those of a few programs with the program's number in the high bits.
    seen = {False: [], True: []}
    for start in range(0, x * y * z, _PROGRAMS):
        some = programs[:, start : start + _PROGRAMS]
        numbers = np.arange(some.shape[1]).repeat(num_warps)[:, None] << 50
        own = {False: [], True: []}
        for stores, width, address, mask in emulation.run(values, some, 32 * num_warps):
            address = np.where(mask, address, -1).reshape(-1, 32)
            sectors = address // SECTOR
            used += width * _distinct(address)
            total += SECTOR * _distinct(sectors)
            own[stores].append(np.unique((sectors + numbers)[sectors >= 0]))
            if len(own[stores]) > 64:
                own[stores] = [np.unique(np.concatenate(own[stores]))]
        for stores, found in own.items():
            found = np.unique(np.concatenate([np.zeros(0, np.int64), *found]))
            by_programs += 0 if stores else len(found)
            seen[stores] = [np.unique(np.concatenate([*seen[stores], found & (2**50 - 1)]))]

    def by_argument(sectors: np.ndarray) -> dict[int, np.ndarray]:
        places = (sectors * SECTOR >> 40) - 1
        return {int(place): sectors[places == place] for place in np.unique(places)}

    return Touched(
        used, total, by_programs, by_argument(seen[False][0]), by_argument(seen[True][0])
    )


def _distinct(warps: np.ndarray) -> int:
    """Distinct numbers in the rows of ``(warps, 32)``, without negative ones."""
    ordered = np.sort(warps, 1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int((new & (ordered >= 0)).sum())


# Offsets


def overflows(ttir: str, launch: Launch) -> list[str]:
    """The 32-bit results in Triton's own code that pass 2^31 at the arguments of ``launch``.

    Every integer is an interval, of all programs of the grid and all iterations of loops.
    """
    known: dict[str, tuple[int, int]] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, int) and not isinstance(value, bool):
            known[f"%{name}"] = value, value
    grid = (*launch.grid, 1, 1)
    known |= {f"program {axis}": (0, grid[i] - 1) for i, axis in enumerate("xyz")}
    found = []
    for line in ttir.splitlines():
        line = re.sub(r" loc\(.*", "", line).strip()
        if loop := re.match(r"(?:%\S+ = )?scf\.for (%\S+) = (%\S+) to (%\S+) step", line):
            variable, low, high = loop.groups()
            known[variable] = known[low][0], max(known[low][0], known[high][1] - 1)
            continue
        matched = re.match(r"(%[\w#:]+) = (\S+) (.*)", line)
        if not matched:
            continue
        name, operation, rest = matched.groups()
        kind = re.search(r"(?:tensor<[\dx]*x)?i(\d+)>?$", rest)
        if not kind or "!tt.ptr" in rest:
            continue
        interval = _interval(operation, rest, known)
        if interval is None:
            raise NotImplementedError(f"no interval of {line}")
        known[name] = interval
        if kind[1] == "32" and not (-(2**31) <= interval[0] and interval[1] < 2**31):
            found.append(line)
    return found


def _interval(
    operation: str, rest: str, known: dict[str, tuple[int, int]]
) -> tuple[int, int] | None:
    given = [known.get(name) for name in re.findall(r"%[\w]+(?:#\d+)?", rest)]
    if operation == "arith.constant":
        text = re.match(r"(?:dense<)?(-?\w+)", rest)[1]
        value = {"true": 1, "false": 0}.get(text)
        value = int(text, 0) if value is None else value
        return value, value
    if operation == "tt.get_program_id":
        return known[f"program {rest.split()[0]}"]
    if operation == "tt.make_range":
        end, start = (int(re.search(rf"{word} = (\d+)", rest)[1]) for word in ("end", "start"))
        return start, end - 1
    if operation == "arith.cmpi" or operation == "arith.cmpf":
        return 0, 1
    if any(one is None for one in given):
        return None
    if operation in _CARRIED:
        return given[0]
    if operation == "arith.select":
        return min(given[1][0], given[2][0]), max(given[1][1], given[2][1])
    if operation in ("arith.andi", "arith.ori", "arith.xori"):
        bits = max(abs(bound) for one in given for bound in one).bit_length()
        return (0 if min(a for a, _ in given) >= 0 else -(2**bits)), 2**bits - 1
    (a, b), (c, d) = given
    if operation == "arith.remsi":
        # Of numbers below the divisor nothing is taken.
        return (a, b) if 0 <= a and b < c else (0 if a >= 0 else 1 - d, min(b, d - 1))
    compute = _BOUNDS.get(operation)
    if compute is None:
        return None
    corners = [compute(p, q) for p in (a, b) for q in (c, d)]
    return min(corners), max(corners)


_CARRIED = {
    "tt.splat",
    "tt.expand_dims",
    "tt.broadcast",
    "tt.reshape",
    "tt.trans",
    "arith.extsi",
    "arith.extui",
    "arith.trunci",
}
_BOUNDS = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: int(a / b) if abs(a) < 2**50 else a // b,
    "arith.ceildivsi": lambda a, b: ceil(a / b),
    "arith.minsi": min,
    "arith.maxsi": max,
}


# The table


def inspect(launch: Launch, large: Launch, arch: int, only: str | None) -> dict[str, int | str]:
    """One row of the table, or a part: ``only`` the check of offsets or the resources."""
    code, metadata = build(launch, arch, "ttir" if only == "offsets" else "ptx")
    if wrong := overflows(code["ttir"], large):
        raise OverflowError(f"{launch.label}: 32 bits are too few for\n" + "\n".join(wrong))
    if only == "offsets":
        return {"offsets": "64 bits"}
    row = resources(code["ptx"], arch)
    products = row.pop("tensor cores")
    row["shared"] = metadata["shared"]
    row["widest"] = max(one.width for one in Emulation(code["ptx"]).accesses)
    if only != "resources":
        found = accesses(launch, code["ptx"])
        row |= {name: f"{100 * found[name]:.0f}%" for name in ("sectors", "traffic")}
        row["reread"] = f"{found['reread']:.1f}"
    return row | {"tensor cores": products}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 90, 100],
        help="sm_80, 89, 90, ... (%(default)s)",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--tiles", action="store_true", help="all tiles that autotuning tries")
    parser.add_argument("--only", choices=("offsets", "resources"), help="a part, in less time")
    parser.add_argument("--kernels", default="", metavar="NAME", help="those whose name has NAME")
    args = parser.parse_args(argv)
    # With it, triton.jit makes interpreted functions, which cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        import triton
    except ImportError:
        print("inspect_kernels: Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    archs = ", ".join(f"sm_{arch}" for arch in args.arch)
    print(f"Triton {triton.__version__}, {archs}\n")
    failed, header = False, True
    stages = list(STAGES) if args.tiles else ["stage 1", "stage 4"]
    for dtype in args.dtypes:
        small, large = (
            launches(dtype, {stage: sizes[stage] for stage in stages}, args.tiles)
            for sizes in (STAGES, LARGE)
        )
        for one, same in zip(small, large, strict=True):
            if args.kernels not in one.label:
                continue
            rows = [inspect(one, same, arch, args.only) for arch in args.arch]
            failed |= any(row.get("spilled", 0) for row in rows) and dtype != "fp32"
            failed |= any(row.get("shared", 0) > SHARED for row in rows)
            if header:
                names = ["kernel", "dtype", *rows[0]]
                print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
                header = False
            cells = [[str(row[name]) for row in rows] for name in rows[0]]
            cells = [c[0] if len(set(c)) == 1 else " / ".join(c) for c in cells]
            print(f"| {one.label} | {dtype} | " + " | ".join(cells) + " |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
