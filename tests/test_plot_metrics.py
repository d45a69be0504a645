"""The series are the log's, resumed runs in order, whichever training wrote them."""

import pytest

from dense import metrics
from tests.support import load_tool, points

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


def test_epochs_are_those_of_the_newest_start(pretraining):
    run = metrics.read_run(pretraining)
    assert run.name == "pretraining" and run.epochs == {1: 10, 2: 20}
    newest = pretraining / "20260101_000200/vis_data/scalars.json"
    newest.parent.mkdir(parents=True)
    # A later start by iteration, with what is no number, and a NaN; detectors have several metrics.
    newest.write_text(
        '{"total_loss": 7.0, "lr": "x", "step": 5}\n{"loss": null, "lr": 0.5, "step": 30}\n'
        '{"mAcc": NaN, "mIoU": 1, "coco/bbox_mAP": 0.5, "other": 3, "step": 31}\n{"lr": 0.7}\n'
    )
    run = metrics.read_run(pretraining)
    assert [path.parts[-3] for path in metrics.log_files(pretraining)] == [
        f"20260101_000{n}00" for n in range(3)
    ]
    assert run.loss == [(5, 7.0), (10, 3.0), (15, 2.0), (20, 1.0)]
    assert run.rate == [(10, 0.1), (15, 0.05), (20, 0.01), (30, 0.5), (31, 0.7)]
    assert run.metrics.keys() == {"top1", "mAcc", "mIoU", "coco/bbox_mAP"}
    assert run.metrics["mIoU"] == [(31, 1.0)] and run.metrics["mAcc"][0][0] == 31


def test_an_evaluation_before_any_training_line(tmp_path):
    (tmp_path / "metrics.json").write_text('{"bbox/AP": 3.0}\n{"lr": 0.1, "iteration": 3}\n')
    run = metrics.read_run(tmp_path)
    assert run.metrics == {"bbox/AP": [(0, 3.0)]} and run.rate == [(3, 0.1)] and run.loss == []


def test_every_line_of_the_picture(pretraining, detection, tmp_path, figures, monkeypatch):
    one, two = metrics.read_run(pretraining), metrics.read_run(detection)
    one.metrics |= {f"{n}": [(1, 1.0)] for n in range(5)}
    path = metrics.plot([one, two], tmp_path / "new/folder/runs.svg")
    assert path == tmp_path / "new/folder/runs.svg" and b"<svg" in path.read_bytes()
    metrics.plot([metrics.Run("a", metrics={"top1": [(5, 1.0)]})], tmp_path / "one.png")
    both, alone = figures
    losses, rates, values = both.axes
    assert both.get_size_inches().tolist() == [15, 4.2] and both.get_layout_engine()
    assert points(losses) == [one.loss, two.loss] and points(rates) == [one.rate, two.rate]
    assert points(values) == [*one.metrics.values(), *two.metrics.values()]

    def style(axes):
        return [
            (n.get_label(), n.get_color(), n.get_linestyle(), n.get_marker()) for n in axes.lines
        ]

    names = ["top1", *"01234"]
    assert style(values) == [
        *(
            (f"pretraining: {name}", "C0", line, ".")
            for name, line in zip(names, ("-", "--", ":", "-.", "-", "--"), strict=True)
        ),
        *(("detection: bbox/AP", "C1", "-", "."), ("detection: segm/AP", "C1", "--", ".")),
    ]
    plain = [("pretraining", "C0", "-", "None"), ("detection", "C1", "-", "None")]
    assert style(losses) == style(rates) == plain
    assert [line.get_linewidth() for line in losses.lines] == [1, 1]
    titles = [(axes.get_title(), axes.get_xlabel()) for axes in both.axes]
    assert titles == [(name, "iteration") for name in ("loss", "learning rate", "validation")]
    for axes in both.axes:
        grid = axes.get_xgridlines()[0]
        assert grid.get_visible() and grid.get_alpha() == 0.3
        text = axes.get_legend().get_texts()[0]
        assert text.get_fontsize() < 10 == axes.title.get_fontsize() - 2
    # Of one run, and where there is nothing to tell apart.
    assert style(alone.axes[2]) == [("top1", "C0", "-", ".")]
    assert [axes.get_legend() is None for axes in alone.axes] == [False, False, False]
    from PIL import Image

    with Image.open(tmp_path / "one.png") as image:
        assert image.size == (1650, 462)


def test_a_training_ends_without_its_plot(tmp_path, caplog):
    metrics.plot_finished(tmp_path)
    assert f"no plot of {tmp_path}: {tmp_path} has no log of a training" in caplog.text


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
