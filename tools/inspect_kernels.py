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
import sys

from tqdm import tqdm

from dense.analysis.kernels.accesses import Emulation, accesses
from dense.analysis.kernels.launches import (
    DTYPES,
    LARGE,
    STAGES,
    Launch,
    build,
    launches,
    resources,
)
from dense.analysis.kernels.offsets import overflows
from dense.waiting import waiting

# What a program can have on GPUs of compute capability 8.6, 8.9 and 12.0, in bytes.
SHARED = 101_376


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
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: both"
    )
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
    with waiting("importing PyTorch"):
        work = planned(args)
    compiling = tqdm(work, "compiling", delay=2, leave=False, unit="kernel")
    for dtype, one, same in compiling:
        rows = [inspect(one, same, arch, args.only) for arch in args.arch]
        failed |= any(row.get("spilled", 0) for row in rows) and dtype != "fp32"
        failed |= any(row.get("shared", 0) > SHARED for row in rows)
        if header:
            names = ["kernel", "dtype", *rows[0]]
            tqdm.write("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
            header = False
        cells = [[str(row[name]) for row in rows] for name in rows[0]]
        cells = [c[0] if len(set(c)) == 1 else " / ".join(c) for c in cells]
        tqdm.write(f"| {one.label} | {dtype} | " + " | ".join(cells) + " |")
    return int(failed)


def planned(args: argparse.Namespace) -> list[tuple[str, Launch, Launch]]:
    """The launches that are compiled, each with its dtype and the same launch on a large map."""
    stages = list(STAGES) if args.tiles else ["stage 1", "stage 4"]
    found = []
    for dtype in args.dtypes:
        small, large = (
            {one.label: one for one in launches(dtype, {s: sizes[s] for s in stages}, args.tiles)}
            for sizes in (STAGES, LARGE)
        )
        # Some tiles are tried on large maps alone.
        pairs = {label: (small.get(label, same), same) for label, same in large.items()}
        found += [(dtype, *pair) for label, pair in pairs.items() if args.kernels in label]
    return found


if __name__ == "__main__":
    sys.exit(main())
