"""What the wheel holds: what users' runs need, and nothing of the developers' tools."""

import tomllib
from pathlib import Path

from setuptools import find_namespace_packages, find_packages

ROOT = Path(__file__).parents[1]


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
