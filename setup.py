"""The metadata stands in pyproject.toml; this adds the recipes, which lie outside the packages."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes of ``configs/`` to ``dense/configs``, where :mod:`dense.recipes` looks."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for recipe in sorted(Path("configs").rglob("*.py")):
            copy = Path(self.build_lib, "dense", recipe)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(recipe, copy)


setup(cmdclass={"build_py": BuildWithRecipes})
