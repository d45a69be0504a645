"""Run tests in environments of their own: other versions of torch and timm, other libraries.

    python tools/test_versions.py            # floor and newest
    python tools/test_versions.py floor      # the minimum versions of pyproject.toml: .venv-floor
    python tools/test_versions.py newest     # the newest versions on PyPI: .venv-newest
    python tools/test_versions.py ecosystem  # the libraries of dense/README.md: .venv-ecosystem
    python tools/test_versions.py forks      # the maintained forks of OpenMMLab: .venv-forks

The first two run tests/backbones, the third the blocks of that page and tests/huggingface, the last
the tests of segmentation, MMDetection and pretraining, with the newest torch and numpy.
Builds the environments with uv, about 6 GB of disk each, prints their versions, and exits with 1 if
a test fails.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "floor": ["tests/backbones"],
    "newest": ["tests/backbones"],
    "ecosystem": ["tests/ecosystem", "tests/huggingface"],
    "forks": ["tests/segmentation", "tests/test_mmdetection.py", "tests/pretraining"],
}
# mmcv's fork is built where torch is not: without the operators that take minutes to compile.
FORKS = ["onedl-mmengine", "onedl-mmcv", "onedl-mmsegmentation", "onedl-mmdetection", "numpy>=2"]
# Of our extras for those packages.
BESIDE_FORKS = ["torchvision", "pycocotools", "tensorboard", "matplotlib", "tqdm", "webdataset"]
# Imported by tests/backbones, or by Inductor, and not a dependency of torch or timm.
TOOLS = ["pytest", "numpy", "onnx", "onnxruntime", "onnxscript", "yacs", "setuptools<81"]


def floors() -> dict[str, str]:
    """The minimum version of each dependency in pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["project"]["dependencies"]
    return dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in listed)


def requirements(kind: str) -> list[str]:
    """What is installed beside the tools, as pip's arguments."""
    if kind == "ecosystem":
        return ["-r", "requirements/ecosystem.txt"]
    if kind == "forks":
        return [*floors(), *FORKS, *BESIDE_FORKS]
    if kind == "newest":
        return list(floors())
    # Triton 3.5's interpreter makes scalars of arrays with one element, which NumPy 2.4 refuses.
    return [*(f"{name}=={version}" for name, version in floors().items()), "numpy<2.4"]


def check(kind: str) -> bool:
    """Build ``.venv-<kind>`` and return whether the tests pass in it."""
    folder = ROOT / f".venv-{kind}"
    python = str(folder / "bin/python")
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "-q", "--clear", "-p", sys.executable, str(folder)], check=True)
    install = [uv, "pip", "install", "-q", "--no-config", "--python", python]
    subprocess.run([*install, *requirements(kind), *TOOLS], check=True, cwd=ROOT)
    versions = "import torch, timm; print('torch', torch.__version__, 'timm', timm.__version__)"
    subprocess.run([python, "-c", versions], check=True)
    tests = [python, "-m", "pytest", "-q", "-m", "not e2e and not kernels and not peers"]
    return subprocess.run([*tests, *TESTS[kind]], cwd=ROOT).returncode == 0


if __name__ == "__main__":
    kinds = sys.argv[1:] or ["floor", "newest"]
    if not set(kinds) <= set(TESTS):
        sys.exit(__doc__)
    sys.exit(not all([check(kind) for kind in kinds]))
