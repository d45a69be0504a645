"""Families side by side: what is trained is one recipe, what is read is what was logged."""

import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction

from dense.analysis import comparison
from tests.support import ROOT, load_tool


@pytest.fixture(scope="module")
def tool():
    """``tools/compare_families.py``."""
    return load_tool("compare_families")


def log(work_dir: Path, losses: list[float], top1: list[float]) -> Path:
    """A training's log, an iteration an epoch."""
    path = work_dir / "20260101_000000/vis_data/scalars.json"
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        for step, (loss, accuracy) in enumerate(zip(losses, top1, strict=True), start=1):
            file.write(json.dumps({"loss": loss, "lr": 0.1, "iter": step, "step": step}) + "\n")
            file.write(json.dumps({"top1": accuracy, "top5": 99.0, "step": step}) + "\n")
    return work_dir


def test_the_last_accuracy_of_every_seed(tmp_path):
    runs = {
        "dw_conv_nano": [
            log(tmp_path / "a", [2.0, 1.0], [50.0, 30.0]),
            log(tmp_path / "b", [2.2, 1.2], [50.0, 34.0]),
        ],
        "swin_nano": [log(tmp_path / "c", [2.0, 1.0], [10.0, 20.0])],
    }
    seconds = {folder: 60.0 * (n + 1) for n, folder in enumerate(sum(runs.values(), []))}
    entries = comparison.compare(runs, seconds, 10, 64, tmp_path)
    assert entries[0].top1 == (30.0, 34.0) and entries[0].minutes == (1.0, 2.0)
    # 32 ± sqrt(((30 - 32)^2 + (34 - 32)^2) / 1); a seed alone has no spread.
    row = entries[0].row()
    assert "| 1.5 | 32.0 ± 2.8 | 30.0 34.0 |" in row and "1.25M" in row
    assert (
        "±" not in entries[1].row() and entries[1].row() in (tmp_path / "comparison.md").read_text()
    )
    assert json.loads((tmp_path / "comparison.json").read_text())[0]["top1"] == [30.0, 34.0]
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_without_a_validation_is_named(tmp_path):
    folder = log(tmp_path / "a", [2.0], [50.0])
    path = next(folder.glob("*/vis_data/scalars.json"))
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="a has no validation in its log"):
        comparison.compare({"swin_nano": [folder]}, {folder: 1.0}, 10, 64, tmp_path)


def test_all_families_have_one_recipe(tool):
    args = tool.parse_args(["--data-root", "photos", "--seeds", "2", "--epochs", "8"])
    planned = tool.plan(args, 4)
    assert [len(steps) for steps in planned.values()] == [2] * 5
    recipes = set()
    for name, steps in planned.items():
        for seed, step in enumerate(steps):
            words = step.argv({"data": "photos", "runs": "runs"})
            cfg = Config.fromfile(ROOT / words[1])
            options = dict(word.split("=") for word in words[words.index("--cfg-options") + 1 :])
            cfg.merge_from_dict({k: DictAction._parse_iterable(v) for k, v in options.items()})
            assert cfg.model.pop("name") == name and cfg.randomness.pop("seed") == seed
            assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 8
            assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 1
            recipes.add(json.dumps(cfg.to_dict(), sort_keys=True, default=str))
    assert len(recipes) == 1


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--data-root", "absent"], "no photos in .*absent/train"),
        (["--data-root", "{photos}/train"], "no photos in"),
    ],
)
def test_what_is_wrong_is_one_line(tool, photos, tmp_path, capsys, args, reason):
    argv = [arg.format(photos=photos) for arg in args]
    assert tool.main([*argv, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("compare_families: ") and said.count("\n") == 1
    assert re.search(reason, said)


def test_options_without_sense(tool, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(["--data-root", "photos", "--epochs", "1"])
    assert "--epochs 1: 2 or more" in capsys.readouterr().err
