"""What the package needs of torch and timm, and the environments that show it."""

import ast
import subprocess
import tomllib
from types import SimpleNamespace

import pytest

from tests.support import ROOT, load_tool


def test_no_private_module_of_timm_is_imported():
    """timm moves them between releases."""
    private = []
    for path in sorted([*ROOT.glob("backbones/**/*.py"), *ROOT.glob("dense/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            private += [
                f"{path.relative_to(ROOT)}: {name}"
                for name in names
                if name.startswith("timm.") and "._" in name
            ]
    assert not private


def test_the_readme_names_the_floors():
    with open(ROOT / "pyproject.toml", "rb") as file:
        needed = tomllib.load(file)["project"]["dependencies"]
    page = " ".join((ROOT / "README.md").read_text().split())
    assert f"Supported are {' and '.join(needed)};" in page


# tools/test_versions.py

PROJECT = """[project]
dependencies = ["torch>=2.6", "timm>=1.0.15"]
optional-dependencies = {other = ["numpy>=1.0"]}
"""
TOOLS = "pytest numpy onnx onnxruntime onnxscript yacs setuptools<81".split()
FORKS = "onedl-mmengine onedl-mmcv onedl-mmsegmentation onedl-mmdetection numpy>=2".split()
BESIDE_FORKS = "torchvision pycocotools tensorboard matplotlib tqdm webdataset".split()
# What each environment gets beside the tools, and the tests that run in it.
KINDS = {
    "floor": (["torch==2.6", "timm==1.0.15", "numpy<2.4"], ["tests/backbones"]),
    "newest": (["torch", "timm"], ["tests/backbones"]),
    "ecosystem": (["-r", "requirements/ecosystem.txt"], ["tests/ecosystem", "tests/huggingface"]),
    "forks": (
        ["torch", "timm", *FORKS, *BESIDE_FORKS],
        ["tests/segmentation", "tests/test_mmdetection.py", "tests/pretraining"],
    ),
}


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_of_its_own(kind, status, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    tool, ran = load_tool("test_versions"), []
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool.sys, "executable", "/usr/bin/python3")

    def run(command, **options):
        ran.append((command, options))
        return subprocess.CompletedProcess(command, status)

    # subprocess has its own name of the function.
    monkeypatch.setattr(tool, "subprocess", SimpleNamespace(run=run))
    assert tool.check(kind) is (status == 0)
    python, (packages, tests) = f"{tmp_path}/.venv-{kind}/bin/python", KINDS[kind]
    create, install, versions, test = ran
    assert create == (
        [
            "/usr/bin/uv",
            "venv",
            "-q",
            "--clear",
            "-p",
            "/usr/bin/python3",
            f"{tmp_path}/.venv-{kind}",
        ],
        {"check": True},
    )
    words = ["/usr/bin/uv", "pip", "install", "-q", "--no-config", "--python", python]
    assert install == ([*words, *packages, *TOOLS], {"check": True, "cwd": tmp_path})
    assert versions[0][:2] == [python, "-c"] and versions[1] == {"check": True}
    words = [python, "-m", "pytest", "-q", "-m", "not e2e and not kernels and not peers"]
    assert test == ([*words, *tests], {"cwd": tmp_path})
