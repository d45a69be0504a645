"""What all tests share: a thread for each xdist worker, the photos, and how Triton runs."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidia0").exists():
    # Before anything imports Triton: without a GPU its kernels are tested by its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402


def pytest_configure(config):
    # xdist's processes would each take all cores, and be several times slower for it.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Says how a process of xdist ended: -9 is a kill, by the system where memory ran out."""
    if error:
        status = node.gateway._io.popen.wait(timeout=60)
        print(f"\n{node.gateway.id} ended with status {status}", flush=True)


@pytest.fixture(autouse=True)
def loggers_as_found() -> Iterator[None]:
    """Detectron2's `setup_logger`, which a training in this process calls, adds handlers for good.

    They would write into a later test's output, or into a stream that pytest has closed.
    """
    loggers = [logging.getLogger(name) for name in ("backbones", "dense", "detectron2", "fvcore")]
    found = [(set(log.handlers), log.propagate) for log in loggers]
    yield
    for log, (handlers, propagate) in zip(loggers, found, strict=True):
        for handler in set(log.handlers) - handlers:
            if type(handler) is logging.StreamHandler:
                log.removeHandler(handler)
        log.propagate = propagate


@pytest.fixture(autouse=True)
def visualizers_forgotten() -> Iterator[None]:
    """MMEngine gives a training the visualizer of one that began in the same second.

    It would write into that training's folder, which is gone when its test has passed.
    """
    yield
    if module := sys.modules.get("mmengine.visualization"):
        for kind in (module.Visualizer, *module.Visualizer.__subclasses__()):
            kind._instance_dict.clear()


@pytest.fixture
def figures(monkeypatch) -> list:
    """What Matplotlib wrote into files."""
    from matplotlib.figure import Figure

    written, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: written.append(self) or savefig(self, *a, **k)
    )
    return written


@pytest.fixture
def bars(monkeypatch) -> list:
    """Progress bars that were opened: name, total, seconds before it shows, whether it stays."""
    from tqdm import tqdm

    opened, begin = [], tqdm.__init__

    def noting(bar, *given, **named):
        begin(bar, *given, **named)
        name = named.get("desc") or (given[1] if len(given) > 1 else None)
        opened.append((name, bar.total, named.get("delay", 0), bar.leave, bar.unit))

    monkeypatch.setattr(tqdm, "__init__", noting)
    monkeypatch.setattr("sys.stderr", Terminal())
    return opened


class Terminal(io.StringIO):
    """Where bars are not switched off."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def reports():
    """For tests of the reports that trainings write at their end: the others go without."""


@pytest.fixture(autouse=True)
def only_wanted_reports(request, monkeypatch):
    """A report takes longer than the training of a nano network."""
    if "reports" not in request.fixturenames:
        monkeypatch.setattr("dense.run_report.write_finished", lambda run: None)


@pytest.fixture
def unforced(monkeypatch):
    """For tests of which backend is chosen: the others pass under whatever DENSE_OPS forces."""
    monkeypatch.delenv("DENSE_OPS", raising=False)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real photos, `coco/` and `ADEChallengeData2016/` as their users have them."""
    named = os.environ.get("DENSE_SAMPLE_DATA")
    if not named:
        pytest.skip("DENSE_SAMPLE_DATA is not set: no real photos to test on")
    folder = Path(named)
    missing = [name for name in ("coco", "ADEChallengeData2016") if not (folder / name).is_dir()]
    if missing:
        pytest.fail(f"DENSE_SAMPLE_DATA={named} has no {' and no '.join(missing)}/ in it")
    return folder


@pytest.fixture(scope="session")
def expected_init():
    """A function of a backbone's name and ``"in1k"`` or ``"in22k"``: the weights that its configs
    start from, released ones by their tag and others by a file."""
    from backbones.released import RELEASED

    def init(name: str, pretraining: str) -> str:
        tags = {f"ms_{pretraining}", f"atten4vis_{pretraining}"} & set(RELEASED.get(name, {}))
        return tags.pop() if tags else f"checkpoints/{name}_{pretraining}.pth"

    return init
