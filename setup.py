"""Add the recipes of configs/ to the wheel, and by WITH_KERNELS=1 the compiled C kernels.

All metadata is in pyproject.toml.
"""

import os
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class Build(build_py):
    """Copy ``configs/`` to ``dense/configs``, where :mod:`dense.recipes` looks for it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for recipe in sorted(Path("configs").rglob("*.py")):
            copy = Path(self.build_lib, "dense", recipe)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(recipe, copy)
        if self.distribution.has_ext_modules():
            # By its file: the package imports torch, which a build does not need.
            spec = spec_from_file_location("library", "backbones/ops/library.py")
            library = module_from_spec(spec)
            spec.loader.exec_module(library)
            library.package(Path(self.build_lib, "backbones/ops/kernels"))


class ForOnePlatform(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class ForAnyPython(bdist_wheel):
    """The compiled kernels depend on the platform and not, like extensions, on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if os.environ.get("WITH_KERNELS") == "1":
    setup(distclass=ForOnePlatform, cmdclass={"build_py": Build, "bdist_wheel": ForAnyPython})
else:
    setup(cmdclass={"build_py": Build})
