"""Find config files: the recipes of this package, a config's framework, a checkpoint's config.

>>> from dense.recipes import RECIPES
>>> config = RECIPES / "segmentation/dw_conv_nano_upernet.py"
"""

import ast
import os
from pathlib import Path

_INSTALLED = Path(__file__).with_name("configs")
# The recipes: dense/configs in an installed wheel, the top-level configs/ in a checkout.
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


class RecipeError(ValueError):
    """A config is missing, of no known framework, or not the only one; the message is one line."""


def framework_of(config: str | os.PathLike) -> str:
    """The framework of a config: ``"detection"`` (Detectron2's LazyConfig), ``"segmentation"``
    (MMSegmentation), ``"mmdetection"`` or ``"classification"`` (pretraining).

    A LazyConfig imports what it builds; mmengine's configs use ``_base_`` or ``read_base()``, or
    import nothing. The file is parsed, not run, to tell the two apart. A ``.yaml`` is a LazyConfig
    that was saved by training. The type of the model and ``default_scope`` tell mmengine's apart.

    Raises:
        RecipeError: the file does not exist, or is neither Python nor YAML.
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
    """The framework of an mmengine config; ``"segmentation"`` for one that cannot be loaded."""
    try:
        from mmengine.config import Config

        cfg = Config.fromfile(config, import_custom_modules=False)
    # The caller loads the config next and reports the error.
    except Exception:
        return "segmentation"
    if cfg.get("model", {}).get("type") == "ImageClassifier":
        return "classification"
    return "mmdetection" if cfg.get("default_scope") == "mmdet" else "segmentation"


def config_beside(checkpoint: str | os.PathLike) -> Path:
    """The config that training saved in the folder of its checkpoints.

    Raises:
        RecipeError: the checkpoint does not exist, or its folder holds no config or several.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise RecipeError(f"checkpoint {checkpoint} does not exist")
    return config_in(checkpoint.parent)


def config_in(folder: str | os.PathLike) -> Path:
    """The config that training saved in its work folder.

    Raises:
        RecipeError: the folder holds no config or several.
    """
    saved = Path(folder, "config.yaml")
    found = [saved] if saved.is_file() else sorted(Path(folder).glob("*.py"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise RecipeError(f"{folder} holds no config; name the training's config by --config")
    names = ", ".join(path.name for path in found)
    raise RecipeError(f"{folder} holds several configs ({names}); name one by --config")
