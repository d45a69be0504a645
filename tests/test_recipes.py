"""Recipes cite the paper's tables only for rows that these have, and with their figures."""

import ast
import re
from pathlib import Path

import pytest

from backbones import MODEL_NAMES
from dense.analysis import paper

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
