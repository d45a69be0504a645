"""Accesses to global memory, from the addresses that a kernel's PTX computes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dense.analysis.kernels.launches import Launch, specialised

SECTOR = 32
# Programs whose threads are executed together.
_PROGRAMS = 256


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
            if one.is_access or one.operation in ("bra", "ret"):
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
    wide = "wide" in one.parts
    signed = [_wrap(g, kind if kind[0] in "su" else f"s{kind[1:]}") for g in given]
    if operation == "setp":
        return [_TESTS[one.parts[0]](*signed)]
    if set(one.parts[:-1]) & {"hi", "sat", "cc"} and (operation, kind[1:]) != ("mul", "32"):
        raise NotImplementedError(one.text)
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
    """The ``sectors``, ``traffic`` and ``reread`` of a launch: see ``inspect_kernels.py``."""
    import torch

    types = specialised(launch)[0]
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
