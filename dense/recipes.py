"""Config files: where ours are, whose one is, and which one a checkpoint was trained with.

>>> from dense.recipes import RECIPES
>>> config = RECIPES / "segmentation/dw_conv_nano_upernet.py"
"""

import ast
import os
from pathlib import Path

_INSTALLED = Path(__file__).with_name("configs")
# The folder of the recipes, as the top-level configs/ of a checkout; a wheel has its copy in dense.
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


class RecipeError(ValueError):
    """A config that is missing, is nobody's, or is not the only one, in one line."""


def framework_of(config: str | os.PathLike) -> str:
    """Whose config a file is: ``"detection"`` (LazyConfig), ``"segmentation"`` (MMSegmentation),
    ``"mmdetection"`` or ``"classification"`` (pretraining).

    The file is parsed, not run, to tell LazyConfig from mmengine. mmengine's configs inherit by
    ``_base_`` or ``read_base()`` or import nothing; LazyConfig's import what they build. A
    ``.yaml`` is a LazyConfig that a training saved. ``default_scope`` tells mmengine's apart.

    Raises:
        RecipeError: no such file, or it is neither.
    """
    path = Path(config)
    if not path.is_file():
        raise RecipeError(f"config {config} does not exist")
    if path.suffix in (".yaml", ".yml"):
        return "detection"
    if path.suffix != ".py":
        raise RecipeError(f"config {config}: a .py or .yaml file is needed")
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError) as error:
        raise RecipeError(f"config {config} is not Python: {error}") from error
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
    if imports and not names & {"_base_", "read_base"}:
        return "detection"
    return _mmengine_kind(path)


def _mmengine_kind(config: Path) -> str:
    """The package that an mmengine config is for; MMSegmentation where that cannot be told."""
    try:
        from mmengine.config import Config

        cfg = Config.fromfile(config, import_custom_modules=False)
    # What is wrong with it is said where it is loaded.
    except Exception:
        return "segmentation"
    if cfg.get("model", {}).get("type") == "ImageClassifier":
        return "classification"
    return "mmdetection" if cfg.get("default_scope") == "mmdet" else "segmentation"


def config_beside(checkpoint: str | os.PathLike) -> Path:
    """The config that a training wrote into the folder of its checkpoints.

    Raises:
        RecipeError: no such checkpoint, or the folder holds no config or several.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise RecipeError(f"checkpoint {checkpoint} does not exist")
    folder = checkpoint.parent
    saved = folder / "config.yaml"
    found = [saved] if saved.is_file() else sorted(folder.glob("*.py"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise RecipeError(f"{folder} holds no config; name the one trained with by --config")
    names = ", ".join(path.name for path in found)
    raise RecipeError(f"{folder} holds several configs ({names}); name one by --config")
