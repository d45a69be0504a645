"""The C kernels at every width, height, window and number of channels, and on several threads."""

import itertools

import pytest
import torch

from backbones import ops
from backbones.ops import native
from tests.support import OperatorCases, agrees, outputs_and_gradients, randn

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="there are no C kernels")
cases = OperatorCases(kernel=7)
EVERY = pytest.mark.parametrize("make", cases.all)
# Their vectors have different lengths.
IN_BOTH = ((torch.float64, 1e-10), (torch.float32, 2e-5))


@EVERY
def test_every_width_and_height(make):
    torch.manual_seed(0)
    for side in range(1, 65):
        few = 1 + side % 3
        for size, precision in zip(((few, side), (side, few)), IN_BOTH, strict=True):
            agrees(make(size, batch=1), "native", *precision)


@EVERY
def test_every_number_of_channels(make):
    torch.manual_seed(0)
    for channels in range(1, 41):
        more = dict(depth=channels) if make == cases.inhomogeneous else {}
        agrees(make((3, 5), groups=channels, shared=1, batch=1), "native", *IN_BOTH[channels % 2])
        for precision in IN_BOTH:
            agrees(make((4, 3), groups=2, shared=channels, batch=1, **more), "native", *precision)


@pytest.mark.parametrize("make", cases.convolutions)
def test_every_kernel(make):
    torch.manual_seed(0)
    for kernel, precision in itertools.product(range(1, 13), IN_BOTH):
        agrees(make((5, 14), kernel=kernel, batch=1), "native", *precision)


@pytest.mark.parametrize("make", [cases.attention, cases.local_mlp, cases.sliding])
def test_every_window(make):
    torch.manual_seed(0)
    step = 2 if make == cases.sliding else 1
    for rows, columns in itertools.product(range(1, 12, step), repeat=2):
        shift = {} if make == cases.sliding else dict(shift=(rows // 2, columns // 2))
        size, precision = (rows + 1, columns), IN_BOTH[(rows + columns // 2) % 2]
        agrees(make(size, window=(rows, columns), batch=1, **shift), "native", *precision)


@EVERY
def test_threads_write_what_one_thread_does(make):
    """A part that two threads share, or that none has, differs sooner or later."""
    torch.manual_seed(0)
    large = dict(groups=4, shared=8)
    large |= {} if make in cases.convolutions else dict(window=(7, 7))
    before = torch.get_num_threads()
    try:
        for size in ((21, 28), (40, 9), (7, 7), (1, 50)):
            name, inputs, options = make(size, **large)
            inputs = [x.float() for x in inputs]
            function = getattr(ops, name)
            grad = randn(*function(*inputs, *options).shape)
            found = []
            for threads in (1, 4, 3, 4):
                torch.set_num_threads(threads)
                with ops.force("native"):
                    found.append(outputs_and_gradients(function, inputs, options, grad))
            for other in found[1:]:
                assert all(map(torch.equal, found[0], other)), (size, threads)
    finally:
        torch.set_num_threads(before)
