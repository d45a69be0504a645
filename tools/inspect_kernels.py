"""Compile the Triton kernels, without a GPU, and print their registers, spills and shared memory.

    python tools/inspect_kernels.py                     # for sm_90, float32 and bfloat16
    python tools/inspect_kernels.py --arch 80 --dtypes fp16

Compiles every kernel at the sizes of a tiny network's first and last stage and prints what ptxas
reports; nothing is timed. Exits with 1 if a kernel spills registers in bfloat16 or float16.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from inspect import signature as signature_of
from pathlib import Path

# With it, triton.jit makes interpreted functions, which cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

DTYPES = ("fp32", "bf16", "fp16")
COPIES = re.compile(r"cp\.async\.c\w\.shared\.global \[.*?\], \[.*?\], (0x\w+)")
ACCESSES = re.compile(r"(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)")


def kernels(dtype: str, every: bool = False) -> list[tuple[str, object, dict, dict]]:
    """Name, kernel, signature and constants at each size, with the first or with every tile."""
    import triton.language as tl

    from backbones.ops.triton_kernels import aggregation, depthwise, inhomogeneous, power, window
    from backbones.ops.triton_kernels import local_mlp as mlp
    from backbones.ops.triton_kernels.tuning import tile

    dot = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    found = []
    for stage, channels in (("stage 1", 96), ("stage 4", 768)):
        shared, depth = channels // 32, channels // 4
        conv = {"K": 7, "before": 3}
        sides = depthwise.tiles(56, channels)
        found += [
            (f"depthwise, {stage}", depthwise._forward, conv | {"flip": 0, "biased": 1}, sides),
            (f"depthwise weight gradient, {stage}", depthwise._weight_gradient, conv, sides[:1]),
        ]
        given = conv | {"BLOCK_G": 32}
        fixed = given | {"BLOCK_D": min(64, power(depth)), "DOT": dot}
        boxes, pieces = inhomogeneous.boxes(shared, 32), inhomogeneous.pieces()
        for name, constants, module in (
            ("I-D-DW", fixed, inhomogeneous),
            ("aggregation", given, aggregation),
        ):
            found += [
                (f"{name}, {stage}", module._mix, constants | {"gather": 0}, boxes),
                (f"{name} map gradient, {stage}", module._mix, constants | {"gather": 1}, boxes),
            ]
        folded, single = inhomogeneous._hidden_gradient, pieces[:1]
        found += [
            (f"I-D-DW hidden gradient, {stage}", folded, fixed | {"BLOCKS": 1}, pieces),
            (f"I-D-DW weight gradient, {stage}", inhomogeneous._weight_gradient, fixed, single),
            (f"aggregation kernel gradient, {stage}", aggregation._kernel_gradient, given, pieces),
        ]
    windows = {"BLOCK_N": 64, "BLOCK_D": 32, "DOT": dot}
    mixing = windows | {"BLOCKS": 1}
    found += [
        ("window attention", window._forward, windows, window.FORWARD),
        ("window attention gradient", window._backward, windows, (tile(window.WARPS),)),
        ("local MLP", mlp._mix, mixing | {"back": 0}, (tile(mlp.WARPS),)),
        ("local MLP map gradient", mlp._mix, mixing | {"back": 1}, (tile(mlp.WARPS),)),
        ("local MLP weight gradient", mlp._weight_gradient, mixing, (tile(mlp.WARPS),)),
    ]
    return [
        (
            name + (f", {'x'.join(map(str, side.kwargs.values()))}" if side.kwargs else ""),
            kernel,
            _signature(kernel, dtype),
            constants | side.kwargs | {"num_warps": side.num_warps},
        )
        for name, kernel, constants, sides in found
        for side in (sides if every else sides[:1])
    ]


def _signature(kernel: object, dtype: str) -> dict[str, str]:
    """Argument types: sums over positions are float32, maps and weights ``dtype``."""
    maps = {"x", "out", "grad", "taps", "kernels", "bias", "hidden", "weight", "qkv", "grad_qkv"}
    maps |= {"value", "grad_value", "mixing"}
    sums = {"out_bias", "grad_bias", "grad_mixing"}
    kinds = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            kinds[name] = "constexpr"
        elif name in sums or (name == "out" and "weight_gradient" in kernel.__name__):
            kinds[name] = "*fp32"
        elif name in maps:
            kinds[name] = f"*{dtype}"
        else:
            kinds[name] = "fp32" if name == "scale" else "i32"
    return kinds


def inspect(kernel: object, signature: dict, constants: dict, arch: int) -> dict[str, int | str]:
    """Compile one kernel and parse its PTX and the output of ptxas."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    # Pointers and sizes that are multiples of 16, as they are with 32 channels and more.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("C", "G", "D", "step")
    }
    options = {"num_warps": constants["num_warps"]}
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(kernel, signature, constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
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
    widths = [int(v or 1) * int(bits) // 8 for _, v, bits in ACCESSES.findall(ptx)]
    widths += [int(size, 16) for size in COPIES.findall(ptx)]
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)),
        "shared": compiled.metadata.shared,
        "widest": max(widths, default=0),
        "tensor cores": "yes" if re.search(r"\b(mma|wgmma)\.", ptx) else "no",
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90, help="sm_80, 89, 90, ... (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--tiles", action="store_true", help="all tiles that autotuning tries")
    args = parser.parse_args(argv)
    try:
        import triton
    except ImportError:
        print("inspect_kernels: Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    print(
        f"Triton {triton.__version__}, sm_{args.arch}; spilled, shared memory and a thread's widest"
    )
    print("access to global memory in bytes.\n")
    print("| kernel | dtype | registers | spilled | shared | widest | tensor cores |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    spilled = 0
    for dtype in args.dtypes:
        for name, kernel, signature, constants in kernels(dtype, args.tiles):
            row = inspect(kernel, signature, constants, args.arch)
            spilled += row["spilled"] * (dtype != "fp32")
            cells = " | ".join(str(value) for value in row.values())
            print(f"| {name} | {dtype} | {cells} |", flush=True)
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
