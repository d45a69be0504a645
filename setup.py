"""Add the recipes of configs/ to the wheel; all metadata is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copy ``configs/`` to ``dense/configs``, where :mod:`dense.recipes` looks for it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for recipe in sorted(Path("configs").rglob("*.py")):
            copy = Path(self.build_lib, "dense", recipe)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(recipe, copy)


setup(cmdclass={"build_py": BuildWithRecipes})
