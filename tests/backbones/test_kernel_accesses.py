"""Accesses of a kernel to memory: every instruction of PTX that its addresses may depend on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dense.analysis.kernels import accesses
from dense.analysis.kernels.launches import Launch


def parameter(name: str, constexpr: bool = False, changes: bool = False) -> SimpleNamespace:
    return SimpleNamespace(name=name, is_constexpr=constexpr, do_not_specialize=changes)


def launch(arguments: dict, parameters: list | None = None, **more) -> Launch:
    parameters = parameters or [parameter(name) for name in arguments]
    given = dict(label="kernel", grid=(1,)) | more
    return Launch(kernel=SimpleNamespace(params=parameters), arguments=arguments, **given)


def code(*lines: str, parameters: int = 2) -> str:
    names = ",\n".join(f"\t.param .u64 _k_param_{i}" for i in range(parameters))
    body = "\n".join(
        f"\t{line.replace(' ', chr(9), 1) if line[0] != '@' else line}" for line in lines
    )
    return (
        f"//\n.version 8.4\n.visible .entry _k(\n{names}\n)\n.reqntid 64\n{{\n\t.reg .b32 %r<9>;\n"
        f"\t.loc 1 2 3\n{body}\n\tret;\n\n}}\n\t.section .debug_str\n\tnonsense;\n"
    )


def addresses(*lines: str, values=(1000, 7), threads=64, programs=((5, 6), (0, 3), (2, 2))):
    """What ``%a`` is for the threads of two programs, after the lines."""
    ptx = code("mov.u32 %t, %tid.x;", *lines, "st.global.b8 [%a], %t;")
    run = accesses.Emulation(ptx).run(list(values), np.array(programs), threads)
    [(stores, width, address, seen)] = list(run)
    assert stores and width == 1 and seen.all() and address.shape == (2, threads)
    return address


T = np.arange(64)[None].repeat(2, 0)
S = T - 32
U = S % 2**32
SIGNED = ["sub.s32 %s, %t, 32;"]
GUARDED = ["mov.b32 %a, 1;", "setp.lt.s32 %p, %s, 3;"]


def signed(value):
    return (value + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["add.s32 %a, %s, 5;"], S + 5),
        (["add.s32 %a, %s, 2147483647;"], signed(S + 2**31 - 1)),
        (["sub.s32 %a, 5, %s;"], 5 - S),
        (["mul.lo.s32 %a, %s, 100000000;"], signed(S * 10**8)),
        (["mul.hi.s32 %a, %s, 1000000000;"], (S * 10**9) >> 32),
        (["mul.hi.u32 %a, %s, 1000000000;"], (U * 10**9) >> 32),
        (["mul.wide.s32 %a, %s, 1000000000;"], S * 10**9),
        (["mul.wide.u32 %a, %s, 1000000000;"], U * 10**9),
        (["mad.lo.s32 %a, %s, 3, %t;"], 3 * S + T),
        (["mul.wide.s32 %w, %s, 1000000000;", "mad.wide.s32 %a, %s, 7, %w;"], S * (10**9 + 7)),
        (["div.s32 %a, %s, 7;"], np.trunc(S / 7).astype(int)),
        (["rem.s32 %a, %s, 7;"], np.fmod(S, 7)),
        (["div.s32 %a, 7, %t;"], np.where(T > 0, 7 // np.maximum(T, 1), 0)),
        (["div.u32 %a, %s, 7;"], U // 7),
        (["shl.b32 %a, %s, 3;"], S * 8),
        (["shl.b32 %a, 1, %t;"], np.where(T < 32, signed(2**T), 0)),
        (["shr.s32 %a, %s, 3;"], S >> 3),
        (["shr.u32 %a, %s, 3;"], U >> 3),
        (["bfe.u32 %a, %s, 2, 3;"], (U >> 2) & 7),
        (["and.b32 %a, %s, 12;"], S & 12),
        (["or.b32 %a, %s, 12;"], S | 12),
        (["xor.b32 %a, %s, 12;"], S ^ 12),
        (["not.b32 %a, %s;"], ~S),
        (["neg.s32 %a, %s;"], -S),
        (["abs.s32 %a, %s;"], abs(S)),
        (["min.s32 %a, %s, 3;"], np.minimum(S, 3)),
        (["max.s32 %a, %s, 3;"], np.maximum(S, 3)),
        (["min.u32 %a, %s, 3;"], np.minimum(U, 3)),
        (["mov.b32 %a, %s;"], S),
        (["mov.b64 %a, {%t, %s};"], S * 2**32 + T),
        (["mov.b32 %a, {%s, %t};"], T * 2**16 + S % 2**16),
        (["cvt.s64.s32 %a, %s;"], S),
        (["cvt.u64.u32 %a, %s;"], U),
        (["cvt.u32.u8 %a, %s;"], S % 256),
        (["cvt.s32.s8 %a, 200;"], T * 0 - 56),
        (["cvt.u32.s8 %a, %s;"], U),
        (["cvta.to.global.u64 %a, %s;"], S),
        (["mov.u32 %a, %ctaid.x;"], T * 0 + [[5], [6]]),
        (["mov.u32 %a, %ctaid.y;"], T * 0 + [[0], [3]]),
        (["mov.u32 %a, %ctaid.z;"], T * 0 + 2),
        (["ld.param.u64 %a, [_k_param_0];"], T * 0 + 1000),
        (["ld.param.u64 %a, [_k_param_1];"], T * 0 + 7),
        (["shfl.sync.idx.b32 %a, %s, 3, 31, -1;"], np.where(T < 32, -29, 3)),
        *(
            ([f"setp.{name}.{kind} %p, %s, 3;", "selp.b32 %a, %t, -1, %p;"], np.where(test, T, -1))
            for name, kind, test in (
                ("lt", "s32", S < 3),
                ("le", "s32", S <= 3),
                ("gt", "s32", S > 3),
                ("ge", "s32", S >= 3),
                ("eq", "s32", S == 3),
                ("ne", "b32", S != 3),
                ("lo", "u32", U < 3),
                ("ls", "u32", U <= 3),
                ("hi", "u32", U > 3),
                ("hs", "u32", U >= 3),
            )
        ),
        *(
            (
                [
                    *("setp.lt.s32 %p, %s, 3;", "setp.gt.s32 %q, %s, -5;"),
                    *(f"{name}.pred %o, %p, %q;", "selp.b32 %a, 1, 0, %o;"),
                ],
                1 * function(S < 3, S > -5),
            )
            for name, function in (
                ("and", np.logical_and),
                ("or", np.logical_or),
                ("xor", np.logical_xor),
            )
        ),
        (["setp.lt.s32 %p, %s, 3;", "not.pred %o, %p;", "selp.b32 %a, 1, 0, %o;"], 1 * (S >= 3)),
        ([*GUARDED, "@%p mov.b32 %a, %t;"], np.where(S < 3, T, 1)),
        ([*GUARDED, "@!%p mov.b32 %a, %t;"], np.where(S < 3, 1, T)),
    ],
)  # fmt: skip
def test_instructions(lines, expected):
    found = addresses(*SIGNED, *lines)
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


def test_threads_that_branch_apart_meet_again():
    """A loop of each thread's own number of rounds, a way around, and an early end."""
    lines = [
        *("mov.u32 %t, %tid.x;", "mov.b32 %n, 0;", "mov.b32 %a, 0;"),
        *("$L1:", "add.s32 %n, %n, 1;", "add.s32 %a, %a, %n;"),
        *("setp.lt.s32 %p, %n, %t;", "@%p bra $L1;"),
        *("setp.gt.s32 %q, %t, 5;", "@!%q bra $L2;", "add.s32 %a, %a, 1000;"),
        *("$L2:", "st.global.b32 [%a], %t;", "@%q ret;", "ld.global.b16 %x, [%a+4];"),
    ]
    run = accesses.Emulation(code(*lines)).run([0, 0], np.zeros((3, 1), int), 8)
    store, load = list(run)
    thread = np.arange(8)
    expected = np.maximum(thread * (thread + 1) // 2, 1) + 1000 * (thread > 5)
    assert store[:2] == (True, 4) and load[:2] == (False, 2)
    assert store[3].all() and store[2][0].tolist() == expected.tolist()
    assert load[3][0].tolist() == (thread <= 5).tolist()
    assert load[2][0, :6].tolist() == (expected + 4)[:6].tolist()


def test_a_wait_for_a_barrier_ends_at_once():
    lines = ["mov.u32 %a, %tid.x;", "$L1:", "mbarrier.try_wait.parity.b64 complete, [%s], %n;"]
    lines += ["@!complete bra $L1;", "ld.global.b32 %f, [%a];"]
    [(_, _, address, seen)] = accesses.Emulation(code(*lines)).run([], np.zeros((3, 1), int), 8)
    assert address[0].tolist() == list(range(8)) and seen.all()


def test_kinds_of_accesses():
    lines = [
        *("mov.u32 %t, %tid.x;", "mov.b32 %z, 0;", "setp.lt.s32 %p, %t, 3;"),
        *("selp.b32 %n, 16, 0, %p;", "mov.b32 %a, 64;"),
        "ld.global.v4.b32 {%x, %y, %u, %v}, [%a];",
        "@%p st.global.v2.b16 [%a+32], {%x, %y};",
        "cp.async.cg.shared.global [%s], [%a], 0x10, %n;",
        "cp.async.ca.shared.global [%s], [%a], 8;",
        "atom.global.add.f32 %x, [%a+8], %m;",
        "ld.shared.b32 %x, [%s];",
        "@%never ld.global.b8 %x, [%a];",
    ]
    lines.insert(3, "setp.lt.s32 %never, %t, 0;")
    emulation = accesses.Emulation(code(*lines))
    found = [
        (stores, width, int(address[0, 0]), int(seen.sum()))
        for stores, width, address, seen in emulation.run([0, 0], np.zeros((3, 1), int), 8)
    ]
    assert found == [
        *((False, 16, 64, 8), (True, 4, 96, 3), (False, 16, 64, 3), (False, 8, 64, 8)),
        (False, 4, 72, 8),
    ]
    assert [one.width for one in emulation.accesses] == [16, 4, 16, 8, 4, 1]


def test_what_no_address_needs_is_not_executed():
    lines = ["mov.u32 %t, %tid.x;", "fma.rn.f32 %f, %g, %g, %g;", "add.s32 %a, %t, 1;"]
    emulation = accesses.Emulation(code(*lines, "st.global.f32 [%a], %f;"))
    assert emulation.executed == [True, False, True, True, True]
    for line in ("add.sat.s32 %a, %t, 3;", "add.cc.s32 %a, %t, 3;", "mul.hi.s64 %a, %t, 3;"):
        with pytest.raises(NotImplementedError, match=line.partition(" ")[0]):
            addresses(line)


COPY = [
    *("mov.u32 %t, %tid.x;", "mov.u32 %x, %ctaid.x;", "mov.u32 %y, %ctaid.y;"),
    *("mov.u32 %z, %ctaid.z;", "ld.param.u64 %p, [_k_param_0];", "ld.param.u64 %q, [_k_param_2];"),
    *("ld.param.u32 %n, [_k_param_1];", "mad.lo.s32 %i, %y, %n, %x;"),
    *("mad.lo.s32 %i, %z, 1000, %i;", "shl.b32 %i, %i, 5;", "add.s32 %j, %i, %t;"),
    *("mul.wide.s32 %w, %j, 4;", "add.s64 %v, %p, %w;", "ld.global.b32 %f, [%v];"),
    *("mul.wide.s32 %w, %t, 4;", "add.s64 %u, %q, %w;", "st.global.b32 [%u], %f;"),
]


def test_accesses_of_a_whole_grid():
    """Each program reads 128 bytes of its own, and all write the same 128."""
    ptx = code(*COPY, parameters=4)
    for grid, number in (((300,), 300), ((20, 30), 600), ((3, 4, 5), 60), ((256,), 256)):
        seen = accesses.touched(ptx, [None, 20, None], grid, 1)
        assert (seen.used, seen.touched) == (2 * 128 * number, 2 * 128 * number)
        assert seen.by_programs == 4 * number
        [(place, read)], [(other, written)] = seen.read.items(), seen.written.items()
        assert (place, other, len(read), len(written)) == (0, 2, 4 * number, 4)
    # Of two warps each reads further on: half of it is the next program's too.
    seen = accesses.touched(ptx, [None, 20, None], (10,), 2)
    assert seen.by_programs == 8 * 10 and len(seen.read[0]) == 4 * 11 and len(seen.written[2]) == 8


def test_many_loads_of_a_program_are_counted_once():
    """More than are held apart."""
    lines = [*COPY[:5], "add.s64 %v, %p, %t;", *["ld.global.b8 %f, [%v];"] * 70]
    seen = accesses.touched(code(*lines, parameters=3), [None, 20, None], (2,), 1)
    assert (seen.used, seen.touched, seen.by_programs) == (2 * 70 * 32, 2 * 70 * 32, 2)
    assert len(seen.read[0]) == 1 and seen.written == {}


@pytest.mark.parametrize("returned", [True, False])
def test_traffic_beside_the_ideal(returned):
    """Partial sums that are not returned are read again, and their sum written."""
    x, out = torch.empty(10 * 32), torch.empty(5, 32)
    arguments = {"x": x, "n": 20, "out": out, "chunks": 5, "one": 1, "BLOCK": 8}
    parameters = [parameter(name, name == "BLOCK", name == "chunks") for name in arguments]
    other = out[1:] if returned else torch.empty(32)
    given = launch(arguments, parameters, grid=(10,), num_warps=1, returned=[other])
    found = accesses.accesses(given, code(*COPY, parameters=6))
    ideal, traffic = (1280 + 640, 1280 + 128) if returned else (1280 + 128, 1280 + 128 + 640 + 128)
    assert found == {"sectors": 1, "traffic": ideal / traffic, "reread": 1}
    given.num_warps, given.grid = 2, (3,)
    found = accesses.accesses(given, code(*COPY, parameters=6))
    assert found["reread"] == 3 * 8 / (4 * 4)
