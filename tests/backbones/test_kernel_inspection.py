"""What is read off the Triton kernels: launches, resources, intervals of offsets; and the tool."""

import json
import stat
import sys
from types import SimpleNamespace

import pytest
import torch

from dense.analysis.kernels import offsets
from dense.analysis.kernels.launches import DTYPES, LARGE, STAGES, Launch, resources, specialised
from tests.backbones.test_kernel_accesses import code, launch, parameter
from tests.support import ROOT, load_tool, run_python

LAUNCHES = ROOT / "tests/backbones/triton_launches.txt"

# The launches. In this process Triton interprets its kernels.
COMPILED = """
import os
os.environ.pop("TRITON_INTERPRET", None)
"""
RECORD = """
import torch
from dense.analysis.kernels.launches import launches
def shown(value):
    if torch.is_tensor(value):
        return f"{str(value.dtype)[6:]}{list(value.shape)}".replace(" ", "")
    return f"{value:.4g}" if isinstance(value, float) else str(value).split(".")[-1]
few = {"stage 1": (2, 9, 20, 64), "stage 4": (3, 8, 7, 96)}
more = {"stage 1": (1, 30, 41, 160), "stage 4": (2, 5, 5, 768)}
for dtype, sizes, every in (("bf16", few, True), ("fp32", few, False), ("fp16", more, False)):
    for one in launches(dtype, sizes, every):
        about = one.label, one.grid, one.num_warps, one.num_stages, len(one.returned)
        print(*about, sep="; ", end="; ")
        print(*(f"{name}={shown(value)}" for name, value in one.arguments.items()))
"""


BUILD = """
import json
from dense.analysis.kernels.launches import build, launches
one = launches("bf16", {"stage 1": (1, 7, 7, 32), "stage 4": (1, 7, 7, 32)})[-3]
code, about = build(one, 90, "ptx")
few, _ = build(one, 80, "ttir")
try:
    build(one, 80, "nothing")
except ValueError as error:
    said = str(error)
target = about["target"]
found = [one.label, list(code), list(few), about["num_warps"], about["num_stages"]]
found += [target.backend, target.arch, target.warp_size, about["shared"]]
found += ["tt.func public @" in few["ttir"], ".reqntid 256" in code["ptx"]]
print(json.dumps([*found, ".target sm_90a" in code["ptx"], said]))
"""


@pytest.fixture(scope="module")
def compiled() -> list[str]:
    """A line for each launch, and one about what was compiled."""
    pytest.importorskip("triton")
    done = run_python("-W", "ignore", "-c", COMPILED + RECORD + BUILD)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_launches_of_all_kernels(compiled):
    """Grids, arguments and tiles; a file has what they are where they were timed and inspected."""
    found, expected = compiled[:-1], LAUNCHES.read_text().splitlines()
    assert [one.split(";")[0] for one in found] == [one.split(";")[0] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == other


def test_sizes_of_the_launches():
    assert DTYPES == ("fp32", "bf16", "fp16")
    assert STAGES == {
        "stage 1": (2, 56, 56, 96),
        "stage 2": (2, 28, 28, 192),
        "stage 3": (4, 14, 14, 384),
        "stage 4": (8, 7, 7, 768),
    }
    # About 5e9 numbers and more, beyond 32 bits.
    assert LARGE == {
        "stage 1": (1, 7168, 7168, 96),
        "stage 2": (4, 3584, 3584, 192),
        "stage 3": (25, 896, 896, 384),
        "stage 4": (100, 266, 266, 768),
    }


def test_types_constants_and_divisibility_of_arguments():
    values = {
        **{kind: torch.empty(2, dtype=getattr(torch, kind)) for kind in ("float32", "bfloat16")},
        **dict(half=torch.empty(2, dtype=torch.float16), one=1, true=True, number=7, sixteen=32),
        **dict(changing=1, always=48, block=64, scale=16.0, low=-(2**31), most=2**31 - 1),
        **dict(below=-(2**31) - 1, beyond=2**31, never=17, last=2**32 + 16),
    }
    parameters = [
        parameter(name, name == "block", name in ("changing", "always")) for name in values
    ]
    types, constants, attributes = specialised(launch(values, parameters))
    assert list(types.items()) == [
        *(("float32", "*fp32"), ("bfloat16", "*bf16"), ("half", "*fp16"), ("one", "constexpr")),
        *(("true", "i32"), ("number", "i32"), ("sixteen", "i32"), ("changing", "i32")),
        *(("always", "i32"), ("block", "constexpr"), ("scale", "fp32"), ("low", "i32")),
        *(("most", "i32"), ("below", "i64"), ("beyond", "i64"), ("never", "i32"), ("last", "i64")),
    ]
    assert constants == {"one": 1, "block": 64}
    divisible = ("float32", "bfloat16", "half", "sixteen", "low", "beyond", "last")
    places = list(values)
    assert attributes == {(places.index(name),): [["tt.divisibility", 16]] for name in divisible}


@pytest.mark.parametrize("takes_arch", [True, False])
def test_resources_are_what_ptxas_says(takes_arch, tmp_path, monkeypatch):
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(
        f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:-3], open(sys.argv[3]).read() != '')\n"
        "assert sys.argv[-2] == '-o' and sys.argv[3].endswith('.ptx')\n"
        "print('12 bytes stack frame, 8 bytes spill stores, 4 bytes loads', file=sys.stderr)\n"
        "print('0 bytes stack frame, 16 bytes spill stores, 4 bytes', file=sys.stderr)\n"
        "print('ptxas info : Used 96 registers, 380 bytes', file=sys.stderr)\n"
        "assert sys.argv[1:3] == ['-v', '-arch=sm_90a']\n"
    )
    ptxas.chmod(ptxas.stat().st_mode | stat.S_IXUSR)
    asked = []

    def with_arch(arch):
        asked.append(arch)
        return SimpleNamespace(path=str(ptxas))

    def without():
        return SimpleNamespace(path=str(ptxas))

    monkeypatch.setattr(compiler, "get_ptxas", with_arch if takes_arch else without)
    head = ".version 8.4\n.target sm_90a\n"
    for instruction, word in (
        ("mma.sync", "yes"),
        ("wgmma.x", "yes"),
        ("tcgen05.mma", "yes"),
        ("mmad", "no"),
    ):
        found = resources(f"{head}{instruction};", 90)
        assert found == {"registers": 96, "spilled": 24, "tensor cores": word}
    assert asked == ([90] * 4 if takes_arch else [])


# Intervals


@pytest.mark.parametrize(
    "operation, rest, expected",
    [
        ("arith.constant", "-7 : i32", (-7, -7)),
        ("arith.constant", "dense<16> : tensor<4xi32>", (16, 16)),
        ("arith.constant", "0x10 : i32", (16, 16)),
        ("arith.constant", "true", (1, 1)),
        ("arith.constant", "dense<false> : tensor<4xi1>", (0, 0)),
        ("tt.get_program_id", "y : i32", (0, 4)),
        ("tt.make_range", "{end = 16 : i32, start = 2 : i32} : tensor<14xi32>", (2, 15)),
        ("arith.cmpi", "slt, %a, %b : i32", (0, 1)),
        ("arith.cmpf", "olt, %none, %b : f32", (0, 1)),
        ("tt.splat", "%a : i32 -> tensor<4xi32>", (-3, 5)),
        ("tt.splat", "%none : i32 -> tensor<4xi32>", None),
        ("arith.extsi", "%loop#1 : i32 to i64", (8, 9)),
        ("arith.select", "%c, %a, %b : i32", (-3, 11)),
        ("arith.addi", "%a, %b : i32", (-1, 16)),
        ("arith.subi", "%a, %b : i32", (-14, 3)),
        ("arith.muli", "%a, %b : i32", (-33, 55)),
        ("arith.divsi", "%a, %b : i32", (-1, 2)),
        ("arith.divsi", "%huge, %b : i64", (2**49 + 1, 2**61)),
        ("arith.ceildivsi", "%a, %b : i32", (-1, 3)),
        ("arith.minsi", "%a, %b : i32", (-3, 5)),
        ("arith.maxsi", "%a, %b : i32", (2, 11)),
        ("arith.andi", "%b, %c : i32", (0, 15)),
        ("arith.ori", "%b, %four : i32", (0, 15)),
        ("arith.xori", "%a, %b : i32", (-16, 15)),
        ("arith.remsi", "%b, %many : i32", (2, 11)),
        ("arith.remsi", "%b, %four : i32", (0, 3)),
        ("arith.remsi", "%b, %eleven : i32", (0, 10)),
        ("arith.remsi", "%a, %four : i32", (-3, 3)),
        ("arith.remsi", "%a, %many : i32", (-11, 5)),
        ("arith.unknown", "%a, %b : i32", None),
    ],
)
def test_intervals_of_operations(operation, rest, expected):
    known = {"%a": (-3, 5), "%b": (2, 11), "%c": (0, 1), "%loop#1": (8, 9), "program y": (0, 4)}
    known |= {"%huge": (2**52 + 8, 2**62), "%four": (4, 4), "%many": (12, 12), "%eleven": (11, 11)}
    if "%huge" in rest:
        known["%b"] = (2, 8)
    assert offsets._interval(operation, rest, known) == expected


def test_what_passes_32_bits_and_what_is_unknown():
    lines = [
        "%x = tt.get_program_id x : i32 loc(#loc1)",
        "%y = tt.get_program_id y : i32",
        "%z = tt.get_program_id z : i32",
        "%big = arith.constant 1073741824 : i32",
        "%two = arith.constant 2 : i32",
        "%s = arith.subi %two, %big : i32",
        "%t = arith.muli %s, %two : tensor<4x8xi32>",  # to -2^31 + 4
        "%u = arith.subi %t, %x : i32",
        "%v = arith.subi %u, %y : i32 loc(#loc2)",
        "%w = arith.muli %big, %two : i32",
        "%l = arith.muli %big, %two : i64",
        "%p = tt.addptr %ptr, %w : tensor<4x!tt.ptr<i32>>",
        "%f = arith.addf %a, %b : f32",
        "tt.store %p, %w : i32",
        "%r:2 = scf.for %i = %two to %N step %two iter_args(%k = %two) -> (i32)  : i32 {",
        "%q = arith.addi %i, %big : i32",
        "scf.for %j = %N to %two step %two : i32 {",
        "%o = arith.muli %j, %big : i32",
    ]
    arguments = {"N": 2**30, "flag": True, "scale": 0.5}
    found = offsets.overflows("\n".join(lines), Launch("", None, arguments, (4, 2)))
    # Beyond -2^31 is -2^31 - 1: %u is at least -2^31 + 1, %v at least -2^31.
    assert found == ["%w = arith.muli %big, %two : i32", "%o = arith.muli %j, %big : i32"]
    found = offsets.overflows("\n".join(lines), Launch("", None, arguments, (4, 3)))
    assert found[0] == "%v = arith.subi %u, %y : i32"
    # The loop's variable ends one before its end: one more is too many.
    arguments["N"] += 1
    assert "%q = arith.addi %i, %big : i32" in offsets.overflows(
        "\n".join(lines), Launch("", None, arguments, (4, 2))
    )
    for unknown in ("%a = arith.addi %flag, %two : i32", "%a = arith.strange %two, %two : i32"):
        with pytest.raises(NotImplementedError, match="no interval of %a = arith"):
            offsets.overflows(f"{lines[4]}\n{unknown}", Launch("", None, arguments, (1,)))


# The tool


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the tool removes
    return load_tool("inspect_kernels")


def test_a_row_of_the_table(tool, monkeypatch):
    asked, wrong = [], []

    def build(one, arch, until):
        asked.append((one, arch, until))
        store = code(
            "mov.u32 %t, %tid.x;", "st.global.v2.b32 [%t], {%t, %t};", "st.global.b8 [%t], %t;"
        )
        return {"ttir": "ttir", "ptx": store}, {"shared": 512}

    monkeypatch.setattr(tool, "build", build)
    monkeypatch.setattr(tool, "overflows", lambda code, large: wrong if large == "large" else None)
    held = {"registers": 96, "spilled": 0, "tensor cores": "yes"}
    monkeypatch.setattr(tool, "resources", lambda ptx, arch: dict(held))
    numbers = {"sectors": 0.856, "traffic": 1.254, "reread": 2.345}
    monkeypatch.setattr(tool, "accesses", lambda one, ptx: numbers)
    one = SimpleNamespace(label="name")
    row = {"registers": 96, "spilled": 0, "shared": 512, "widest": 8}
    found = tool.inspect(one, "large", 80, None)
    assert list(found.items()) == [
        *row.items(),
        *(("sectors", "86%"), ("traffic", "125%"), ("reread", "2.3"), ("tensor cores", "yes")),
    ]
    assert tool.inspect(one, "large", 80, "resources") == row | {"tensor cores": "yes"}
    assert tool.inspect(one, "large", 90, "offsets") == {"offsets": "64 bits"}
    assert asked == [(one, 80, "ptx"), (one, 80, "ptx"), (one, 90, "ttir")]
    wrong += ["%a", "%b"]
    with pytest.raises(OverflowError, match="name: 32 bits are too few for\n%a\n%b"):
        tool.inspect(one, "large", 80, None)


def rows_of(tool, monkeypatch, rows: dict, words: list[str]) -> int:
    """The tool's status, for the row of each kernel by its name and architecture."""
    pytest.importorskip("triton")
    work = [(dtype, SimpleNamespace(label=name), f"large {name}") for name, dtype in rows]

    def inspect(one, same, arch, only):
        assert same == f"large {one.label}" and only == ("resources" if words else None)
        (row,) = (row for (name, _), row in rows.items() if name == one.label)
        return {
            name: value[arch] if isinstance(value, dict) else value for name, value in row.items()
        }

    monkeypatch.setattr(tool, "planned", lambda args: work)
    monkeypatch.setattr(tool, "inspect", inspect)
    return tool.main(["--arch", "80", "90", *words])


def test_the_table(tool, monkeypatch, capsys):
    import os

    import triton

    rows = {
        ("one", "fp32"): {"registers": {80: 1, 90: 2}, "shared": 101376, "spilled": 8},
        ("two", "bf16"): {"registers": 3, "shared": 4, "spilled": 0},
    }
    assert rows_of(tool, monkeypatch, rows, []) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Triton {triton.__version__}, sm_80, sm_90",
        "",
        "| kernel | dtype | registers | shared | spilled |",
        "| --- | --- | --- | --- | --- |",
        "| one | fp32 | 1 / 2 | 101376 | 8 |",
        "| two | bf16 | 3 | 4 | 0 |",
    ]
    assert "TRITON_INTERPRET" not in os.environ


@pytest.mark.parametrize(
    "dtype, row, status",
    [
        ("bf16", {"spilled": 0, "shared": 101376}, 0),
        ("bf16", {"spilled": {80: 0, 90: 8}, "shared": 0}, 1),
        ("fp16", {"spilled": {80: 8, 90: 0}, "shared": 0}, 1),
        ("fp32", {"spilled": 8, "shared": 0}, 0),
        ("fp32", {"spilled": 0, "shared": {80: 101377, 90: 0}}, 1),
        ("bf16", {"offsets": "64 bits"}, 0),
    ],
)
def test_the_status(dtype, row, status, tool, monkeypatch):
    """Of a kernel that is not the last."""
    rows = {
        ("one", dtype): row,
        ("two", "fp32"): {**row, **{n: 0 for n in ("spilled", "shared") if n in row}},
    }
    assert rows_of(tool, monkeypatch, rows, ["--only", "resources"]) == status


def test_what_is_inspected(tool, monkeypatch):
    asked = []

    def launches(dtype, sizes, every):
        asked.append((dtype, dict(sizes), every))
        return [SimpleNamespace(label=f"{name}, {dtype}", sizes=sizes[name]) for name in sizes]

    monkeypatch.setattr(tool, "launches", launches)
    args = dict(tiles=False, dtypes=["fp32", "bf16"], kernels="stage 4")
    found = tool.planned(SimpleNamespace(**args))
    assert [(dtype, one.label, one.sizes, same.sizes) for dtype, one, same in found] == [
        (dtype, f"stage 4, {dtype}", STAGES["stage 4"], LARGE["stage 4"])
        for dtype in ("fp32", "bf16")
    ]
    few = [{name: sizes[name] for name in ("stage 1", "stage 4")} for sizes in (STAGES, LARGE)]
    assert asked == [(dtype, sizes, False) for dtype in ("fp32", "bf16") for sizes in few]
    asked.clear()
    found = tool.planned(SimpleNamespace(tiles=True, dtypes=["fp16"], kernels=""))
    assert asked == [("fp16", STAGES, True), ("fp16", LARGE, True)] and len(found) == 4


def test_tiles_of_large_maps_alone_are_inspected(tool, monkeypatch):
    def launches(dtype, sizes, every):
        tiles = ("16", "64") if sizes["stage 1"] == LARGE["stage 1"] else ("16",)
        return [SimpleNamespace(label=tile, sizes=sizes["stage 1"]) for tile in tiles]

    monkeypatch.setattr(tool, "launches", launches)
    found = tool.planned(SimpleNamespace(tiles=True, dtypes=["fp32"], kernels=""))
    large = LARGE["stage 1"]
    assert [(one.label, one.sizes, same.label, same.sizes) for _, one, same in found] == [
        ("16", STAGES["stage 1"], "16", large),
        ("64", large, "64", large),
    ]


def test_options_of_the_inspection(tool, monkeypatch, capsys):
    pytest.importorskip("triton")
    given = []
    monkeypatch.setattr(tool, "planned", lambda args: given.append(vars(args)) or [])
    words = ["--arch", "86", "--dtypes", "fp16", "fp32", "--tiles", "--only", "offsets"]
    assert tool.main([]) == 0 and tool.main([*words, "--kernels", "name"]) == 0
    both = dict(arch=[80, 90, 100], dtypes=["fp32", "bf16"], tiles=False, only=None, kernels="")
    more = dict(arch=[86], dtypes=["fp16", "fp32"], tiles=True, only="offsets", kernels="name")
    assert given == [both, more]
    for wrong in (["--dtypes", "fp64"], ["--only", "x"], ["--arch", "sm"]):
        with pytest.raises(SystemExit):
            tool.main(wrong)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    shown = capsys.readouterr().out
    assert tool.__doc__ in shown and "--kernels NAME" in shown
    monkeypatch.setitem(sys.modules, "triton", None)
    assert tool.main([]) == 2
    said = "inspect_kernels: Triton is not installed: pip install triton\n"
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_what_is_compiled(compiled):
    label, stages, few, *about, shared, ttir, threads, target, said = json.loads(compiled[-1])
    assert label == "local MLP" and stages == ["ttir", "ttgir", "llir", "ptx"] and few == ["ttir"]
    assert about == [8, 3, "cuda", 90, 32] and shared > 0
    assert ttir and threads and target
    assert said.startswith("no stage nothing among ttir, ttgir, llir, ptx")
