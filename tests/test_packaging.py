"""What the wheel holds: what users' runs need, and nothing of the developers' tools."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from setuptools import find_namespace_packages, find_packages

from backbones.ops import library
from tests.support import ROOT, environment, run_bare, run_code, run_python


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
        "dense.export",
        "dense.huggingface",
        "dense.openmmlab",
        "dense.pretraining",
        "dense.segmentation",
    }
    assert not [name for name in found if name.startswith(("dense.analysis", "dense.demo"))]
    every = find_packages(str(ROOT), include=["backbones*", "dense*"])
    assert set(every) - found == {
        "dense.analysis",
        "dense.analysis.benchmark",
        "dense.analysis.kernels",
        "dense.demo",
    }


def test_nothing_in_the_wheel_needs_what_is_left_out():
    for path in (ROOT / "dense").rglob("*.py"):
        if path.relative_to(ROOT / "dense").parts[0] not in ("analysis", "demo"):
            text = path.read_text()
            assert "dense.analysis" not in text and "dense.demo" not in text, path


def test_another_package_of_the_name_is_told_from_ours(tmp_path):
    (tmp_path / "backbones").mkdir()
    (tmp_path / "backbones/__init__.py").write_text("")
    shutil.copytree(ROOT / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("*pyc"))
    done = subprocess.run(
        [sys.executable, "-c", "import dense"], cwd=tmp_path, capture_output=True, text=True
    )
    said = done.stderr.splitlines()[-1]
    assert f"the one in {tmp_path}/backbones/__init__.py is of another project: run pip" in said


@pytest.mark.e2e
def test_importing_the_networks_costs_what_timm_costs():
    code = (
        "import sys, timm; before = set(sys.modules); import backbones\n"
        "print(*(m for m in set(sys.modules) - before if not m.startswith('backbones')))"
    )
    more = set(run_python("-c", code).stdout.split()) - sys.stdlib_module_names
    assert more <= {"torch.utils.flop_counter", "torch.utils.module_tracker"}


@pytest.mark.slow
def test_an_installed_wheel_finds_its_recipes(tmp_path):
    build = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    done = run_python(ROOT / "setup.py", "-q", *build)
    assert done.returncode == 0, done.stderr
    installed = tmp_path / "lib/dense/configs"
    recipes = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.*")} == recipes
    assert (tmp_path / "lib/dense/page.html").is_file()
    code = "from dense.recipes import RECIPES; print(RECIPES)"
    assert python(tmp_path, code, cwd=tmp_path) == str(installed)

    # A recipe is read with all that it inherits: the nano ones do from every folder.
    leaves = [path for path in recipes if "nano" in path.stem and len(path.parts) == 2]
    if find_spec("mmengine"):
        code = (
            "import sys; from mmengine.config import Config; from dense.recipes import RECIPES\n"
            "for path in sys.argv[1:]: Config.fromfile(RECIPES / path, import_custom_modules=False)"
        )
        theirs = [path for path in leaves if path.parts[0] != "detection"]
        assert {path.parts[0] for path in theirs} == {"mmdetection", "pretraining", "segmentation"}
        python(tmp_path, code, *theirs, cwd=tmp_path)
    if find_spec("detectron2"):
        code = (
            "import sys; from dense.detection.config import load_config\n"
            "from dense.recipes import RECIPES\n"
            "for path in sys.argv[1:]: load_config(str(RECIPES / path))"
        )
        theirs = [path for path in leaves if path.parts[0] == "detection"]
        assert theirs
        python(tmp_path, code, *theirs, cwd=tmp_path)


def python(root: Path, code: str, *arguments: str | Path, cwd: Path) -> str:
    """What a program prints for which the packages are those in ``root/lib``."""
    done = run_bare(partial(run_code, code, *arguments, first=root / "lib"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Arguments: an instruction set, and whether PyTorch shows its OpenMP to the libraries loaded later.
COMPARE = """
import ctypes, re, sys
load = ctypes.CDLL
if sys.argv[2] == "hidden":
    ctypes.CDLL = lambda name, mode=0: load(name)
import torch
ctypes.CDLL = load
from backbones.ops import library, native
library.INSTRUCTIONS = {sys.argv[1]: library.INSTRUCTIONS[sys.argv[1]]}
assert native.missing() is None, native.missing()
from tests.support import OperatorCases, agrees
torch.manual_seed(0)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
for kernel in 3, 7:
    for make in OperatorCases(kernel).all:
        for dtype, tolerance in TOLERANCES.items():
            agrees(make((9, 23), groups=3, shared=13), "native", dtype, tolerance)
paths = {line.split()[-1] for line in open("/proc/self/maps")}
print(native.origin())
print(*sorted(path for path in paths if re.search(r"/ops/kernels/|/lib[a-z]*omp[^/]*$", path)))
"""


@pytest.mark.e2e
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs Linux and GCC"
)
def test_make_wheel_holds_the_kernels_compiled(tmp_path):
    subprocess.run(["make", "wheel", f"DIST={tmp_path}"], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    (minor,) = re.search(r"-py3-none-.*manylinux_2_(\d+)_x86_64\.whl$", wheel.name).groups()
    assert int(minor) <= 28  # which PyTorch's own wheels need
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".so" in name} == {
        f"backbones/ops/kernels/{kind}-{instructions}.so"
        for kind in library.TYPES
        for instructions in library.INSTRUCTIONS
    }

    lib, nowhere = tmp_path / "lib", tmp_path / "nowhere"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", lib, wheel], check=True)
    flags = library._processor().replace("_", "").split()
    here = [name for name, needs in library.INSTRUCTIONS.items() if {*needs} <= {*flags}]
    print(f"{wheel.name}; this processor runs {here} of {[*library.INSTRUCTIONS]}")
    for instructions in here:
        for openmp in ("shown", "hidden"):
            program = ["-W", "error::RuntimeWarning", "-c", COMPARE, instructions, openmp]
            paths = {"PATH": str(nowhere), "XDG_CACHE_HOME": str(nowhere), "CC": ""}
            ran = subprocess.run(
                [sys.executable, *program],
                cwd=tmp_path,
                env=environment(PYTHONPATH=f"{lib}{os.pathsep}{ROOT}", **paths),
                capture_output=True,
                text=True,
            )
            assert ran.returncode == 0, ran.stderr
            origin, mapped = ran.stdout.strip().splitlines()
            print(f"OpenMP {openmp}, {origin}; mapped {mapped}")
            assert origin == f"from the package: float-{instructions}.so"
            names = {Path(path).name for path in mapped.split()}
            kernels = {f"{kind}-{instructions}.so" for kind in library.TYPES}
            assert names == kernels | {"libgomp.so.1"}
    assert not nowhere.exists()


@pytest.mark.e2e
def test_a_wheel_needs_no_compiler(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    nowhere = environment(PATH=str(tmp_path), CC="")
    subprocess.run([*build, "--wheel-dir", tmp_path], cwd=ROOT, env=nowhere, check=True)
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "backbones/ops/depthwise.c" in names and not any(".so" in name for name in names)
