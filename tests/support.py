"""What several test files share: tools as modules, programs of their own, comparisons, operators.

It imports no framework, so that every test file can use it.
"""

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import backbones
from backbones import ops
from backbones.ops import reference
from tests.processes import ROOT
from tests.processes import environment as environment
from tests.processes import run_bare as run_bare
from tests.processes import run_code as run_code
from tests.processes import run_forked as run_forked
from tests.processes import run_python as run_python
from tests.processes import run_script as run_script
from tests.processes import run_tool as run_tool
from tests.processes import run_without as run_without

NANO = tuple(name for name in backbones.MODEL_NAMES if name.endswith("nano"))

# Programs


def load_tool(name: str) -> ModuleType:
    """A fresh module of ``tools/<name>.py``."""
    spec = spec_from_file_location(f"{name}_tool", ROOT / f"tools/{name}.py")
    module = module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A port of this machine for processes to meet at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def noting(done: list, name: str, result: Any = None) -> Any:
    """A function in another's place, which appends the name and what it was given to a list."""

    def call(*args, **kwargs):
        done.append((name, *args, *([kwargs] if kwargs else [])))
        return result

    return call


def claiming(done: list) -> Any:
    """In the place of ``dense.runs.claimed``: notes what a training claims, begins and leaves."""

    @contextmanager
    def claimed(folder, **options):
        done.append(("claim", folder, options))
        yield noting(done, "begin")
        done.append(("leave",))

    return claimed


@pytest.fixture(autouse=True)
def plain_config_text(monkeypatch):
    """MMEngine prettifies the config six times a run, which takes longer than a nano training."""
    # MMEngine imports it at its top, the maintained fork where it is called.
    for place in ("mmengine.config.config", "yapf.yapflib.yapf_api"):
        name = f"{place}.FormatCode"
        monkeypatch.setattr(name, lambda text, **_: (text, True), raising=False)


# Comparisons


def assert_same(one: Any, two: Any, path: str = "") -> None:
    """Nested dicts, lists and tuples of tensors and plain values are equal, bit for bit."""
    if isinstance(one, Tensor):
        assert one.equal(two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{path}[{number}]")
    else:
        assert one == two, path


def recipes(folder: Path) -> list[Path]:
    """The configs of a folder, without the parts that they share."""
    return [p for p in sorted(folder.glob("**/*.py")) if not {"_base_", "common"} & {*p.parts}]


def assert_channels_said(path: Path) -> None:
    """An OpenMMLab recipe writes what its backbone has: a run corrects it, a reader does not."""
    from mmengine.config import Config

    from dense.openmmlab.backbone import fit_channels

    cfg = Config.fromfile(path)
    said = flat(cfg.model.to_dict())
    fit_channels(cfg.model)
    assert flat(cfg.model.to_dict()) == said
    assert cfg.model.backbone.type in backbones.MODEL_NAMES


def points(axes: Any) -> list[list[tuple[float, float]]]:
    """What each line of Matplotlib's axes runs through."""
    return [list(zip(*line.get_data(), strict=True)) for line in axes.lines]


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and of lists of dicts, by dotted path."""
    if isinstance(node, list) and node and isinstance(node[0], dict):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {path: node}
    return {
        key: value
        for name, part in node.items()
        for key, value in flat(part, f"{path}.{name}" if path else str(name)).items()
    }


MISSING = "missing"


def differences(ours: Any, theirs: Any, *left_out: str) -> dict[str, Any]:
    """The settings of a config that another has otherwise, by dotted path, with our values.

    Tuples are as lists. What the other alone has, in a section of both, is MISSING.

    Args:
        left_out: beginnings of paths.
    """
    # Where a config is a base of another package's, MMEngine notes it.
    one, other = (
        {k: _listed(v) for k, v in flat(node).items() if not k.endswith("_scope_")}
        for node in (ours, theirs)
    )
    sections = {key.partition(".")[0] for key in one}
    found = {key: value for key, value in one.items() if value != other.get(key, MISSING)}
    found |= {k: MISSING for k in other if k not in one and k.partition(".")[0] in sections}
    return {key: value for key, value in found.items() if not key.startswith(left_out)}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(part) for key, part in value.items()}
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value


def losses(work_dir: Path) -> dict[int, dict[str, float]]:
    """By step, the losses and accuracies that mmengine logged; a later run's win."""
    return {
        entry["step"]: {key: entry[key] for key in entry if "loss" in key or "acc" in key}
        for log in sorted(work_dir.glob("*/vis_data/scalars.json"))
        for entry in map(json.loads, log.read_text().splitlines())
        if "loss" in entry
    }


def build(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A model of five classes, the same one for a seed."""
    torch.manual_seed(seed)
    return timm.create_model(name, **{"num_classes": 5, **kwargs})


# Operators


def at_length(*values: Any) -> list:
    """Values that ``make test-kernels`` adds: interpreters and exporters take long for each."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.kernels)
        for value in values
    ]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class OperatorCases:
    """Makers of an operator's name, float64 inputs and options, from a size ``(H, W)``.

    Args:
        kernel: side of the convolutions' kernels unless a test asks for another.
    """

    def __init__(self, kernel: int):
        self.kernel = kernel
        self.convolutions = [self.depthwise, self.dynamic, self.inhomogeneous, self.aggregation]
        self.all = [*self.convolutions, self.attention, self.local_mlp, self.sliding]

    def depthwise(self, size, groups=2, shared=3, kernel=None, batch=2):
        kernel, channels = kernel or self.kernel, groups * shared
        weights = [randn(channels, 1, kernel, kernel), randn(channels)]
        return "depthwise_conv", [randn(batch, *size, channels), *weights], ()

    def dynamic(self, size, groups=2, shared=3, kernel=None, batch=2):
        kernel, channels = kernel or self.kernel, groups * shared
        weights = [randn(batch, channels, kernel, kernel), randn(channels)]
        return "dynamic_depthwise_conv", [randn(batch, *size, channels), *weights], ()

    def inhomogeneous(self, size, groups=2, shared=3, kernel=None, batch=2, depth=5):
        kernel = kernel or self.kernel
        rows = groups * kernel**2
        inputs = [randn(batch, *size, groups * shared), randn(batch, *size, depth)]
        inputs += [randn(rows, depth) * depth**-0.5, randn(rows)]
        return "inhomogeneous_dynamic_depthwise_conv", inputs, (kernel,)

    def aggregation(self, size, groups=2, shared=3, kernel=None, batch=2):
        kernel = kernel or self.kernel
        kernels = randn(batch, *size, groups, kernel, kernel)
        return "inhomogeneous_aggregation", [randn(batch, *size, groups * shared), kernels], ()

    def attention(self, size, groups=2, shared=3, shift=(1, 1), window=(3, 2), batch=2):
        size = [n * -(-side // n) for n, side in zip(window, size, strict=True)]
        positions = window[0] * window[1]
        inputs = [randn(batch, *size, 3 * groups * shared), randn(groups, positions, positions)]
        return "window_attention", inputs, (groups, window, shift)

    def local_mlp(self, size, groups=2, shared=3, shift=(1, 1), window=(3, 2), batch=2, grid=()):
        size = [n * -(-side // n) for n, side in zip(window, size, strict=True)]
        weights = groups, window[0] * window[1], window[0] * window[1]
        inputs = [randn(batch, *size, groups * shared), randn(*grid, *weights), randn(*weights)]
        return "local_mlp", inputs, (window, shift)

    def sliding(self, size, groups=2, shared=3, window=(3, 5), batch=2):
        inputs = [randn(batch, *size, 3 * groups * shared), randn(groups, window[0] * window[1])]
        return "sliding_attention", inputs, (groups, window)


def outputs_and_gradients(function, inputs, options, grad) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, *options)
    return out, *torch.autograd.grad(out, leaves, grad.to(out))


def agrees(
    case, path: str | None, dtype=torch.float64, tolerance: float = 1e-10, device: str = "cpu"
) -> None:
    """Outputs and gradients of a path are the reference's of the same inputs, in float64.

    Args:
        case: of :class:`OperatorCases`.
        path: as ``ops.force`` takes it.
        dtype: of the inputs, to which the reference's are rounded too.
        tolerance: of the largest error, as a part of the largest value.
        device: where the path runs.
    """
    name, inputs, options = case
    inputs = [x.to(dtype).double() for x in inputs]
    plain = getattr(reference, name)
    grad = randn(*plain(*inputs, *options).shape).to(dtype).double()
    expected = outputs_and_gradients(plain, inputs, options, grad)
    with ops.force(path):
        lower = [x.to(device, dtype) for x in inputs]
        got = outputs_and_gradients(getattr(ops, name), lower, options, grad)
    for ours, true in zip(got, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        if true.numel():
            error = (ours.cpu().double() - true).abs().max() / true.abs().max().clamp_min(1e-30)
            assert error < tolerance


# Other people's compiled operators, and whether the memory layout of what they get matters

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
