"""The series are the log's, resumed runs in order, whichever training wrote them."""

import pytest

from dense import metrics
from tests.support import load_tool

tool = load_tool("plot_metrics")


@pytest.fixture
def pretraining(tmp_path):
    """Ten iterations, killed after 15 of a resumed run that began at 10."""
    for stamp, text in {
        "20260101_000000": '{"loss": 3.0, "lr": 0.1, "epoch": 1, "step": 10}\n'
        '{"top1": 20.0, "step": 1}\n{"loss": 9.0, "lr": 0.1, "epoch": 2, "step": 15}\n',
        "20260101_000100": '{"loss": 2.0, "base_lr": 0.05, "epoch": 2, "step": 15}\n'
        '{"loss": 1.0, "lr": 0.01, "epoch": 2, "step": 20}\n{"top1": 40.0, "step": 2}\n'
        '{"loss": 0.5',
    }.items():
        folder = tmp_path / "pretraining" / stamp / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text(text)
    return tmp_path / "pretraining"


@pytest.fixture
def detection(tmp_path):
    (tmp_path / "detection").mkdir()
    (tmp_path / "detection/metrics.json").write_text(
        '{"iteration": 19, "total_loss": 5.0, "lr": 0.001}\n'
        '{"iteration": 39, "total_loss": 4.0, "lr": 0.001, "bbox/AP": 12.5, "segm/AP": 10.0}\n'
    )
    return tmp_path / "detection"


def test_a_resumed_run(pretraining):
    run = metrics.read_run(pretraining)
    assert run.loss == [(10, 3.0), (15, 2.0), (20, 1.0)]
    assert run.rate == [(10, 0.1), (15, 0.05), (20, 0.01)]
    assert run.metrics == {"top1": [(10, 20.0), (20, 40.0)]}


def test_a_log_by_iteration_says_where_it_validated(tmp_path):
    (tmp_path / "20260101_000000/vis_data").mkdir(parents=True)
    (tmp_path / "20260101_000000/vis_data/scalars.json").write_text(
        '{"loss": 3.0, "lr": 0.1, "iter": 50, "step": 50}\n{"mIoU": 20.0, "step": 70}\n'
    )
    run = metrics.read_run(tmp_path)
    assert run.loss == [(50, 3.0)] and run.metrics == {"mIoU": [(70, 20.0)]}


def test_detectron2s(detection):
    run = metrics.read_run(detection)
    assert run.loss == [(19, 5.0), (39, 4.0)]
    assert run.metrics == {"bbox/AP": [(39, 12.5)], "segm/AP": [(39, 10.0)]}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_several_in_one_picture(pretraining, detection, suffix, tmp_path):
    out = tmp_path / f"runs{suffix}"
    assert tool.main([str(pretraining), str(detection), "--out", str(out)]) == 0
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in content
    assert metrics.plot_run(detection) == detection / "metrics.png"


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys):
    assert tool.main([str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert "has no log of a training" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text("{}\n")
    assert tool.main([str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert "no losses and no metrics yet" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path), "--out", "a.txt"])
