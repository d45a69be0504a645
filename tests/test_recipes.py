"""Recipes cite the paper's tables only for rows that these have, and with their figures; and whose
config a file is."""

import ast
import re
from pathlib import Path

import pytest

from backbones import MODEL_NAMES
from dense.analysis import paper
from dense.recipes import RecipeError, config_beside, config_in, framework_of

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.py"))
FIGURES = {"top-1": "top1", "box AP": "box_ap", "mask AP": "mask_ap", "mIoU": "miou"}
OUTSIDE = "not in the paper's tables"


def rows(recipe: str) -> dict[str, tuple | None]:
    """The tables that have results of such a recipe, and this one's row in each, None without."""
    folder, stem = recipe.removesuffix(".py").split("/")
    name = max((name for name in MODEL_NAMES if name in stem), key=len)
    if name.endswith("_nano"):
        return {}
    if folder == "pretraining":
        if "384x384" in stem:
            return {"14": paper.TABLE_14.get((name, 12 if "_w12_" in stem else 7))}
        if stem.endswith("in22k-224x224"):
            return {"10": paper.TABLE_10.get(name), "11": paper.TABLE_11_DETECTION.get(name)}
        if "in22k-pre" in stem:
            return {"10": paper.TABLE_10.get(name)}
        return {"2": paper.TABLE_2.get(name)}
    table = "11" if "in22k" in stem else "3"
    task = "SEGMENTATION" if folder == "segmentation" else "DETECTION"
    return {table: getattr(paper, f"TABLE_{table}_{task}").get(name)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_docstring_cites_rows_and_figures_of_the_paper(recipe):
    text = ast.get_docstring(ast.parse((CONFIGS / recipe).read_text()))
    published = {table: row for table, row in rows(recipe).items() if row}
    cited = re.search(r"Tables? (\d+)(?: and (\d+))?", text)
    assert {table for table in (cited.groups() if cited else ()) if table} == set(published)
    assert (OUTSIDE in text) == (not published and "nano" not in recipe)
    figures = re.findall(r"(\d+\.\d) ({})".format("|".join(FIGURES)), text)
    # Results from 22K belong to the fine-tuned networks: two tables, no figure.
    assert bool(figures) == (len(published) == 1)
    for figure, kind in figures:
        (row,) = published.values()
        assert float(figure) == getattr(row, FIGURES[kind])


FRAMEWORKS = {"pretraining": "classification"}
FRAMEWORKS |= {name: name for name in ("detection", "segmentation", "mmdetection")}


@pytest.mark.parametrize("folder", FRAMEWORKS)
def test_a_recipe_is_of_its_folders_framework(folder):
    if folder != "detection":
        pytest.importorskip("mmengine")
    recipes = sorted((CONFIGS / folder).glob("*nano*.py"))
    assert recipes
    assert {framework_of(str(path)) for path in recipes} == {FRAMEWORKS[folder]}


# What imports nothing, or by a base alone, is mmengine's; what imports is Detectron2's.
@pytest.mark.parametrize(
    ("name", "text", "framework"),
    [
        ("a.py", "model = dict(type='ImageClassifier')\n", "classification"),
        ("a.py", "model = dict(type='X')\ndefault_scope = 'mmdet'\n", "mmdetection"),
        ("a.py", "default_scope = 'mmdet'\n", "mmdetection"),
        ("a.py", "default_scope = 'mmseg'\n", "segmentation"),
        ("a.py", "", "segmentation"),
        # Its modules may be of another machine.
        (
            "a.py",
            "custom_imports = dict(imports=['absent_module'])\ndefault_scope = 'mmdet'\n",
            "mmdetection",
        ),
        ("a.py", "_base_ = './absent.py'\n", "segmentation"),
        (
            "a.py",
            "from mmengine.config import read_base\nwith read_base():\n    from .b import *\n",
            "mmdetection",
        ),
        ("a.py", "import os\nmodel = 1\n", "detection"),
        ("a.py", "from os import path\n", "detection"),
        ("a.yaml", "model: 1\n", "detection"),
        ("a.yml", "", "detection"),
    ],
)
def test_the_framework_of_a_config(tmp_path, name, text, framework):
    pytest.importorskip("mmengine")
    (tmp_path / "b.py").write_text("default_scope = 'mmdet'\n")
    (tmp_path / name).write_text(text)
    assert framework_of(str(tmp_path / name)) == framework


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", None, "config {} does not exist"),
        ("a.json", b"{}", "config {}: a .py or .yaml file is needed"),
        ("a.py", b"model = (", "config {} is not Python: '(' was never closed"),
        ("a.py", b"# \xff\n", "config {} is not Python: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_config_is_said(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        framework_of(str(path))
    assert str(error.value).startswith(message.format(path))


def test_the_config_that_training_saved(tmp_path):
    checkpoint = str(tmp_path / "model.pth")
    with pytest.raises(RecipeError, match=f"^checkpoint {checkpoint} does not exist$"):
        config_beside(checkpoint)
    Path(checkpoint).touch()
    for find, of in ((config_beside, checkpoint), (config_in, str(tmp_path))):
        with pytest.raises(RecipeError) as error:
            find(of)
        said = f"{tmp_path} holds no config; name the training's config by --config"
        assert str(error.value) == said
    (tmp_path / "b.py").touch()
    assert config_beside(checkpoint) == config_in(str(tmp_path)) == tmp_path / "b.py"
    (tmp_path / "a.py").touch()
    with pytest.raises(RecipeError) as error:
        config_beside(checkpoint)
    assert (
        str(error.value) == f"{tmp_path} holds several configs (a.py, b.py); name one by --config"
    )
    # Detectron2's trainer saves one, whatever else lies there.
    (tmp_path / "config.yaml").touch()
    assert config_in(str(tmp_path)) == tmp_path / "config.yaml"
