"""Other people's compiled operators, and whether the memory layout of what they get matters."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_OURS_AND_PYTORCHS = ("aten", "prim", "prims", "dense", "profiler", "mkldnn", "inductor")
_COMPILED_IN_MMCV = ("nms", "roi_align_forward", "roi_align_backward")


@contextmanager
def foreign_operators() -> Iterator[set[str]]:
    """Collect the names of the compiled operators called that are neither PyTorch's nor ours.

    An operator of the dispatcher (torchvision's) is called again with contiguous tensors and must
    give the same. A function of ``mmcv._ext``, which writes into its arguments and may read them as
    contiguous whatever they are, must be given contiguous ones.
    """
    seen: set[str] = set()
    extension = sys.modules.get("mmcv._ext")
    with ExitStack() as stack:
        stack.enter_context(_Dispatched(seen))
        for name in _COMPILED_IN_MMCV if extension else ():
            stack.enter_context(patch.object(extension, name, _checked(extension, name, seen)))
        yield seen


class _Dispatched(TorchDispatchMode):
    def __init__(self, seen: set[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace not in _OURS_AND_PYTORCHS:
            self.seen.add(func._schema.name)
            plain, named = tree_map_only(torch.Tensor, _contiguous, (args, kwargs))
            torch.testing.assert_close(out, func(*plain, **named))
        return out


def _checked(module, name: str, seen: set[str]):
    function = getattr(module, name)

    def checked(*args, **kwargs):
        seen.add(f"mmcv::{name}")
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                assert given.is_contiguous(), f"{name} misreads strides of {given.stride()}"
        return function(*args, **kwargs)

    return checked


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
