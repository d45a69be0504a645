"""Each block of dense/README.md runs, in a folder of its own."""

import ast
import importlib.util
import os
import re
import sys
from functools import partial

import pytest

from tests.support import ROOT, run_forked

pytestmark = pytest.mark.ecosystem
PAGE = (ROOT / "dense/README.md").read_text()


def blocks(language: str) -> list[pytest.param]:
    """The blocks in a language, each with its heading and the line it begins at."""
    found = []
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", PAGE, re.S | re.M):
        line = PAGE[: match.start()].count("\n") + 1
        heading = re.findall(r"^## (.*)$", PAGE[: match.start()], re.M)[-1]
        found.append(pytest.param(heading, match[1], id=f"{heading}, line {line}"))
    return found


def packages(code: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


def run(code: str) -> None:
    exec(compile(code, "dense/README.md", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("heading, code", blocks("python"))
def test_a_block_runs(heading, code, tmp_path):
    for name in packages(code):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if heading in ("MMSegmentation", "MMDetection"):
        return _builds(heading, code, tmp_path)
    (done,) = run_forked(partial(run, code), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def _builds(heading: str, code: str, folder) -> None:
    """A config of the framework's own, with the page's lines below it, builds our backbone."""
    config = pytest.importorskip("mmengine.config")
    registry = pytest.importorskip("mmengine.registry")
    package, base = {
        "MMSegmentation": ("mmseg", "configs/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-"
                           "160k_ade20k-512x512.py"),
        "MMDetection": ("mmdet", "configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
    }[heading]  # fmt: skip
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    base = os.path.join(os.path.dirname(found.origin), ".mim", base)
    path = folder / "config.py"
    path.write_text(f"_base_ = {base!r}\n{code}")
    cfg = config.Config.fromfile(path)
    cfg.model.backbone.init = None
    registry.init_default_scope(package)
    model = registry.MODELS.build(cfg.model)
    assert type(model.backbone.stages[0].blocks[0].mixer).__name__.startswith("Inhomogeneous")
