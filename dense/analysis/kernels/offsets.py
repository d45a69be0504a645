"""Offsets that pass 32 bits, from intervals of the integers in Triton's own code."""

import re
from math import ceil

from dense.analysis.kernels.launches import Launch


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
