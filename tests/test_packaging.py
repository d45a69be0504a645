"""What the wheel holds: what users' runs need, and nothing of the developers' tools."""

import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

from setuptools import find_namespace_packages, find_packages

from tests.support import ROOT


def test_packages_of_the_wheel():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    find = options["packages"]["find"]
    assert set(find) == {"include", "exclude"}
    found = set(find_namespace_packages(str(ROOT), **find))
    assert found >= {
        "backbones",
        "backbones.mixers",
        "backbones.ops",
        "dense",
        "dense.detection",
        "dense.openmmlab",
        "dense.pretraining",
        "dense.segmentation",
    }
    assert not [name for name in found if name.startswith(("dense.analysis", "dense.demo"))]
    every = find_packages(str(ROOT), include=["backbones*", "dense*"])
    assert set(every) - found == {"dense.analysis", "dense.analysis.benchmark", "dense.demo"}


def test_nothing_in_the_wheel_needs_what_is_left_out():
    for path in (ROOT / "dense").rglob("*.py"):
        if path.relative_to(ROOT / "dense").parts[0] not in ("analysis", "demo"):
            text = path.read_text()
            assert "dense.analysis" not in text and "dense.demo" not in text, path


def test_an_installed_wheel_finds_its_recipes(tmp_path):
    build = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    python(tmp_path, ROOT / "setup.py", "-q", *build, cwd=ROOT)
    installed = tmp_path / "lib/dense/configs"
    recipes = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.*")} == recipes
    code = "from dense.recipes import RECIPES; print(RECIPES)"
    assert python(tmp_path, "-c", code, cwd=tmp_path) == str(installed)

    # A recipe is read with all that it inherits: the nano ones do from every folder.
    leaves = [path for path in recipes if "nano" in path.stem and len(path.parts) == 2]
    if find_spec("mmengine"):
        code = (
            "import sys; from mmengine.config import Config; from dense.recipes import RECIPES\n"
            "for path in sys.argv[1:]: Config.fromfile(RECIPES / path, import_custom_modules=False)"
        )
        theirs = [path for path in leaves if path.parts[0] != "detection"]
        assert {path.parts[0] for path in theirs} == {"mmdetection", "pretraining", "segmentation"}
        python(tmp_path, "-c", code, *theirs, cwd=tmp_path)
    if find_spec("detectron2"):
        code = (
            "import sys; from dense.detection.config import load_config\n"
            "from dense.recipes import RECIPES\n"
            "for path in sys.argv[1:]: load_config(str(RECIPES / path))"
        )
        theirs = [path for path in leaves if path.parts[0] == "detection"]
        assert theirs
        python(tmp_path, "-c", code, *theirs, cwd=tmp_path)


def python(root: Path, *arguments: str | Path, cwd: Path) -> str:
    """What a program prints for which the packages are those in ``root/lib``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(root / "lib")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
