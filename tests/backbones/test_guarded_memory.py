"""The C kernels touch their maps, weights and work space alone, and read what they have written.

Each of these ends, and each map and weight begins too, where memory begins that nobody may touch;
work space is filled with NaN (guarded.h). What is read or written beside them ends a process.
"""

import ctypes
import itertools
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from backbones.ops import cases as small
from backbones.ops import library, native
from backbones.ops.common import forced_here
from tests.backbones import test_residual_mlp as halves
from tests.support import OperatorCases, agrees, run_forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]
cases = OperatorCases(kernel=7)
PAGE = mmap.PAGESIZE
NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def guarded(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy whose memory ends, or begins, at a page that may not be touched."""
    if not x.numel():
        return x
    pages = -(-x.nbytes // PAGE) * PAGE
    space = mmap.mmap(-1, pages + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(space))
    protect = ctypes.CDLL(None).mprotect
    for place in (start, start + PAGE + pages):
        assert not protect(ctypes.c_void_p(place), ctypes.c_size_t(PAGE), 0)
    offset = PAGE + (pages - x.nbytes if at_end else 0)
    return (
        torch.frombuffer(space, dtype=x.dtype, count=x.numel(), offset=offset).view_as(x).copy_(x)
    )


def built(dtype: torch.dtype, folder: str) -> ctypes.CDLL:
    path, header = Path(folder, "kernels.so"), Path(__file__).with_name("guarded.h")
    flags = ["-O1", "-march=native", "-fopenmp", "-shared", "-fPIC", "-include", header]
    flags += library.TYPES[NAMES[dtype]]
    subprocess.run(["cc", *flags, *library._SOURCES, "-o", path, "-lm"], check=True)
    return ctypes.CDLL(str(path))


def compute(dtype: torch.dtype) -> None:
    """Every operator at sizes around its vectors, tiles, windows, strips and threads."""
    call = native.call
    ends = [True]

    def guarding(name, maps, weights=(), sizes=()):
        inside = [[x if x is None else guarded(x, ends[0]) for x in xs] for xs in (maps, weights)]
        call(name, *inside, sizes)
        for x, copy in zip((*maps, *weights), (*inside[0], *inside[1]), strict=True):
            if x is not None:
                x.copy_(copy)

    native.call = guarding
    with TemporaryDirectory() as folder:
        kernels = built(dtype, folder)
        native._library = lambda asked: kernels if asked == dtype else None
        torch.manual_seed(0)
        # Threads wait for each other busily: few of the cases.
        for threads, ends[0], step in ((1, True, 1), (1, False, 2), (3, True, 9)):
            torch.set_num_threads(threads)
            for case in itertools.islice(all_cases(), 0, None, step):
                agrees(case, "native", dtype, TOLERANCES[dtype])
            for size, projected in itertools.product(halves.SIZES, (True, False)):
                given = halves.Given(size, dtype, projected)
                halves.assert_near(given.run(), given.expected())


def all_cases() -> Iterator[tuple]:
    for make, (size, channels) in itertools.product(cases.all, zip(SIZES, CHANNELS, strict=True)):
        yield make(size, *channels)
    for make, kernel in itertools.product(cases.convolutions, (1, 2, 3, 8)):
        yield make((5, 11), 5, 9, kernel)
    for make in (cases.attention, cases.local_mlp, cases.sliding):
        for window in ((7, 7), (1, 5), (5, 1), (3, 9)):
            yield make((15, 10), 3, 9, window=window)


SIZES = ((1, 1), (3, 20), (8, 7), (25, 9), (13, 33), (2, 15))
CHANNELS = ((1, 1), (3, 5), (17, 3), (9, 8), (33, 1), (2, 40))


@pytest.mark.parametrize("dtype", NAMES)
def test_no_memory_beside_their_own_is_touched(dtype):
    if native.missing() is not None:
        pytest.skip(native.missing())
    (done,) = run_forked(partial(compute, dtype))
    assert done.returncode == 0, done.stderr[-3000:]


# Allocations of a forward and of a backward pass.
ALLOCATED = {
    "depthwise": (small.depthwise((3, 4), 5, 3), 0, 0),
    "predicted": (small.inhomogeneous((3, 4), 2, 3, 3, 2, 5), 3, 3),
    "aggregation": (small.aggregation((3, 4), 2, 3, 3), 2, 2),
    "attention": (small.attention((2, 1), 2, 3, (3, 2), (1, 1)), 4, 4),
    "mixing": (small.mixing((2, 1), 2, 3, (3, 2), (1, 1)), 3, 3),
    "sliding": (small.sliding((3, 4), 2, 3, (3, 5)), 3, 3),
}


def run_out() -> None:
    """Each allocation fails in turn: an error every time, and the right values after all."""
    with TemporaryDirectory() as folder, forced_here("native"):
        kernels = built(torch.float32, folder)
        native._library = lambda asked: kernels
        left = ctypes.c_int.in_dll(kernels, "allocations")
        for name, (case, *numbers) in ALLOCATED.items():
            given = [x.float() for x in case.tensors]
            left.value = -1
            expected = case.run(*given)
            passes = [partial(case.forward, *given), partial(case.backward, expected[0], *given)]
            for run, number, start in zip(passes, numbers, (0, 1), strict=True):
                for left.value in range(number):
                    with pytest.raises(MemoryError, match="out of memory"):
                        run()
                left.value = number
                got = run()
                assert left.value == 0, name
                got = got if start else [got]
                torch.testing.assert_close(list(got), list(expected[start:][: len(got)]))
        half = halves.Given((7, 20, 30), torch.float32)
        left.value = 0
        with pytest.raises(MemoryError, match="native residual_mlp: out of memory"):
            half.run()
        left.value = 1
        halves.assert_near(half.run(), half.expected())


def test_memory_that_runs_out_is_an_error():
    if native.missing() is not None:
        pytest.skip(native.missing())
    (done,) = run_forked(run_out)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_guards_hold():
    """At both ends: a process that touches the next byte is killed."""
    for at_end, step in ((True, 0), (False, -1)):
        (done,) = run_forked(partial(touch, at_end, step))
        assert done.returncode == -11 and "read" in done.stdout


def touch(at_end: bool, step: int) -> None:
    x = guarded(torch.arange(3.0), at_end)
    assert x.tolist() == [0, 1, 2]
    print("read", flush=True)
    ctypes.c_char.from_address(x.data_ptr() + (x.nbytes if at_end else 0) + step).value  # noqa: B018
