"""What the report of a training says of its logs, without a training."""

import json

import numpy as np
import pytest

from dense import run_report
from tests.pages import Page
from tests.support import load_tool

Config = pytest.importorskip("mmengine.config").Config

from dense.recipes import RECIPES  # noqa: E402

NANO = RECIPES / "pretraining/dw_conv_nano.py"


@pytest.fixture
def folder(tmp_path):
    """A training in two starts: four epochs of ten iterations, its accuracies and its costs."""
    cfg = Config.fromfile(NANO)
    cfg.train_cfg.max_epochs = 4
    cfg.dump(tmp_path / "dw_conv_nano.py")
    log = tmp_path / "20261128_120000/vis_data/scalars.json"
    log.parent.mkdir(parents=True)
    lines = []
    for epoch, top1 in enumerate((50.0, 70.0, 60.0, 65.0), 1):
        costs = {"time": 0.25 * epoch, "data_time": 0.1, "images_per_second": 10.0 * epoch}
        step = {"epoch": epoch, "iter": 10 * epoch, "step": 10 * epoch, "lr": 1e-3}
        lines.append({"loss": 3.0 / epoch, "memory_mb": 400.0 + epoch, **costs, **step})
        lines.append({"top1": top1, "top5": 90.0, "step": epoch})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        **{"config": str(NANO), "machine": "x86_64, 2 cores", "device": "CPU, 2 threads"},
        **{"precision": "float32", "batch": 8, "images": 1024, "steps": 40},
        **{"versions": {"python": "3.11.7", "torch": "2.9.0"}},
    }
    first = {"command": "python pretrain.py", "began": "2026-11-28T12:00:00", "weights": "random"}
    second = {"command": "python pretrain.py --resume", "began": "2026-11-28T13:00:00"}
    second |= {"weights": "resumed", "seconds": 90.0, "peak_memory_mb": 512}
    (tmp_path / "run.json").write_text(json.dumps([start | first, start | second]))
    return tmp_path


def test_the_report_says_what_the_logs_do(folder):
    page = Page(run_report.write(folder, images=0).read_text())
    assert [float(cell) for cell in page.row("top1")] == [65.0, 40, 70.0, 20]
    assert [float(cell) for cell in page.row("top5")] == [90.0, 40, 90.0, 10]
    assert page.row("peak memory (MB)") == ["512"]
    assert page.row("seconds an iteration, median") == ["0.62"]
    assert float(page.row("images a second, median")[0]) == 25
    assert page.row("device") == ["CPU, 2 threads"] and page.row("torch") == ["2.9.0"]
    assert "python pretrain.py --resume" in page.text
    assert page.row("train_cfg.max_epochs")[1] == "4"
    assert all(title in page.text for title in ("Losses", "Validation", "Learning rate"))
    assert "in 2 starts, finished" in page.text
    assert not page.pictures


def test_the_tools_options_reach_the_report(monkeypatch):
    given = []
    monkeypatch.setattr(run_report, "write", lambda *options: given.append(options))
    assert load_tool("report").main(["mine", "--images", "3", "--out", "page.html"]) == 0
    assert given == [("mine", 3, "page.html")]


def test_what_cannot_be_reported_is_one_line(tmp_path, capsys):
    assert load_tool("report").main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("report: ") and said.count("\n") == 1


def test_an_image_is_judged_by_the_classes_that_truth_or_prediction_has():
    reporting = pytest.importorskip("dense.segmentation.reporting")
    truth, found = np.array([[0, 0, 255]]), np.array([[0, 1, 2]])
    # 1 of 2 pixels of the first class, 0 of 1 of the second; the third is where none counts.
    assert reporting._miou(found, truth, 4) == 25.0
    assert reporting._miou(found, np.full_like(truth, 255), 4) is None
