"""What the package needs of torch and timm."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
